//! The page of `nowait stall --html` in a headless Chromium.

use anyhow::Result;

use super::{Counts, cargo_tests};
use crate::browser::{self, Browser};
use crate::{binaries, paths};

/// Runs the browser's tests; without a browser they are skipped.
pub(super) fn run() -> Result<Counts> {
    let program = match browser::browser()? {
        Browser::Program(program) => program,
        Browser::Missing(why) => {
            let skips = vec![("browser".to_owned(), why)];
            return Ok(Counts { skipped: 1, skips, ..Counts::default() });
        }
    };
    let mut cargo = binaries::cargo();
    cargo.args(["test", "-p", "nowait-browser-tests"]);
    cargo.env("NOWAIT_BIN", binaries::nowait()?).env(browser::PROGRAM, program);
    cargo.env("NOWAIT_PICTURES", paths::target().join("browser"));
    cargo_tests("browser", vec![cargo])
}

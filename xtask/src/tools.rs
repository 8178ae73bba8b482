//! Programs written in Rust that we install at a pinned version, into the cache.

use std::path::PathBuf;
use std::process::Command;

use anyhow::Result;

use crate::cache::{self, Key};
use crate::progress::Step;
use crate::{binaries, child, paths};

/// The version of cargo-deny.
const CARGO_DENY: &str = "0.20.2";

/// cargo-deny, installed if it is not there. Unoptimised: it compiles in a quarter of the time, and a
/// check of our few dependencies takes a second all the same.
pub(crate) fn cargo_deny() -> Result<PathBuf> {
    let key = Key::default().with("version", CARGO_DENY);
    let dir = cache::entry("cargo-deny", key, |dir| {
        let step = Step::begin("cargo-deny", &format!("installing {CARGO_DENY}"));
        let log = paths::log("cargo-deny")?;
        let mut install: Command = binaries::cargo();
        install
            .args(["install", "--locked", "--debug", "--no-default-features"])
            .args(["--version", CARGO_DENY, "--root"])
            .arg(dir)
            .arg("cargo-deny")
            .env("CARGO_TARGET_DIR", dir.join("target"))
            .env("CARGO_PROFILE_DEV_DEBUG", "0")
            .env("CARGO_PROFILE_DEV_INCREMENTAL", "false");
        child::run(&step, &mut install, &log)?;
        cache::clear(&dir.join("target"))?;
        step.done(&format!("{CARGO_DENY} installed"));
        Ok(())
    })?;
    Ok(dir.join("bin/cargo-deny"))
}

//! Chromium, for the tests of the page: found, installed from Debian's packages, or what to install instead.

use std::path::{Path, PathBuf};
use std::{env, fs};

use anyhow::Result;

use crate::exit::{self, Exit};
use crate::{apt, paths, setup};

/// The environment variable that names the browser's program.
pub(crate) const PROGRAM: &str = "CHROMIUM";
/// What it is called.
const NAMES: [&str; 4] = ["chromium", "google-chrome-stable", "google-chrome", "chromium-browser"];

/// Whether there is a browser.
pub(crate) enum Browser {
    /// Its program.
    Program(PathBuf),
    /// What to do about it.
    Missing(String),
}

/// Finds a browser, or installs Debian's.
pub(crate) fn browser() -> Result<Browser> {
    if let Some(program) = env::var_os(PROGRAM) {
        let program = PathBuf::from(program);
        if program.is_file() {
            return Ok(Browser::Program(program));
        }
        let message = format!("{PROGRAM}={}: there is no such file", program.display());
        return Err(Exit::error(exit::OPERAND, message));
    }
    if let Some(program) = installed() {
        return Ok(Browser::Program(program));
    }
    let or_name = format!("or set {PROGRAM}=FILE to a Chromium or Chrome");
    if !apt::present() {
        return Ok(Browser::Missing(format!(
            "no Chromium: install it with the system's tools, {or_name}"
        )));
    }
    match apt::candidate(setup::BROWSER.package)? {
        Some(package) if !is_snap_version(&package.version) => setup::browser()?,
        _ => {
            return Ok(Browser::Missing(format!(
                "no Chromium: this distribution has it as a snap only, which does not see our files; install \
                 Google Chrome's .deb (google-chrome-stable), {or_name}"
            )));
        }
    }
    Ok(match installed() {
        Some(program) => Browser::Program(program),
        None => {
            Browser::Missing(format!("Debian's package has no program of a known name; {or_name}"))
        }
    })
}

fn installed() -> Option<PathBuf> {
    NAMES.iter().filter_map(|name| paths::program(name)).find(|program| !is_snap(program))
}

/// Ubuntu's package is a script that installs or starts the snap.
fn is_snap(program: &Path) -> bool {
    let target = fs::canonicalize(program).unwrap_or_else(|_| program.to_owned());
    let in_snap = |path: &Path| path.starts_with("/snap") || path.ends_with("snap");
    in_snap(program)
        || in_snap(&target)
        || fs::read(&target).is_ok_and(|text| is_snap_script(&text))
}

fn is_snap_script(text: &[u8]) -> bool {
    /// A script that only hands over to the snap is short.
    const BYTES: usize = 16 * 1024;
    text.starts_with(b"#!")
        && text.len() < BYTES
        && ["/snap/bin/", "snap install"]
            .iter()
            .any(|word| text.windows(word.len()).any(|window| window == word.as_bytes()))
}

/// `1:85.0.4183.83-0ubuntu2.22.04.1`, `2:1snap1-0ubuntu2`: Ubuntu's own packages.
fn is_snap_version(version: &str) -> bool {
    version.contains("snap") || version.contains("ubuntu")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snap_is_told_from_a_browser() {
        let stub =
            b"#!/bin/sh\nif ! [ -x /snap/bin/chromium ]; then echo snap install chromium; fi\n";
        assert!(is_snap_script(stub));
        assert!(!is_snap_script(b"#!/bin/sh\nexec /usr/lib/chromium/chromium \"$@\"\n"));
        assert!(!is_snap_script(b"\x7fELF /snap/bin/"));
        assert!(is_snap(Path::new("/snap/bin/chromium")));
        for (version, snap) in [
            ("2:1snap1-0ubuntu2", true),
            ("1:85.0.4183.83-0ubuntu2.22.04.1", true),
            ("156.0.8078.108-1~deb12u1", false),
        ] {
            assert_eq!(is_snap_version(version), snap, "{version}");
        }
    }
}

//! `cargo xtask setup`: what the other commands need beside the Rust toolchain, and its installation.

use std::fs;
use std::path::Path;

use anyhow::Result;

use crate::exit::{self, Exit};
use crate::{apt, cache, paths, progress};

/// One thing that is needed.
pub(crate) struct Need {
    /// The Debian and Ubuntu package that has it.
    pub(crate) package: &'static str,
    /// Elsewhere: a program or a file (with `/`) that shows it is there.
    shown_by: &'static str,
    /// What it is needed for.
    why: &'static str,
}

const fn need(package: &'static str, shown_by: &'static str, why: &'static str) -> Need {
    Need { package, shown_by, why }
}

const NEEDS: [Need; 17] = [
    need("binutils", "objcopy", "the test kernel"),
    need("gcc", "gcc", "guest kernel"),
    need("g++", "g++", "fuzzing (libFuzzer)"),
    need("libc6-dev", "/usr/include/stdio.h", "static binaries, guest kernel"),
    need("make", "make", "guest kernel"),
    need("flex", "flex", "guest kernel"),
    need("bison", "bison", "guest kernel"),
    need("bc", "bc", "guest kernel"),
    need("libelf-dev", "/usr/include/libelf.h", "guest kernel (objtool)"),
    need("xz-utils", "xz", "unpacking kernel source and modules"),
    need("bzip2", "bzip2", "unpacking Ubuntu's kernel source"),
    need("libclang-dev", "/usr/lib/llvm*/lib/libclang.so", "building the userfaultfd crate"),
    need("qemu-system-x86", "qemu-system-x86_64", "the nested machine"),
    need("qemu-utils", "qemu-nbd", "tests of the nbd store"),
    need("nbdkit", "nbdkit", "tests of the nbd store"),
    need("tmux", "tmux", "tests of nowait top in a terminal"),
    need("nbd-client", "nbd-client", "QEMU's swap in bench peers"),
];
/// Needed on Ubuntu only, whose kernel modules are compressed with it.
const UBUNTU: Need = need("zstd", "zstd", "unpacking Ubuntu's kernel modules");
/// Large, so only where it is needed.
pub(crate) const BROWSER: Need = need("chromium", "chromium", "tests of the page");

/// Finds what is missing and installs it, or says what to install.
pub(crate) fn setup() -> Result<()> {
    apt::require_x86_64()?;
    if !apt::present() {
        return list_missing();
    }
    let mut names: Vec<&str> = NEEDS.iter().map(|need| need.package).collect();
    if distribution().contains("ubuntu") {
        names.push(UBUNTU.package);
    }
    packages(&names)
}

/// Installs those of these packages that are missing.
pub(crate) fn packages(names: &[&str]) -> Result<()> {
    if apt::missing(names)?.is_empty() {
        return Ok(());
    }
    let _lock = cache::lock(&paths::cache()?.join("setup.lock"))?;
    for _ in 0..ROUNDS {
        let missing = apt::missing(names)?;
        if missing.is_empty() {
            return Ok(());
        }
        install(&missing, names)?;
    }
    let still = apt::missing(names)?;
    if still.is_empty() {
        return Ok(());
    }
    Err(Exit::error(exit::CANNOT, format!("apt-get did not install: {}", still.join(" "))))
}

/// How often to install what is missing: packages of one source that were installed at another version
/// go when the first of them comes, and come back the second time.
const ROUNDS: u32 = 2;

fn install(missing: &[String], names: &[&str]) -> Result<()> {
    for need in NEEDS.iter().chain([&UBUNTU, &BROWSER]) {
        if missing.iter().any(|name| name == need.package) {
            progress::line("setup", &format!("missing: {} ({})", need.package, need.why));
        }
    }
    for name in missing {
        if apt::candidate(name)?.is_none() {
            apt::update()?;
            break;
        }
    }
    progress::line("setup", &format!("installing with apt-get: {}", missing.join(" ")));
    if let Err(error) = apt::install(missing, names) {
        // A package list that is out of date names files that are gone from the mirror.
        crate::signals::check()?;
        progress::line("setup", &format!("{error:#}; once more with fresh package lists"));
        apt::update()?;
        apt::install(missing, names)?;
    }
    Ok(())
}

/// Installs the browser's package.
pub(crate) fn browser() -> Result<()> {
    let missing = apt::missing(&[BROWSER.package])?;
    if missing.is_empty() { Ok(()) } else { install(&missing, &[BROWSER.package]) }
}

/// No apt: every missing program by name, with its use.
fn list_missing() -> Result<()> {
    let missing: Vec<&Need> = NEEDS.iter().filter(|need| !is_there(need.shown_by)).collect();
    for need in &missing {
        progress::line(
            "setup",
            &format!("missing: {} (Debian package {}): {}", need.shown_by, need.package, need.why),
        );
    }
    if missing.is_empty() {
        return Ok(());
    }
    Err(Exit::error(
        exit::CANNOT,
        "this system has no apt-get: install the above with its own package manager",
    ))
}

fn is_there(shown_by: &str) -> bool {
    match shown_by.split_once('*') {
        // The one pattern we have: a directory `<prefix>…` that holds `<rest>`.
        Some((before, after)) => {
            let Some((dir, prefix)) = before.rsplit_once('/') else {
                return false;
            };
            let rest = after.trim_start_matches('/');
            fs::read_dir(dir).is_ok_and(|entries| {
                entries.flatten().any(|entry| {
                    entry.file_name().to_string_lossy().starts_with(prefix)
                        && entry.path().join(rest).exists()
                })
            })
        }
        None if shown_by.starts_with('/') => Path::new(shown_by).exists(),
        None => paths::program(shown_by).is_some(),
    }
}

/// `ID` and `ID_LIKE` of /etc/os-release, the own one first; empty when there is none.
pub(crate) fn distribution() -> String {
    let text = fs::read_to_string("/etc/os-release").unwrap_or_default();
    parse_distribution(&text)
}

fn parse_distribution(os_release: &str) -> String {
    let value = |key: &str| {
        os_release
            .lines()
            .find_map(|line| line.strip_prefix(key)?.strip_prefix('='))
            .map(|value| value.trim_matches(['"', '\'']))
            .unwrap_or_default()
    };
    format!("{} {}", value("ID"), value("ID_LIKE")).trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::parse_distribution;

    #[test]
    fn os_release_is_read() {
        assert_eq!(parse_distribution("NAME=x\nID=debian\n"), "debian");
        assert_eq!(
            parse_distribution("ID_LIKE=\"ubuntu debian\"\nID=mint\n"),
            "mint ubuntu debian"
        );
        assert_eq!(parse_distribution(""), "");
    }
}

//! Debian's and Ubuntu's package tools: what is installed, what can be had, download and unpack.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use std::{env, fmt, fs, thread};

use anyhow::{Context, Result, bail};

use crate::exit::{self, Exit};
use crate::progress::Step;
use crate::{apt_cache, child, paths, progress, signals};

/// A package at a version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Package {
    /// Its name.
    pub(crate) name: String,
    /// Its candidate version.
    pub(crate) version: String,
}

/// Whether this system has apt and dpkg.
pub(crate) fn present() -> bool {
    ["apt-get", "apt-cache", "dpkg-deb", "dpkg-query"].iter().all(|p| paths::program(p).is_some())
}

/// Fails on a system without apt.
pub(crate) fn require(what: &str) -> Result<()> {
    if present() {
        return Ok(());
    }
    Err(Exit::error(
        exit::CANNOT,
        format!("{what} comes from Debian's or Ubuntu's packages, and this system has no apt-get"),
    ))
}

/// Those of `names` that are not installed.
pub(crate) fn missing(names: &[&str]) -> Result<Vec<String>> {
    // dpkg-query fails when one is unknown and still prints the others.
    let output = Command::new("dpkg-query")
        .args(["-W", "-f", "${Package} ${db:Status-Status}\n"])
        .args(names)
        .stdin(Stdio::null())
        .output()
        .context("cannot start dpkg-query")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let installed: Vec<&str> =
        text.lines().filter_map(|line| line.strip_suffix(" installed")).collect();
    Ok(names.iter().filter(|name| !installed.contains(name)).map(|&name| name.to_owned()).collect())
}

/// All package names that begin with `prefix`, as the package lists have them.
pub(crate) fn names(prefix: &str) -> Result<Vec<String>> {
    let text = apt_cache::ask(&["pkgnames", prefix])?;
    Ok(text.lines().map(str::to_owned).collect())
}

/// The version of `name` that apt would take now.
pub(crate) fn candidate(name: &str) -> Result<Option<Package>> {
    let text = apt_cache::ask(&["policy", name])?;
    let version = text.lines().find_map(|line| line.trim().strip_prefix("Candidate: "));
    Ok(version
        .filter(|version| *version != "(none)")
        .map(|version| Package { name: name.to_owned(), version: version.to_owned() }))
}

/// The same; with fresh lists where those at hand have none.
pub(crate) fn wanted(name: &str) -> Result<Package> {
    if let Some(package) = candidate(name)? {
        return Ok(package);
    }
    update()?;
    candidate(name)?.ok_or_else(|| {
        let message = format!("no package {name} can be had from the apt sources of this system");
        Exit::error(exit::CANNOT, message)
    })
}

/// `apt-get update`, once per process.
pub(crate) fn update() -> Result<()> {
    static DONE: std::sync::Once = std::sync::Once::new();
    let mut result = Ok(());
    DONE.call_once(|| {
        const UPDATE: [&str; 3] = ["apt-get", "-q", "update"];
        progress::line("apt", "fetching the package lists: apt-get update");
        result = as_root(&UPDATE).or_else(|error| {
            // Others fetch them, too (unattended-upgrades after a boot), and apt does not wait for the lists' lock.
            progress::line("apt", &format!("{error:#}; once more in {} s", PAUSE.as_secs()));
            pause()?;
            as_root(&UPDATE)
        });
    });
    result
}

/// Between two tries to fetch the package lists.
const PAUSE: Duration = Duration::from_secs(20);

fn pause() -> Result<()> {
    let end = Instant::now() + PAUSE;
    while Instant::now() < end {
        signals::check()?;
        thread::sleep(child::POLL);
    }
    Ok(())
}

/// A package that could not be downloaded: most often the lists are older than the mirror.
#[derive(Debug)]
struct NotDownloaded(String);

impl fmt::Display for NotDownloaded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Does `what`, which looks packages up and unpacks them; once more with fresh lists where one is not to be had.
pub(crate) fn downloading<T>(what: impl Fn() -> Result<T>) -> Result<T> {
    match what() {
        Err(error) if error.is::<NotDownloaded>() => {
            signals::check()?;
            progress::line("apt", &format!("{error:#}; once more with fresh package lists"));
            update()?;
            what()
        }
        done => done,
    }
}

/// Installs packages. What apt would have to remove for it may be among `ours`, which are installed
/// again at the version that fits; anything else is not ours to remove.
pub(crate) fn install(packages: &[String], ours: &[&str]) -> Result<()> {
    // Others install, too: apt waits that long for them, in seconds.
    const LOCK: [&str; 2] = ["-o", "DPkg::Lock::Timeout=600"];
    let words = ["-q", "install", "-y", "--no-install-recommends"];
    let words = || words.into_iter().chain(packages.iter().map(String::as_str));
    // A simulation needs no root. One that fails says nothing about removals: the real one tells why.
    let simulated = Command::new("apt-get")
        .env("LC_ALL", "C")
        .arg("-s")
        .args(words())
        .stdin(Stdio::null())
        .output()
        .context("cannot start apt-get")?;
    let removed = removals(&String::from_utf8_lossy(&simulated.stdout));
    let foreign: Vec<&str> =
        removed.iter().map(String::as_str).filter(|name| !ours.contains(name)).collect();
    if !foreign.is_empty() {
        let command: Vec<&str> = ["apt-get"].into_iter().chain(words()).collect();
        return Err(Exit::error(
            exit::CANNOT,
            format!(
                "apt-get would remove {} for {}: if that is all right, run: {}",
                foreign.join(" "),
                packages.join(" "),
                command.join(" ")
            ),
        ));
    }
    let command: Vec<&str> = ["apt-get"].into_iter().chain(LOCK).chain(words()).collect();
    as_root(&command)
}

/// What an `apt-get -s` would remove.
fn removals(simulation: &str) -> Vec<String> {
    let name =
        |line: &str| line.strip_prefix("Remv ")?.split_whitespace().next().map(str::to_owned);
    simulation.lines().filter_map(name).collect()
}

/// Runs a command as root: directly, or through sudo, which may ask for a password.
fn as_root(arguments: &[&str]) -> Result<()> {
    let mut command;
    if rustix::process::geteuid().is_root() {
        command = Command::new("env");
        command.stdin(Stdio::null());
    } else if paths::program("sudo").is_some() {
        progress::line("apt", &format!("needs root, so through sudo: {}", arguments.join(" ")));
        // In our own process group: sudo asks on the terminal.
        command = Command::new("sudo");
        command.args(["--", "env"]);
    } else {
        return Err(Exit::error(
            exit::CANNOT,
            format!("needs root and there is no sudo; as root, run: {}", arguments.join(" ")),
        ));
    }
    let status = command
        .args(["DEBIAN_FRONTEND=noninteractive", "LC_ALL=C"])
        .args(arguments)
        .stdout(std::io::stderr())
        .status()
        .context("cannot start apt-get")?;
    signals::check()?;
    if !status.success() {
        return Err(Exit::error(
            exit::CANNOT,
            format!("`{}` failed ({status}), see above", arguments.join(" ")),
        ));
    }
    Ok(())
}

/// Downloads a package (apt checks it against the signed lists) and unpacks it below `dir`.
pub(crate) fn unpack(step: &Step, package: &Package, dir: &Path, log: &Path) -> Result<()> {
    let download = dir.join("download");
    paths::create_dir(&download)?;
    step.note(&format!("downloading {} {}", package.name, package.version));
    let mut command = Command::new("apt-get");
    command.args(["-q", "download"]);
    if rustix::process::geteuid().is_root() {
        // The cache is the user's: apt's own download user cannot write there, and would warn.
        command.args(["-o", "APT::Sandbox::User=root"]);
    }
    command.arg(format!("{}={}", package.name, package.version)).current_dir(&download);
    child::run(step, &mut command, log).map_err(|error| {
        let what = format!("cannot download {} {}", package.name, package.version);
        error.context(NotDownloaded(what))
    })?;
    let file = only_file(&download)?;
    step.note(&format!("unpacking {}", package.name));
    child::run(step, Command::new("dpkg-deb").arg("-x").arg(&file).arg(dir), log)?;
    fs::remove_dir_all(&download).context("cannot remove a downloaded package")
}

fn only_file(dir: &Path) -> Result<PathBuf> {
    let mut files = fs::read_dir(dir)?.collect::<Result<Vec<_>, _>>()?;
    match (files.pop(), files.is_empty()) {
        (Some(file), true) => Ok(file.path()),
        _ => bail!("apt-get download left not exactly one file in {}", dir.display()),
    }
}

/// The architecture's packages we can use; others are refused by name.
pub(crate) fn require_x86_64() -> Result<()> {
    if env::consts::ARCH == "x86_64" {
        return Ok(());
    }
    Err(Exit::error(exit::CANNOT, format!("nowait needs x86_64, this is {}", env::consts::ARCH)))
}

#[cfg(test)]
mod tests {
    use super::{NotDownloaded, removals};

    #[test]
    fn a_failed_download_is_told_from_other_errors() {
        let error = anyhow::anyhow!("apt-get failed").context(NotDownloaded("cannot".to_owned()));
        assert_eq!(format!("{error:#}"), "cannot: apt-get failed");
        assert!(error.is::<NotDownloaded>());
        assert!(!anyhow::anyhow!("make failed").is::<NotDownloaded>());
    }

    #[test]
    fn a_simulation_tells_what_would_go() {
        let text = "Reading package lists...\nRemv qemu-utils [1:10.0.2+ds-2~bpo12+1]\n\
            Inst m4 (1.4.19-3 Debian:12/stable [amd64])\nRemv foo [1] [bar:amd64 ]\n";
        assert_eq!(removals(text), ["qemu-utils", "foo"]);
        assert!(removals("").is_empty());
    }
}

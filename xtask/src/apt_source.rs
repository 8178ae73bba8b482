//! A package's source from Debian's or Ubuntu's archive, whether or not this system's apt sources have source
//! packages: with lists of our own, which apt checks as it checks the system's.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{fs, io};

use anyhow::{Context, Result, bail};

use crate::exit::{self, Exit};
use crate::progress::Step;
use crate::{child, paths};

/// The system's list of apt sources, and the directory of further ones.
const LIST: &str = "/etc/apt/sources.list";
const PARTS: &str = "/etc/apt/sources.list.d";

/// Downloads the source package `name` (apt checks it against the signed lists) and unpacks it as `tree`, with its
/// patches; `work` is for what is needed meanwhile. When the archives have `version` no longer it is the newest.
/// Returns the version.
///
/// # Errors
/// No archive of this system has it, or a command failed.
pub(crate) fn unpack(
    step: &Step,
    (name, version): (&str, &str),
    work: &Path,
    tree: &Path,
    log: &Path,
) -> Result<String> {
    let apt = Apt::new(work)?;
    step.note("fetching the lists of source packages");
    apt.write_lists()?;
    // An archive that cannot be reached, or that has no source packages, need not be the one with this.
    let updated = child::output(&mut apt.command("apt-get", &["update"]));
    let known = child::output(&mut apt.command("apt-cache", &["showsrc", "--only-source", name]));
    let known = known.unwrap_or_default();
    let mut versions = known.lines().filter_map(|line| line.strip_prefix("Version: "));
    let has_it = versions.clone().any(|each| each == version);
    if !has_it && versions.next().is_none() {
        let why = updated.err().map(|error| format!(": {error:#}")).unwrap_or_default();
        return Err(Exit::error(
            exit::CANNOT,
            format!("no apt source of this system has the source package {name}{why}"),
        ));
    }
    let what = if has_it { format!("{name}={version}") } else { name.to_owned() };
    step.note(&format!("downloading the source of {what}"));
    let mut command = apt.command("apt-get", &["source", "--download-only", &what]);
    child::run(step, command.current_dir(work), log)?;
    step.note(&format!("unpacking the source of {what}"));
    let description = description(work)?;
    let mut unpack = Command::new("dpkg-source");
    unpack.args(["--no-check", "-x"]).arg(&description).arg(tree);
    child::run(step, &mut unpack, log)?;
    let text = String::from_utf8_lossy(&paths::read(&description)?).into_owned();
    let version = text.lines().find_map(|line| line.strip_prefix("Version: "));
    version.map(str::to_owned).with_context(|| format!("{} has no version", description.display()))
}

/// apt with its state in a directory of ours.
struct Apt {
    dir: PathBuf,
}

impl Apt {
    fn new(work: &Path) -> Result<Self> {
        let dir = work.join("apt");
        for part in ["lists/partial", "archives/partial", "sources"] {
            paths::create_dir(&dir.join(part))?;
        }
        Ok(Self { dir })
    }

    fn command(&self, program: &str, words: &[&str]) -> Command {
        let mut command = Command::new(program);
        let dir = self.dir.display();
        command.arg("-q").env("LC_ALL", "C");
        for option in [
            "Dir::Etc::sourcelist=/dev/null".to_owned(),
            format!("Dir::Etc::sourceparts={dir}/sources"),
            format!("Dir::State::lists={dir}/lists"),
            format!("Dir::Cache::archives={dir}/archives"),
            "Dir::Cache::pkgcache=".to_owned(),
            "Dir::Cache::srcpkgcache=".to_owned(),
            "Acquire::Languages=none".to_owned(),
        ] {
            command.arg("-o").arg(option);
        }
        if rustix::process::geteuid().is_root() {
            // The cache is the user's: apt's own download user cannot write there.
            command.args(["-o", "APT::Sandbox::User=root"]);
        }
        command.args(words);
        command
    }

    /// The system's sources, for source packages.
    fn write_lists(&self) -> Result<()> {
        let mut files = vec![PathBuf::from(LIST)];
        match fs::read_dir(PARTS) {
            Ok(entries) => {
                files.extend(
                    entries.collect::<io::Result<Vec<_>>>()?.iter().map(fs::DirEntry::path),
                );
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error).with_context(|| format!("cannot list {PARTS}")),
        }
        for (number, file) in files.iter().enumerate().filter(|(_, file)| file.is_file()) {
            let text = String::from_utf8_lossy(&paths::read(file)?).into_owned();
            let (kind, text) = match file.extension().and_then(|ext| ext.to_str()) {
                Some("sources") => ("sources", of_stanzas(&text)),
                Some("list") => ("list", of_lines(&text)),
                _ => continue,
            };
            let list = self.dir.join(format!("sources/{number}.{kind}"));
            fs::write(&list, text).with_context(|| format!("cannot write {}", list.display()))?;
        }
        Ok(())
    }
}

/// Those lines of a `.list` that are for packages, for source packages.
fn of_lines(text: &str) -> String {
    let rest = |line: &str| {
        let rest = line.trim_start().strip_prefix("deb")?;
        rest.starts_with([' ', '\t']).then(|| format!("deb-src{rest}\n"))
    };
    text.lines().filter_map(rest).collect()
}

/// The stanzas of a `.sources` (sources.list(5), "DEB822-STYLE FORMAT"), for source packages.
fn of_stanzas(text: &str) -> String {
    let mut all = String::new();
    let mut in_types = false;
    for line in text.lines() {
        let goes_on = line.starts_with([' ', '\t']);
        if goes_on && in_types {
            continue;
        }
        in_types = if goes_on || line.starts_with('#') {
            in_types
        } else {
            line.to_ascii_lowercase().starts_with("types:")
        };
        let is_types = in_types && !line.starts_with('#');
        all += if is_types { "Types: deb-src" } else { line };
        all.push('\n');
    }
    all
}

/// The one `.dsc` that was downloaded.
fn description(dir: &Path) -> Result<PathBuf> {
    let entries = fs::read_dir(dir).with_context(|| format!("cannot list {}", dir.display()))?;
    let paths = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    let mut found = paths.into_iter().filter(|path| path.extension().is_some_and(|e| e == "dsc"));
    match (found.next(), found.next()) {
        (Some(file), None) => Ok(file),
        _ => bail!("apt-get source left not exactly one .dsc in {}", dir.display()),
    }
}

#[cfg(test)]
mod tests {
    use super::{of_lines, of_stanzas};

    #[test]
    fn lines_become_those_of_source_packages() {
        let text = "# deb http://deb.debian.org/debian old main\n\
            deb [signed-by=/k.gpg] http://deb.debian.org/debian/ bookworm main\n\
            deb-src http://deb.debian.org/debian bookworm main\n \
            deb\tmirror+file:///etc/apt/mirrors/debian.list bookworm main\n";
        assert_eq!(
            of_lines(text),
            "deb-src [signed-by=/k.gpg] http://deb.debian.org/debian/ bookworm main\n\
             deb-src\tmirror+file:///etc/apt/mirrors/debian.list bookworm main\n"
        );
    }

    #[test]
    fn stanzas_become_those_of_source_packages() {
        let text = "types: deb\nURIs: http://deb.debian.org/debian\n http://two.example/debian\n\
            Suites: bookworm\nSigned-By: /k.gpg\n\nTypes:\n deb\n deb-src\n# a remark\nSuites: x\n\n\
            Enabled: no\nTypes: deb\n";
        assert_eq!(
            of_stanzas(text),
            "Types: deb-src\nURIs: http://deb.debian.org/debian\n http://two.example/debian\n\
             Suites: bookworm\nSigned-By: /k.gpg\n\nTypes: deb-src\n# a remark\nSuites: x\n\n\
             Enabled: no\nTypes: deb-src\n"
        );
        assert_eq!(of_stanzas(""), "");
    }
}

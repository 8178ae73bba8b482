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

/// What is to be had.
pub(crate) struct Source<'a> {
    /// A binary package that comes from the same place.
    pub(crate) binary: &'a str,
    /// The source package.
    pub(crate) name: &'a str,
    /// Its version; when the archive has it no longer, the newest is taken.
    pub(crate) version: &'a str,
}

/// Downloads it (apt checks it against the signed lists) and unpacks it as `tree`, with its patches. `work`
/// is for what is needed meanwhile.
pub(crate) fn unpack(
    step: &Step,
    source: &Source<'_>,
    work: &Path,
    tree: &Path,
    log: &Path,
) -> Result<()> {
    let Source { binary, name, version } = source;
    let apt = Apt::new(work)?;
    step.note(&format!("looking for the source of {binary}"));
    apt.write_lists(&origin(binary)?)?;
    child::run(step, &mut apt.get(&["update"]), log)?;
    step.note(&format!("downloading the source of {name} {version}"));
    let download = |what: &str| {
        let mut command = apt.get(&["source", "--download-only", what]);
        child::run(step, command.current_dir(work), log)
    };
    download(&format!("{name}={version}")).or_else(|_| download(name))?;
    step.note(&format!("unpacking {name}"));
    let mut unpack = Command::new("dpkg-source");
    unpack.args(["--no-check", "-x"]).arg(description(work)?).arg(tree);
    child::run(step, &mut unpack, log)
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

    fn get(&self, words: &[&str]) -> Command {
        let mut command = Command::new("apt-get");
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

    /// The system's sources at `origin`, for source packages.
    fn write_lists(&self, origin: &str) -> Result<()> {
        let mut files = vec![PathBuf::from(LIST)];
        match fs::read_dir(PARTS) {
            Ok(entries) => {
                files.extend(
                    entries.collect::<io::Result<Vec<_>>>()?.iter().map(fs::DirEntry::path),
                );
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error).context("cannot list /etc/apt/sources.list.d"),
        }
        let mut any = false;
        for (number, file) in files.iter().enumerate().filter(|(_, file)| file.is_file()) {
            let text = String::from_utf8_lossy(&paths::read(file)?).into_owned();
            let (kind, text) = match file.extension().and_then(|ext| ext.to_str()) {
                Some("sources") => ("sources", of_stanzas(&text, origin)),
                Some("list") => ("list", of_lines(&text, origin)),
                _ => continue,
            };
            any |= !text.is_empty();
            let list = self.dir.join(format!("sources/{number}.{kind}"));
            fs::write(&list, text).with_context(|| format!("cannot write {}", list.display()))?;
        }
        if any {
            return Ok(());
        }
        Err(Exit::error(
            exit::CANNOT,
            format!("no apt source of this system is at {origin}, where the package comes from"),
        ))
    }
}

/// The archive that a package comes from: the address in front of its `/pool/`.
fn origin(binary: &str) -> Result<String> {
    let uris = child::output(
        Command::new("apt-get")
            .args(["-qq", "--print-uris", "download", binary])
            .env("LC_ALL", "C"),
    )?;
    let uri = uris.split('\'').nth(1).and_then(|uri| uri.split_once("/pool/"));
    match uri {
        Some((archive, _)) => Ok(archive.to_owned()),
        None => Err(Exit::error(
            exit::CANNOT,
            format!("apt-get does not say where {binary} comes from; run: apt-get update"),
        )),
    }
}

/// Those lines of a `.list` that are for packages at `origin`, for source packages.
fn of_lines(text: &str, origin: &str) -> String {
    let ours = |line: &&str| {
        line.starts_with("deb ")
            && line.split_whitespace().any(|word| word.trim_end_matches('/') == origin)
    };
    text.lines().filter(ours).map(|line| format!("deb-src{}\n", &line["deb".len()..])).collect()
}

/// The same for the stanzas of a `.sources` (sources.list(5), "DEB822-STYLE FORMAT").
fn of_stanzas(text: &str, origin: &str) -> String {
    let mut all = String::new();
    let lines: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
    for stanza in lines.split(|line| line.trim().is_empty()) {
        let field = |name: &str| {
            stanza.iter().find_map(|line| {
                let (key, value) = line.split_once(':')?;
                key.eq_ignore_ascii_case(name).then(|| value.trim())
            })
        };
        let at_origin = field("URIs").is_some_and(|uris| {
            uris.split_whitespace().any(|uri| uri.trim_end_matches('/') == origin)
        });
        if !at_origin || field("Enabled").is_some_and(|value| value.eq_ignore_ascii_case("no")) {
            continue;
        }
        for line in stanza {
            let is_types = line.to_ascii_lowercase().starts_with("types:");
            all += if is_types { "Types: deb-src" } else { line };
            all.push('\n');
        }
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

    const ORIGIN: &str = "http://deb.debian.org/debian";

    #[test]
    fn lines_of_the_origin_become_those_of_source_packages() {
        let text = "# deb http://deb.debian.org/debian old main\n\
            deb [signed-by=/k.gpg] http://deb.debian.org/debian/ bookworm main\n\
            deb-src http://deb.debian.org/debian bookworm main\n\
            deb http://deb.debian.org/debian-security bookworm-security main\n";
        assert_eq!(
            of_lines(text, ORIGIN),
            "deb-src [signed-by=/k.gpg] http://deb.debian.org/debian/ bookworm main\n"
        );
    }

    #[test]
    fn stanzas_of_the_origin_become_those_of_source_packages() {
        let text = "Types: deb\n# a remark\nURIs: http://deb.debian.org/debian\nSuites: bookworm\n\
            Signed-By: /k.gpg\n\nTypes: deb\nURIs: http://other.example/debian\nSuites: x\n\n\
            Enabled: no\nTypes: deb\nURIs: http://deb.debian.org/debian\n";
        assert_eq!(
            of_stanzas(text, ORIGIN),
            "Types: deb-src\nURIs: http://deb.debian.org/debian\nSuites: bookworm\nSigned-By: /k.gpg\n\n"
        );
        assert_eq!(of_stanzas("", ORIGIN), "");
    }
}

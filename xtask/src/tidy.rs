//! `cargo xtask tidy`: what the repository promises of its own files.

use std::path::Path;
use std::process::Command;

use anyhow::{Result, bail};

use crate::{child, exit, paths};

/// More lines than this and a source file is too long.
const LINE_LIMIT: usize = 600;
/// Directories of somebody's machine, in halves so that this file does not find itself.
const MACHINE_PATHS: [&str; 3] =
    [concat!("/wo", "rk/"), concat!("/ro", "ot/"), concat!("/ho", "me/")];
/// Words for work that was put off.
const PUT_OFF: [&str; 2] = [concat!("TO", "DO"), concat!("FIX", "ME")];
/// The commands that the documentation must name.
const COMMANDS: [&str; 2] = ["cargo xtask demo", "cargo xtask test"];
/// The file that must name them.
const READ_FIRST: &str = "README.md";

/// Prints every complaint; the exit code.
pub(crate) fn run() -> Result<u8> {
    match check() {
        Ok(()) => Ok(0),
        Err(error) => {
            eprintln!("xtask: tidy: {error:#}");
            Ok(exit::FAILED)
        }
    }
}

/// Fails with the number of complaints, after printing them.
pub(crate) fn check() -> Result<()> {
    let root = paths::root();
    let mut complaints = Vec::new();
    let mut readme = String::new();
    for file in files(&root)? {
        // Deleted but still in git's index, or not text: nothing to say.
        let Ok(text) = std::fs::read_to_string(root.join(&file)) else {
            continue;
        };
        look_at(&file, &text, &mut complaints);
        if file == READ_FIRST {
            readme = text;
        }
    }
    for command in COMMANDS {
        if !readme.contains(command) {
            complaints.push(format!("{READ_FIRST}: does not name `{command}`"));
        }
    }
    for complaint in &complaints {
        eprintln!("tidy: {complaint}");
    }
    if complaints.is_empty() {
        return Ok(());
    }
    bail!("{} complaints", complaints.len())
}

/// Every file that is or would be in the repository.
fn files(root: &Path) -> Result<Vec<String>> {
    let mut git = Command::new("git");
    git.current_dir(root).args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"]);
    let text = child::output(&mut git)?;
    Ok(text.split('\0').filter(|file| !file.is_empty()).map(str::to_owned).collect())
}

fn look_at(file: &str, text: &str, complaints: &mut Vec<String>) {
    let source = [".rs", ".sh"].iter().any(|suffix| file.ends_with(suffix));
    let lines = text.lines().count();
    if source && lines > LINE_LIMIT {
        complaints.push(format!("{file}: {lines} lines, the limit is {LINE_LIMIT}"));
    }
    for (number, line) in text.lines().enumerate() {
        let number = number + 1;
        if let Some(path) = MACHINE_PATHS.iter().find(|path| line.contains(**path)) {
            complaints.push(format!("{file}:{number}: a path of one machine: {path}"));
        }
        if let Some(word) = PUT_OFF.iter().find(|word| has_word(line, word)) {
            complaints.push(format!("{file}:{number}: {word}"));
        }
    }
    // A workspace of its own cannot inherit ours.
    let manifest = file.ends_with("/Cargo.toml") && !text.lines().any(|line| line == "[workspace]");
    if manifest && !text.contains("[lints]\nworkspace = true") {
        complaints.push(format!("{file}: no `[lints] workspace = true`"));
    }
}

/// Whether `word` stands in `line` on its own.
fn has_word(line: &str, word: &str) -> bool {
    line.match_indices(word).any(|(start, _)| {
        let outside = |c: Option<char>| c.is_none_or(|c| !c.is_alphanumeric() && c != '_');
        outside(line[..start].chars().next_back())
            && outside(line[start + word.len()..].chars().next())
    })
}

#[cfg(test)]
mod tests {
    use super::{LINE_LIMIT, has_word, look_at};

    fn complaints(file: &str, text: &str) -> usize {
        let mut complaints = Vec::new();
        look_at(file, text, &mut complaints);
        complaints.len()
    }

    #[test]
    fn complaints_are_found() {
        assert_eq!(complaints("a.rs", "fn main() {}\n"), 0);
        assert_eq!(complaints("a.rs", &"\n".repeat(LINE_LIMIT + 1)), 1);
        assert_eq!(complaints("a.md", concat!("see /ho", "me/x\n")), 1);
        assert_eq!(complaints("a.rs", concat!("// FIX", "ME: later\n")), 1);
        assert_eq!(complaints("a/Cargo.toml", "[package]\n"), 1);
        assert_eq!(complaints("a/Cargo.toml", "[package]\n[workspace]\n"), 0);
        assert_eq!(complaints("a/Cargo.toml", "[lints]\nworkspace = true\n"), 0);
    }

    #[test]
    fn words_stand_alone() {
        assert!(has_word("a b c", "b"));
        assert!(!has_word("abc", "b"));
        assert!(!has_word("a_b", "b"));
    }
}

//! apt-cache's answers, remembered until apt's lists change: asking takes half a second each time where
//! apt keeps no cache of its own (container images), and every command asks.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use tempfile::NamedTempFile;

use crate::cache::Key;
use crate::{child, paths};

/// What an answer depends on; for directories, every file in them.
const SOURCES: [&str; 6] = [
    "/var/lib/apt/lists",
    "/var/lib/dpkg/status",
    "/etc/apt/sources.list",
    "/etc/apt/sources.list.d",
    "/etc/apt/preferences",
    "/etc/apt/preferences.d",
];

/// Answers for one state of [`SOURCES`].
#[derive(Default, Serialize, Deserialize)]
struct Answers {
    state: String,
    by_question: BTreeMap<String, String>,
}

/// The output of `apt-cache` with these arguments.
pub(crate) fn ask(arguments: &[&str]) -> Result<String> {
    let file = paths::cache()?.join("apt-cache.json");
    let state = state();
    let question = arguments.join(" ");
    // A file that cannot be read or parsed is one that is not there.
    let stored =
        fs::read(&file).ok().and_then(|bytes| serde_json::from_slice::<Answers>(&bytes).ok());
    let mut answers = stored.filter(|answers| answers.state == state).unwrap_or_default();
    if let Some(answer) = answers.by_question.get(&question) {
        return Ok(answer.clone());
    }
    let answer = child::output(Command::new("apt-cache").args(arguments).env("LC_ALL", "C"))?;
    answers.state = state;
    answers.by_question.insert(question, answer.clone());
    store(&file, &answers).context("cannot remember apt-cache's answer")?;
    Ok(answer)
}

fn store(file: &Path, answers: &Answers) -> Result<()> {
    let temporary = NamedTempFile::new_in(file.parent().unwrap_or(Path::new(".")))?;
    serde_json::to_writer(&temporary, answers)?;
    temporary.persist(file)?;
    Ok(())
}

/// Changes whenever one of [`SOURCES`] does.
fn state() -> String {
    let mut stamps = Vec::new();
    for source in SOURCES {
        stamp(Path::new(source), &mut stamps);
        for entry in fs::read_dir(source).into_iter().flatten().flatten() {
            stamp(&entry.path(), &mut stamps);
        }
    }
    stamps.sort();
    Key::default().with("apt", stamps.join("\n")).digits()
}

fn stamp(file: &Path, stamps: &mut Vec<String>) {
    if let Ok(data) = file.metadata() {
        let (time, part) = (data.mtime(), data.mtime_nsec());
        stamps.push(format!("{} {time}.{part} {}", file.display(), data.len()));
    }
}

//! The files for a result: claimed before anything is measured, written at the end.

use std::path::PathBuf;

use super::document::Document;
use super::{StallArgs, StallError, hlog, html, junit, markdown};
use crate::operand::FileId;
use crate::output::{OutputError, OutputFile};

/// What makes a report of a result.
type Render = fn(&Document) -> Result<Vec<u8>, String>;

/// A claimed file, with the option that named it.
struct Output {
    option: &'static str,
    render: Render,
    file: OutputFile,
}

/// All of them.
pub(super) struct Outputs(Vec<Output>);

impl Outputs {
    /// Claims the files that were asked for: each another one than the others, and than what is read.
    pub(super) fn claim(
        args: &StallArgs,
        inputs: Vec<(&'static str, FileId)>,
    ) -> Result<Self, StallError> {
        let StallArgs { json, html, markdown, junit, hlog, .. } = args;
        let reports = [html, markdown, junit, hlog].map(Option::as_ref);
        Self::claim_each(json.as_ref(), reports, inputs)
    }

    /// The same; `reports` are HTML, Markdown, JUnit and the interval log.
    pub(super) fn claim_each(
        json: Option<&PathBuf>,
        [html, markdown, junit, hlog]: [Option<&PathBuf>; 4],
        inputs: Vec<(&'static str, FileId)>,
    ) -> Result<Self, StallError> {
        let asked: [(&'static str, Option<&PathBuf>, Render); 5] = [
            ("--json", json, self::json),
            ("--html", html, html::render),
            ("--markdown", markdown, markdown::render),
            ("--junit", junit, junit::render),
            ("--hlog", hlog, hlog::render),
        ];
        let (mut outputs, mut taken) = (Vec::new(), inputs);
        for (option, path, render) in asked {
            let Some(path) = path else { continue };
            let file = OutputFile::open_beside(path, &taken)
                .map_err(|source| StallError::Output { option, source })?;
            let same = |other: &&Output| other.file.is_stdout() && file.is_stdout();
            if let Some(Output { option: other, .. }) = outputs.iter().find(same) {
                let (path, other) = (path.clone(), (*other).to_owned());
                let source = OutputError::Taken { path, other };
                return Err(StallError::Output { option, source });
            }
            taken.extend(file.id().map(|id| (option, id)));
            outputs.push(Output { option, render, file });
        }
        Ok(Self(outputs))
    }

    /// Whether nothing was asked for.
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether one of them is standard output.
    pub(super) fn use_stdout(&self) -> bool {
        self.0.iter().any(|output| output.file.is_stdout())
    }

    /// Writes all of them, also when one fails: gives the first error.
    pub(super) fn write(self, document: &Document) -> Result<(), StallError> {
        let mut first = Ok(());
        for Output { option, render, file } in self.0 {
            let written = render(document)
                .map_err(|why| StallError::Report { option, why })
                .and_then(|bytes| {
                    file.write(&bytes).map_err(|source| StallError::Output { option, source })
                });
            first = first.and(written);
        }
        first
    }
}

fn json(document: &Document) -> Result<Vec<u8>, String> {
    let mut text = serde_json::to_vec_pretty(document).map_err(|error| error.to_string())?;
    text.push(b'\n');
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::super::document::tests::planned;
    use super::super::plan::tests::parse;
    use super::*;
    use std::fs;

    #[test]
    fn each_report_has_a_file_of_its_own_and_one_that_fails_keeps_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).display().to_string();
        let (json, html, junit, full) =
            (path("a.json"), path("a.html"), path("a.xml"), "/dev/full");
        let args = |more: &[&str]| parse(more).unwrap();
        let twice = Outputs::claim(&args(&["--json", &json, "--junit", &json]), Vec::new());
        assert!(twice.is_err_and(|error| error.to_string().starts_with("--junit: ")));
        let stdout = Outputs::claim(&args(&["--json", "-", "--html", "-"]), Vec::new());
        assert!(
            stdout.is_err_and(|error| error.to_string().starts_with("--html: '-' is also --json"))
        );
        let args = args(&["--json", &json, "--html", &html, "--markdown", full, "--junit", &junit]);
        let outputs = Outputs::claim(&args, Vec::new()).unwrap();
        assert!(!outputs.use_stdout());
        let (_, document) = planned(&[]);
        let error = outputs.write(&document).unwrap_err();
        assert_eq!(error.exit_code(), crate::exit::OPERAND);
        assert!(error.to_string().contains("--markdown: cannot write '/dev/full'"), "{error}");
        assert!(fs::read_to_string(json).unwrap().contains("nowait.stall/1"));
        assert!(fs::read_to_string(html).unwrap().contains("<!doctype html>"));
        assert!(fs::read_to_string(junit).unwrap().contains("<testsuites"));
    }
}

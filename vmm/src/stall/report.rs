//! `nowait report`: the reports of a result that `nowait stall --json` saved, without measuring anything.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use super::document::{Document, Run};
use super::outputs::Outputs;
use super::overrun::HistogramError;
use super::{STDOUT_FILE, StallError, overrun, table};
use crate::exit;
use crate::operand::{self, FileId, OperandError};
use crate::output::STDOUT;

/// The longest result that is read.
const BYTES: u64 = 256 << 20;

/// Turn a result that `nowait stall --json` saved into reports. Without an option it prints the table.
///
/// It says what the result says: a gate that failed or a measurement that is incomplete is no failure here.
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// The result, of schema nowait.stall/1
    #[arg(value_name = "RESULT")]
    pub result: PathBuf,
    /// Write one self-contained page with plots to FILE ("-" is standard output)
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
    /// Write the summary to FILE as Markdown, for a pull request's comment
    #[arg(long, value_name = "FILE")]
    pub markdown: Option<PathBuf>,
    /// Write runs and gates to FILE as JUnit XML
    #[arg(long, value_name = "FILE")]
    pub junit: Option<PathBuf>,
    /// Write all overruns to FILE as an HdrHistogram interval log
    #[arg(long, value_name = "FILE")]
    pub hlog: Option<PathBuf>,
}

/// Why there is no report.
#[derive(Debug, thiserror::Error)]
enum ReportError {
    #[error("result '{path}': {source}")]
    Result { path: PathBuf, source: ResultError },
    #[error(transparent)]
    Output(#[from] StallError),
    #[error("cannot write the table: {0}")]
    Table(#[source] io::Error),
}

impl ReportError {
    fn exit_code(&self) -> u8 {
        match self {
            Self::Result { .. } => exit::OPERAND,
            Self::Output(error) => error.exit_code(),
            Self::Table(_) => exit::FAILURE,
        }
    }
}

/// Why a file is no result.
#[derive(Debug, thiserror::Error)]
pub(super) enum ResultError {
    #[error("cannot read it: {0}")]
    Unreadable(#[from] OperandError),
    #[error("it is no JSON: {0}")]
    Json(serde_json::Error),
    #[error(
        "its schema is {found}, and this nowait reads {known}: use the nowait that made it",
        known = super::SCHEMA
    )]
    Schema { found: String },
    #[error("it is no {known} result: {why}", known = super::SCHEMA)]
    Form { why: serde_json::Error },
    #[error("run {number} of it: {source}")]
    Histogram { number: usize, source: HistogramError },
}

/// Runs the command: the exit code of the process.
#[must_use]
pub fn main(args: &Args) -> u8 {
    match run(args) {
        Ok(()) => exit::OK,
        Err(error) => {
            let line = error.to_string();
            let line = line.split_whitespace().collect::<Vec<_>>().join(" ");
            let _ = writeln!(io::stderr(), "nowait: {line}");
            error.exit_code()
        }
    }
}

fn run(args: &Args) -> Result<(), ReportError> {
    let Args { result, html, markdown, junit, hlog } = args;
    let document =
        read(result).map_err(|source| ReportError::Result { path: result.clone(), source })?;
    let reports = [html, markdown, junit, hlog].map(Option::as_ref);
    // Without a report it is the table's, and of no concern.
    let stdout = reports.iter().flatten().any(|path| path.as_path() == Path::new(STDOUT));
    let stdout = FileId::at(Path::new(STDOUT_FILE)).filter(|_| stdout);
    let stdout = stdout.map(|id| ("standard output", id));
    let inputs =
        FileId::at(result).map(|id| ("the result", id)).into_iter().chain(stdout).collect();
    let outputs = Outputs::claim_each(None, reports, inputs)?;
    if outputs.is_empty() {
        return print(&mut io::stdout(), &document).map_err(ReportError::Table);
    }
    Ok(outputs.write(&document)?)
}

fn print(out: &mut dyn Write, document: &Document) -> io::Result<()> {
    table::head(out, document)?;
    document.runs.iter().try_for_each(|run| table::row(out, document, run))?;
    table::foot(out, document)
}

fn read(path: &Path) -> Result<Document, ResultError> {
    parse(&operand::read_text(path, BYTES)?)
}

/// Reads what `--json` wrote, and decodes each histogram of it once.
///
/// # Errors
/// When it is something else, or of another version.
pub(super) fn parse(text: &str) -> Result<Document, ResultError> {
    /// What tells the version, whatever else there is.
    #[derive(serde::Deserialize)]
    struct Version {
        schema: Option<serde_json::Value>,
    }
    let version: Version = serde_json::from_str(text).map_err(ResultError::Json)?;
    match version.schema {
        Some(serde_json::Value::String(schema)) if schema == super::SCHEMA => {}
        Some(other) => return Err(ResultError::Schema { found: other.to_string() }),
        None => return Err(ResultError::Schema { found: "missing".to_owned() }),
    }
    let document: Document = serde_json::from_str(text).map_err(|why| ResultError::Form { why })?;
    for (index, run) in document.runs.iter().enumerate() {
        let number = index + 1;
        decode(run).map_err(|source| ResultError::Histogram { number, source })?;
    }
    Ok(document)
}

fn decode(run: &Run) -> Result<(), HistogramError> {
    let overruns = run.heartbeats.iter().map(|heartbeat| &heartbeat.overrun_us_hdr);
    let stalls = run.stall.causes.iter().map(|cause| &cause.us_hdr);
    for text in overruns.chain(stalls).chain([&run.overrun_us_hdr]) {
        overrun::decode(text)?;
    }
    if !run.access_us_hdr.is_empty() {
        overrun::decode_accesses(&run.access_us_hdr)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::document::Failure;
    use super::super::document::tests::{BOOT, host, planned, result, workload};
    use super::*;
    use clap::Parser;
    use nowait_wire::agent::Kind;
    use serde_json::{Value, json};

    fn document() -> Document {
        let (plan, mut document) = planned(&["--scenario", "quick"]);
        for kind in [Kind::Idle, Kind::User, Kind::Copy] {
            document.runs.push(Run::new(BOOT, result(&workload(kind), 2), host()).unwrap());
        }
        document.failures.push(Failure::new(BOOT, "the guest kernel panicked".into()));
        document.judge(&plan);
        let gate: super::super::Gate = "host.overrun.max > 1us".parse().unwrap();
        document.gates.push(gate.judge(&document.summary));
        document
    }

    #[test]
    fn a_result_comes_back_as_it_was() {
        let value = serde_json::to_value(document()).unwrap();
        let again = parse(&value.to_string()).unwrap();
        assert_eq!(serde_json::to_value(again).unwrap(), value);
    }

    #[test]
    fn what_is_no_result_says_why() {
        let mut value = serde_json::to_value(document()).unwrap();
        let refusal = |value: &Value| parse(&value.to_string()).unwrap_err().to_string();
        assert!(parse("{").unwrap_err().to_string().starts_with("it is no JSON: "));
        assert!(refusal(&json!({})).starts_with("its schema is missing"));
        let future = json!({"schema": "nowait.stall/2"});
        assert!(refusal(&future).starts_with("its schema is \"nowait.stall/2\", and this nowait"));
        let early = json!({"schema": "nowait.stall/1"});
        assert!(refusal(&early).starts_with("it is no nowait.stall/1 result: missing field"));
        value["runs"][1]["heartbeats"][0]["overrun_us_hdr"] = "AAAA".into();
        assert!(refusal(&value).starts_with("run 2 of it: the histogram's header"));
        value["host"]["accel"] = "abacus".into();
        assert!(refusal(&value).contains("'abacus' is not kvm or nested"));
    }

    #[test]
    fn reports_are_written_and_the_result_is_left_alone() {
        #[derive(Parser)]
        struct Cli {
            #[command(flatten)]
            args: Args,
        }
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).display().to_string();
        let report = |more: &[&str]| {
            let all = ["report"].iter().chain(more).copied();
            run(&Cli::try_parse_from(all).unwrap().args)
        };
        let saved = path("a.json");
        std::fs::write(&saved, serde_json::to_vec(&document()).unwrap()).unwrap();
        report(&[&saved, "--html", &path("a.html"), "--markdown", &path("a.md")]).unwrap();
        assert!(std::fs::read_to_string(path("a.html")).unwrap().starts_with("<!doctype html>"));
        assert!(std::fs::read_to_string(path("a.md")).unwrap().starts_with("## nowait stall"));
        let error = report(&[&saved, "--junit", &saved]).unwrap_err();
        assert_eq!(error.exit_code(), exit::OPERAND);
        assert!(error.to_string().contains("is also the result"), "{error}");
        let error = report(&[&path("none.json")]).unwrap_err();
        assert_eq!(error.exit_code(), exit::OPERAND);
        assert!(error.to_string().contains("none.json': cannot read it: "), "{error}");
        let mut out = Vec::new();
        print(&mut out, &document()).unwrap();
        let text = String::from_utf8(out).unwrap();
        assert!(text.contains("missing: host with 2 vCPUs: the guest kernel panicked"), "{text}");
    }
}

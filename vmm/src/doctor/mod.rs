//! `nowait doctor`: what this host has, what is missing, and the command that helps.
//!
//! ```text
//! gather (reads the host, runs the probe guest) -> Facts -> checks (pure) -> Report -> table | JSON
//! ```
//!
//! A check never says only "Operation not permitted": it tells an absent device from a denied one
//! (whose is it, which group), from a feature that the kernel lacks, from a sysctl or a capability.

mod checks;
mod facts;
mod gather;
mod report;

#[cfg(test)]
mod tests;

use std::io::{self, Write};
use std::path::PathBuf;

pub use facts::{
    Access, Cpu, Facts, Identity, KvmFacts, Limit, Swap, UffdCreation, UffdFacts, UffdFeature,
};
pub use report::{Check, Report, SCHEMA, Status, Verdict};

use crate::exit;
use crate::output::{OutputError, OutputFile};

/// Standard output, as an operand of `--json`.
const STDOUT: &str = "-";

/// Arguments of `nowait doctor`.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Write the result as JSON: to FILE beside the table, or to standard output instead of it.
    #[arg(long, value_name = "FILE", num_args = 0..=1, default_missing_value = STDOUT)]
    pub json: Option<PathBuf>,
}

/// Why the result could not be handed over.
#[derive(Debug, thiserror::Error)]
enum DoctorError {
    /// The operand of `--json`.
    #[error("--json: {0}")]
    Json(#[from] OutputError),
    /// Standard output, other than closed.
    #[error("cannot write to standard output: {0}")]
    Stdout(io::Error),
}

/// Examines this host: reads its settings and runs the probe guest (bounded by
/// [`crate::probe::WATCHDOG`]).
#[must_use]
pub fn examine() -> Report {
    Report::new(&gather::gather(crate::probe::run()))
}

/// Runs the command and says in one line on standard error what kept it from handing its result
/// over. Returns the exit code of the process: 0 if this host can run a guest directly,
/// [`exit::HOST`] if not, [`exit::OPERAND`] if `--json`'s file could not be written, [`exit::FAILURE`] if
/// standard output could not.
#[must_use]
pub fn main(args: Args) -> u8 {
    run(&args).unwrap_or_else(|error| {
        let _ = writeln!(io::stderr(), "nowait: {error}");
        match error {
            DoctorError::Json(_) => exit::OPERAND,
            DoctorError::Stdout(_) => exit::FAILURE,
        }
    })
}

fn run(args: &Args) -> Result<u8, DoctorError> {
    // The file is claimed before the work, so that no result is lost to a wrong path.
    let json = args.json.as_deref().map(OutputFile::open).transpose()?;
    let report = examine();
    match json {
        Some(stdout) if stdout.is_stdout() => print(&report.to_json())?,
        Some(file) => {
            file.write(report.to_json().as_bytes())?;
            print(&report.to_table())?;
        }
        None => print(&report.to_table())?,
    }
    Ok(if report.verdict.host { exit::OK } else { exit::HOST })
}

/// Prints; a reader that went away (`| head`) is not an error.
fn print(text: &str) -> Result<(), DoctorError> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(DoctorError::Stdout(error)),
        _ => Ok(()),
    }
}

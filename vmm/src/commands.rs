//! The command line of `nowait`: parsing, and one line for whatever went wrong.

use std::io::{self, Write};

use clap::{CommandFactory, Parser, Subcommand, error::ErrorKind};

use crate::events::Signals;
use crate::machine::{Machine, MachineError, Outcome};
use crate::output::{OutputError, OutputFile};
use crate::spec::{RunArgs, Spec, SpecError};
use crate::{doctor, exit, probe, size, stall};

/// A small KVM virtual machine monitor whose guest RAM is demand-paged by userfaultfd.
#[derive(Debug, Parser)]
#[command(name = "nowait", version, after_help = exit_codes(), max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Launch a guest whose RAM is demand-paged
    Run(Box<RunArgs>),
    /// Measure how long a guest's processors stall under paging, and print a table
    Stall(Box<stall::StallArgs>),
    /// Check what this host can do, and say how to mend what it cannot
    Doctor(doctor::Args),
    /// Run the probe guest (for `doctor`, in a process of its own)
    #[command(hide = true)]
    Probe,
}

fn exit_codes() -> String {
    let mut text = String::from("Exit codes:\n");
    for (code, meaning) in exit::TABLE {
        text.push_str(&format!("  {code:>3}  {meaning}\n"));
    }
    text
}

/// Runs the program and returns its exit code.
#[must_use]
pub fn main() -> u8 {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    match cli.command {
        Command::Run(args) => run(*args),
        Command::Stall(args) => stall::main(*args),
        Command::Doctor(args) => doctor::main(args),
        Command::Probe => probe::main_hidden(),
    }
}

/// Help goes to standard output as it is; a mistake becomes one line that names the operand.
fn usage(error: &clap::Error) -> u8 {
    if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
        // A closed pipe is no reason to fail.
        let _ = error.print();
        return exit::OK;
    }
    if error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        let _ = Cli::command().print_help();
        return exit::USAGE;
    }
    let text = error.render().to_string();
    let lines: Vec<&str> = text
        .lines()
        .map(str::trim)
        .take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more information"))
        .filter(|line| !line.is_empty())
        .collect();
    let message = lines.join(" ");
    complain(&format!("{} (try --help)", message.trim_start_matches("error: ")));
    exit::USAGE
}

/// One line on standard error.
fn complain(message: &str) {
    let line = message.split_whitespace().collect::<Vec<_>>().join(" ");
    let _ = writeln!(io::stderr(), "nowait: {line}");
}

/// Why `nowait run` did not come to an end of its own.
#[derive(Debug, thiserror::Error)]
enum RunError {
    #[error(transparent)]
    Spec(#[from] SpecError),
    #[error(transparent)]
    Machine(#[from] MachineError),
    #[error("{option}: {source}")]
    Output { option: &'static str, source: OutputError },
    #[error("--json: {0}")]
    Json(#[from] serde_json::Error),
}

impl RunError {
    fn exit_code(&self) -> u8 {
        match self {
            Self::Spec(_) | Self::Output { .. } => exit::OPERAND,
            Self::Machine(error) => error.exit_code(),
            Self::Json(_) => exit::FAILURE,
        }
    }
}

fn run(args: RunArgs) -> u8 {
    match try_run(args) {
        Ok(outcome) => {
            summarize(&outcome);
            outcome.exit.code
        }
        Err(error) => {
            complain(&error.to_string());
            error.exit_code()
        }
    }
}

fn try_run(args: RunArgs) -> Result<Outcome, RunError> {
    let signals = Signals::new()?;
    let spec = Spec::from_args(args)?;
    let output = |option| move |source| RunError::Output { option, source };
    let json = spec.json.as_deref().map(OutputFile::open).transpose().map_err(output("--json"))?;
    let report =
        spec.report.as_deref().map(OutputFile::open).transpose().map_err(output("--report"))?;
    let report = report.map(OutputFile::into_stream).transpose().map_err(output("--report"))?;
    let outcome = Machine::build(spec)?.run(signals, report)?;
    if let Some(file) = json {
        let mut bytes = serde_json::to_vec_pretty(&outcome)?;
        bytes.push(b'\n');
        file.write(&bytes).map_err(output("--json"))?;
    }
    Ok(outcome)
}

/// What a user wants to know when a guest is gone; on standard error, for standard output is the
/// guest's.
fn summarize(outcome: &Outcome) {
    let pager = &outcome.pager;
    let seconds = outcome.elapsed_us as f64 / 1e6;
    let lines = [
        format!("{} after {seconds:.2} s (exit code {})", outcome.exit.reason, outcome.exit.code),
        format!(
            "pages: {} of {} ever touched; {} resident at the end",
            pager.pages_touched,
            outcome.memory_bytes / 4096,
            size::show(pager.resident_bytes)
        ),
        format!(
            "faults: {} missing, {} minor; pages: {} loaded at start, {} zero on a fault and {} around it, \
             {} evicted, {} fetched back",
            pager.messages_missing,
            pager.messages_minor,
            pager.pages_loaded,
            pager.zero_faults,
            pager.fault_around_pages,
            pager.evicted_pages,
            pager.fetched_pages
        ),
    ];
    for line in lines {
        complain(&line);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn help_shows_every_exit_code() {
        let help = Cli::command().render_long_help().to_string();
        for (code, meaning) in exit::TABLE {
            assert!(help.contains(code) && help.contains(&meaning[..10]), "{code}");
        }
    }
}

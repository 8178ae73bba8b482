//! The command line of `nowait`: parsing, and one line for whatever went wrong.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{CommandFactory, Parser, Subcommand, error::ErrorKind};

use crate::control::{BindError, ControlSocket};
use crate::events::Signals;
use crate::exit::ExitReason;
use crate::machine::{Machine, MachineError, Outcome};
use crate::operand::FileId;
use crate::output::{OutputError, OutputFile, STDOUT};
use crate::patience::{self, Lines, Written};
use crate::spec::{ConsoleKind, RunArgs, Spec, SpecError};
use crate::trace::Tracer;
use crate::{doctor, exit, probe, size, stall, top};

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
    /// Watch a running guest's stalls, faults and memory, live, over its control socket
    Top(top::TopArgs),
    /// Turn a saved result of `stall --json` into a page, Markdown, JUnit XML or an interval log
    Report(stall::report::Args),
    /// Check what this host can do, and say how to mend what it cannot
    Doctor(doctor::Args),
    /// Run the probe guest (for `doctor`, in a process of its own)
    #[command(hide = true)]
    Probe,
}

/// What of it `nowait run` needs: the descriptions of the other commands' options are not made for every guest.
#[derive(Debug, Parser)]
#[command(name = "nowait", version, max_term_width = 100)]
struct RunOnly {
    #[command(subcommand)]
    command: RunCommand,
}

#[derive(Debug, Subcommand)]
enum RunCommand {
    /// Launch a guest whose RAM is demand-paged
    Run(Box<RunArgs>),
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
    let parsed = if std::env::args_os().nth(1).is_some_and(|command| command == "run") {
        RunOnly::try_parse().map(|RunOnly { command: RunCommand::Run(args) }| Command::Run(args))
    } else {
        Cli::try_parse().map(|cli| cli.command)
    };
    let command = match parsed {
        Ok(command) => command,
        Err(error) => return usage(&error),
    };
    match command {
        Command::Run(args) => run(*args),
        Command::Stall(args) => stall::main(*args),
        Command::Top(args) => top::main(&args),
        Command::Report(args) => stall::report::main(&args),
        Command::Doctor(args) => doctor::main(args),
        Command::Probe => probe::main_hidden(),
    }
}

/// Help goes to standard output as it is; a mistake becomes one line that names the operand.
fn usage(error: &clap::Error) -> u8 {
    if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
        return match error.print() {
            // A closed pipe is no reason to fail.
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
                complain(&format!("cannot write to standard output: {error}"));
                exit::FAILURE
            }
            _ => exit::OK,
        };
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
        // A value behind `--` would be something else here.
        .filter(|line| !line.is_empty() && !line.starts_with("tip: to pass"))
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
    #[error("--control: {0}")]
    Control(#[from] BindError),
    #[error("--json: {0}")]
    Json(#[from] serde_json::Error),
}

impl RunError {
    fn exit_code(&self) -> u8 {
        match self {
            Self::Output { source, .. } if source.is_of_stdout() => exit::FAILURE,
            Self::Spec(_) | Self::Output { .. } | Self::Control(_) => exit::OPERAND,
            Self::Machine(error) => error.exit_code(),
            Self::Json(_) => exit::FAILURE,
        }
    }
}

fn run(args: RunArgs) -> u8 {
    match try_run(args) {
        Ok(code) => code,
        Err(error) => {
            complain(&error.to_string());
            error.exit_code()
        }
    }
}

fn try_run(args: RunArgs) -> Result<u8, RunError> {
    let signals = Signals::new()?;
    let spec = Spec::from_args(args)?;
    let mut outputs = Outputs::claim(&spec)?;
    let control = spec.control.as_deref().map(ControlSocket::bind).transpose()?;
    let outcome = Machine::build(spec)?.run(signals, outputs.reports.take(), control)?;
    // Whoever asked for the end does not wait for a reader that may never come.
    let stopped = matches!(outcome.exit.reason, ExitReason::Signal { .. } | ExitReason::UserStop);
    let patience = stopped.then_some(STOPPED_PATIENCE);
    let lines = summary(&outcome);
    let _nobody_reads = patience::within(patience, move || lines.iter().for_each(|l| complain(l)));
    outputs.finish(&outcome, patience)?;
    Ok(match &outcome.console_failure {
        Some(failure) if !failure.closed && outcome.exit.code == exit::OK => exit::FAILURE,
        _ => outcome.exit.code,
    })
}

/// How long a run that was stopped waits for the readers of its outputs.
const STOPPED_PATIENCE: Duration = Duration::from_secs(2);

/// The files that a run writes.
struct Outputs {
    json: Option<OutputFile>,
    trace: Option<OutputFile>,
    /// Taken by the run.
    reports: Option<Lines>,
    written: Option<(PathBuf, Written)>,
}

impl Outputs {
    /// Claims them, each another file than the other and than what the run reads.
    fn claim(spec: &Spec) -> Result<Self, RunError> {
        let failed = |option| move |source| RunError::Output { option, source };
        let mut taken = spec.inputs();
        let stdout = FileId::at(Path::new("/proc/self/fd/1"));
        let uses_stdout = spec.console == ConsoleKind::Stdio
            || [&spec.json, &spec.report].iter().any(|o| o.as_deref() == Some(Path::new(STDOUT)));
        taken.extend(stdout.filter(|_| uses_stdout).map(|id| ("standard output", id)));
        let open = |path: &Path, taken: &[_]| OutputFile::open_beside(path, taken);
        let json = spec.json.as_deref().map(|path| open(path, &taken)).transpose();
        let json = json.map_err(failed("--json"))?;
        taken.extend(json.as_ref().and_then(OutputFile::id).map(|id| ("--json", id)));
        let trace = spec.trace.as_deref().map(|path| open(path, &taken)).transpose();
        let trace = trace.map_err(failed("--trace"))?;
        taken.extend(trace.as_ref().and_then(OutputFile::id).map(|id| ("--trace", id)));
        let report = spec.report.as_deref().map(|path| open(path, &taken)).transpose();
        let (mut reports, mut written) = (None, None);
        if let Some(file) = report.map_err(failed("--report"))? {
            let path = file.path().to_owned();
            let out = file.into_stream().map_err(failed("--report"))?;
            let (lines, end) =
                Lines::start(out).map_err(MachineError::host("start a thread for --report"))?;
            reports = Some(lines);
            written = Some((path, end));
        }
        Ok(Self { json, trace, reports, written })
    }

    /// Waits for the reports and writes the outcome, both at most this long.
    fn finish(self, outcome: &Outcome, patience: Option<Duration>) -> Result<(), RunError> {
        let json = self.json.map(|file| write_json(file, outcome, patience)).transpose();
        let traced = match (self.trace, &outcome.tracer) {
            (Some(file), Some(tracer)) => write_trace(file, tracer, patience),
            _ => Ok(()),
        };
        if let Some((path, written)) = self.written {
            let failed = |error| RunError::Output {
                option: "--report",
                source: OutputError::Write { path, source: io::Error::other(error) },
            };
            match outcome.exit.reason {
                // That the writer failed may have been the end of the run, and was said then.
                ExitReason::Failure { .. } => drop(written.wait(Some(STOPPED_PATIENCE))),
                _ => written.wait(patience).map_err(failed)?,
            }
        }
        json.map(drop).and(traced)
    }
}

fn write_json(
    file: OutputFile,
    outcome: &Outcome,
    patience: Option<Duration>,
) -> Result<(), RunError> {
    let mut bytes = serde_json::to_vec_pretty(outcome)?;
    bytes.push(b'\n');
    let path = file.path().to_owned();
    patience::within(patience, move || file.write(&bytes))
        .unwrap_or(Err(OutputError::NotTaken(path)))
        .map_err(|source| RunError::Output { option: "--json", source })
}

fn write_trace(
    file: OutputFile,
    tracer: &Tracer,
    patience: Option<Duration>,
) -> Result<(), RunError> {
    let bytes = tracer.render()?;
    let path = file.path().to_owned();
    patience::within(patience, move || file.write(&bytes))
        .unwrap_or(Err(OutputError::NotTaken(path)))
        .map_err(|source| RunError::Output { option: "--trace", source })
}

/// What a user wants to know when a guest is gone; for standard error, since standard output is the
/// guest's.
fn summary(outcome: &Outcome) -> Vec<String> {
    let pager = &outcome.pager;
    let seconds = outcome.elapsed_us as f64 / 1e6;
    let mut lines = vec![
        format!("{} after {seconds:.2} s (exit code {})", outcome.exit.reason, outcome.exit.code),
        format!(
            "pages: {} of {} ever touched; {} resident at the end",
            pager.pages_touched,
            outcome.memory_bytes / 4096,
            size::show(pager.resident_bytes)
        ),
        format!(
            "pages: {} loaded at start, {} zero on a fault, {} zero around one",
            pager.pages_loaded, pager.zero_faults, pager.fault_around_pages,
        ),
        format!(
            "faults: {} missing, {} minor; {} pages evicted, {} fetched back",
            pager.messages_missing, pager.messages_minor, pager.evicted_pages, pager.fetched_pages
        ),
    ];
    lines.extend(outcome.console_failure.as_ref().map(|failure| {
        format!("standard output: {}: what the guest wrote to it is lost", failure.message)
    }));
    lines
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

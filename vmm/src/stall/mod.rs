//! `nowait stall`: how long a guest's processors stall under paging, as a table, as JSON, and as a page.
//!
//! ```text
//!   preset or file, options -> Scenario, checked                      (scenario, plan: pure)
//!   for each (round, vcpus, apf): one `nowait run` in its own process (child)
//!       idle, user x threads…, copy x threads…: what it reports       (session, pure)
//!           -> heartbeats of all vCPUs merged, percentiles            (overrun, document)
//!           -> a row of the table                                     (table)
//!   medians, intervals, ratios, warnings, gates                       (summary, warnings, gate: pure)
//!   at the end: every output that was asked for, whatever became of the runs   (outputs)
//! ```
//!
//! A boot of its own for every combination, so that none inherits the state of another; a process of
//! its own, so that a guest that goes wrong costs its own rows only.

mod baseline;
mod child;
mod document;
mod gate;
mod hlog;
mod html;
mod junit;
mod markdown;
mod missing;
mod outputs;
mod overrun;
mod plan;
pub mod report;
mod scenario;
mod session;
mod summary;
mod table;
mod verdict;
mod warnings;

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};

use crate::exit;
use crate::operand;
use crate::operand::FileId;
use crate::output::OutputError;
pub use baseline::{BaselineError, Tolerance};
use baseline::{Earlier, Now};
use child::{Child, Heard, Said};
pub use document::{
    ACCEL_NESTED, ACCEL_VARIABLE, CauseOfStalls, CommandEnd, Config, Document, Failure, Host, Run,
    SCHEMA, Stall,
};
pub use gate::{Gate, GateError, GateResult};
use outputs::Outputs;
pub use overrun::{HistogramError, Summary};
pub use plan::StallArgs;
use plan::{Boot, Plan};
pub use scenario::{PRESETS, Scenario, ScenarioError, Via};
pub use session::SessionError;
use session::{Session, Step};
pub use summary::{Group, ModeSummary, Quantiles, Ratios};

/// How often a signal to us is looked for while a guest is silent.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// Why `nowait stall` gave up, or what its result lacks.
#[derive(Debug, thiserror::Error)]
pub enum StallError {
    /// What is to be measured.
    #[error(transparent)]
    Scenario(#[from] ScenarioError),
    /// A gate about something that the scenario does not measure.
    #[error("--fail-if: {0}")]
    Gate(#[from] GateError),
    /// The earlier result.
    #[error("--baseline '{path}': {source}")]
    Baseline {
        /// Its file.
        path: PathBuf,
        /// Why it is none.
        source: BaselineError,
    },
    /// A file for a result.
    #[error("{option}: {source}")]
    Output {
        /// The option that names it.
        option: &'static str,
        /// Why.
        source: OutputError,
    },
    /// Our own requests do not fit the protocol.
    #[error("cannot encode the requests for the guest agent: {0}")]
    Request(#[source] nowait_wire::agent::LineError),
    /// A child process.
    #[error("cannot run a guest in a process of its own: {0}")]
    Child(#[source] io::Error),
    /// A child refused its operands, or its host: so will all others.
    #[error("{message}")]
    Refused {
        /// The child's exit code.
        code: u8,
        /// What it said.
        message: String,
    },
    /// The signal handlers.
    #[error("cannot install signal handlers: {0}")]
    Signals(#[source] io::Error),
    /// The table's reader is gone.
    #[error("cannot write the table: {0}")]
    Table(#[source] io::Error),
    /// The result cannot be written in a form.
    #[error("{option}: cannot make the report: {why}")]
    Report {
        /// The option that asks for it.
        option: &'static str,
        /// Why.
        why: String,
    },
    /// A signal.
    #[error("stopped by a signal")]
    Stopped,
    /// Runs are missing or measured too little.
    #[error("the measurement is incomplete: {complete} of {planned} runs are complete{first}")]
    Incomplete {
        /// Complete runs.
        complete: usize,
        /// All runs.
        planned: usize,
        /// What the first boot that is not as it should be had, if one is known.
        first: String,
    },
    /// Gates that were not passed.
    #[error("{failed} of {all} gates failed; first: {first}")]
    Gates {
        /// How many failed.
        failed: usize,
        /// How many there were.
        all: usize,
        /// The first, and where it failed.
        first: String,
    },
    /// Wrong bytes.
    #[error("{0} pages did not hold what was written to them")]
    DataErrors(u64),
}

impl StallError {
    /// The exit code of the process.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Output { source, .. } if source.is_of_stdout() => exit::FAILURE,
            Self::Scenario(_) | Self::Gate(_) | Self::Baseline { .. } | Self::Output { .. } => {
                exit::OPERAND
            }
            Self::Refused { code, .. } => *code,
            Self::Request(_)
            | Self::Child(_)
            | Self::Signals(_)
            | Self::Table(_)
            | Self::Report { .. } => exit::FAILURE,
            Self::Stopped => exit::STOPPED,
            Self::Gates { .. } => exit::GATE,
            Self::Incomplete { .. } | Self::DataErrors(_) => exit::MEASUREMENT,
        }
    }
}

/// Runs the command: the exit code of the process.
#[must_use]
pub fn main(args: StallArgs) -> u8 {
    let result = if args.check { prepare(&args).map(drop) } else { run(args).map(drop) };
    match result {
        Ok(()) => exit::OK,
        Err(error) => {
            let line = error.to_string();
            let line = line.split_whitespace().collect::<Vec<_>>().join(" ");
            let _ = writeln!(io::stderr(), "nowait: {line}");
            error.exit_code()
        }
    }
}

/// Makes all runs and prints the table; writes the results that are asked for, also when runs are missing.
///
/// # Errors
/// When it cannot go on, when the measurement is incomplete or found data errors, or when a gate failed.
pub fn run(args: StallArgs) -> Result<Document, StallError> {
    let Prepared { plan, earlier, outputs } = prepare(&args)?;
    let mut out: Box<dyn Write> =
        if outputs.use_stdout() { Box::new(io::stderr()) } else { Box::new(io::stdout()) };
    let mut driver = Driver {
        program: std::env::current_exe().map_err(StallError::Child)?,
        document: Document::new(&args, &plan),
        stop: stop_flag().map_err(StallError::Signals)?,
        headed: false,
        args,
        plan,
    };
    let result = driver.run(&mut *out);
    let Driver { mut document, plan, args, .. } = driver;
    document.judge(&plan);
    judge_gates(&mut document, &args, earlier.as_ref());
    let told = table::foot(&mut *out, &document).map_err(StallError::Table);
    // Whatever was measured is kept, unless nothing was.
    if !(document.runs.is_empty() && result.is_err()) {
        outputs.write(&document)?;
    }
    result.and(told)?;
    verdict(document, plan.runs())
}

/// What is checked, read and claimed before anything is measured.
struct Prepared {
    plan: Plan,
    earlier: Option<Earlier>,
    outputs: Outputs,
}

fn prepare(args: &StallArgs) -> Result<Prepared, StallError> {
    let plan = Plan::new(args)?;
    let command = !args.command.is_empty();
    args.fail_if.iter().try_for_each(|gate| gate.check(&plan.scenario, command))?;
    let earlier = args.baseline.as_ref().map(|path| read_baseline(path, &plan)).transpose()?;
    let inputs = [("--kernel", &args.kernel), ("--initrd", &args.initrd)];
    let baseline = args.baseline.iter().map(|path| ("--baseline", path));
    let scenario = args.scenario_file();
    let scenario = scenario.iter().map(|path| ("--scenario", path));
    let inputs = inputs.into_iter().chain(baseline).chain(scenario);
    let inputs = inputs.filter_map(|(name, path)| Some((name, FileId::at(path)?)));
    // The table, or a report in its place.
    let stdout = FileId::at(Path::new(STDOUT_FILE)).map(|id| ("standard output", id));
    let outputs = Outputs::claim(args, inputs.chain(stdout).collect())?;
    Ok(Prepared { plan, earlier, outputs })
}

/// The file, if it is one, that standard output goes to.
const STDOUT_FILE: &str = "/proc/self/fd/1";

fn read_baseline(path: &Path, plan: &Plan) -> Result<Earlier, StallError> {
    /// The longest earlier result.
    const BYTES: u64 = 256 << 20;
    operand::read_text(path, BYTES)
        .map_err(BaselineError::from)
        .and_then(|text| {
            let (scenario, command) = (&plan.scenario, plan.command());
            Earlier::parse(&text, &Now { scenario, command, accel: document::accel_of_now() })
        })
        .map_err(|source| StallError::Baseline { path: path.to_owned(), source })
}

fn judge_gates(document: &mut Document, args: &StallArgs, earlier: Option<&Earlier>) {
    let gates = args.fail_if.iter().map(|gate| gate.judge(&document.summary));
    let baseline = earlier.zip(args.tolerance);
    let baseline = baseline.map(|(earlier, by)| earlier.judge(&document.summary, by));
    document.gates = gates.chain(baseline).collect();
    document.warnings = warnings::of(document);
}

fn verdict(document: Document, planned: usize) -> Result<Document, StallError> {
    match document.data_errors() {
        0 if document.complete => gates(document),
        0 => Err(StallError::Incomplete {
            complete: document.runs.iter().filter(|run| run.complete).count(),
            planned,
            first: document
                .failures
                .first()
                .map_or_else(String::new, |failure| format!("; first trouble: {failure}")),
        }),
        errors => Err(StallError::DataErrors(errors)),
    }
}

fn gates(document: Document) -> Result<Document, StallError> {
    let failed: Vec<&GateResult> = document.gates.iter().filter(|gate| !gate.passed).collect();
    match failed.first() {
        None => Ok(document),
        Some(GateResult { gate, failures, .. }) => Err(StallError::Gates {
            failed: failed.len(),
            all: document.gates.len(),
            first: format!("{gate} ({})", failures.first().map_or("", String::as_str)),
        }),
    }
}

/// A flag that is set when someone wants us to end. The second time we end at once: a write to a pipe
/// that nobody empties may wait.
fn stop_flag() -> io::Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGHUP, SIGINT, SIGQUIT, SIGTERM] {
        let code = exit::STOPPED.into();
        signal_hook::flag::register_conditional_shutdown(signal, code, Arc::clone(&stop))?;
        signal_hook::flag::register(signal, Arc::clone(&stop))?;
    }
    Ok(stop)
}

/// What all boots share.
struct Driver {
    args: StallArgs,
    plan: Plan,
    program: PathBuf,
    document: Document,
    stop: Arc<AtomicBool>,
    headed: bool,
}

impl Driver {
    fn run(&mut self, out: &mut dyn Write) -> Result<(), StallError> {
        for boot in self.plan.boots.clone() {
            if let Some(message) = self.boot(boot, out)? {
                self.document.failures.push(Failure::new(boot, message));
            }
        }
        Ok(())
    }

    /// Makes one boot with all its runs; gives why it ended early, if it did.
    fn boot(&mut self, boot: Boot, out: &mut dyn Write) -> Result<Option<String>, StallError> {
        let deadline = Instant::now() + self.plan.timeout;
        let mut session = Session::new(boot, &self.plan.workloads(boot.vcpus));
        let child = Child::start(&mut self.command(boot), &self.plan.requests(boot)?);
        let child = child.map_err(StallError::Child)?;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if self.stop.load(Ordering::Relaxed) {
                return Err(StallError::Stopped);
            }
            if left.is_zero() {
                let seconds = self.plan.timeout.as_secs();
                let missing = session.missing();
                return Ok(Some(format!("{missing} runs were not over within {seconds} s")));
            }
            let step = match child.hear(left.min(LOOK_AGAIN)) {
                Heard::Nothing => continue,
                Heard::End => break,
                Heard::TooLong => {
                    return Ok(Some(nowait_wire::agent::LineError::TooLong.to_string()));
                }
                Heard::Line(line) => session.on_line(&line),
            };
            match step {
                Err(error) => return Ok(Some(error.to_string())),
                Ok(Step::Up) => self.head_once(out)?,
                Ok(Step::More) => {}
                Ok(Step::Refused(why)) => self.document.failures.push(Failure::new(boot, why)),
                Ok(Step::Run(run)) => {
                    table::row(out, &self.document, &run).map_err(StallError::Table)?;
                    self.document.runs.push(*run);
                }
            }
        }
        let (status, said) = child.end().map_err(StallError::Child)?;
        if self.stop.load(Ordering::Relaxed) {
            return Err(StallError::Stopped);
        }
        judge_end(status.code(), session.is_over(), said)
    }

    /// Prints the table's head when the first guest is up, so that a wrong operand is not below it.
    fn head_once(&mut self, out: &mut dyn Write) -> Result<(), StallError> {
        if std::mem::replace(&mut self.headed, true) {
            return Ok(());
        }
        table::head(out, &self.document).map_err(StallError::Table)
    }

    fn command(&self, boot: Boot) -> Command {
        let mut command = Command::new(&self.program);
        command.arg("run").arg("--kernel").arg(&self.args.kernel);
        command.arg("--initrd").arg(&self.args.initrd);
        command.args(["--cpus", &boot.vcpus.to_string(), "--apf", &boot.apf.to_string()]);
        let (scenario, checked) = (&self.plan.scenario, &self.plan.checked);
        command.args(["--memory", &scenario.memory, "--store", &checked.store.to_string()]);
        if let Some(limit) = checked.limit_bytes {
            command.args(["--resident-limit", &limit.to_string()]);
        }
        if !scenario.prefetch {
            command.arg("--no-prefetch");
        }
        // Its standard input by a name that is there without udev.
        command.args(["--console", "none", "--requests", "/proc/self/fd/0", "--report", "-"]);
        command
    }
}

/// What the end of a child means: nothing, a boot whose rows are missing, or the end of it all.
fn judge_end(
    code: Option<i32>,
    over: bool,
    Said { complaint, trouble }: Said,
) -> Result<Option<String>, StallError> {
    let code = code.and_then(|code| u8::try_from(code).ok());
    match code {
        // With all of its rows, but they are not what they seem.
        Some(exit::OK) if over => Ok(trouble),
        Some(exit::OK) => Ok(Some("the guest powered off before all runs were over".to_owned())),
        Some(code @ (exit::USAGE | exit::OPERAND | exit::HOST)) => {
            Err(StallError::Refused { code, message: complaint })
        }
        _ if !complaint.is_empty() => Ok(Some(complaint)),
        Some(code) => Ok(Some(format!("`nowait run` ended with exit code {code}"))),
        None => Ok(Some("`nowait run` was killed".to_owned())),
    }
}

#[cfg(test)]
mod schema;
#[cfg(test)]
mod tests;

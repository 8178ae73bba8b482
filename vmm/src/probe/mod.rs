//! The probe guest: can this host's KVM run a guest? Answered by running one.
//!
//! /dev/kvm being there proves little: a KVM without hardware virtualisation creates VMs and then
//! stops at an instruction that its emulator does not know. So a guest of a few instructions is
//! run in 64-bit mode, and what it does is compared step by step with what a processor does:
//!
//! ```text
//! create -> port-write -> int3 -> iretq -> halt      poison-marker (in a VM of its own)
//!           OUT 1         IDT     back     HLT       a page with a UFFDIO_POISON marker is read:
//!                         OUT 2   OUT 3              SIGBUS, marker replaced, re-entered, OUT byte
//! ```
//!
//! It runs in a child process of its own (the hidden subcommand `nowait probe`), because the
//! question is asked of kernels of which nothing is known yet: a KVM_RUN that never returns is
//! ended by SIGKILL, one that kills the process kills only the probe, and the SIGBUS handler and
//! the userfaultfd end with it, so that nothing is left changed in the process that asks. The
//! child prints each step as it is taken; the parent ([`run`]) waits at most [`WATCHDOG`].

mod guest;
mod machine;
mod marker;
mod processor;
pub(crate) mod uffd;
mod watch;

#[cfg(test)]
mod tests;

use std::io::Write;
use std::process::Command;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// How long the probe may take altogether; a working host needs some milliseconds, an emulated
/// machine under load some tenths of a second.
pub const WATCHDOG: Duration = Duration::from_secs(5);

/// What one exit from a guest to this process takes, and back; `None` where no guest runs. This runs a
/// guest in this process: for a host that is known to run guests.
#[must_use]
pub fn exit_cost() -> Option<Duration> {
    machine::exit_cost()
}

/// One thing that a host must be able to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Step {
    /// Open /dev/kvm, create a VM with RAM and a vCPU in 64-bit mode.
    Create,
    /// OUT to a port.
    PortWrite,
    /// INT3 through the guest's IDT into its handler.
    Int3,
    /// IRETQ from the handler to the next instruction.
    Iretq,
    /// HLT.
    Halt,
    /// A read of a page with a UFFDIO_POISON marker: SIGBUS with its address, then served.
    PoisonMarker,
}

impl Step {
    /// All steps, in the order in which they are taken.
    pub const ALL: [Self; 6] =
        [Self::Create, Self::PortWrite, Self::Int3, Self::Iretq, Self::Halt, Self::PoisonMarker];

    /// Whether a guest can run at all without it. The marker is a better source of faults, not a
    /// condition.
    #[must_use]
    pub fn is_needed(self) -> bool {
        self != Self::PoisonMarker
    }

    /// What the step does, for a sentence such as "the guest stopped at: …".
    #[must_use]
    pub fn describe(self) -> &'static str {
        match self {
            Self::Create => "creating a VM with a vCPU in 64-bit mode",
            Self::PortWrite => "a write to an I/O port",
            Self::Int3 => "INT3 through the interrupt descriptor table",
            Self::Iretq => "IRETQ from an exception handler",
            Self::Halt => "HLT",
            Self::PoisonMarker => "a fault on a UFFDIO_POISON marker",
        }
    }
}

/// How a step went.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "kebab-case")]
pub enum Outcome {
    /// As on a processor.
    Passed,
    /// Otherwise.
    Failed {
        /// What happened instead, in plain words.
        reason: String,
    },
    /// Not tried.
    Skipped {
        /// Why not.
        reason: String,
    },
}

/// A step and how it went.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepReport {
    /// The step.
    pub step: Step,
    /// How it went.
    #[serde(flatten)]
    pub outcome: Outcome,
}

/// Whether this host can run a guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "can_run", rename_all = "snake_case")]
pub enum Verdict {
    /// Every needed step passed.
    Yes,
    /// One did not.
    No {
        /// The first needed step that did not pass.
        step: Step,
        /// What happened instead.
        reason: String,
    },
}

impl Verdict {
    /// Why not, in a sentence about "it".
    fn reason_against(self) -> Option<String> {
        match self {
            Self::Yes => None,
            Self::No { step: Step::Create, reason } => Some(reason),
            Self::No { step, reason } => Some(format!("it stops at {}: {reason}", step.describe())),
        }
    }
}

/// What the probe found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ProbeReport {
    /// Every step of [`Step::ALL`], in that order.
    pub steps: Vec<StepReport>,
    /// Whether this host can run a guest; a failed marker step alone does not make it "no".
    pub verdict: Verdict,
}

impl ProbeReport {
    /// The report for the steps that were taken. The first one that is missing failed because of
    /// `why_missing` (or was never reached because an earlier one failed); the rest are skipped.
    #[must_use]
    pub fn new(taken: &[StepReport], why_missing: &str) -> Self {
        let mut stopped_at: Option<Step> = None;
        let mut steps = Vec::with_capacity(Step::ALL.len());
        for step in Step::ALL {
            let outcome = match taken.iter().find(|report| report.step == step) {
                Some(report) => report.outcome.clone(),
                None => match stopped_at {
                    Some(earlier) => Outcome::Skipped {
                        reason: format!("the guest did not get past {}", earlier.describe()),
                    },
                    None => Outcome::Failed { reason: why_missing.to_owned() },
                },
            };
            if stopped_at.is_none() && matches!(outcome, Outcome::Failed { .. }) {
                stopped_at = Some(step);
            }
            steps.push(StepReport { step, outcome });
        }
        let verdict = steps
            .iter()
            .find_map(|report| match &report.outcome {
                Outcome::Failed { reason } | Outcome::Skipped { reason }
                    if report.step.is_needed() =>
                {
                    Some(Verdict::No { step: report.step, reason: reason.clone() })
                }
                _ => None,
            })
            .unwrap_or(Verdict::Yes);
        Self { steps, verdict }
    }

    /// Whether this host can run a guest.
    #[must_use]
    pub fn can_run(&self) -> bool {
        self.verdict == Verdict::Yes
    }

    /// How one step went.
    #[must_use]
    pub fn outcome(&self, step: Step) -> Option<&Outcome> {
        self.steps.iter().find(|report| report.step == step).map(|report| &report.outcome)
    }
}

/// Runs the probe guest in a child process and waits for it, at most [`WATCHDOG`] (and a second
/// more for a child that cannot be killed). Never fails: whatever goes wrong is a failed step.
#[must_use]
pub fn run() -> ProbeReport {
    let mut child = Command::new("/proc/self/exe");
    child.arg("probe");
    watch::run(child, WATCHDOG)
}

/// Where the processor shows no hardware virtualisation to this host, there may be a /dev/kvm all the same: then
/// asks the probe guest, and says why none runs. Elsewhere it costs nothing.
#[must_use]
pub fn reason_against_guests() -> Option<String> {
    if processor::has_virtualisation() { None } else { run().verdict.reason_against() }
}

/// The child's side: takes the steps in this process and prints each as a JSON line. For `nowait
/// probe` only, since it takes over SIGBUS. Returns the exit code of the process.
#[must_use]
pub fn main_hidden() -> u8 {
    watch::die_with_parent();
    let mut taken = Vec::new();
    machine::take_steps(&mut |report| {
        // A parent that is gone, or a line that does not fit, must not stop the probe.
        if let Ok(line) = serde_json::to_string(&report) {
            let mut out = std::io::stdout().lock();
            let _ = writeln!(out, "{line}").and_then(|()| out.flush());
        }
        taken.push(report);
    });
    if ProbeReport::new(&taken, "").can_run() { crate::exit::OK } else { crate::exit::HOST }
}

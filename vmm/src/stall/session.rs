//! One boot as its reports tell it: which run each belongs to, and what is still to come. Pure:
//! lines in, steps out.
//!
//! ```text
//!   Hello -> Result, Host | Error for the first workload -> … for the next … -> (the guest powers off)
//! ```

use std::collections::VecDeque;

use nowait_wire::agent::{LineError, PROTOCOL, Report, RunResult, Workload, decode_line};

use super::document::Run;
use super::overrun::HistogramError;
use super::plan::Boot;

/// Why a boot cannot be followed any further.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The line is no report.
    #[error(transparent)]
    Line(#[from] LineError),
    /// Another agent.
    #[error(
        "the guest agent speaks protocol {0} and this nowait speaks {PROTOCOL}: build the images anew"
    )]
    Protocol(u32),
    /// A guest that is not as ordered.
    #[error("the guest has {found} processors online of {ordered}")]
    Processors {
        /// What the agent found.
        found: u32,
        /// What was ordered.
        ordered: u32,
    },
    /// A report out of order.
    #[error("the guest agent sent {found} where {expected} was due")]
    Order {
        /// What came.
        found: &'static str,
        /// What was to come.
        expected: &'static str,
    },
    /// A result of something else.
    #[error("the guest agent reported another workload than the one it was given")]
    OtherWorkload,
    /// A histogram.
    #[error("the guest agent's report: {0}")]
    Histogram(#[from] HistogramError),
}

/// What a line means.
#[derive(Debug)]
#[must_use]
pub(super) enum Step {
    /// The agent is up.
    Up,
    /// A run is over; what the host saw of it is still to come.
    More,
    /// A run is over.
    Run(Box<Run>),
    /// A run could not be made: which, and why.
    Refused(String),
}

/// Follows one boot.
pub(super) struct Session {
    boot: Boot,
    greeted: bool,
    left: VecDeque<Workload>,
    /// A result that the host's own report follows.
    half: Option<RunResult>,
}

impl Session {
    pub(super) fn new(boot: Boot, workloads: &[Workload]) -> Self {
        Self { boot, greeted: false, left: workloads.iter().cloned().collect(), half: None }
    }

    /// Takes one line of `nowait run --report`.
    pub(super) fn on_line(&mut self, line: &[u8]) -> Result<Step, SessionError> {
        let report: Report = decode_line(line)?;
        if !self.greeted {
            return self.on_first(&report);
        }
        if let Some(result) = self.half.take() {
            let Report::Host(host) = report else {
                let expected = "what the host saw";
                return Err(SessionError::Order { found: name(&report), expected });
            };
            return Ok(Step::Run(Box::new(Run::new(self.boot, result, host)?)));
        }
        let Some(workload) = self.left.pop_front() else {
            return Err(SessionError::Order { found: name(&report), expected: "nothing" });
        };
        match report {
            Report::Result(result) if result.workload == workload => {
                self.half = Some(result);
                Ok(Step::More)
            }
            Report::Result(_) => Err(SessionError::OtherWorkload),
            Report::Error { message } => Ok(Step::Refused(format!(
                "{:?} with {} threads: {message}",
                workload.kind, workload.threads
            ))),
            other => Err(SessionError::Order { found: name(&other), expected: "a result" }),
        }
    }

    fn on_first(&mut self, report: &Report) -> Result<Step, SessionError> {
        match *report {
            Report::Hello { protocol, .. } if protocol != PROTOCOL => {
                Err(SessionError::Protocol(protocol))
            }
            Report::Hello { cpus, .. } if cpus != self.boot.vcpus => {
                Err(SessionError::Processors { found: cpus, ordered: self.boot.vcpus })
            }
            Report::Hello { .. } => {
                self.greeted = true;
                Ok(Step::Up)
            }
            _ => Err(SessionError::Order { found: name(report), expected: "its greeting" }),
        }
    }

    /// Whether every workload has had its report.
    pub(super) fn is_over(&self) -> bool {
        self.greeted && self.left.is_empty() && self.half.is_none()
    }

    /// How many workloads have had none.
    pub(super) fn missing(&self) -> usize {
        self.left.len() + usize::from(self.half.is_some())
    }
}

fn name(report: &Report) -> &'static str {
    match report {
        Report::Hello { .. } => "a greeting",
        Report::Result(_) => "a result",
        Report::Exec { .. } => "the end of a command",
        Report::Error { .. } => "an error",
        Report::Host(_) => "what the host saw",
    }
}

#[cfg(test)]
mod tests {
    use super::super::document::tests::{BOOT, host, result, workload};
    use super::*;
    use nowait_wire::agent::{Kind, encode_line};
    use proptest::prelude::*;

    fn hello(protocol: u32, cpus: u32) -> Vec<u8> {
        let hello = Report::Hello { protocol, kernel: "6.12".into(), cpus, mem_total_kib: 1 };
        encode_line(&hello).unwrap()
    }

    fn report(kind: Kind) -> Vec<u8> {
        encode_line(&Report::Result(result(&workload(kind), 2))).unwrap()
    }

    fn seen() -> Vec<u8> {
        encode_line(&Report::Host(host())).unwrap()
    }

    /// A report of a run, and what the host saw of it.
    fn run(session: &mut Session, line: &[u8]) -> Result<Run, SessionError> {
        match session.on_line(line)? {
            Step::More => match session.on_line(&seen())? {
                Step::Run(run) => Ok(*run),
                other => panic!("{other:?}"),
            },
            other => panic!("{other:?}"),
        }
    }

    fn session() -> Session {
        Session::new(BOOT, &[workload(Kind::Idle), workload(Kind::User), workload(Kind::Copy)])
    }

    #[test]
    fn a_boot_with_three_runs_of_which_one_is_refused() {
        let mut session = session();
        assert!(matches!(session.on_line(&hello(PROTOCOL, 2)).unwrap(), Step::Up));
        let idle = run(&mut session, &report(Kind::Idle)).unwrap();
        assert_eq!((idle.workload, idle.vcpus, idle.complete), (Kind::Idle, 2, true));
        let error = Report::Error { message: "no port".into() };
        let Step::Refused(why) = session.on_line(&encode_line(&error).unwrap()).unwrap() else {
            panic!()
        };
        assert_eq!(why, "User with 1 threads: no port");
        assert_eq!((session.missing(), session.is_over()), (1, false));
        assert!(matches!(session.on_line(&report(Kind::Copy)).unwrap(), Step::More));
        assert_eq!((session.missing(), session.is_over()), (1, false));
        assert!(matches!(session.on_line(&seen()).unwrap(), Step::Run(_)));
        assert!(session.is_over());
        assert!(matches!(session.on_line(&report(Kind::Copy)), Err(SessionError::Order { .. })));
    }

    #[test]
    fn a_greeting_of_another_guest_is_refused() {
        let error = |line: &[u8]| session().on_line(line).unwrap_err();
        assert!(matches!(error(&hello(PROTOCOL + 1, 2)), SessionError::Protocol(_)));
        let processors = error(&hello(PROTOCOL, 1));
        assert_eq!(processors.to_string(), "the guest has 1 processors online of 2");
        assert!(matches!(error(&report(Kind::Idle)), SessionError::Order { .. }));
    }

    #[test]
    fn reports_out_of_order_and_garbage_end_it() {
        let mut session = session();
        let _ = session.on_line(&hello(PROTOCOL, 2)).unwrap();
        assert!(matches!(session.on_line(&report(Kind::Copy)), Err(SessionError::OtherWorkload)));
        assert!(matches!(
            session.on_line(&hello(PROTOCOL, 2)),
            Err(SessionError::Order { found: "a greeting", .. })
        ));
        assert!(matches!(session.on_line(b"{"), Err(SessionError::Line(_))));
        let mut session = self::session();
        let _ = session.on_line(&hello(PROTOCOL, 2)).unwrap();
        assert!(matches!(session.on_line(&seen()), Err(SessionError::Order { .. })));
        let mut session = self::session();
        let _ = session.on_line(&hello(PROTOCOL, 2)).unwrap();
        assert!(matches!(session.on_line(&report(Kind::Idle)), Ok(Step::More)));
        assert!(matches!(
            session.on_line(&report(Kind::User)),
            Err(SessionError::Order { found: "a result", .. })
        ));
    }

    proptest! {
        #[test]
        fn a_hostile_guest_only_makes_errors(
            deadlines: u64, elapsed_us: u64, pages_touched: u64, cpu: u32, cut in 0_usize..400,
        ) {
            let mut result = result(&workload(Kind::User), 2);
            (result.elapsed_us, result.pages_touched) = (elapsed_us, pages_touched);
            (result.heartbeats[0].deadlines, result.heartbeats[0].cpu) = (deadlines, cpu);
            let mut line = encode_line(&Report::Result(result)).unwrap();
            let mut session = Session::new(BOOT, &[workload(Kind::User)]);
            let _ = session.on_line(&hello(PROTOCOL, 2)).unwrap();
            if let Ok(Step::More) = session.on_line(&line)
                && let Ok(Step::Run(run)) = session.on_line(&seen())
            {
                prop_assert!(!run.complete);
                prop_assert!(run.pages_per_s.is_finite());
            }
            line.truncate(cut);
            let _ = session.on_line(&line);
        }
    }
}

//! The report's logic over made-up steps, the watchdog over processes that misbehave, and the
//! probe itself on this host, whose KVM may or may not run guests.

use std::process::Command;
use std::time::{Duration, Instant};

use super::*;

fn passed(step: Step) -> StepReport {
    StepReport { step, outcome: Outcome::Passed }
}

fn failed(step: Step) -> StepReport {
    StepReport { step, outcome: Outcome::Failed { reason: "because".to_owned() } }
}

#[test]
fn all_steps_passed_is_yes() {
    let report = ProbeReport::new(&Step::ALL.map(passed), "");
    assert!(report.can_run());
    assert_eq!(report.steps.len(), Step::ALL.len());
}

#[test]
fn a_failed_marker_alone_leaves_the_verdict_at_yes() {
    let mut steps = Step::ALL.map(passed);
    steps[5] = failed(Step::PoisonMarker);
    let report = ProbeReport::new(&steps, "");
    assert!(report.can_run());
    assert!(matches!(report.outcome(Step::PoisonMarker), Some(Outcome::Failed { .. })));
}

#[test]
fn the_first_needed_step_that_failed_is_the_verdict_and_later_ones_are_skipped() {
    let steps = [
        passed(Step::Create),
        passed(Step::PortWrite),
        failed(Step::Int3),
        passed(Step::PoisonMarker),
    ];
    let report = ProbeReport::new(&steps, "never used");
    assert_eq!(report.verdict, Verdict::No { step: Step::Int3, reason: "because".to_owned() });
    for step in [Step::Iretq, Step::Halt] {
        let Some(Outcome::Skipped { reason }) = report.outcome(step) else {
            panic!("{step:?}: {:?}", report.outcome(step));
        };
        assert!(reason.contains("INT3"), "{reason}");
    }
    assert_eq!(report.outcome(Step::PoisonMarker), Some(&Outcome::Passed));
}

#[test]
fn the_guests_image_lies_in_its_ram_without_overlap_and_off_the_marked_page() {
    let mut end_of_last = 0;
    for (gpa, bytes) in guest::image() {
        assert!(gpa >= end_of_last, "{gpa:#x} overlaps what ends at {end_of_last:#x}");
        end_of_last = gpa + bytes.len();
    }
    assert!(end_of_last <= guest::MARKED_PAGE);
    const { assert!(guest::MARKED_PAGE < guest::RAM_BYTES) };
}

#[test]
fn a_step_is_one_json_line_that_reads_back() {
    let line = serde_json::to_string(&failed(Step::Int3)).unwrap();
    assert_eq!(line, r#"{"step":"int3","outcome":"failed","reason":"because"}"#);
    assert_eq!(serde_json::from_str::<StepReport>(&line).unwrap(), failed(Step::Int3));
}

fn shell(script: &str) -> Command {
    let mut command = Command::new("/bin/sh");
    command.args(["-c", script]);
    command
}

const FIRST_STEPS: &str = r#"echo '{"step":"create","outcome":"passed"}'
    echo noise; echo '{"step":"port-write","outcome":"passed"}';"#;

#[test]
fn a_probe_that_hangs_is_killed_and_the_step_it_hung_in_is_named() {
    let started = Instant::now();
    let hang = shell(&format!("{FIRST_STEPS} exec sleep 60"));
    let report = watch::run(hang, Duration::from_millis(300));
    assert!(started.elapsed() < Duration::from_secs(30), "{:?}", started.elapsed());
    let Verdict::No { step: Step::Int3, reason } = report.verdict else {
        panic!("{report:?}");
    };
    assert_eq!(reason, "no answer within 0.3 s");
}

#[test]
fn a_probe_that_dies_is_a_failed_step_with_the_signal() {
    let report = watch::run(shell(&format!("{FIRST_STEPS} kill -BUS $$")), WATCHDOG);
    let Verdict::No { step: Step::Int3, reason } = report.verdict else {
        panic!("{report:?}");
    };
    assert_eq!(reason, format!("the probe was killed by signal {}", libc::SIGBUS));
}

#[test]
fn a_probe_that_cannot_start_or_says_nothing_fails_the_first_step() {
    let missing = watch::run(Command::new("/nonexistent/probe"), WATCHDOG);
    let Verdict::No { step: Step::Create, reason } = missing.verdict else {
        panic!("{missing:?}");
    };
    assert!(reason.contains("/nonexistent/probe"), "{reason}");
    let silent = watch::run(shell("exit 2"), WATCHDOG);
    assert!(matches!(silent.verdict, Verdict::No { step: Step::Create, .. }), "{silent:?}");
}

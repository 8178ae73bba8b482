//! Runs and gates as JUnit XML, which CI systems show.

use std::time::Duration;

use quick_junit::{NonSuccessKind, Report, TestCase, TestCaseStatus, TestSuite};

use super::document::{Document, Run};
use super::summary::workload_name;

/// The report.
pub(super) fn render(document: &Document) -> Result<Vec<u8>, String> {
    let mut report = Report::new("nowait stall");
    let mut runs = TestSuite::new(format!("{}: runs", document.config.scenario.name));
    for run in &document.runs {
        runs.add_test_case(of_run(run));
    }
    for failure in &document.failures {
        let name = format!("{}, {} vCPUs, round {}", failure.apf, failure.vcpus, failure.round);
        runs.add_test_case(TestCase::new(name, failed(NonSuccessKind::Error, &failure.message)));
    }
    let told = !document.failures.is_empty() || document.runs.iter().any(|run| !run.complete);
    if !document.complete && !told {
        let ended = failed(NonSuccessKind::Error, "it ended before all runs were made");
        runs.add_test_case(TestCase::new("all runs", ended));
    }
    report.add_test_suite(runs);
    if !document.gates.is_empty() {
        let mut gates = TestSuite::new(format!("{}: gates", document.config.scenario.name));
        for gate in &document.gates {
            let status = if gate.passed {
                TestCaseStatus::success()
            } else {
                failed(NonSuccessKind::Failure, &gate.failures.join("\n"))
            };
            gates.add_test_case(TestCase::new(gate.gate.clone(), status));
        }
        report.add_test_suite(gates);
    }
    let mut bytes = Vec::new();
    report.serialize(&mut bytes).map_err(|error| error.to_string())?;
    Ok(bytes)
}

fn of_run(run: &Run) -> TestCase {
    let workload = workload_name(run.workload);
    let name = format!(
        "{workload}, {} threads, {} vCPUs, {}, round {}",
        run.threads, run.vcpus, run.apf, run.round
    );
    let status = match (&run.problem, run.data_errors) {
        (Some(problem), _) => failed(NonSuccessKind::Error, problem),
        (None, 0) => TestCaseStatus::success(),
        (None, errors) => {
            let message = format!("{errors} pages did not hold what was written to them");
            failed(NonSuccessKind::Failure, &message)
        }
    };
    let mut case = TestCase::new(name, status);
    case.set_time(Duration::from_micros(run.elapsed_us));
    let overrun = run.overrun_us;
    for (name, value) in [
        ("overrun_us.p50", overrun.p50.to_string()),
        ("overrun_us.p99", overrun.p99.to_string()),
        ("overrun_us.max", overrun.max.to_string()),
        ("pages_per_s", format!("{:.1}", run.pages_per_s)),
    ] {
        case.add_property((name, value.as_str()));
    }
    case
}

fn failed(kind: NonSuccessKind, message: &str) -> TestCaseStatus {
    let mut status = TestCaseStatus::non_success(kind);
    status.set_message(message);
    status
}

#[cfg(test)]
mod tests {
    use super::super::document::Failure;
    use super::super::document::tests::{BOOT, host, planned, result, workload};
    use super::super::{Gate, Run};
    use super::*;
    use nowait_wire::agent::Kind;

    #[test]
    fn runs_and_gates_are_test_cases_and_what_is_wrong_with_them_is_a_failure() {
        let (plan, mut document) = planned(&[]);
        for kind in [Kind::Idle, Kind::User] {
            document.runs.push(Run::new(BOOT, result(&workload(kind), 2), host()).unwrap());
        }
        document.runs[1].data_errors = 2;
        document.failures.push(Failure::new(BOOT, "it said <boom> & \u{1}".into()));
        document.judge(&plan);
        for gate in ["host.overrun.max > 1us", "host.overrun.max > 1s"] {
            let gate: Gate = gate.parse().unwrap();
            document.gates.push(gate.judge(&document.summary));
        }
        let xml = String::from_utf8(render(&document).unwrap()).unwrap();
        let report = Report::deserialize_from_str(&xml).unwrap();
        assert_eq!((report.tests, report.failures, report.errors), (5, 2, 1));
        assert!(xml.contains("2 pages did not hold") && xml.contains("&lt;boom&gt;"), "{xml}");
    }

    #[test]
    fn a_measurement_that_ended_early_is_an_error() {
        let (_, mut document) = planned(&[]);
        document.runs.push(Run::new(BOOT, result(&workload(Kind::Idle), 2), host()).unwrap());
        let xml = String::from_utf8(render(&document).unwrap()).unwrap();
        let report = Report::deserialize_from_str(&xml).unwrap();
        assert_eq!((report.tests, report.failures, report.errors), (2, 0, 1));
        document.complete = true;
        let xml = String::from_utf8(render(&document).unwrap()).unwrap();
        assert_eq!(Report::deserialize_from_str(&xml).unwrap().errors, 0);
    }
}

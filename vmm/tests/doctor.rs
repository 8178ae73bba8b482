//! `nowait doctor` and its probe guest on this host, whatever this host can do.

use std::process::{Command, Output};

fn nowait(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_nowait")).args(args).output().expect("nowait starts")
}

fn json(output: &Output) -> serde_json::Value {
    serde_json::from_slice(&output.stdout).expect("JSON on standard output")
}

#[test]
fn the_exit_code_is_the_verdict_and_every_failure_has_a_remedy() {
    let output = nowait(&["doctor", "--json", "-"]);
    let report = json(&output);
    assert_eq!(report["schema"], "nowait.doctor/1");
    let host = report["verdict"]["host"].as_bool().expect("a verdict");
    assert_eq!(output.status.code(), Some(if host { 0 } else { 6 }));
    for check in report["checks"].as_array().expect("checks") {
        let status = check["status"].as_str().expect("a status");
        assert!(["pass", "warn", "fail", "skip"].contains(&status), "{check}");
        assert!(!check["found"].as_str().expect("what was found").is_empty(), "{check}");
        if matches!(status, "warn" | "fail") {
            assert!(!check["remedy"].as_str().expect("a remedy").is_empty(), "{check}");
        }
    }
}

#[test]
fn the_probe_takes_every_step_it_can_and_is_never_killed() {
    let report = json(&nowait(&["doctor", "--json", "-"]));
    let steps = report["probe"]["steps"].as_array().expect("the probe's steps");
    assert!(!steps.is_empty());
    for step in steps {
        let text = step.to_string();
        assert!(!text.contains("killed") && !text.contains("no answer"), "{step}");
    }
}

#[test]
fn a_file_that_cannot_be_written_is_refused_before_the_work() {
    let output = nowait(&["doctor", "--json", "/nonexistent/doctor.json"]);
    assert_eq!(output.status.code(), Some(4));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    assert!(stderr.contains("/nonexistent/doctor.json"), "{stderr}");
}

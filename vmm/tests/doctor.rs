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

/// As much of a bzImage as is looked at before the host is.
fn kernel() -> Vec<u8> {
    let mut bytes = vec![0; 4096];
    bytes[0x1f1] = 1;
    bytes[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    bytes[0x202..0x206].copy_from_slice(b"HdrS");
    bytes[0x206..0x208].copy_from_slice(&0x020f_u16.to_le_bytes());
    bytes[0x211] = 1;
    bytes[0x236] = 1;
    bytes
}

#[test]
fn a_host_that_runs_no_guests_is_refused_before_one_is_built() {
    let report = json(&nowait(&["doctor", "--json", "-"]));
    if report["verdict"]["host"] == true {
        println!("skipped: this host runs guests");
        return;
    }
    let checks = report["checks"].as_array().expect("checks");
    let guest =
        checks.iter().find(|check| check["name"] == "kvm.guest").expect("the probe's check");
    // Without /dev/kvm that is said, and with it why its guest did not run.
    let expected = match guest["status"].as_str() {
        Some("fail") => "this KVM cannot run guests (it stops at",
        _ => "nowait: ",
    };
    let dir = tempfile::tempdir().expect("a directory");
    let kernel_file = dir.path().join("bzImage");
    std::fs::write(&kernel_file, kernel()).expect("a kernel");
    let kernel = kernel_file.to_str().expect("UTF-8");
    for command in [
        &["run", "--kernel", kernel][..],
        &["stall", "--kernel", kernel, "--initrd", "/dev/null", "--scenario", "quick"],
    ] {
        let output = nowait(command);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(6), "{command:?}: {stderr}");
        assert_eq!(stderr.lines().count(), 1, "{stderr}");
        assert!(stderr.contains(expected), "{stderr}");
    }
}

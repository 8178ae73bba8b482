//! `nowait doctor` where guests run: it says so, and its JSON agrees.

use std::process::Command;
use std::time::Duration;

use nowait_tests::{nowait_bin, process};

use crate::Test;

pub(crate) const TESTS: &[Test] = &[("a_host_that_runs_guests_passes", passes)];

fn passes() {
    let limit = Duration::from_secs(60);
    let text = process::run(Command::new(nowait_bin()).arg("doctor"), limit);
    text.expect_code(0);
    let json = process::run(Command::new(nowait_bin()).args(["doctor", "--json", "-"]), limit);
    json.expect_code(0);
    let json: serde_json::Value = serde_json::from_str(&json.stdout).expect("JSON");
    assert_eq!(json["schema"], "nowait.doctor/1");
    assert_eq!(json["verdict"]["host"], true);
    let checks = json["checks"].as_array().expect("a list of checks");
    for name in ["kvm.device", "kvm.guest", "uffd.access", "uffd.feature.minor-shmem"] {
        let check = checks.iter().find(|check| check["name"] == name);
        assert_eq!(check.expect(name)["status"], "pass", "{name}");
        assert!(text.stdout.contains(name), "{name} is not in the table");
    }
    // The marker is optional, but its result must be shown.
    assert!(checks.iter().any(|check| check["name"] == "kvm.poison-marker"));
}

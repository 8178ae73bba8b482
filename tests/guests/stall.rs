//! `nowait stall`: the table, its JSON, and its manners.

use std::fs;
use std::process::{Command, Stdio};
use std::time::Duration;

use nowait_tests::{initramfs, nowait_bin, process, vmlinux};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::Test;

pub(crate) const TESTS: &[Test] = &[
    ("the_table_has_every_row_and_no_data_errors", table),
    ("a_second_run_may_not_write_the_same_file", same_file),
    ("a_signal_ends_it_with_its_guest", signal),
];

const LIMIT: Duration = Duration::from_secs(240);

fn stall(json: &std::path::Path) -> Command {
    let mut command = Command::new(nowait_bin());
    command.arg("stall").arg("--kernel").arg(vmlinux()).arg("--initrd").arg(initramfs());
    command.args(["--duration", "400ms", "--store", "delay=5ms"]).arg("--json").arg(json);
    command
}

fn table() {
    let files = TempDir::new().expect("a temporary directory");
    let json = files.path().join("stall.json");
    let end = process::run(stall(&json).args(["--cpus", "1,2", "--apf", "host,kernel"]), LIMIT);
    end.expect_code(0);
    let json: serde_json::Value =
        serde_json::from_slice(&fs::read(&json).expect("the JSON is there")).expect("JSON");
    assert_eq!(json["schema"], "nowait.stall/1");
    assert!(json["host"]["kernel"].is_string());
    assert!(["kvm", "nested"].contains(&json["host"]["accel"].as_str().expect("accel")));
    let runs = json["runs"].as_array().expect("runs");
    for apf in ["host", "kernel"] {
        for vcpus in [1, 2] {
            for (workload, threads) in
                [("idle", 0), ("user", 1), ("user", 8), ("copy", 1), ("copy", 8)]
            {
                let run = runs
                    .iter()
                    .find(|run| {
                        run["apf"] == apf
                            && run["vcpus"] == vcpus
                            && run["workload"] == workload
                            && run["threads"] == threads
                    })
                    .unwrap_or_else(|| panic!("no row {apf} {workload} {threads} {vcpus}"));
                assert_eq!(run["data_errors"], 0, "{run}");
                let us = |key: &str| run["overrun_us"][key].as_u64().expect("a number");
                assert!(us("p50") <= us("p90") && us("p90") <= us("p99") && us("p99") <= us("max"));
                assert!(us("count") > 100, "{run}");
                let rate = run["pages_per_s"].as_f64().expect("a number");
                assert!((workload == "idle") == (rate == 0.0), "{run}");
            }
        }
    }
    for word in ["apf", "p50", "p99", "idle", "copy", "kernel"] {
        assert!(end.stdout.contains(word), "'{word}' is not in\n{}", end.stdout);
    }
}

fn same_file() {
    let files = TempDir::new().expect("a temporary directory");
    let json = files.path().join("stall.json");
    let first =
        stall(&json).stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("it starts");
    std::thread::sleep(Duration::from_millis(500));
    let second = process::run(stall(&json).args(["--cpus", "1"]), LIMIT);
    stop(first);
    second.expect_refusal(4, &["stall.json"]);
}

fn signal() {
    let files = TempDir::new().expect("a temporary directory");
    let json = files.path().join("stall.json");
    let child =
        stall(&json).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it starts");
    std::thread::sleep(Duration::from_secs(2));
    assert!(guests() > 0, "a guest runs");
    stop(child);
    assert_eq!(guests(), 0, "no guest is left");
}

/// Sends SIGTERM and expects the documented end.
fn stop(child: std::process::Child) {
    let pid = Pid::from_raw(child.id().cast_signed()).expect("a pid");
    kill_process(pid, Signal::TERM).expect("the child runs");
    let end = process::finish(child, Duration::from_secs(30)).expect("it ends in time");
    end.expect_code(16);
}

/// How many `nowait run` processes there are.
fn guests() -> usize {
    fs::read_dir("/proc")
        .expect("/proc")
        .filter_map(|entry| fs::read(entry.ok()?.path().join("cmdline")).ok())
        .filter(|cmdline| {
            let mut words = cmdline.split(|byte| *byte == 0);
            let program = words.next().unwrap_or_default();
            (program.ends_with(b"nowait") || program.ends_with(b"exe"))
                && words.next() == Some(b"run")
        })
        .count()
}

//! `nowait stall`: the table, its JSON, and its manners.

use std::fs;
use std::process::{Command, Stdio};
use std::time::Duration;

use nowait_tests::small_disk::SmallDisk;
use nowait_tests::{initramfs, nowait_bin, process, vmlinux};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::Test;

pub(crate) const TESTS: &[Test] = &[
    ("the_table_has_every_row_and_no_data_errors", table),
    ("a_second_run_may_not_write_the_same_file", same_file),
    ("a_signal_ends_it_with_its_guest", signal),
    ("a_gate_that_fails_ends_it_with_3_and_its_results", gates),
    ("a_command_of_the_guest_has_a_heartbeat_beside_it", command),
    ("bad_scenarios_and_gates_are_refused_by_name", refused),
];
pub(crate) const ROOT_TESTS: &[Test] =
    &[("a_store_that_is_full_makes_the_result_partial", full_store)];

const LIMIT: Duration = Duration::from_secs(240);

fn stall(json: &std::path::Path) -> Command {
    let mut command = stall_of(json, "400ms");
    command.args(["--store", "delay=5ms"]);
    command
}

fn stall_of(json: &std::path::Path, duration: &str) -> Command {
    let mut command = Command::new(nowait_bin());
    command.arg("stall").arg("--kernel").arg(vmlinux()).arg("--initrd").arg(initramfs());
    command.args(["--duration", duration]).arg("--json").arg(json);
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

/// A file in a directory, with this content.
fn file(files: &TempDir, name: &str, content: &str) -> String {
    let path = files.path().join(name);
    fs::write(&path, content).expect("it can be written");
    path.display().to_string()
}

/// A short scenario with some lines more.
fn scenario(more: &str) -> String {
    format!("name = \"short\"\nduration = \"300ms\"\nthreads = [1]\nvia = [\"user\"]\n{more}")
}

fn full_store() {
    let files = TempDir::new().expect("a temporary directory");
    let disk = SmallDisk::new("2M");
    let store = format!("file={}", disk.path().display());
    let more = format!("memory = \"96M\"\nresident_limit = \"32M\"\nstore = \"{store}\"\n");
    let name = file(&files, "full.toml", &scenario(&more));
    let json = files.path().join("stall.json");
    let mut command = Command::new(nowait_bin());
    command.arg("stall").arg("--kernel").arg(vmlinux()).arg("--initrd").arg(initramfs());
    command.args(["--scenario", &name, "--cpus", "1", "--apf", "off", "--json"]).arg(&json);
    let end = process::run(&mut command, LIMIT);
    end.expect_code(18);
    let json: serde_json::Value =
        serde_json::from_slice(&fs::read(&json).expect("the JSON is there")).expect("JSON");
    assert_eq!(json["complete"], false);
    let message = json["failures"][0]["message"].as_str().expect("a failure");
    assert!(message.contains("the resident limit may be exceeded"), "{message}");
}

fn gates() {
    let files = TempDir::new().expect("a temporary directory");
    let at = |name: &str| files.path().join(name).display().to_string();
    let given = file(
        &files,
        "s.toml",
        &scenario(
            "modes = [\"off\", \"user\"]\nrounds = 2\nresident_limit = \"40M\"\nbuffer = \"48M\"\n\
         store = \"delay=2ms+memory\"\ncompute_per_cpu = 1\nwrite_percent = 20\nwarm_up = \"100ms\"\n\
         access = \"zipf\"\n",
        ),
    );
    let reports =
        ["--json", "--markdown", "--junit", "--hlog"].map(|option| (option, at(&option[2..])));
    let run = |more: &[&str]| {
        let mut command = Command::new(nowait_bin());
        command.args(["stall", "--scenario", &given, "--kernel"]).arg(vmlinux());
        command.arg("--initrd").arg(initramfs()).args(more);
        process::run(&mut command, LIMIT)
    };
    let outputs: Vec<&str> = reports.iter().flat_map(|(option, path)| [*option, path]).collect();
    let fails = ["--fail-if", "off.overrun.max > 1us", "--fail-if", "user.work < 1"];
    let end = run(&[&outputs[..], &fails].concat());
    end.expect_code(3);
    for text in
        ["gate FAILED: off.overrun.max > 1us", "gate passed: user.work < 1", "work over off"]
    {
        assert!(end.stdout.contains(text), "'{text}' is not in\n{}", end.stdout);
    }
    assert!(end.stderr.contains("1 of 2 gates failed"), "{}", end.stderr);
    let read = |index: usize| fs::read_to_string(&reports[index].1).expect("it is written");
    let json: serde_json::Value = serde_json::from_str(&read(0)).expect("JSON");
    assert_eq!(
        (&json["complete"], &json["runs"].as_array().expect("runs").len()),
        (&true.into(), &8)
    );
    assert_eq!(json["gates"][0]["passed"], false);
    let shares = json["runs"].as_array().expect("runs").iter().map(|run| &run["stall"]["share"]);
    assert!(
        shares.clone().all(|share| share.as_f64().is_some_and(|share| share < 1.0)),
        "{shares:?}"
    );
    assert!(read(1).contains("**failed**") && read(2).contains("off.overrun.max"));
    assert!(read(3).contains("Tag=user-user-1t-1cpu-r2"), "{}", read(3));

    // The same again is no worse by 100 times; and another scenario is no baseline.
    let baseline = ["--baseline", &reports[0].1, "--tolerance", "1000%", "--rounds", "1"];
    run(&baseline).expect_code(0);
    let other = [&baseline[..], &["--seed", "2"]].concat();
    run(&other).expect_refusal(4, &["--baseline", "differing: seed"]);
}

fn command() {
    for (words, duration, code, said) in [
        (
            "dd if=/dev/zero of=/run/x bs=64k count=64 2> /dev/null && echo done",
            "10s",
            0,
            "command",
        ),
        ("echo so; exit 7", "10s", 18, "the command ended with status 7: so"),
        ("kill -9 $$", "10s", 18, "the command ended with status 137"),
        ("sleep 1000", "500ms", 18, "did not end"),
        ("echo garbage > /dev/ttyS1; sleep 1", "10s", 18, "the agent channel carried a line"),
    ] {
        let files = TempDir::new().expect("a temporary directory");
        let json = files.path().join("stall.json");
        let mut command = stall_of(&json, duration);
        command.args(["--cpus", "1", "--apf", "off", "--", words]);
        let end = process::run(&mut command, LIMIT);
        end.expect_code(code);
        let all = format!("{}{}", end.stdout, end.stderr);
        assert!(all.contains(said), "{words}: '{said}' is not in\n{all}");
        let json = fs::read(&json).expect("what there is, is written");
        let json: serde_json::Value = serde_json::from_slice(&json).expect("JSON");
        assert_eq!(json["complete"], code == 0, "{words}");
        assert_eq!(json["runs"][0]["workload"], "idle", "{words}");
        if code == 0 {
            assert_eq!(json["runs"][1]["command"]["output"], "done\n");
            assert!(json["runs"][1]["overrun_us"]["count"].as_u64() > Some(0));
        }
    }
}

fn refused() {
    let files = TempDir::new().expect("a temporary directory");
    let json = files.path().join("stall.json");
    let run = |words: &[&str]| process::run(stall(&json).args(words), LIMIT);
    for (text, words) in [
        ("colour = 1", ["line 5", "colour"]),
        ("cpus = [1", ["line", "s.toml"]),
        ("modes = [\"fast\"]", ["line 5: modes", "`fast`"]),
        ("cpus = [64]", ["line 5: cpus", "64"]),
        ("resident_limit = \"4G\"", ["line 5: resident_limit", "4 GiB"]),
    ] {
        let given = file(&files, "s.toml", &scenario(text));
        run(&["--scenario", &given]).expect_refusal(4, &words);
    }
    run(&["--scenario", "nothing.toml"]).expect_refusal(4, &["nothing.toml", "overcommit"]);
    run(&["--fail-if", "off.work < 1"]).expect_refusal(4, &["off.work < 1", "compute_per_cpu"]);
    run(&["--fail-if", "off.overrun.p99 >"]).expect_refusal(2, &["--fail-if"]);
    let old = file(&files, "old.json", "{\"schema\":\"nowait.stall/0\"}");
    let baseline = ["--baseline", &old, "--tolerance", "10%"];
    run(&baseline).expect_refusal(4, &["old.json", "nowait.stall/0"]);
    assert!(!json.exists(), "nothing was measured");
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

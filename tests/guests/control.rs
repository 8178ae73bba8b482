//! The control socket: it answers while pages are outstanding, and holds the guest's processors.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::thread;
use std::time::Duration;

use nowait_tests::running::{ANSWER_LIMIT, Running};
use nowait_tests::{nowait_bin, process, vmlinux};
use nowait_wire::agent::{Kind, Request, Workload};
use serde_json::Value;
use tempfile::TempDir;

use crate::Test;

pub(crate) const TESTS: &[Test] = &[
    ("it_answers_with_pages_outstanding_and_pauses", outstanding),
    ("a_guest_whose_store_fails_goes_on_when_told_to", store_in_trouble),
    ("a_path_that_exists_is_refused", exists),
    ("pages_and_stalls_are_shown_and_the_threshold_changes", shown),
    ("a_threshold_is_refused_where_there_is_none", no_threshold),
];

/// How long anything else may take.
const LIMIT: Duration = Duration::from_secs(60);
/// What the store takes for a page.
const PAGE: Duration = Duration::from_secs(2);

/// A guest whose threads touch evicted pages for a minute.
fn start(args: &[&str]) -> Running {
    start_with(args, Vec::new())
}

/// As [`start`], with what it has to do before.
fn start_with(args: &[&str], mut requests: Vec<Request>) -> Running {
    let args = [&["--no-prefetch"], args].concat();
    let (threads, duration_ms, pages) = (4, 60_000, 512);
    let touch = Workload { kind: Kind::User, threads, duration_ms, pages, ..Workload::IDLE };
    requests.push(Request::Run(touch));
    Running::start(&args, &requests)
}

/// A guest's command that touches 8M which nobody has touched, on each of two vCPUs: booting may leave
/// the second one with none.
const TOUCH_ON_EACH: &str = "for vcpu in 0 1; do \
    taskset -c $vcpu dd if=/dev/zero of=/fresh$vcpu bs=1M count=8; done";

fn outstanding() {
    for apf in ["kernel", "off"] {
        let run = start(&["--apf", apf, "--store", &format!("delay={PAGE:?}")]);
        let mode = fs::metadata(run.socket()).expect("the socket is there").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        run.wait_until("nowait_outstanding", |pages| pages > Some(0.0));
        let mut times: Vec<Duration> = (0..50).map(|_| run.ask("GET /metrics", "").2).collect();
        times.sort_unstable();
        println!(
            "--apf {apf}: GET /metrics took {:?} at the median, {:?} at most",
            times[25], times[49]
        );
        assert!(times[49] < ANSWER_LIMIT, "{times:?}");

        run.tell("POST /pause", "");
        run.wait_until("nowait_vcpus_paused", |vcpus| vcpus == Some(1.0));
        // What was on its way comes, and nothing else is asked for.
        run.wait_until("nowait_outstanding", |pages| pages == Some(0.0));
        let before = run.progress();
        thread::sleep(2 * PAGE);
        assert_eq!(run.progress(), before, "the guest runs although it is paused");
        run.tell("POST /resume", "");
        run.wait_until("nowait_fetched_pages_total", |pages| pages > before[0]);
        assert_eq!(run.metric(r#"nowait_paused{reason="user"}"#), Some(0.0));

        run.tell("PUT /limit", "64M");
        let limit = "nowait_resident_limit_bytes";
        run.wait_until(limit, |bytes| bytes == Some(67_108_864.0));
        assert_eq!(run.ask("PUT /limit", "1M").0, 400);
        run.tell("POST /limit", "none");
        run.wait_until(limit, |bytes| bytes.is_none());
        let said = run.end();
        assert!(said.contains("paused by the control socket"), "{said}");
        assert!(said.contains("goes on by the control socket"), "{said}");
    }
}

fn store_in_trouble() {
    let run = start(&["--store", "fail=read:rate=1"]);
    let (store, user) = (r#"nowait_paused{reason="store"}"#, r#"nowait_paused{reason="user"}"#);
    run.wait_until(store, |paused| paused == Some(1.0));
    run.wait_until("nowait_vcpus_paused", |vcpus| vcpus == Some(1.0));
    run.tell("POST /pause", "");
    assert_eq!(run.metric(user), Some(1.0));
    run.tell("POST /resume", "");
    assert_eq!((run.metric(store), run.metric(user)), (Some(0.0), Some(0.0)));
    run.wait_until("nowait_vcpus_paused", |vcpus| vcpus == Some(0.0));
    // It is still in the same trouble, which is no reason any more.
    assert_eq!(run.metric(r#"nowait_store_failing{operation="read"}"#), Some(1.0));
    let said = run.end();
    assert!(said.contains("until its store answers again"), "{said}");
    assert!(said.contains("its store does not answer yet"), "{said}");
}

/// The sum of a state over all cells of an answer to `/pages`.
fn pages(answer: &Value, state: &str) -> u64 {
    let cells = answer["cells"].as_array().expect("cells");
    cells.iter().map(|cell| cell[state].as_u64().expect("a number")).sum()
}

fn shown() {
    let store = format!("delay={PAGE:?}");
    let args = ["--apf", "user", "--apf-threshold", "1ms", "--cpus", "2", "--store", &store];
    let run = start_with(&args, vec![Request::Exec { command: TOUCH_ON_EACH.into() }]);
    run.wait_until("nowait_outstanding", |pages| pages > Some(0.0));

    // Pages by state, in milliseconds, while the store takes seconds.
    for cells in [1, 64, 1024] {
        let (code, json, took) = run.ask(&format!("GET /pages?cells={cells}"), "");
        println!("GET /pages?cells={cells}: {took:?}");
        assert!(code == 200 && took < ANSWER_LIMIT, "{code} {took:?}");
        let answer: Value = serde_json::from_str(&json).expect("JSON");
        assert_eq!(answer["cells"].as_array().map(Vec::len), Some(cells));
        assert_eq!((&answer["pages"], &answer["sampled"]), (&Value::from(32768), &false.into()));
        let states =
            ["mapped", "pinned", "idle", "at_hand", "stored", "absent", "under_way", "lost"];
        let counts = states.map(|state| pages(&answer, state));
        println!("{states:?} {counts:?}");
        assert_eq!(counts.iter().sum::<u64>(), 32768);
        // kvmclock is, and what was evicted is not there.
        assert!(pages(&answer, "mapped") > 1000 && pages(&answer, "pinned") > 0);
        assert!(pages(&answer, "stored") > 0 && pages(&answer, "absent") > 0);
        assert_eq!(pages(&answer, "lost"), 0);
    }
    assert_eq!(run.ask("GET /pages?cells=0", "").0, 400);

    // Ages of what is outstanding.
    run.wait_until("nowait_outstanding_oldest_seconds", |age| age > Some(1.0));
    run.wait_until(r#"nowait_outstanding_by_age{below="+Inf"}"#, |pages| pages > Some(0.0));

    // Stalls by vCPU and cause.
    for vcpu in 0..2 {
        let series =
            |name: &str, cause: &str| format!(r#"nowait_{name}{{vcpu="{vcpu}",cause="{cause}"}}"#);
        run.wait_until(&series("vcpu_stalls_total", "zero"), |count| count > Some(0.0));
        run.wait_until(&series("vcpu_stall_seconds_total", "zero"), |time| time > Some(0.0));
        println!("vCPU {vcpu}: {:?} stalls", run.metric(&series("vcpu_stalls_total", "zero")));
        let now = run.metric(&format!(r#"nowait_vcpu_stalled_seconds{{vcpu="{vcpu}"}}"#));
        assert!(now.is_some_and(|now| (0.0..60.0).contains(&now)), "{now:?}");
    }

    // Another threshold, and the one that is measured.
    let threshold = "nowait_async_pf_threshold_seconds";
    assert_eq!(run.metric(threshold), Some(0.001));
    run.tell("PUT /threshold", "500us");
    assert_eq!(run.metric(threshold), Some(0.0005));
    run.tell("PUT /threshold", "auto");
    run.wait_until(threshold, |seconds| seconds != Some(0.0005));
    println!("auto: {:?}", run.metric(threshold));
    for bad in ["soon", "", "-1us", "2"] {
        assert_eq!(run.ask("PUT /threshold", bad).0, 400, "{bad}");
    }
    // Longer than the store takes: from here on vCPUs wait, and nobody is told.
    run.tell("PUT /threshold", "3600s");
    let told = r#"nowait_vcpu_stalls_total{vcpu="0",cause="waited"}"#;
    let before = run.metric(told);
    run.wait_until(told, |count| count > before);
    run.end();
}

fn no_threshold() {
    for apf in ["off", "kernel", "host"] {
        let run = start(&["--apf", apf, "--store", &format!("delay={PAGE:?}")]);
        // While it boots in an emulated machine, its VMM has hardly a processor.
        run.wait_until("nowait_outstanding", |pages| pages > Some(0.0));
        let (code, line, took) = run.ask("PUT /threshold", "500us");
        assert!(took < ANSWER_LIMIT, "{took:?}");
        assert_eq!(code, 409, "{line}");
        assert!(line.contains(&format!("--apf {apf}")) && line.contains("--apf user"), "{line}");
        let stalls = run.metric(r#"nowait_vcpu_stalled_seconds{vcpu="0"}"#);
        assert_eq!(stalls.is_some(), apf == "off", "--apf {apf}");
        run.end();
    }
}

fn exists() {
    let files = TempDir::new().expect("a temporary directory");
    let path = files.path().join("file");
    fs::write(&path, "precious").expect("a file can be written");
    let mut command = Command::new(nowait_bin());
    command.arg("run").arg("--kernel").arg(vmlinux()).arg("--control").arg(&path);
    process::run(&mut command, LIMIT).expect_refusal(4, &["--control", "exists", "name a path"]);
    assert_eq!(fs::read(&path).expect("it is there"), b"precious");
}

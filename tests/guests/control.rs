//! The control socket: it answers while pages are outstanding, and holds the guest's processors.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::thread;
use std::time::Duration;

use nowait_tests::running::{ANSWER_LIMIT, Running};
use nowait_tests::{nowait_bin, process, vmlinux};
use nowait_wire::agent::{Kind, Request, Workload};
use tempfile::TempDir;

use crate::Test;

pub(crate) const TESTS: &[Test] = &[
    ("it_answers_with_pages_outstanding_and_pauses", outstanding),
    ("a_guest_whose_store_fails_goes_on_when_told_to", store_in_trouble),
    ("a_path_that_exists_is_refused", exists),
];

/// How long anything else may take.
const LIMIT: Duration = Duration::from_secs(60);
/// What the store takes for a page.
const PAGE: Duration = Duration::from_secs(2);

/// A guest whose threads touch evicted pages for a minute.
fn start(args: &[&str]) -> Running {
    let args = [&["--no-prefetch"], args].concat();
    let (threads, duration_ms, pages) = (4, 60_000, 512);
    let touch = Workload { kind: Kind::User, threads, duration_ms, pages, ..Workload::IDLE };
    Running::start(&args, &[Request::Run(touch)])
}

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

fn exists() {
    let files = TempDir::new().expect("a temporary directory");
    let path = files.path().join("file");
    fs::write(&path, "precious").expect("a file can be written");
    let mut command = Command::new(nowait_bin());
    command.arg("run").arg("--kernel").arg(vmlinux()).arg("--control").arg(&path);
    process::run(&mut command, LIMIT).expect_refusal(4, &["--control", "exists", "name a path"]);
    assert_eq!(fs::read(&path).expect("it is there"), b"precious");
}

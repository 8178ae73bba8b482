//! The control socket: it answers while pages are outstanding, and holds the guest's processors.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nowait_tests::{initramfs, nowait_bin, process, vmlinux};
use nowait_wire::agent::{Kind, Request, Workload, encode_line};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::Test;

pub(crate) const TESTS: &[Test] = &[
    ("it_answers_with_pages_outstanding_and_pauses", outstanding),
    ("a_guest_whose_store_fails_goes_on_when_told_to", store_in_trouble),
    ("a_path_that_exists_is_refused", exists),
];

/// How long an answer may take on a machine that is emulated and busy; what it took is printed.
const ANSWER_LIMIT: Duration = Duration::from_millis(500);
/// How long anything else may take.
const LIMIT: Duration = Duration::from_secs(60);
/// What the store takes for a page.
const PAGE: Duration = Duration::from_secs(2);

/// A guest whose threads touch evicted pages for a minute.
struct Run {
    child: Child,
    socket: PathBuf,
    _files: TempDir,
}

impl Run {
    fn start(args: &[&str]) -> Self {
        let files = TempDir::new().expect("a temporary directory");
        let (socket, requests) = (files.path().join("control"), files.path().join("requests"));
        let workload = Workload {
            kind: Kind::User,
            threads: 4,
            duration_ms: 60_000,
            pages: 512,
            ..Workload::IDLE
        };
        let line = encode_line(&Request::Run(workload)).expect("a short request");
        fs::write(&requests, line).expect("the request can be written");
        let child = Command::new(nowait_bin())
            .args(["run", "--console", "none", "--no-prefetch"])
            .arg("--kernel")
            .arg(vmlinux())
            .arg("--initrd")
            .arg(initramfs())
            .arg("--requests")
            .arg(&requests)
            .arg("--control")
            .arg(&socket)
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("it starts");
        let run = Self { child, socket, _files: files };
        let started = Instant::now();
        while UnixStream::connect(&run.socket).is_err() {
            assert!(started.elapsed() < LIMIT, "no control socket");
            thread::sleep(Duration::from_millis(20));
        }
        run
    }

    /// Status and body of the answer, and how long it took.
    fn ask(&self, first_line: &str, body: &str) -> (u16, String, Duration) {
        let asked = Instant::now();
        let mut stream = UnixStream::connect(&self.socket).expect("the socket is there");
        stream.set_read_timeout(Some(LIMIT)).expect("a time-out");
        let length = body.len();
        let request = format!("{first_line} HTTP/1.1\r\nContent-Length: {length}\r\n\r\n{body}");
        stream.write_all(request.as_bytes()).expect("it reads");
        let mut reply = String::new();
        stream.read_to_string(&mut reply).expect("it answers");
        let took = asked.elapsed();
        let code = reply.split(' ').nth(1).and_then(|code| code.parse().ok());
        let body = reply.split_once("\r\n\r\n").expect("a head and a body").1.to_owned();
        (code.expect("a status"), body, took)
    }

    /// Has it do something, soon.
    fn tell(&self, first_line: &str, body: &str) {
        let (code, line, took) = self.ask(first_line, body);
        println!("{first_line} {body}: {took:?}");
        assert_eq!(code, 200, "{first_line}: {line}");
        assert!(took < ANSWER_LIMIT, "{first_line} took {took:?}");
    }

    /// One number, `None` when it is not shown.
    fn metric(&self, series: &str) -> Option<f64> {
        let (_, text, _) = self.ask("GET /metrics", "");
        let line =
            text.lines().find(|line| line.rsplit_once(' ').is_some_and(|l| l.0 == series))?;
        line.rsplit_once(' ').map(|(_, number)| number.parse().expect("a number"))
    }

    fn wait_until(&self, series: &str, holds: impl Fn(Option<f64>) -> bool) {
        let started = Instant::now();
        while !holds(self.metric(series)) {
            let found = self.metric(series);
            assert!(started.elapsed() < LIMIT, "{series} stays at {found:?}");
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// What grows while the guest runs.
    fn progress(&self) -> Vec<Option<f64>> {
        let names = ["fetched_pages", "retries", "messages_missing", "messages_minor"];
        names.map(|name| self.metric(&format!("nowait_{name}_total"))).to_vec()
    }

    /// Ends it with a signal; what it wrote to standard error.
    fn end(self) -> String {
        let pid = Pid::from_raw(self.child.id().cast_signed()).expect("a pid");
        kill_process(pid, Signal::TERM).expect("the child runs");
        let end = process::finish(self.child, LIMIT).expect("it ends in time");
        end.expect_code(16);
        assert!(!self.socket.exists(), "the socket is left");
        end.stderr
    }
}

fn outstanding() {
    for apf in ["kernel", "off"] {
        let run = Run::start(&["--apf", apf, "--store", &format!("delay={PAGE:?}")]);
        let mode = fs::metadata(&run.socket).expect("the socket is there").permissions().mode();
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
    let run = Run::start(&["--store", "fail=read:rate=1"]);
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

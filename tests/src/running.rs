//! A guest that runs while a test does something to it, by its control socket.

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nowait_wire::agent::{Report, Request, decode_line, encode_line};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::process::{self, Finished};
use crate::{control, initramfs, nowait_bin, vmlinux};

/// How long an answer may take on a machine that is emulated and busy; what it took is printed.
pub const ANSWER_LIMIT: Duration = Duration::from_millis(500);
/// How long anything else may take.
const LIMIT: Duration = Duration::from_secs(60);

/// A guest with a control socket.
#[derive(Debug)]
pub struct Running {
    /// Until it is waited for.
    child: Option<Child>,
    socket: PathBuf,
    report: PathBuf,
    _files: TempDir,
}

impl Running {
    /// Starts a guest whose agent does what these ask for; then it is powered off.
    ///
    /// # Panics
    /// When it does not start.
    #[must_use]
    pub fn start(args: &[&str], requests: &[Request]) -> Self {
        let all = requests.iter().chain([&Request::PowerOff]);
        let files = TempDir::new().expect("a temporary directory");
        let at = |name: &str| files.path().join(name);
        let (socket, file, report) = (at("control"), at("requests"), at("report"));
        let lines: Vec<u8> =
            all.flat_map(|request| encode_line(request).expect("a short request")).collect();
        fs::write(&file, lines).expect("the requests can be written");
        let child = Command::new(nowait_bin())
            .args(["run", "--console", "none"])
            .arg("--kernel")
            .arg(vmlinux())
            .arg("--initrd")
            .arg(initramfs())
            .arg("--requests")
            .arg(&file)
            .arg("--report")
            .arg(&report)
            .arg("--control")
            .arg(&socket)
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("it starts");
        let run = Self { child: Some(child), socket, report, _files: files };
        let started = Instant::now();
        while UnixStream::connect(&run.socket).is_err() {
            assert!(started.elapsed() < LIMIT, "no control socket");
            thread::sleep(Duration::from_millis(20));
        }
        run
    }

    /// Status and body of the answer, and how long it took.
    ///
    /// # Panics
    /// When it does not answer.
    pub fn ask(&self, first_line: &str, body: &str) -> (u16, String, Duration) {
        let answer = control::ask(&self.socket, first_line, body).expect("it answers");
        (answer.code, answer.body, answer.took)
    }

    /// Has it do something, soon.
    pub fn tell(&self, first_line: &str, body: &str) {
        let (code, line, took) = self.ask(first_line, body);
        println!("{first_line} {body}: {took:?}");
        assert_eq!(code, 200, "{first_line}: {line}");
        assert!(took < ANSWER_LIMIT, "{first_line} took {took:?}");
    }

    /// Has it do something, if it still runs and has time for it; whether it did.
    pub fn try_tell(&self, first_line: &str, body: &str) -> bool {
        control::ask(&self.socket, first_line, body).is_ok_and(|answer| answer.code == 200)
    }

    /// One number, `None` when it is not shown.
    pub fn metric(&self, series: &str) -> Option<f64> {
        let answer = control::ask(&self.socket, "GET /metrics", "").expect("it answers");
        answer.metric(series)
    }

    /// Waits until a series holds.
    pub fn wait_until(&self, series: &str, holds: impl Fn(Option<f64>) -> bool) {
        let started = Instant::now();
        while !holds(self.metric(series)) {
            let found = self.metric(series);
            assert!(started.elapsed() < LIMIT, "{series} stays at {found:?}");
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// What grows while the guest runs.
    pub fn progress(&self) -> Vec<Option<f64>> {
        let names = ["fetched_pages", "retries", "messages_missing", "messages_minor"];
        names.map(|name| self.metric(&format!("nowait_{name}_total"))).to_vec()
    }

    /// Ends it with a signal; what it wrote to standard error.
    pub fn end(mut self) -> String {
        let child = self.child.take().expect("nobody has waited for it");
        let pid = Pid::from_raw(child.id().cast_signed()).expect("a pid");
        kill_process(pid, Signal::TERM).expect("the child runs");
        let end = process::finish(child, LIMIT).expect("it ends in time");
        end.expect_code(16);
        assert!(!self.socket.exists(), "the socket is left");
        end.stderr
    }

    /// Its control socket.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Has it ended?
    ///
    /// # Panics
    /// When that cannot be found out.
    pub fn has_ended(&mut self) -> bool {
        let child = self.child.as_mut().expect("nobody has waited for it");
        child.try_wait().expect("a child can be waited for").is_some()
    }

    /// All its metrics that count something, without histograms, twice: what grows is seen.
    fn counts(&self) -> String {
        let mut text = String::new();
        for _ in 0..2 {
            let answer = control::ask(&self.socket, "GET /metrics", "");
            let body = answer.map_or_else(|error| error.to_string(), |answer| answer.body);
            let counts = |line: &&str| {
                !(line.starts_with('#') || line.contains("_bucket") || line.ends_with(" 0"))
            };
            body.lines().filter(counts).for_each(|line| text.push_str(&format!("{line}\n")));
            text.push_str("---\n");
            thread::sleep(Duration::from_secs(1));
        }
        text
    }

    /// Waits for its end; how it ended, and the reports of its agent.
    ///
    /// # Panics
    /// When it does not end in time.
    #[must_use]
    pub fn finish(mut self, limit: Duration) -> (Finished, Vec<Report>) {
        let child = self.child.take().expect("nobody has waited for it");
        let end = match process::finish_asking(child, limit, || self.counts()) {
            Ok(end) => end,
            Err((stdout, stderr)) => panic!("it does not end within {limit:?}\n{stdout}\n{stderr}"),
        };
        let reports = fs::read(&self.report).unwrap_or_default();
        let lines = reports.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
        let reports =
            lines.map(|line| decode_line(line).expect("nowait writes whole reports")).collect();
        (end, reports)
    }
}

impl Drop for Running {
    /// A test that failed leaves no guest to the next one, and says what this one was at.
    fn drop(&mut self) {
        if let Some(child) = self.child.take()
            && let Err((stdout, stderr)) = process::finish(child, Duration::ZERO)
        {
            eprintln!("--- the guest of a test that failed\n{stdout}\n{stderr}");
        }
    }
}

//! Signals at any moment: the process ends at once with its documented code, or vanishes.

use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nowait_tests::{initramfs, nowait_bin, process, vmlinux};
use nowait_wire::agent::{Kind, Request, Workload, encode_line};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::Test;
use crate::interactive;
use crate::terminal::Terminal;

pub(crate) const TESTS: &[Test] = &[
    ("sigterm_and_sigint_end_a_run_at_any_moment", any_moment),
    ("sigterm_and_sighup_give_the_terminal_back", terminal),
    ("a_stopped_run_gives_the_terminal_back_until_it_goes_on", stopped),
    ("a_run_with_pages_outstanding_ends_at_once", || outstanding(Signal::TERM)),
    ("a_killed_run_with_pages_outstanding_is_gone", || outstanding(Signal::KILL)),
];

/// How long the end may take, in the emulated machine.
const END_LIMIT: Duration = Duration::from_secs(10);

fn send(child: &Child, signal: Signal) {
    let pid = Pid::from_raw(child.id().cast_signed()).expect("a pid");
    kill_process(pid, signal).expect("the child runs");
}

fn run() -> Command {
    let mut command = Command::new(nowait_bin());
    command.arg("run").arg("--kernel").arg(vmlinux()).arg("--initrd").arg(initramfs());
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn any_moment() {
    for (index, delay_ms) in [500, 900, 1500, 3000].into_iter().enumerate() {
        let signal = if index % 2 == 0 { Signal::TERM } else { Signal::INT };
        let child = run().args(["--cmdline", "nowait.agent=serve"]).spawn().expect("it starts");
        thread::sleep(Duration::from_millis(delay_ms));
        send(&child, signal);
        let end = process::finish(child, END_LIMIT).expect("it ends in time");
        end.expect_code(16);
        assert!(!end.stderr.contains("panicked"), "{}", end.stderr);
    }
}

fn terminal() {
    for signal in [Signal::TERM, Signal::HUP] {
        let terminal = interactive::start();
        send(&terminal.child, signal);
        assert_eq!(terminal.end().0.code(), Some(16));
    }
}

fn stopped() {
    let mut terminal = interactive::start();
    for round in 1..=2 {
        send(&terminal.child, Signal::TSTP);
        terminal.wait_until("it is stopped", |t| state(&t.child) == 'T');
        assert!(!terminal.is_raw());
        send(&terminal.child, Signal::CONT);
        terminal.wait_until("the terminal is raw again", Terminal::is_raw);
        terminal.type_keys(&format!("echo round=$((0+{round}))\r"));
        terminal.wait_for(&format!("round={round}"));
    }
    terminal.type_keys("\x01x");
    assert_eq!(terminal.end().0.code(), Some(16));
}

/// The state of a process, as /proc has it: `T` is stopped.
fn state(child: &Child) -> char {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", child.id())).expect("it runs");
    let after_name = stat.rsplit_once(") ").expect("a name in parentheses").1;
    after_name.chars().next().expect("a state")
}

/// Eight threads wait for pages that take a minute.
fn outstanding(signal: Signal) {
    let files = TempDir::new().expect("a temporary directory");
    let requests = files.path().join("requests");
    let workload =
        Workload { kind: Kind::User, threads: 8, duration_ms: 60_000, pages: 64, ..Workload::IDLE };
    let line = encode_line(&Request::Run(workload)).expect("a short request");
    std::fs::write(&requests, line).expect("the request can be written");
    let child = run()
        .args(["--store", "delay=60s", "--console", "none", "--requests"])
        .arg(&requests)
        .spawn()
        .expect("it starts");
    thread::sleep(Duration::from_secs(8));
    let sent = Instant::now();
    send(&child, signal);
    let end = process::finish(child, END_LIMIT)
        .unwrap_or_else(|_| panic!("it does not end {:?} after {signal:?}", sent.elapsed()));
    if signal == Signal::TERM {
        end.expect_code(16);
    }
}

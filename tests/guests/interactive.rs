//! A person at the console of a guest.

use std::process::Command;
use std::time::Duration;

use nowait_tests::running::Running;
use nowait_tests::{initramfs, nowait_bin, vmlinux};
use nowait_wire::agent::{Kind, Request, Workload};

use crate::Test;
use crate::terminal::Terminal;

pub(crate) const TESTS: &[Test] = &[
    ("a_shell_answers_and_its_end_powers_off", shell),
    ("ctrl_c_reaches_the_guest", ctrl_c),
    ("ctrl_a_x_ends_the_run", ctrl_a_x),
    ("input_from_a_file_is_typed_in", input_file),
    ("the_live_view_shows_a_guest_and_pauses_it", live_view),
];

/// What the agent's shell prompts with.
const PROMPT: &str = "# ";

pub(crate) fn start() -> Terminal {
    let mut command = Command::new(nowait_bin());
    command.arg("run").arg("--kernel").arg(vmlinux()).arg("--initrd").arg(initramfs());
    let mut terminal = Terminal::start(command.args(["--cmdline", "loglevel=3"]));
    terminal.wait_for(PROMPT);
    assert!(terminal.is_raw());
    terminal
}

fn shell() {
    let mut terminal = start();
    terminal.type_keys("echo answer=$((6*7))\r");
    terminal.wait_for("answer=42");
    terminal.type_keys("exit\r");
    let (status, screen) = terminal.end();
    assert_eq!(status.code(), Some(0), "{screen}");
    assert!(screen.contains("the guest powered off"), "{screen}");
}

fn ctrl_c() {
    let mut terminal = start();
    terminal.type_keys("echo go; sleep 1000\r");
    terminal.wait_for("\r\ngo");
    terminal.type_keys("\x03");
    terminal.wait_for(PROMPT);
    terminal.type_keys("echo still=$((1+1))\r");
    terminal.wait_for("still=2");
    terminal.type_keys("\x01x");
    assert_eq!(terminal.end().0.code(), Some(16));
}

fn ctrl_a_x() {
    let mut terminal = start();
    terminal.type_keys("\x01h");
    terminal.wait_for("end the run");
    terminal.type_keys("\x01x");
    let (status, screen) = terminal.end();
    assert_eq!(status.code(), Some(16), "{screen}");
}

fn input_file() {
    let kernel = crate::kernels::TestKernel::new(&[]);
    let typed = kernel.file("typed", b"echo typed=$((2+3))\nexit\n");
    let mut command = Command::new(nowait_bin());
    command.arg("run").arg("--kernel").arg(vmlinux()).arg("--initrd").arg(initramfs());
    let child = command
        .args(["--cmdline", "loglevel=3"])
        .stdin(std::fs::File::open(typed).expect("the file"))
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .expect("it starts");
    let end =
        nowait_tests::process::finish(child, nowait_tests::guest::GUEST_LIMIT).expect("it ends");
    end.expect_code(0);
    assert!(end.stdout.contains("typed=5"), "{}", end.stdout);
}

fn live_view() {
    let workload = Workload {
        kind: Kind::User,
        threads: 8,
        duration_ms: 15_000,
        pages: 8192,
        ..Workload::IDLE
    };
    let args = ["--apf", "user", "--cpus", "2", "--no-prefetch", "--store", "delay=20ms"];
    let run = Running::start(&args, &[Request::Run(workload)]);
    run.wait_until("nowait_fetched_pages_total", |pages| pages > Some(100.0));
    let mut terminal = Terminal::start(Command::new(nowait_bin()).arg("top").arg(run.socket()));
    for section in ["Stalls", "Faults", "Outstanding", "Memory", "Async faults", "told"] {
        terminal.wait_until(section, |terminal| terminal.screen.contains(section));
    }
    terminal.type_keys("p");
    run.wait_until("nowait_vcpus_paused", |vcpus| vcpus == Some(2.0));
    terminal.wait_until("PAUSED", |terminal| terminal.screen.contains("PAUSED"));
    terminal.type_keys("r");
    run.wait_until("nowait_vcpus_paused", |vcpus| vcpus == Some(0.0));
    terminal.type_keys("q");
    let (status, screen) = terminal.end();
    assert_eq!(status.code(), Some(0), "{screen}");
    // The guest goes on to its end.
    let (end, reports) = run.finish(Duration::from_secs(120));
    end.expect_code(0);
    assert!(!reports.is_empty());
}

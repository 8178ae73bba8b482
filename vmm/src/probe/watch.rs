//! The parent's side of the probe: a child process, its lines, and a clock.

// `unsafe`: prctl(PR_SET_PDEATHSIG) has no safe wrapper.
#![allow(unsafe_code)]

use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use super::{ProbeReport, StepReport};

/// How long a child may take to die of SIGKILL before it is left behind: one that hangs in the
/// kernel cannot be reaped.
const REAP_TIMEOUT: Duration = Duration::from_secs(1);
/// How often a dying child is looked at.
const REAP_INTERVAL: Duration = Duration::from_millis(5);
/// Bytes that are read from the child at most.
const MAX_OUTPUT_BYTES: u64 = 64 << 10;

/// Ends this process when its parent dies, so that a guest that hangs never outlives the question.
pub(super) fn die_with_parent() {
    // SAFETY: no pointers; it changes an attribute of this process only.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
}

/// Runs `command`, which prints its steps as JSON lines, for at most `watchdog`.
pub(super) fn run(mut command: Command, watchdog: Duration) -> ProbeReport {
    let deadline = Instant::now() + watchdog;
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) => {
            let program = command.get_program().display();
            return ProbeReport::new(&[], &format!("cannot start the probe {program}: {error}"));
        }
    };
    let mut taken = Vec::new();
    let why = match child.stdout.take() {
        Some(stdout) => follow(&mut child, &read_lines(stdout), deadline, &mut taken)
            .unwrap_or_else(|| format!("no answer within {} s", watchdog.as_secs_f32())),
        None => "the probe has no output".to_owned(),
    };
    ProbeReport::new(&taken, &why)
}

/// Collects steps until the child is gone; says how it ended, or `None` if time ran out and it was
/// killed.
fn follow(
    child: &mut Child,
    steps: &Receiver<StepReport>,
    deadline: Instant,
    taken: &mut Vec<StepReport>,
) -> Option<String> {
    loop {
        match steps.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(step) => taken.push(step),
            Err(RecvTimeoutError::Timeout) => break,
            Err(RecvTimeoutError::Disconnected) => match wait_until(child, deadline) {
                Some(status) => return Some(describe(status)),
                None => break,
            },
        }
    }
    let _ = child.kill();
    wait_until(child, Instant::now() + REAP_TIMEOUT);
    None
}

fn wait_until(child: &mut Child, deadline: Instant) -> Option<ExitStatus> {
    loop {
        if let Ok(Some(status)) = child.try_wait() {
            return Some(status);
        }
        if Instant::now() >= deadline {
            return None;
        }
        thread::sleep(REAP_INTERVAL);
    }
}

/// A thread that turns lines into steps; it ends when the child's output does. The queue is
/// bounded by [`MAX_OUTPUT_BYTES`].
fn read_lines(stdout: ChildStdout) -> Receiver<StepReport> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        for line in BufReader::new(stdout.take(MAX_OUTPUT_BYTES)).lines() {
            let Ok(line) = line else { return };
            // Other lines are what a debug build or a test harness prints around them.
            if let Ok(step) = serde_json::from_str(&line)
                && sender.send(step).is_err()
            {
                return;
            }
        }
    });
    receiver
}

fn describe(status: ExitStatus) -> String {
    match status.signal() {
        Some(signal) => format!("the probe was killed by signal {signal}"),
        None => format!("the probe ended without an answer ({status})"),
    }
}

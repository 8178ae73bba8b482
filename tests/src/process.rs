//! A child process with a time limit; whatever happens, it is gone afterwards.

use std::fs;
use std::io::{self, Read};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// How often a running child is looked at.
const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// A finished child.
#[derive(Clone, Debug)]
pub struct Finished {
    /// How it ended.
    pub status: ExitStatus,
    /// What it wrote to standard output.
    pub stdout: String,
    /// What it wrote to standard error.
    pub stderr: String,
}

impl Finished {
    /// Its exit code; -1 when a signal ended it.
    #[must_use]
    pub fn code(&self) -> i32 {
        self.status.code().unwrap_or(-1)
    }

    /// Checks the exit code, and shows everything when it is another.
    ///
    /// # Panics
    /// When the code differs.
    pub fn expect_code(&self, code: i32) {
        assert!(
            self.code() == code,
            "exit code {} (signal {:?}), not {code}\n--- stdout\n{}\n--- stderr\n{}",
            self.code(),
            self.status.signal(),
            self.stdout,
            self.stderr
        );
    }

    /// Checks that the command was refused as the house rules say: this code, one line on standard
    /// error that contains each of these words, and no backtrace.
    ///
    /// # Panics
    /// When it was not.
    pub fn expect_refusal(&self, code: i32, words: &[&str]) {
        self.expect_code(code);
        let lines: Vec<&str> = self.stderr.lines().collect();
        assert_eq!(lines.len(), 1, "one line, not:\n{}", self.stderr);
        for word in words {
            assert!(lines[0].contains(word), "'{word}' is not in: {}", lines[0]);
        }
        assert!(!self.stderr.contains("panicked"), "{}", self.stderr);
    }
}

/// Runs a command to its end.
///
/// # Panics
/// When it cannot be started, or takes longer than `limit` (it is killed then).
#[must_use]
pub fn run(command: &mut Command, limit: Duration) -> Finished {
    try_run(command, limit).unwrap_or_else(|stuck| panic!("{stuck}"))
}

/// As [`run`].
///
/// # Errors
/// What is known of a command that takes longer than `limit`, which is killed then.
///
/// # Panics
/// When it cannot be started.
pub fn try_run(command: &mut Command, limit: Duration) -> Result<Finished, String> {
    let child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("cannot start {command:?}: {error}"));
    finish(child, limit).map_err(|(out, err)| {
        format!("{command:?} took longer than {limit:?}; so far:\n{out}\n{err}")
    })
}

/// Waits for a child whose outputs are pipes; on time-out kills it and returns what it had written.
///
/// # Errors
/// Both outputs, when the child did not end in time.
///
/// # Panics
/// When the child cannot be waited for.
pub fn finish(child: Child, limit: Duration) -> Result<Finished, (String, String)> {
    finish_asking(child, limit, String::new)
}

/// As [`finish`]; a child that does not end in time is first asked something, for the end of its standard error.
///
/// # Errors
/// As [`finish`].
///
/// # Panics
/// As [`finish`].
pub fn finish_asking(
    mut child: Child,
    limit: Duration,
    ask: impl FnOnce() -> String,
) -> Result<Finished, (String, String)> {
    let stdout = child.stdout.take().map(collect);
    let stderr = child.stderr.take().map(collect);
    let deadline = Instant::now() + limit;
    let status = loop {
        match child.try_wait().expect("a child can be waited for") {
            Some(status) => break Some(status),
            None if Instant::now() >= deadline => break None,
            None => thread::sleep(POLL_INTERVAL),
        }
    };
    let stuck = if status.is_none() { ask() + &where_it_is(child.id()) } else { String::new() };
    if status.is_none() {
        // It has not been waited for, so the pid is still its own.
        let _ = child.kill();
        let _ = child.wait();
    }
    let text = |reader: Option<thread::JoinHandle<Vec<u8>>>| {
        let bytes = reader.map(|reader| reader.join().unwrap_or_default()).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    };
    let (stdout, stderr) = (text(stdout), text(stderr));
    match status {
        Some(status) => Ok(Finished { status, stdout, stderr }),
        None => Err((stdout, stderr + &stuck)),
    }
}

/// What the threads of a process that does not come to its end are at, and its vCPUs, as far as the kernel
/// tells. Short: who reads it may have the end of a long log only.
fn where_it_is(pid: u32) -> String {
    let mut text = String::from("--- threads\n");
    let tasks = fs::read_dir(format!("/proc/{pid}/task"));
    for task in tasks.into_iter().flatten().flatten() {
        let read = |file: &str| fs::read_to_string(task.path().join(file)).unwrap_or_default();
        let stat = read("stat");
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or("").split_whitespace().collect();
        let field = |index: usize| fields.get(index).copied().unwrap_or("?");
        // `[<0>] futex_wait+0x79/0x120`: the function.
        let stack = read("stack");
        let functions =
            stack.lines().filter_map(|line| line.split(' ').nth(1)?.split('+').next()).take(5);
        text.push_str(&format!(
            "{} state {} user {} system {} ticks: {}\n",
            read("comm").trim(),
            field(0),
            field(11),
            field(12),
            functions.collect::<Vec<_>>().join(" < ")
        ));
    }
    // The threads last: `cargo xtask test` repeats the end.
    match kvm_events() {
        Ok(events) => format!("--- KVM\n{events}{text}"),
        Err(error) => format!("--- no trace of KVM: {error}\n{text}"),
    }
}

/// What KVM did in a moment: where its guests are. By a trace of our own: whoever else traces here loses nothing.
fn kvm_events() -> io::Result<String> {
    const INSTANCES: &str = "/sys/kernel/tracing/instances";
    const MOMENT: Duration = Duration::from_millis(300);
    const LAST_LINES: usize = 24;
    if !Path::new(INSTANCES).exists() {
        // Its own output says why not; the directory is missing then.
        let _ =
            Command::new("mount").args(["-t", "tracefs", "none", "/sys/kernel/tracing"]).status();
    }
    let own = Path::new(INSTANCES).join(format!("nowait-{}", std::process::id()));
    fs::create_dir(&own)?;
    let trace = || {
        fs::write(own.join("events/kvm/enable"), "1")?;
        thread::sleep(MOMENT);
        // First of all: events are turned off one by one, and slowly.
        fs::write(own.join("tracing_on"), "0")?;
        fs::read_to_string(own.join("trace"))
    };
    let trace = trace();
    fs::remove_dir(&own)?;
    let trace = trace?;
    let lines: Vec<&str> = trace.lines().filter(|line| !line.starts_with('#')).collect();
    let from = lines.len().saturating_sub(LAST_LINES);
    Ok(format!("{} events, the last:\n{}\n", lines.len(), lines[from..].join("\n")))
}

fn collect(mut pipe: impl Read + Send + 'static) -> thread::JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        // What came before an error is still worth showing.
        let _ = pipe.read_to_end(&mut bytes);
        bytes
    })
}

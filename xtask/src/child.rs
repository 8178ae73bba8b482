//! Child processes: each in a process group of its own, its output in a log file, ended with us.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{BufRead, BufReader, ErrorKind, PipeReader, Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process_group, waitid};

use crate::exit::{self, Exit};
use crate::progress::Step;
use crate::signals;

/// How often a wait looks at the stop flag.
pub(crate) const POLL: Duration = Duration::from_millis(20);
/// How long a child may take to end after SIGTERM before it is killed.
const GRACE: Duration = Duration::from_secs(2);
/// How long output is read on after the child has ended (a grandchild may hold the pipe).
const DRAIN: Duration = Duration::from_millis(500);
/// Lines of a failed child's output that are shown.
const TAIL_LINES: usize = 40;
/// Lines that may wait between the reader and the writer.
const QUEUE_LINES: usize = 1024;

/// A running child that is ended, with its process group, when this is dropped.
pub(crate) struct Group {
    child: Child,
    /// Once it has ended.
    status: Option<ExitStatus>,
}

impl Group {
    /// Starts `command` in a process group of its own.
    pub(crate) fn spawn(command: &mut Command) -> Result<Group> {
        command.process_group(0);
        let child = command
            .spawn()
            .with_context(|| format!("cannot start {}", command.get_program().to_string_lossy()))?;
        Ok(Group { child, status: None })
    }

    /// The child, for its pipes.
    pub(crate) fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// The exit status, if it has ended. Whatever it left behind in its group is ended then: it would hold
    /// the pipes, and run on.
    pub(crate) fn ended(&mut self) -> Result<Option<ExitStatus>> {
        if self.status.is_some() {
            return Ok(self.status);
        }
        // Not reaped by this: as long as it is not, the group's number is nobody else's.
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        let ended = waitid(WaitId::Pid(Pid::from_child(&self.child)), options);
        if ended.context("cannot wait for a child")?.is_some() {
            self.kill();
        }
        Ok(self.status)
    }

    /// Ends the group at once, for a child that has nothing to put in order.
    pub(crate) fn kill(&mut self) {
        if self.status.is_none() {
            let _ = kill_process_group(Pid::from_child(&self.child), Signal::KILL);
            self.status = self.child.wait().ok();
        }
    }

    /// Ends the group: SIGTERM, then SIGKILL.
    pub(crate) fn end(&mut self) {
        let group = Pid::from_child(&self.child);
        let _ = kill_process_group(group, Signal::TERM);
        let deadline = Instant::now() + GRACE;
        while Instant::now() < deadline {
            if !matches!(self.ended(), Ok(None)) {
                return;
            }
            thread::sleep(POLL);
        }
        self.kill();
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if matches!(self.ended(), Ok(None)) {
            self.end();
        }
    }
}

/// The standard output of a short command that must succeed.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let name = describe(command);
    let output =
        command.stdin(Stdio::null()).output().with_context(|| format!("cannot start {name}"))?;
    if !output.status.success() {
        let why = String::from_utf8_lossy(&output.stderr);
        bail!("{name} failed ({}): {}", output.status, why.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs a long command to its end with all its output in the file `log`, each line handed to `each`.
pub(crate) fn lines(
    command: &mut Command,
    log: &Path,
    mut each: impl FnMut(&str),
) -> Result<ExitStatus> {
    let (reader, writer) = std::io::pipe().context("cannot make a pipe")?;
    let second = writer.try_clone().context("cannot make a pipe")?;
    let mut log = std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(log)
        .with_context(|| format!("cannot write {}", log.display()))?;
    let mut group = Group::spawn(command.stdin(Stdio::null()).stdout(writer).stderr(second))?;
    // The command holds the pipe's write ends; without this the reader would never see the end.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let queue = line_queue(reader);
    let mut ended: Option<(ExitStatus, Instant)> = None;
    loop {
        signals::check()?;
        match queue.recv_timeout(POLL) {
            Ok(line) => {
                log.write_all(line.as_bytes()).context("cannot write a log")?;
                each(line.trim_end_matches(['\n', '\r']));
            }
            Err(RecvTimeoutError::Disconnected) if ended.is_some() => break,
            Err(RecvTimeoutError::Disconnected) => thread::sleep(POLL),
            Err(RecvTimeoutError::Timeout) => {
                if ended.is_some_and(|(_, until)| Instant::now() > until) {
                    break;
                }
            }
        }
        if ended.is_none() {
            ended = group.ended()?.map(|status| (status, Instant::now() + DRAIN));
        }
    }
    Ok(ended.map(|(status, _)| status).unwrap_or_default())
}

/// Runs one command of a step: output into `log`, last line beside the spinner, tail shown on failure.
pub(crate) fn run(step: &Step, command: &mut Command, log: &Path) -> Result<()> {
    run_noting(step, command, log, |_, line| line.to_owned())
}

/// As [`run`], for a command that takes minutes: each line, with its number, becomes a note of the step.
pub(crate) fn run_noting(
    step: &Step,
    command: &mut Command,
    log: &Path,
    note: impl Fn(u32, &str) -> String,
) -> Result<()> {
    let name = describe(command);
    let mut tail = Tail::default();
    let mut number = 0;
    let status = lines(command, log, |line| {
        number += 1;
        step.note(&note(number, line.trim()));
        tail.push(line);
    })?;
    if status.success() {
        return Ok(());
    }
    eprintln!("{}", tail.text());
    bail!("{name} failed ({status}); the whole output is in {}", log.display());
}

/// Words by which a program's help is asked for.
pub(crate) const HELP: [&str; 2] = ["--help", "-h"];

/// Runs a command to its end with our own output as its output; its exit code.
pub(crate) fn foreground(command: &mut Command) -> Result<u8> {
    let mut group = Group::spawn(command.stdin(Stdio::null()))?;
    wait(&mut group)
}

/// As [`foreground`], with a copy of its standard output in the file `log`.
pub(crate) fn foreground_logged(command: &mut Command, log: &Path) -> Result<u8> {
    let mut group = Group::spawn(command.stdin(Stdio::null()).stdout(Stdio::piped()))?;
    let stdout = group.child().stdout.take().context("the child has no output")?;
    let pump = pump(stdout, std::io::stdout(), log)?;
    let code = wait(&mut group)?;
    drop(group);
    if let Ok(Err(lost)) = pump.join() {
        return Err(output_lost(code, &lost, log));
    }
    Ok(code)
}

/// What a command that ended with this code said could not be written.
pub(crate) fn output_lost(code: u8, error: &std::io::Error, log: &Path) -> anyhow::Error {
    let code = if code == 0 { exit::FAILED } else { code };
    let log = log.display();
    Exit::error(code, format!("cannot write what the command said: {error}; its log is {log}"))
}

/// How a copy went: the first error of writing, other than that nobody reads.
pub(crate) type Pumped = std::io::Result<()>;

/// The exit code of a child, as a shell has it.
fn wait(group: &mut Group) -> Result<u8> {
    loop {
        signals::check()?;
        if let Some(status) = group.ended()? {
            let code = status.code().or(status.signal().map(|signal| 128 + signal));
            return Ok(code.and_then(|code| u8::try_from(code).ok()).unwrap_or(u8::MAX));
        }
        thread::sleep(POLL);
    }
}

/// Copies `from` to `to` and to a log, as it comes.
pub(crate) fn pump(
    mut from: impl Read + Send + 'static,
    mut to: impl Write + Send + 'static,
    log: &Path,
) -> Result<JoinHandle<Pumped>> {
    let mut log = File::create(log).with_context(|| format!("cannot write {}", log.display()))?;
    Ok(thread::spawn(move || {
        let mut buffer = [0; 16 << 10];
        let mut result = Ok(());
        while let Ok(length @ 1..) = from.read(&mut buffer) {
            // No reason to stop the machine; the log has it all.
            let written = to.write_all(&buffer[..length]).and_then(|()| to.flush());
            result = result.and(match written {
                Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
                written => written,
            });
            let _ = log.write_all(&buffer[..length]);
        }
        result
    }))
}

/// Standard output or error, which gets whole lines only: for outputs that come side by side.
pub(crate) struct WholeLines<W: Write> {
    to: W,
    line: Vec<u8>,
}

impl<W: Write> WholeLines<W> {
    /// To this.
    pub(crate) fn new(to: W) -> Self {
        Self { to, line: Vec::new() }
    }
}

impl<W: Write> Write for WholeLines<W> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.line.extend(bytes);
        if let Some(end) = self.line.iter().rposition(|byte| *byte == b'\n') {
            let rest = self.line.split_off(end + 1);
            self.to.write_all(&std::mem::replace(&mut self.line, rest))?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.to.flush()
    }
}

impl<W: Write> Drop for WholeLines<W> {
    fn drop(&mut self) {
        let _ = self.to.write_all(&self.line);
    }
}

/// The last lines of an output.
#[derive(Default)]
pub(crate) struct Tail(VecDeque<String>);

impl Tail {
    /// Takes one line.
    pub(crate) fn push(&mut self, line: &str) {
        if self.0.len() == TAIL_LINES {
            self.0.pop_front();
        }
        self.0.push_back(line.to_owned());
    }

    /// What is kept, as text.
    pub(crate) fn text(&self) -> String {
        self.0.iter().map(String::as_str).collect::<Vec<_>>().join("\n")
    }
}

/// A command as its program and first arguments, for messages.
fn describe(command: &Command) -> String {
    let mut text = command.get_program().to_string_lossy().into_owned();
    for argument in command.get_args().take(3) {
        text.push(' ');
        text.push_str(&argument.to_string_lossy());
    }
    text
}

/// Reads lines on a thread, so that a wait for the next one can be interrupted.
fn line_queue(reader: PipeReader) -> Receiver<String> {
    let (sender, receiver) = sync_channel(QUEUE_LINES);
    thread::spawn(move || read_lines(BufReader::new(reader), &sender));
    receiver
}

fn read_lines(mut reader: BufReader<impl Read>, sender: &SyncSender<String>) {
    let mut line = Vec::new();
    while matches!(reader.read_until(b'\n', &mut line), Ok(bytes) if bytes > 0) {
        if sender.send(String::from_utf8_lossy(&line).into_owned()).is_err() {
            return;
        }
        line.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_child_leaves_behind_ends_with_it() {
        let log = tempfile::NamedTempFile::new().unwrap();
        let start = Instant::now();
        let mut shell = Command::new("sh");
        // It holds the pipe that is read to its end.
        let code = foreground_logged(shell.args(["-c", "sleep 60 & echo $!; exit 7"]), log.path());
        assert_eq!(code.unwrap(), 7);
        assert!(start.elapsed() < Duration::from_secs(30));
        let left = std::fs::read_to_string(log.path()).unwrap();
        let left = Path::new("/proc").join(left.trim()).join("stat");
        // Gone, or a zombie that init has not looked at yet.
        let gone = || std::fs::read_to_string(&left).map_or(true, |stat| stat.contains(") Z "));
        while !gone() {
            assert!(start.elapsed() < Duration::from_secs(30));
            thread::sleep(POLL);
        }
    }

    #[test]
    fn a_child_that_does_not_end_is_ended() {
        let mut group = Group::spawn(Command::new("sleep").arg("60")).unwrap();
        assert!(group.ended().unwrap().is_none());
        group.end();
        assert_eq!(group.ended().unwrap().unwrap().signal(), Some(15));
    }
}

//! One `nowait run` as a child process: started, listened to within bounds, and gone in the end.
//!
//! Its requests stand ready in a pipe that is its standard input, its reports come line by line on
//! its standard output, and whatever it complains about is kept from its standard error. Two threads
//! read; they end with the child, which [`Child::drop`] kills if it still runs.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{self, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nowait_wire::agent::MAX_LINE_BYTES;

use crate::events::{tells_of_its_end, tells_of_trouble};

/// Reports that may wait to be looked at.
const QUEUE_LINES: usize = 4;
/// How much of the end of the child's standard error is kept, in bytes.
const STDERR_BYTES: usize = 4096;
/// How long a child that has closed its output may take to end.
const END_LIMIT: Duration = Duration::from_secs(10);
/// How often an ending child is looked at.
const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// What there is to hear from a child.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Heard {
    /// One line, with its newline.
    Line(Vec<u8>),
    /// A line that is longer than the protocol allows.
    TooLong,
    /// Nothing yet.
    Nothing,
    /// The child has closed its output.
    End,
}

/// A running child.
pub(super) struct Child {
    process: process::Child,
    lines: Receiver<Heard>,
    complaints: Option<JoinHandle<Vec<u8>>>,
}

impl Child {
    /// Starts the command in a process group of its own, so that a Ctrl-C reaches only us, with this
    /// on its standard input.
    pub(super) fn start(command: &mut Command, input: &[u8]) -> io::Result<Self> {
        let mut process = command
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let (stdin, stdout, stderr) =
            (process.stdin.take(), process.stdout.take(), process.stderr.take());
        let (sender, lines) = sync_channel(QUEUE_LINES);
        // From here on dropping it kills it.
        let mut child = Self { process, lines, complaints: None };
        let stdout = stdout.ok_or(io::ErrorKind::BrokenPipe)?;
        let stderr = stderr.ok_or(io::ErrorKind::BrokenPipe)?;
        std::thread::Builder::new().spawn(move || read_lines(BufReader::new(stdout), &sender))?;
        child.complaints = Some(std::thread::Builder::new().spawn(move || keep_end(stderr))?);
        // A child that ends before it reads says why on its standard error.
        let _ = stdin.map(|mut stdin| stdin.write_all(input));
        Ok(child)
    }

    /// Waits for a line, no longer than this.
    pub(super) fn hear(&self, limit: Duration) -> Heard {
        self.lines.recv_timeout(limit).unwrap_or_else(|error| match error {
            RecvTimeoutError::Timeout => Heard::Nothing,
            RecvTimeoutError::Disconnected => Heard::End,
        })
    }

    /// Takes leave of a child that has closed its output: how it ended, and what it said.
    pub(super) fn end(mut self) -> io::Result<(ExitStatus, Said)> {
        let deadline = Instant::now() + END_LIMIT;
        let status = loop {
            if let Some(status) = self.process.try_wait()? {
                break status;
            }
            if Instant::now() >= deadline {
                self.process.kill()?;
                break self.process.wait()?;
            }
            std::thread::sleep(LOOK_AGAIN);
        };
        let complaints = self.complaints.take().and_then(|thread| thread.join().ok());
        Ok((status, said(&complaints.unwrap_or_default())))
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // Harmless when it has ended and was waited for.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn read_lines(mut from: impl BufRead, to: &SyncSender<Heard>) {
    loop {
        let mut line = Vec::new();
        let limit = MAX_LINE_BYTES as u64;
        let heard = match from.by_ref().take(limit).read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => return,
            Ok(_) if line.ends_with(b"\n") => Heard::Line(line),
            // A line that is cut short by the end is no report.
            Ok(count) if count < MAX_LINE_BYTES => return,
            Ok(_) => Heard::TooLong,
        };
        let go_on = heard != Heard::TooLong;
        if to.send(heard).is_err() || !go_on {
            return;
        }
    }
}

fn keep_end(mut from: impl Read) -> Vec<u8> {
    let (mut kept, mut chunk) = (Vec::new(), [0; STDERR_BYTES]);
    loop {
        match from.read(&mut chunk) {
            Ok(0) => return kept,
            Ok(count) => {
                kept.extend_from_slice(&chunk[..count]);
                let excess = kept.len().saturating_sub(STDERR_BYTES);
                kept.drain(..excess);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return kept,
        }
    }
}

/// What a child said on its standard error.
pub(super) struct Said {
    /// Why it ended: `nowait`'s own first line that tells of no such trouble nor of its end, or else the last line of whatever else
    /// there is.
    pub(super) complaint: String,
    /// That paging failed while it ran, which need not have ended it.
    pub(super) trouble: Option<String>,
}

fn said(text: &[u8]) -> Said {
    let text = String::from_utf8_lossy(text);
    let own = || text.lines().filter_map(|line| line.strip_prefix("nowait: "));
    let complaint = own()
        .find(|line| !tells_of_trouble(line) && !tells_of_its_end(line))
        .or_else(|| text.lines().rfind(|line| !line.trim().is_empty()))
        .unwrap_or_default();
    let trouble = own().find(|line| tells_of_trouble(line)).map(|line| line.trim().to_owned());
    Said { complaint: complaint.trim().to_owned(), trouble }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(20);

    fn shell(script: &str, input: &[u8]) -> Child {
        Child::start(Command::new("/bin/sh").args(["-c", script]), input).unwrap()
    }

    #[test]
    fn lines_come_as_they_are_written_then_the_end_and_the_reason() {
        let child = shell(
            "cat; echo b; echo x >&2; echo nowait: why >&2; echo nowait: pages >&2; echo; exit 4",
            b"a\n",
        );
        for line in ["a\n", "b\n", "\n"] {
            assert_eq!(child.hear(LONG), Heard::Line(line.into()));
        }
        assert_eq!(child.hear(LONG), Heard::End);
        let (status, said) = child.end().unwrap();
        assert_eq!((status.code(), said.complaint.as_str()), (Some(4), "why"));
        assert_eq!(said.trouble, None);
    }

    #[test]
    fn paging_that_failed_is_told_from_the_reason_of_the_end() {
        let of = |text: &str| {
            let said = said(text.as_bytes());
            (said.complaint, said.trouble)
        };
        let full = "pages cannot be evicted, the resident limit may be exceeded: No space left";
        let over = "nowait: pages can be evicted again\r\n";
        let text = format!("nowait: {full}\r\n{over}nowait: the guest panicked\n");
        assert_eq!(of(&text), ("the guest panicked".to_owned(), Some(full.to_owned())));
        assert_eq!(of("nowait: the guest panicked\n").1, None);
    }

    #[test]
    fn an_endless_line_is_cut_off_and_the_child_can_be_left() {
        let child = shell("while :; do printf xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx; done", b"");
        assert_eq!(child.hear(LONG), Heard::TooLong);
        assert_eq!(child.hear(LONG), Heard::End);
    }

    #[test]
    fn a_dropped_child_is_gone() {
        let child = shell("echo $$; exec sleep 1000", b"");
        let Heard::Line(pid) = child.hear(LONG) else { panic!() };
        let proc = format!("/proc/{}", String::from_utf8(pid).unwrap().trim());
        assert_eq!(child.hear(Duration::from_millis(10)), Heard::Nothing);
        assert!(std::path::Path::new(&proc).exists());
        drop(child);
        assert!(!std::path::Path::new(&proc).exists());
    }

    #[test]
    fn much_on_standard_error_neither_blocks_nor_stays() {
        let child = shell("yes noise | head -c 3000000 >&2; echo the end >&2", b"");
        assert_eq!(child.hear(LONG), Heard::End);
        assert_eq!(child.end().unwrap().1.complaint, "the end");
    }

    #[test]
    fn a_child_that_does_not_read_is_no_trouble() {
        let child = shell("exit 3", &[b'x'; 1 << 20]);
        assert_eq!(child.hear(LONG), Heard::End);
        assert_eq!(child.end().unwrap().0.code(), Some(3));
    }
}

//! A byte on the machine's serial line every few milliseconds, so that a lost interrupt is not lost
//! for ever.
//!
//! QEMU's TCG (7.2) can lose an interrupt that its I/O thread raises while the CPU's thread is in an
//! SVM helper: both change `interrupt_request`, one of them without the lock. If it was the timer's,
//! an idle machine sleeps until some other interrupt comes, which may be never. One host CPU for both
//! threads makes that rare; this bounds it. The byte is XON, which the terminal layer swallows. A whole line
//! on the same way asks the machine to end its command (init.sh).

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use tempfile::TempDir;

/// XON: "go on", to a line that was not stopped.
const XON: u8 = 0x11;
/// The longest that a lost interrupt may last; each byte costs the machine an interrupt of its own.
const INTERVAL: Duration = Duration::from_millis(20);

/// The other end of the machine's serial line.
pub(crate) struct Nudge {
    /// Not in the output directory: the path of a socket is short.
    dir: TempDir,
    line: Option<UnixStream>,
    last: Instant,
}

impl Nudge {
    /// A line that nobody has connected yet.
    pub(crate) fn new() -> Result<Self> {
        let dir = TempDir::with_prefix("nowait-").context("cannot make a temporary directory")?;
        Ok(Self { dir, line: None, last: Instant::now() })
    }

    /// Where QEMU is to listen.
    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.path().join("serial")
    }

    /// Where QEMU is to listen for the command's standard input.
    pub(crate) fn stdin(&self) -> PathBuf {
        self.dir.path().join("stdin")
    }

    /// Asks for the end of the command; false when the machine cannot be reached.
    pub(crate) fn ask_to_stop(&mut self) -> bool {
        self.line.as_mut().is_some_and(|line| line.write_all(STOP).is_ok())
    }

    /// Sends the byte if it is time, and takes what the machine has said: QEMU keeps the log.
    pub(crate) fn poll(&mut self) {
        if self.last.elapsed() < INTERVAL {
            return;
        }
        self.last = Instant::now();
        if self.line.is_none() {
            self.line = connect(&self.socket());
        }
        if let Some(line) = &mut self.line
            && talk(line).is_err()
        {
            self.line = None;
        }
    }
}

/// What the machine takes for "end the command".
const STOP: &[u8] = b"stop\n";

/// `None` while QEMU does not listen yet.
fn connect(socket: &Path) -> Option<UnixStream> {
    let line = UnixStream::connect(socket).ok()?;
    line.set_nonblocking(true).ok()?;
    Some(line)
}

fn talk(line: &mut UnixStream) -> std::io::Result<()> {
    let would_block = |error: &std::io::Error| error.kind() == ErrorKind::WouldBlock;
    let mut said = [0; 4096];
    while match line.read(&mut said) {
        Ok(count) => count > 0,
        Err(error) if would_block(&error) => false,
        Err(error) => return Err(error),
    } {}
    match line.write(&[XON]) {
        // A machine that does not read its line has enough of them.
        Err(error) if !would_block(&error) => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    #[test]
    fn the_machine_gets_a_byte_and_is_not_waited_for() {
        let mut nudge = Nudge::new().unwrap();
        assert!(!nudge.ask_to_stop());
        std::thread::sleep(INTERVAL);
        nudge.poll();
        let listener = UnixListener::bind(nudge.socket()).unwrap();
        std::thread::sleep(INTERVAL);
        nudge.poll();
        let (mut machine, _) = listener.accept().unwrap();
        let mut byte = [0];
        machine.read_exact(&mut byte).unwrap();
        assert_eq!(byte, [XON]);
        assert!(nudge.ask_to_stop());
        let mut line = [0; STOP.len()];
        machine.read_exact(&mut line).unwrap();
        assert_eq!(line, STOP);
        // One that talks and does not listen.
        machine.write_all(&[b'x'; 10_000]).unwrap();
        for _ in 0..3 {
            std::thread::sleep(INTERVAL);
            nudge.poll();
        }
        drop(machine);
        std::thread::sleep(INTERVAL);
        nudge.poll();
    }
}

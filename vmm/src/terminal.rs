//! The user's terminal while a guest has it: raw mode, put back on every way out, and the escape key.
//!
//! Ctrl-A begins a command, as in QEMU: `x` ends the run, `h` shows help, `a` or Ctrl-A sends Ctrl-A.

use std::io::{self, Stdin};

use rustix::process::getpgrp;
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcgetpgrp, tcsetattr};

/// The key that begins a command: Ctrl-A.
pub const ESCAPE: u8 = 0x01;
/// What `Ctrl-A h` prints.
pub const HELP: &str =
    "\r\nCtrl-A x  end the run\r\nCtrl-A h  this help\r\nCtrl-A a  send Ctrl-A\r\n";

/// Standard input as a terminal in raw mode; the former mode comes back when it is dropped.
///
/// A terminal belongs to the process group in its foreground: while that is another, it is neither set
/// nor read, for either would stop the process.
#[derive(Debug)]
pub struct RawMode {
    stdin: Stdin,
    before: Termios,
    raw: bool,
}

impl RawMode {
    /// Sets raw mode if standard input is a terminal, and ours.
    ///
    /// # Errors
    /// When the terminal refuses.
    pub fn enter() -> io::Result<Option<Self>> {
        let stdin = io::stdin();
        if !isatty(&stdin) {
            return Ok(None);
        }
        let before = tcgetattr(&stdin)?;
        let mut mode = Self { stdin, before, raw: false };
        mode.resume()?;
        Ok(Some(mode))
    }

    /// Whether the terminal is ours at the moment. One without a foreground (we are not in its session)
    /// is.
    #[must_use]
    pub fn in_foreground(&self) -> bool {
        tcgetpgrp(&self.stdin).map_or(true, |foreground| foreground == getpgrp())
    }

    /// Sets raw mode again, after [`Self::suspend`] or a stop, if the terminal is ours.
    ///
    /// # Errors
    /// When the terminal refuses.
    pub fn resume(&mut self) -> io::Result<()> {
        if self.in_foreground() {
            let mut raw = self.before.clone();
            raw.make_raw();
            tcsetattr(&self.stdin, OptionalActions::Drain, &raw)?;
            self.raw = true;
        }
        Ok(())
    }

    /// Gives the terminal its former mode.
    pub fn suspend(&mut self) {
        if self.raw && self.in_foreground() {
            // At once: what a stopped terminal has not shown must not keep us. Nothing more can be
            // done when the terminal is gone.
            let _ = tcsetattr(&self.stdin, OptionalActions::Now, &self.before);
        }
        self.raw = false;
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        self.suspend();
    }
}

/// What typed bytes ask for, besides what goes to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Command {
    /// Nothing.
    None,
    /// Show [`HELP`].
    Help,
    /// End the run.
    Quit,
}

/// Tells the user's commands from what goes to the guest; what is not typed at a terminal has none.
#[derive(Debug, Default)]
pub struct EscapeFilter {
    off: bool,
    escaped: bool,
}

impl EscapeFilter {
    /// For input of a terminal, or of something else.
    #[must_use]
    pub fn new(terminal: bool) -> Self {
        Self { off: !terminal, escaped: false }
    }

    /// Takes typed bytes; appends those for the guest to `guest`.
    pub fn feed(&mut self, typed: &[u8], guest: &mut Vec<u8>) -> Command {
        let mut command = Command::None;
        if self.off {
            guest.extend_from_slice(typed);
            return command;
        }
        for &byte in typed {
            match (std::mem::take(&mut self.escaped), byte) {
                (false, ESCAPE) => self.escaped = true,
                (false, _) => guest.push(byte),
                (true, b'x' | b'X') => return Command::Quit,
                (true, b'h' | b'H' | b'?') => command = Command::Help,
                (true, b'a' | b'A' | ESCAPE) => guest.push(ESCAPE),
                (true, _) => {}
            }
        }
        command
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn feed(parts: &[&[u8]]) -> (Vec<u8>, Vec<Command>) {
        let (mut filter, mut guest) = (EscapeFilter::default(), Vec::new());
        let commands = parts.iter().map(|part| filter.feed(part, &mut guest)).collect();
        (guest, commands)
    }

    #[test]
    fn ordinary_bytes_pass() {
        assert_eq!(feed(&[b"ls\r", b"\x03"]).0, b"ls\r\x03");
    }

    #[test]
    fn the_escape_may_be_cut_between_reads() {
        assert_eq!(feed(&[b"a\x01", b"x"]), (b"a".to_vec(), vec![Command::None, Command::Quit]));
        assert_eq!(feed(&[b"\x01h"]).1, [Command::Help]);
    }

    #[test]
    fn a_file_has_no_commands() {
        let (mut filter, mut guest) = (EscapeFilter::new(false), Vec::new());
        assert_eq!(filter.feed(b"\x01x", &mut guest), Command::None);
        assert_eq!(guest, b"\x01x");
    }

    #[test]
    fn the_escape_itself_can_be_sent() {
        assert_eq!(feed(&[b"\x01a", b"\x01\x01b"]).0, b"\x01\x01b");
        assert_eq!(feed(&[b"\x01zb"]).0, b"b", "an unknown command is swallowed");
    }
}

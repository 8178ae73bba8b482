//! The user's terminal while it belongs to the nested machine: raw, so that Ctrl-C reaches the
//! command inside; Ctrl-A X is the way out, Ctrl-A Ctrl-A sends one Ctrl-A.

use std::io::{self, IsTerminal, Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::{Context, Result};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

/// Ctrl-A.
const ESCAPE: u8 = 1;

/// Whether the user sits at both ends.
pub(crate) fn interactive() -> bool {
    io::stdin().is_terminal() && io::stdout().is_terminal()
}

/// Rows and columns.
pub(crate) fn size() -> (u16, u16) {
    match tcgetwinsize(io::stdout()) {
        Ok(size) if size.ws_row > 0 && size.ws_col > 0 => (size.ws_row, size.ws_col),
        _ => (24, 80),
    }
}

/// The terminal in raw mode until this is dropped.
pub(crate) struct Raw {
    saved: Termios,
}

impl Raw {
    /// Switches to raw mode.
    pub(crate) fn enter() -> Result<Raw> {
        let saved = tcgetattr(io::stdin()).context("cannot read the terminal's mode")?;
        let mut raw = saved.clone();
        raw.make_raw();
        tcsetattr(io::stdin(), OptionalActions::Now, &raw)
            .context("cannot set the terminal's mode")?;
        Ok(Raw { saved })
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &self.saved);
    }
}

/// Hands what is typed to `to` on a thread; the flag says that Ctrl-A X was typed.
pub(crate) fn forward_keys(mut to: impl Write + Send + 'static) -> Arc<AtomicBool> {
    let leave = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&leave);
    thread::spawn(move || {
        let mut keys = Keys::default();
        let mut buffer = [0; 256];
        while let Ok(length @ 1..) = io::stdin().lock().read(&mut buffer) {
            let (typed, left) = keys.filter(&buffer[..length]);
            if left {
                flag.store(true, Ordering::Relaxed);
                return;
            }
            if to.write_all(&typed).and_then(|()| to.flush()).is_err() {
                return;
            }
        }
    });
    leave
}

/// Finds the escape sequence in what is typed.
#[derive(Default)]
struct Keys {
    escaped: bool,
}

impl Keys {
    /// What goes on, and whether the user wants to leave.
    fn filter(&mut self, typed: &[u8]) -> (Vec<u8>, bool) {
        let mut on = Vec::with_capacity(typed.len());
        for &key in typed {
            match (self.escaped, key) {
                (false, ESCAPE) => self.escaped = true,
                (true, b'x' | b'X') => return (on, true),
                (true, ESCAPE) | (false, _) => {
                    self.escaped = false;
                    on.push(key);
                }
                (true, _) => {
                    self.escaped = false;
                    on.extend([ESCAPE, key]);
                }
            }
        }
        (on, false)
    }
}

#[cfg(test)]
mod tests {
    use super::Keys;

    #[test]
    fn only_the_sequence_leaves() {
        assert_eq!(Keys::default().filter(b"ab\x03"), (b"ab\x03".to_vec(), false));
        assert_eq!(Keys::default().filter(b"\x01x"), (Vec::new(), true));
        assert_eq!(Keys::default().filter(b"\x01\x01x"), (b"\x01x".to_vec(), false));
        assert_eq!(Keys::default().filter(b"\x01b"), (b"\x01b".to_vec(), false));
        let mut keys = Keys::default();
        assert_eq!(keys.filter(b"q\x01"), (b"q".to_vec(), false));
        assert_eq!(keys.filter(b"X"), (Vec::new(), true));
    }
}

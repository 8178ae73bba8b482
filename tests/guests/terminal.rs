//! `nowait run` on a pseudo-terminal, typed at and read as a person would.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags, open};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Termios, Winsize, tcgetattr, tcsetwinsize};

/// How long to wait for anything on the screen.
const SCREEN_LIMIT: Duration = Duration::from_secs(60);

/// What the child finds its screen to be.
const SIZE: Winsize = Winsize { ws_row: 40, ws_col: 120, ws_xpixel: 0, ws_ypixel: 0 };

/// A running child and its terminal.
pub(crate) struct Terminal {
    pub(crate) child: Child,
    master: File,
    slave: OwnedFd,
    before: String,
    /// Everything that the screen has shown.
    pub(crate) screen: String,
}

impl Terminal {
    pub(crate) fn start(command: &mut Command) -> Self {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).expect("a pseudo-terminal");
        grantpt(&master).expect("it is granted");
        unlockpt(&master).expect("it is unlocked");
        let name = ptsname(&master, Vec::new()).expect("it has a name");
        let slave =
            open(&name, OFlags::RDWR | OFlags::NOCTTY, Mode::empty()).expect("its other side");
        tcsetwinsize(&slave, SIZE).expect("a size");
        let end = || Stdio::from(slave.try_clone().expect("a descriptor"));
        let before = describe(&tcgetattr(&slave).expect("its mode"));
        let child = command.stdin(end()).stdout(end()).stderr(end()).spawn().expect("it starts");
        Self { child, master: File::from(master), slave, before, screen: String::new() }
    }

    pub(crate) fn type_keys(&mut self, keys: &str) {
        self.master.write_all(keys.as_bytes()).expect("the terminal takes keys");
    }

    /// Reads until the screen shows this text after what was seen before.
    pub(crate) fn wait_for(&mut self, text: &str) {
        let deadline = Instant::now() + SCREEN_LIMIT;
        let start = self.screen.len();
        while !self.screen[start..].contains(text) {
            assert!(
                Instant::now() < deadline && self.read_some(Duration::from_millis(200)),
                "'{text}' did not come:\n{}",
                self.screen
            );
        }
    }

    /// Waits, reading the screen meanwhile.
    pub(crate) fn wait_until(&mut self, what: &str, is_so: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + SCREEN_LIMIT;
        while !is_so(self) {
            assert!(Instant::now() < deadline, "never: {what}\n{}", self.screen);
            self.read_some(Duration::from_millis(20));
        }
    }

    /// False when the other side is closed.
    fn read_some(&mut self, limit: Duration) -> bool {
        let mut fds = [PollFd::new(&self.master, PollFlags::IN)];
        let limit = Timespec::try_from(limit).expect("a short time");
        if poll(&mut fds, Some(&limit)).unwrap_or(0) == 0 {
            return true;
        }
        let mut bytes = [0; 4096];
        match self.master.read(&mut bytes) {
            Ok(count) if count > 0 => {
                self.screen.push_str(&String::from_utf8_lossy(&bytes[..count]));
                true
            }
            _ => false,
        }
    }

    pub(crate) fn is_raw(&self) -> bool {
        let modes = tcgetattr(&self.slave).expect("the terminal's mode").local_modes;
        !modes.intersects(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG)
    }

    /// Waits for the end and checks that the terminal is as it was.
    pub(crate) fn end(mut self) -> (ExitStatus, String) {
        let deadline = Instant::now() + SCREEN_LIMIT;
        let status = loop {
            self.read_some(Duration::from_millis(20));
            if let Some(status) = self.child.try_wait().expect("a child can be waited for") {
                break status;
            }
            assert!(Instant::now() < deadline, "it does not end:\n{}", self.screen);
        };
        self.read_some(Duration::from_millis(20));
        let after = describe(&tcgetattr(&self.slave).expect("the terminal's mode"));
        assert_eq!(after, self.before, "the terminal is as it was");
        (status, std::mem::take(&mut self.screen))
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // After a failed test; a child that has ended is not signalled.
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

fn describe(mode: &Termios) -> String {
    format!(
        "{:?} {:?} {:?} {:?}",
        mode.input_modes, mode.output_modes, mode.control_modes, mode.local_modes
    )
}

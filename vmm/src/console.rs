//! The writer behind the first UART: standard output, byte by byte.
//!
//! Each byte is written at once by the vCPU thread that the guest's write ended up on. A write that
//! waits (a pipe that nobody empties) makes the guest wait; [`ConsoleOut::abandon`] and a signal to the
//! thread end that.

use std::io::{self, Stdout, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

/// Standard output as the console's cable.
#[derive(Clone, Debug)]
pub struct ConsoleOut {
    out: Arc<Stdout>,
    abandoned: Arc<AtomicBool>,
    failure: Arc<OnceLock<Failure>>,
}

/// Why the console's output is not complete.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// Its reader went away, which it may.
    pub closed: bool,
    /// The error.
    pub message: String,
}

impl ConsoleOut {
    /// The cable to standard output.
    #[must_use]
    pub fn new() -> Self {
        Self { out: Arc::new(io::stdout()), abandoned: Arc::default(), failure: Arc::default() }
    }

    /// From here on a write that a signal interrupts is given up: the run is over.
    pub fn abandon(&self) {
        self.abandoned.store(true, Ordering::SeqCst);
    }

    /// Why what the guest wrote is not all there, if it is not.
    #[must_use]
    pub fn failure(&self) -> Option<&Failure> {
        self.failure.get()
    }
}

impl Default for ConsoleOut {
    fn default() -> Self {
        Self::new()
    }
}

impl Write for ConsoleOut {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // Not through `Stdout`, which buffers, and holds a lock while it waits.
        match rustix::io::write(&*self.out, bytes) {
            Ok(count) => Ok(count),
            Err(rustix::io::Errno::INTR) if self.abandoned.load(Ordering::SeqCst) => {
                Err(io::Error::other("the run is over"))
            }
            Err(rustix::io::Errno::INTR) => Err(io::ErrorKind::Interrupted.into()),
            Err(errno) => {
                let error = io::Error::from(errno);
                let closed = errno == rustix::io::Errno::PIPE;
                let _ = self.failure.set(Failure { closed, message: error.to_string() });
                Err(error)
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

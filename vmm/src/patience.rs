//! Writes that may wait for ever – to a pipe that nobody empties, a terminal that is held – kept away
//! from the threads that must go on.
//!
//! ```text
//!   main loop --push--> queue of lines --> thread of its own --> file, pipe or terminal
//!             <-- full: the line is given back, and the guest waits
//!             <-- failed: the error, and a descriptor that wakes the loop
//! ```

use std::io::{self, Write};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::Duration;

use vmm_sys_util::eventfd::EventFd;

/// Lines that may wait to be written.
const QUEUE_LINES: usize = 64;

/// Does `work` on a thread of its own and waits for its result; `None` when it takes longer than
/// `limit`, and then it goes on unheeded until the process ends.
pub fn within<T: Send + 'static>(
    limit: Option<Duration>,
    work: impl FnOnce() -> T + Send + 'static,
) -> Option<T> {
    let (done, result) = sync_channel(1);
    let started = thread::Builder::new().spawn(move || {
        let _nobody_waits_any_more = done.try_send(work());
    });
    match (started, limit) {
        (Err(_), _) => None,
        (Ok(_), Some(limit)) => result.recv_timeout(limit).ok(),
        (Ok(_), None) => result.recv().ok(),
    }
}

/// Whether a line was taken.
#[derive(Debug, PartialEq, Eq)]
#[must_use]
pub enum Push {
    /// It will be written, unless the writer fails.
    Taken,
    /// The queue is full: offer it again later.
    Full(Vec<u8>),
    /// The writer has failed.
    Failed(String),
}

/// Where lines go in; they come out in a writer, one after the other.
#[derive(Debug)]
pub struct Lines {
    queue: SyncSender<Vec<u8>>,
    failure: Arc<OnceLock<String>>,
    failed: EventFd,
}

/// Says when all lines are written.
#[derive(Debug)]
pub struct Written {
    end: Receiver<()>,
    failure: Arc<OnceLock<String>>,
}

impl Lines {
    /// Starts the thread that writes to `out`.
    ///
    /// # Errors
    /// When there can be no thread, or no descriptor.
    pub fn start(out: Box<dyn Write + Send>) -> io::Result<(Self, Written)> {
        let failed = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let wake = failed.try_clone()?;
        let (queue, lines) = sync_channel::<Vec<u8>>(QUEUE_LINES);
        let (ended, end) = sync_channel(1);
        let failure = Arc::new(OnceLock::new());
        thread::Builder::new().name("reports".into()).spawn({
            let failure = Arc::clone(&failure);
            move || {
                if let Err(error) = write_all(out, &lines) {
                    let _ = failure.set(error.to_string());
                    let _ = wake.write(1);
                }
                let _ = ended.try_send(());
            }
        })?;
        Ok((Self { queue, failure: Arc::clone(&failure), failed }, Written { end, failure }))
    }

    /// Hands a line over, without waiting.
    pub fn push(&self, line: Vec<u8>) -> Push {
        match (self.failure.get(), self.queue.try_send(line)) {
            (Some(error), _) => Push::Failed(error.clone()),
            (None, Ok(())) => Push::Taken,
            (None, Err(TrySendError::Full(line))) => Push::Full(line),
            (None, Err(TrySendError::Disconnected(_))) => {
                Push::Failed(self.failure.get().cloned().unwrap_or_default())
            }
        }
    }

    /// Readable when the writer has failed.
    #[must_use]
    pub fn failed(&self) -> &EventFd {
        &self.failed
    }

    /// Why the writer has failed, if it has.
    #[must_use]
    pub fn failure(&self) -> Option<&str> {
        self.failure.get().map(String::as_str)
    }
}

impl Written {
    /// Waits until every line is written; [`Lines`] must be gone.
    ///
    /// # Errors
    /// Why lines are missing: the writer failed, or is not done within `limit`.
    pub fn wait(self, limit: Option<Duration>) -> Result<(), String> {
        let ended = match limit {
            Some(limit) => self.end.recv_timeout(limit).is_ok(),
            None => self.end.recv().is_ok(),
        };
        match self.failure.get() {
            Some(error) => Err(error.clone()),
            None if ended => Ok(()),
            None => Err("nobody takes it".into()),
        }
    }
}

fn write_all(mut out: Box<dyn Write + Send>, lines: &Receiver<Vec<u8>>) -> io::Result<()> {
    for line in lines {
        out.write_all(&line)?;
        out.flush()?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::Read;

    #[test]
    fn a_pipe_that_nobody_empties_blocks_nobody_and_loses_nothing() {
        let (mut reader, writer) = io::pipe().unwrap();
        let (lines, written) = Lines::start(Box::new(writer)).unwrap();
        let line = vec![b'x'; 4096];
        let taken = (0..).take_while(|_| lines.push(line.clone()) == Push::Taken).count();
        assert!((QUEUE_LINES..QUEUE_LINES + 20).contains(&taken), "{taken}");
        drop(lines);
        let all = thread::spawn(move || {
            let mut all = Vec::new();
            reader.read_to_end(&mut all).unwrap();
            all.len()
        });
        assert_eq!(written.wait(None), Ok(()));
        assert_eq!(all.join().unwrap(), taken * line.len());
    }

    #[test]
    fn whoever_has_no_patience_is_told() {
        let (_reader, writer) = io::pipe().unwrap();
        let (lines, written) = Lines::start(Box::new(writer)).unwrap();
        while lines.push(vec![0; 4096]) == Push::Taken {}
        drop(lines);
        assert!(written.wait(Some(Duration::from_millis(20))).unwrap_err().contains("nobody"));
        assert_eq!(within(Some(Duration::from_millis(5)), || thread::sleep(LONG)), None);
        assert_eq!(within(None, || 7), Some(7));
    }

    const LONG: Duration = Duration::from_secs(5);

    #[test]
    fn a_failed_write_wakes_and_is_named() {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let (lines, written) = Lines::start(Box::new(full)).unwrap();
        assert_eq!(lines.push(b"x".to_vec()), Push::Taken);
        while lines.failed().read().is_err() {
            thread::yield_now();
        }
        assert!(lines.failure().unwrap().contains("No space"));
        assert!(matches!(lines.push(b"y".to_vec()), Push::Failed(why) if why.contains("No space")));
        drop(lines);
        assert!(written.wait(None).unwrap_err().contains("No space"));
    }
}

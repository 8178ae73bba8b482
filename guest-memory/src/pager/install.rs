//! The one place where pages are mapped, unmapped and marked, and where the kernel's verdicts are
//! answered. EEXIST and EAGAIN are verdicts, not errors; a want of memory is the caller's to wait out.

use std::io;
use std::thread;
use std::time::Duration;

use super::PagerError;
use super::core::Core;
use super::trouble::is_want_of_memory;
use crate::address::{PageIndex, PageRun};
use crate::sys::Outcome;

/// How often a system call that the kernel puts off (EAGAIN: the address space is changing) is tried,
/// and how long the pause between is. We never make it change; a debugger or a checkpoint may.
const TRIES: u32 = 10_000;
const PAUSE: Duration = Duration::from_micros(200);

/// Why pages were not mapped.
#[derive(Debug)]
pub(super) struct Refused {
    pub(super) error: PagerError,
    /// The host has no memory now, which may pass.
    pub(super) transient: bool,
}

impl Core {
    /// Maps pages whose bytes are in the RAM file, and wakes whoever sleeps on them in the kernel.
    pub(super) fn map_until_done(&self, run: PageRun) -> Result<(), Refused> {
        self.until_done("map", run, |run| match self.userfault.map(run)? {
            Outcome::Exists => {
                // EEXIST wakes nobody, and somebody may have begun to wait before it was mapped.
                self.userfault.wake(run.first())?;
                Ok(Outcome::Partial(1))
            }
            other => Ok(other),
        })
    }

    /// Installs one zero page; if the RAM file has the page already, as part of a huge one, maps it.
    pub(super) fn zero_until_done(&self, page: PageIndex) -> Result<(), Refused> {
        self.until_done("install zeros in", PageRun::single(page), |run| {
            match self.userfault.zero(run)? {
                Outcome::Exists => match self.userfault.map(run)? {
                    Outcome::Exists => {
                        self.userfault.wake(page)?;
                        Ok(Outcome::Done)
                    }
                    other => Ok(other),
                },
                other => Ok(other),
            }
        })
    }

    /// Puts markers on pages that are not mapped. A page that is mapped all the same, or that has its
    /// marker already, is left as it is; so is one that the kernel does not get round to: its next fault
    /// is a message.
    pub(super) fn mark(&self, run: PageRun) {
        let marked = self.until_done("mark", run, |run| match self.userfault.mark(run)? {
            Outcome::Exists => Ok(Outcome::Partial(1)),
            other => Ok(other),
        });
        match marked {
            Ok(()) => self.counters.markers.add(run.pages().into()),
            Err(_) => self.counters.marker_errors.add(1),
        }
    }

    fn until_done(
        &self,
        action: &'static str,
        run: PageRun,
        call: impl Fn(PageRun) -> io::Result<Outcome>,
    ) -> Result<(), Refused> {
        let refused = |run, error: io::Error| {
            let transient = is_want_of_memory(&error);
            Refused { error: self.on_pages(action, run)(error), transient }
        };
        let mut left = Some(run);
        let mut tries = 0;
        while let Some(run) = left {
            match call(run).map_err(|error| refused(run, error))? {
                Outcome::Done => left = None,
                Outcome::Partial(pages) => left = run.suffix(pages),
                Outcome::Exists => left = run.suffix(1),
                Outcome::Again if tries < TRIES && !self.is_closing() => {
                    tries += 1;
                    self.counters.install_retries.add(1);
                    thread::sleep(PAUSE);
                }
                Outcome::Again => {
                    return Err(refused(run, io::Error::from_raw_os_error(libc::EAGAIN)));
                }
            }
        }
        Ok(())
    }
}

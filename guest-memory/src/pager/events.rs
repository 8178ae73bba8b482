//! The pager thread: userfaultfd messages in, first passes made. With markers only faults come here that
//! no marker caught; without, all do.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::EventFd;

use super::core::Core;
use super::first::{First, Source};
use super::{PagerError, system};
use crate::ram::Step;
use crate::sys::{Fault, FaultBatch, FaultKind, wait_readable};

/// The most messages that are read at once.
const MESSAGE_BATCH: usize = 64;
/// The time that the thread spins for a message before it sleeps. A sleep and a wake-up cost a
/// few microseconds here and many more in the thread that waits.
const LONGEST_SPIN: Duration = Duration::from_micros(50);
/// After so many spins in a row without a message, only one wait in [`WAITS_PER_TRIAL`] spins.
const MOST_VAIN_SPINS: u32 = 4;
const WAITS_PER_TRIAL: u32 = 16;

/// The thread. A failure is told to the VMM; who waits for pages goes on waiting, and does not read
/// zeros.
pub(super) fn run(core: &Arc<Core>, stop: &EventFd) {
    let end = catch_unwind(AssertUnwindSafe(|| core.serve(stop)));
    match end {
        Ok(Ok(())) => {}
        Ok(Err(error)) => core.fail(error),
        Err(_) => core.fail(PagerError::Panicked),
    }
}

impl Core {
    fn serve(self: &Arc<Self>, stop: &EventFd) -> Result<(), PagerError> {
        let mut batch = FaultBatch::new(MESSAGE_BATCH);
        let mut faults = Vec::with_capacity(MESSAGE_BATCH);
        let mut spin = Spin::new();
        while !self.is_closing() {
            let budget = spin.budget();
            let waiting = Instant::now();
            loop {
                let messages = self.userfault.read(&self.mapping, &mut batch);
                faults.extend(messages.map_err(system("read userfaultfd messages"))?);
                if !faults.is_empty() || budget.is_zero() || waiting.elapsed() >= budget {
                    break;
                }
                std::hint::spin_loop();
            }
            if !budget.is_zero() {
                spin.ended(!faults.is_empty());
            }
            if faults.is_empty() {
                let [_, stopped] = wait_readable([Some(&self.userfault), Some(stop)], None)
                    .map_err(system("wait for messages"))?;
                if stopped {
                    break;
                }
            } else {
                self.on_messages(&mut faults);
            }
        }
        Ok(())
    }

    /// The messages of one read; `faults` is left empty. Several for one page need one answer: all who
    /// sent them sleep already, and it wakes them all. The answer always follows from the page's
    /// state, never from the message alone: it may be late, or one of many.
    fn on_messages(self: &Arc<Self>, faults: &mut Vec<Fault>) {
        for fault in faults.iter() {
            match fault.kind {
                FaultKind::Missing => self.counters.messages_missing.add(1),
                FaultKind::Minor => self.counters.messages_minor.add(1),
            }
        }
        let all = faults.len();
        faults.sort_unstable_by_key(|fault| fault.page);
        faults.dedup_by_key(|fault| fault.page);
        self.counters.messages_joined.add((all - faults.len()) as u64);
        for fault in faults.drain(..) {
            self.tell_step(fault.page, Step::Message);
            let retry = match self.first_pass(fault.page, Source::Userfault) {
                First::Retry(retry) => Some(retry),
                First::Present => {
                    self.counters.messages_duplicate.add(1);
                    let remap = self.remap(fault.page);
                    if remap.is_none() {
                        // It changed under our eyes: the message is late, or comes again.
                        let _ = self.userfault.wake(fault.page);
                    }
                    remap
                }
                First::Joined => {
                    self.counters.messages_joined.add(1);
                    None
                }
                First::Hit(_) | First::Lost => None,
            };
            if let Some(retry) = retry {
                // Refused, it is dropped and has them fault again.
                drop(self.workers.submit(retry.0, Duration::ZERO));
            }
        }
    }
}

/// Whether to spin for the next message: while spins end with one. A time would not do for a measure:
/// that of a wait that slept has the sleep's own cost in it, and the thread would not find back.
struct Spin {
    /// Spins in a row that ended without a message.
    vain: u32,
    /// Waits since the last spin.
    skipped: u32,
    alone: bool,
}

impl Spin {
    fn new() -> Self {
        // On a single CPU, whoever sends the next message needs that CPU.
        let alone = thread::available_parallelism().map_or(true, |cpus| cpus.get() == 1);
        Self { vain: 0, skipped: 0, alone }
    }

    /// How long the next wait spins.
    fn budget(&mut self) -> Duration {
        let pays = self.vain < MOST_VAIN_SPINS || self.skipped >= WAITS_PER_TRIAL;
        if self.alone || !pays {
            self.skipped += 1;
            return Duration::ZERO;
        }
        self.skipped = 0;
        LONGEST_SPIN
    }

    /// How a spin ended.
    fn ended(&mut self, message: bool) {
        self.vain = if message { 0 } else { self.vain.saturating_add(1) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_spins_while_messages_come_fast_and_seldom_when_they_do_not() {
        let mut spin = Spin { alone: false, ..Spin::new() };
        let waits = |spin: &mut Spin, message: bool| {
            let spun = (0..1600).filter(|_| {
                let spins = !spin.budget().is_zero();
                if spins {
                    spin.ended(message);
                }
                spins
            });
            spun.count()
        };
        assert_eq!(waits(&mut spin, true), 1600);
        let vain = waits(&mut spin, false);
        assert!((50..=100).contains(&vain), "{vain} spins for nothing");
        assert!(waits(&mut spin, true) >= 1600 - WAITS_PER_TRIAL as usize);
        let mut alone = Spin { alone: true, ..Spin::new() };
        assert_eq!(waits(&mut alone, true), 0);
    }
}

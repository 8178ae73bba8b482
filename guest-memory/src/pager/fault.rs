//! Answers to faults. The answer always follows from the page's state, never from the message alone:
//! a message may be late, or one of many.

use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use super::PagerError;
use super::worker::{MAX_OUTSTANDING, Worker};
use crate::address::{PageIndex, PageRun};
use crate::deadline::{Full, Task};
use crate::state::{OnFault, OnFetchEnd, OnInstalled, PageState, PageWord};
use crate::sys::{Fault, FaultKind, Outcome};

/// How long to wait when the kernel puts an installation off.
const RETRY_AFTER: Duration = Duration::from_micros(200);

impl Worker {
    /// The userfaultfd messages of one read; `faults` is left empty. Several for one page need one
    /// answer: all who sent them wait already, and it wakes them all.
    pub(super) fn on_messages(&mut self, faults: &mut Vec<Fault>) {
        let counters = &self.shared.counters;
        for fault in faults.iter() {
            match fault.kind {
                FaultKind::Missing => counters.messages_missing.add(1),
                FaultKind::Minor => counters.messages_minor.add(1),
            }
        }
        let all = faults.len();
        faults.sort_unstable_by_key(|fault| fault.page);
        faults.dedup_by_key(|fault| fault.page);
        counters.messages_joined.add((all - faults.len()) as u64);
        for fault in faults.drain(..) {
            if let PageState::Fetching(_) = self.table.state(fault.page) {
                self.shared.counters.messages_joined.add(1);
            }
            self.resolve(fault.page);
        }
    }

    /// Gives the page to whoever waits for it, or sees to it that they get it. What fails here
    /// leaves a vCPU without its page: the VMM is told.
    pub(super) fn resolve(&mut self, page: PageIndex) {
        let result = match self.table.edge(page, PageWord::fault) {
            OnFault::InstallZero => self.install_zero(page),
            OnFault::MapAgain => self.map(page),
            OnFault::StartFetch => self.start_fetch(page),
            OnFault::Join | OnFault::Lost => Ok(()),
        };
        if let Err(error) = result {
            self.shared.fail(error);
        }
    }

    /// The page's fetch was just decided: it is due after the store's latency.
    pub(super) fn start_fetch(&mut self, page: PageIndex) -> Result<(), PagerError> {
        self.shared.counters.fetch_began();
        let latency = self.store.latency();
        if latency.is_zero() {
            self.finish_fetch(page);
            return Ok(());
        }
        self.schedule(latency, Task::Fetch, page)
    }

    /// The store's latency is over: moves the bytes, maps the page, serves who waits.
    pub(super) fn finish_fetch(&mut self, page: PageIndex) {
        self.shared.counters.outstanding.sub(1);
        match self.fetch(page) {
            Ok(()) => self.shared.counters.fetched_pages.add(1),
            Err(error) => {
                // A page that was not being fetched keeps its state.
                let (OnFetchEnd::Ended(_) | OnFetchEnd::Stale) =
                    self.table.edge(page, PageWord::failed);
                self.shared.fail(error);
            }
        }
        self.serve_waiting(page);
    }

    fn fetch(&mut self, page: PageIndex) -> Result<(), PagerError> {
        let PageState::Fetching(slot) = self.table.state(page) else {
            return Ok(());
        };
        let gfn = self.shared.layout.gfn_of(page);
        let lost = |source| PagerError::Fetch { gfn, source };
        self.store.read(slot, &mut self.buffer).map_err(lost)?;
        self.shared
            .file
            .write_all_at(&self.buffer[..], page.file_offset())
            .map_err(self.on_pages("fill", PageRun::single(page)))?;
        let (OnFetchEnd::Ended(_) | OnFetchEnd::Stale) = self.table.edge(page, PageWord::fetched);
        self.shared.counters.stored_pages.sub(1);
        self.map_first_time(page)?;
        // The guest has its page; but a store that cannot free is broken.
        Ok(self.store.free(slot)?)
    }

    /// Installs zero pages: the untouched ones around the fault, in one go if the kernel lets us.
    /// ZEROPAGE takes 0.90 us a page in blocks of 64 KiB where fallocate and CONTINUE take 1.04 us
    /// (Linux 6.18 under nested virtualisation), and is one system call instead of two.
    fn install_zero(&mut self, page: PageIndex) -> Result<(), PagerError> {
        let ram = self.shared.layout.all_pages();
        let block = PageRun::aligned_block(page, self.fault_around_pages).intersect(ram);
        let bounds = block.unwrap_or(PageRun::single(page));
        let run = self.table.zero_run_around(page, bounds);
        let before = self.shared.counters.pages_touched.get();
        let outcome = self.userfault.zero(run);
        match outcome.map_err(self.on_pages("install zeros in", run))? {
            Outcome::Done => {
                run.iter().for_each(|page| self.first_touch(page));
                // One page alone is what the guest asks for anyway.
                if run.pages() > 1 {
                    self.tell_mapped(run);
                }
            }
            _ => self.install_zero_singly(page, run)?,
        }
        let counters = &self.shared.counters;
        let answered = u64::from(self.table.state(page) == PageState::Mapped);
        let installed = counters.pages_touched.get() - before;
        counters.zero_faults.add(answered);
        counters.fault_around_pages.add(installed - answered);
        Ok(())
    }

    /// The kernel stopped somewhere in the run: asks for each page alone, for a clear answer. `page`
    /// is the one that somebody waits for; the others are a bonus.
    fn install_zero_singly(&mut self, page: PageIndex, run: PageRun) -> Result<(), PagerError> {
        for each in run.iter() {
            let single = PageRun::single(each);
            let outcome = match self.userfault.zero(single) {
                // In the RAM file, by the stopped try or as part of a huge page: only map it.
                Ok(Outcome::Exists) => self.userfault.map(single),
                other => other,
            };
            match outcome.map_err(self.on_pages("install zeros in", single))? {
                Outcome::Done | Outcome::Partial(_) => self.first_touch(each),
                Outcome::Exists => {
                    self.first_touch(each);
                    self.wake(each)?;
                }
                Outcome::Again if each == page => self.retry(each)?,
                Outcome::Again => {}
            }
        }
        Ok(())
    }

    /// Maps a page whose bytes were there before.
    fn map(&mut self, page: PageIndex) -> Result<(), PagerError> {
        match self.try_map(page)? {
            Outcome::Exists => self.shared.counters.messages_duplicate.add(1),
            Outcome::Done | Outcome::Partial(_) => self.shared.counters.remapped_pages.add(1),
            Outcome::Again => {}
        }
        Ok(())
    }

    /// Maps a page whose bytes have just come.
    pub(super) fn map_first_time(&mut self, page: PageIndex) -> Result<(), PagerError> {
        // A retry, if it comes to that, is on its way already.
        self.try_map(page).map(|_| ())
    }

    fn try_map(&mut self, page: PageIndex) -> Result<Outcome, PagerError> {
        let single = PageRun::single(page);
        let outcome = self.userfault.map(single);
        let outcome = outcome.map_err(self.on_pages("map", single))?;
        match outcome {
            Outcome::Done | Outcome::Partial(_) => {}
            // EEXIST wakes nobody, and somebody may have begun to wait before the page was mapped.
            Outcome::Exists => self.wake(page)?,
            Outcome::Again => self.retry(page)?,
        }
        Ok(outcome)
    }

    fn wake(&self, page: PageIndex) -> Result<(), PagerError> {
        let woken = self.userfault.wake(page);
        woken.map_err(self.on_pages("wake the waiters of", PageRun::single(page)))
    }

    /// The page's first bytes are there.
    pub(super) fn first_touch(&mut self, page: PageIndex) {
        if self.table.edge(page, PageWord::installed) == OnInstalled::First {
            self.shared.counters.pages_touched.add(1);
        }
    }

    pub(super) fn retry(&mut self, page: PageIndex) -> Result<(), PagerError> {
        self.shared.counters.install_retries.add(1);
        self.schedule(RETRY_AFTER, Task::Retry, page)
    }

    fn schedule(&mut self, after: Duration, task: Task, page: PageIndex) -> Result<(), PagerError> {
        let due = Instant::now() + after;
        // Messages and accesses are taken only when there is room.
        self.deadlines.push(due, task, page).map_err(|Full| too_many_tasks())
    }
}

pub(super) fn too_many_tasks() -> PagerError {
    PagerError::Busy { what: "fetches", limit: MAX_OUTSTANDING }
}

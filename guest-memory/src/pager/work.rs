//! What the workers do: the second pass of faults, pages that are fetched ahead, and write-back. A piece
//! of work owns its pages; dropped without being done it puts them back, so that none is ever left
//! behind.

use std::sync::Arc;
use std::time::Duration;

use super::PagerError;
use super::core::Core;
use super::second;
use super::trouble::WaitsFor;
use crate::address::PageIndex;
use crate::ages::Begun;
use crate::pass::MayWait;
use crate::stores::Slot;
use crate::word::{Generation, OnSettled, PageWord, Taken};

/// In which order workers serve what waits; see [`Work::class`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum WorkClass {
    /// Somebody waits for it.
    Fault,
    /// Somebody may want it soon.
    Prefetch,
    /// Somebody may want the room soon.
    WriteBack,
}

/// Who runs [`Work`]. The pool of async-pf does, through a few lines of glue in the VMM; this crate does
/// not know it.
pub trait Workers: Send + Sync {
    /// Has the work run, not before `after` is over. Never waits.
    ///
    /// # Errors
    /// The work, when too much of its class waits already or the end has come.
    fn submit(&self, work: Work, after: Duration) -> Result<(), Work>;

    /// The work with this [`Work::key`], if it still waits, is of the class of faults from now on.
    fn promote(&self, key: u64);
}

/// One piece of work.
pub struct Work {
    core: Arc<Core>,
    /// `None` when it is done.
    job: Option<Job>,
    pub(super) attempts: u32,
    /// Counted in [`super::trouble::Trouble`].
    pub(super) in_trouble: Option<WaitsFor>,
    lane: u16,
    /// While it is a fetch.
    began: Option<Begun>,
}

/// What there is to do. The pages of all but `WriteBack` have this work as their owner.
#[derive(Debug)]
pub(super) enum Job {
    /// Read a page from the store and map it.
    Fetch(PageIndex, Slot),
    /// Read a page ahead of its fault, and map it if somebody wants it by then.
    Prefetch(PageIndex, Slot),
    /// Take room, then fill from the store, where it is at hand.
    Fill(PageIndex, Slot),
    /// Take room, then install zeros.
    Zero(PageIndex),
    /// Map what is in the RAM file, which the host may have swapped out, or had no memory to map.
    Remap(PageIndex),
    /// Write a batch of [`Core::leaving`] to the store and give its memory back, if there is one left.
    WriteBack,
}

impl Work {
    pub(super) fn new(core: Arc<Core>, job: Job) -> Self {
        let began = matches!(job, Job::Fetch(..) | Job::Prefetch(..)).then(|| {
            core.counters.fetches_began(1);
            core.fetches.begin()
        });
        Self { core, job: Some(job), attempts: 0, in_trouble: None, lane: 0, began }
    }

    /// Where in the order it belongs.
    #[must_use]
    pub fn class(&self) -> WorkClass {
        match self.job {
            Some(Job::Prefetch(..)) => WorkClass::Prefetch,
            Some(Job::WriteBack) => WorkClass::WriteBack,
            _ => WorkClass::Fault,
        }
    }

    /// For whom it is done: the number of a vCPU plus one, or 0. Workers are fair between lanes.
    #[must_use]
    pub fn lane(&self) -> u16 {
        self.lane
    }

    /// Does it wait for the store? If not, then for room or the kernel only.
    #[must_use]
    pub fn needs_store(&self) -> bool {
        !matches!(self.job, Some(Job::Zero(_) | Job::Remap(_)))
    }

    /// Names it for [`Workers::promote`].
    #[must_use]
    pub fn key(&self) -> u64 {
        match self.job {
            Some(
                Job::Fetch(page, _)
                | Job::Prefetch(page, _)
                | Job::Fill(page, _)
                | Job::Zero(page)
                | Job::Remap(page),
            ) => page.0.into(),
            Some(Job::WriteBack) | None => u64::MAX,
        }
    }

    pub(super) fn for_lane(mut self, lane: u16) -> Self {
        self.lane = lane;
        self
    }

    /// Does it. May wait for the store and for room.
    pub fn run(mut self) {
        let pass = MayWait::second_pass();
        let core = Arc::clone(&self.core);
        match self.job {
            Some(Job::Fetch(page, slot)) => core.second_fetch(self, page, slot, &pass),
            Some(Job::Fill(page, slot)) => core.second_fill(self, page, slot, &pass),
            Some(Job::Zero(page)) => core.second_zero(self, page, &pass),
            Some(Job::Remap(page)) => core.second_map(self, page),
            Some(Job::Prefetch(page, slot)) => core.second_prefetch(self, page, slot, &pass),
            Some(Job::WriteBack) => {
                self.done();
                core.write_back_next(&pass);
            }
            None => {}
        }
    }

    /// Its page is no longer its own to put back.
    pub(super) fn done(&mut self) {
        self.job = None;
        self.began = None;
    }

    /// It is a fetch from here on.
    pub(super) fn becomes_fetch(&mut self, page: PageIndex, slot: Slot) {
        self.core.counters.fetches_began(1);
        self.began = Some(self.core.fetches.begin());
        self.job = Some(Job::Fetch(page, slot));
    }

    /// It failed: has it done again, later and later. Refused, it comes back.
    pub(super) fn again(mut self) -> Result<(), Self> {
        let after = second::pause(self.attempts);
        self.attempts += 1;
        let core = Arc::clone(&self.core);
        core.workers.submit(self, after)
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        if let Some(what) = self.in_trouble {
            self.core.trouble_over(what);
        }
        let core = &self.core;
        let job = self.job.take();
        if std::thread::panicking() {
            // What this page has is not known; nobody gets it.
            if let Some(Job::Fetch(page, _) | Job::Prefetch(page, _) | Job::Zero(page)) = job {
                core.give_up(page, PagerError::Panicked);
            }
            return core.fail(PagerError::Panicked);
        }
        match job {
            None => {}
            Some(Job::Fetch(page, _) | Job::Prefetch(page, _)) => core.not_fetched(page),
            Some(Job::Fill(page, _)) => {
                core.put_back_wanted(page, core.table.edge(page, PageWord::unfilled));
            }
            Some(Job::Zero(page)) => {
                core.put_back_wanted(page, core.table.edge(page, PageWord::zero_again));
            }
            Some(Job::Remap(page)) => {
                core.put_back_wanted(page, core.table.edge(page, PageWord::not_mapped));
            }
            Some(Job::WriteBack) => {
                if let Some(batch) = core.next_leaving() {
                    let pages = batch.len();
                    batch.into_iter().for_each(|(page, generation)| core.keep(page, generation));
                    core.room.write_back_ended(pages);
                }
            }
        }
    }
}

impl Core {
    /// A page is not fetched after all; whoever wants it faults again.
    pub(super) fn not_fetched(&self, page: PageIndex) {
        self.counters.outstanding.sub(1);
        self.put_back(page, self.table.edge(page, PageWord::unfetched));
    }

    /// As [`Core::put_back`] for a page that somebody's own fault brought here.
    fn put_back_wanted(&self, page: PageIndex, settled: OnSettled) {
        self.put_back(page, OnSettled { wanted: true, ..settled });
    }

    /// A page that was chosen to leave stays; no effect if it was used meanwhile.
    pub(super) fn keep(&self, page: PageIndex, generation: Generation) {
        if self.table.edge(page, |word| word.not_stored(generation)) == Taken::Yes
            && let Some(mut policy) = self.policy()
        {
            policy.kept(page);
        }
    }
}

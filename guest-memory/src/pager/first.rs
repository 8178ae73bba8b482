//! The first pass of a fault: what can be had without waiting is mapped at once, and everything else is
//! a [`Retry`]. It runs on vCPU threads (faults on markers), on the pager thread (userfaultfd) and for
//! devices, takes locks only that nobody holds across I/O, and makes no system call that does I/O.

use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::Hit;
use super::core::{Core, MARKED_BLOCK_PAGES};
use super::install::Refused;
use super::trouble::WaitsFor;
use super::work::{Job, Work};
use crate::address::{PAGE_SIZE, PageBytes, PageIndex, PageRun};
use crate::checksum::checksum;
use crate::pass::NoWait;
use crate::policy::Entry;
use crate::ram::Step;
use crate::stores::Slot;
use crate::sys::{Outcome, view};
use crate::waiters::PageEnd;
use crate::word::{OnFault, OnSettled, PageState, PageWord, Taken};

/// Zero pages around a fault at most while the limit is near, a power of two. What the guest does not use
/// of them has to go again, at the cost of looking at it; each fault less is an exit less.
const TIGHT_BLOCK_PAGES: u32 = 16;

/// How a fault came to the pager.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// A message: somebody sleeps in the kernel until the page is mapped.
    Userfault,
    /// A marker, or a device: the caller's own thread asks.
    Direct,
}

/// What the first pass says.
#[must_use]
pub(super) enum First {
    /// The page is mapped.
    Hit(Hit),
    /// By all we know it had been mapped before.
    Present,
    /// Another thread is bringing it.
    Joined,
    /// It needs time: hand this to the workers.
    Retry(Retry),
    /// Nobody gets it any more.
    Lost,
}

/// The rest of a fault, for a second pass that may wait. The page is this value's: it ends in exactly
/// one completion, and dropped it puts the page back and tells whoever waits to look again.
#[must_use]
pub(super) struct Retry(pub(super) Work);

impl Core {
    /// Answers a fault, as far as that needs no waiting.
    pub(super) fn first_pass(self: &Arc<Self>, page: PageIndex, source: Source) -> First {
        let pass = NoWait::first_pass();
        let at_hand = |slot| self.store.at_hand(slot);
        match self.table.edge(page, |word| word.fault(at_hand)) {
            OnFault::InstallZero => self.first_zero(page, source),
            OnFault::Remap => self.touched(page),
            OnFault::Fill(slot) => self.first_fill(page, slot, &pass),
            OnFault::StartFetch(slot, _) => {
                self.counters.retries.add(1);
                self.retry(page, Job::Fetch(page, slot))
            }
            OnFault::Join => {
                self.counters.joined.add(1);
                if self.table.state(page) == PageState::Fetching {
                    // If it is being fetched ahead, it is a fault from now on.
                    self.workers.promote(page.0.into());
                }
                First::Joined
            }
            OnFault::Present => First::Present,
            OnFault::Lost => First::Lost,
        }
    }

    fn retry(self: &Arc<Self>, page: PageIndex, job: Job) -> First {
        self.tell_step(page, Step::Queued);
        First::Retry(Retry(Work::new(Arc::clone(self), job)))
    }

    /// A fault on an idle page is the one access hint that there is.
    fn touched(self: &Arc<Self>, page: PageIndex) -> First {
        if self.host_swaps && !view::is_in_memory(&self.alias, &self.layout, page) {
            // The host has to read it back before it can be mapped.
            if let Some(mut policy) = self.policy() {
                policy.touched(page);
            }
            self.counters.retries.add(1);
            return self.retry(page, Job::Remap(page));
        }
        self.counters.hits_idle.add(1);
        self.map_owned_and(page, || {
            if let Some(mut policy) = self.policy() {
                policy.touched(page);
            }
        });
        First::Hit(Hit::Resident)
    }

    /// Never touched: zeros, along with the untouched neighbours if there is room for them.
    fn first_zero(self: &Arc<Self>, page: PageIndex, source: Source) -> First {
        let mut run = PageRun::single(page);
        if !self.room.is_tight_for_prefetch() {
            let pages = match self.room.is_tight() {
                true => self.fault_around_pages.min(TIGHT_BLOCK_PAGES),
                false => self.fault_around_pages,
            };
            let bounds = PageRun::aligned_block(page, pages).intersect(self.layout.all_pages());
            run = self.table.claim_zeros_around(page, bounds.unwrap_or(run));
        }
        if !self.room.try_take(run.pages().into()) {
            self.release_zeros(page, run);
            run = PageRun::single(page);
            if !self.room.try_take(1) {
                self.counters.retries.add(1);
                return self.retry(page, Job::Zero(page));
            }
        }
        if self.markers && source == Source::Userfault {
            self.mark_block(page);
        }
        // Of no effect unless the page itself cannot be had now.
        self.install_zeros(page, run, Work::new(Arc::clone(self), Job::Zero(page)));
        First::Hit(Hit::Zero)
    }

    /// In the store, but at hand (compressed in memory, or all one word).
    fn first_fill(self: &Arc<Self>, page: PageIndex, slot: Slot, pass: &NoWait) -> First {
        if !self.room.try_take(1) {
            self.counters.retries.add(1);
            return self.retry(page, Job::Fill(page, slot));
        }
        let mut bytes = [0; PAGE_SIZE];
        let read = self.store.read_now(pass, slot, &mut bytes);
        if !matches!(read, Ok(true)) || checksum(&bytes) != self.table.checksum(page) {
            // Moved to a slower tier meanwhile; or broken, and then the second pass finds out.
            self.room.give(1);
            let _generation = self.table.edge(page, PageWord::fill_missed);
            self.counters.retries.add(1);
            return self.retry(page, Job::Fetch(page, slot));
        }
        if self.fill(page, &bytes).is_err() {
            // No memory now; the second pass waits for some, or finds out what is wrong.
            self.room.give(1);
            let _generation = self.table.edge(page, PageWord::fill_missed);
            self.counters.retries.add(1);
            return self.retry(page, Job::Fetch(page, slot));
        }
        self.counters.hits_stored.add(1);
        self.enter_and_map(page);
        First::Hit(Hit::AtHand)
    }

    /// Puts the bytes of a page that is the caller's into the RAM file.
    pub(super) fn fill(&self, page: PageIndex, bytes: &PageBytes) -> io::Result<()> {
        self.file.write_all_at(bytes, page.file_offset())
    }

    /// The page is the caller's and filled: it is one of the pages in memory from now on. What the store
    /// has of it in memory is given back.
    pub(super) fn enter_and_map(self: &Arc<Self>, page: PageIndex) {
        self.map_owned_and(page, || {
            self.forget_copy_in_memory(page);
            if let Some(mut policy) = self.policy() {
                policy.entered(page, Entry::Refault);
            }
        });
    }

    /// A copy on a disk is kept as long as the page may still be the same; one in memory would count
    /// twice.
    fn forget_copy_in_memory(&self, page: PageIndex) {
        let slot = self.table.word(page).slot();
        if let Some(slot) = slot.filter(|slot| self.store.at_hand(*slot)) {
            let _ours = self.table.edge(page, PageWord::forget_slot);
            self.free_slot(slot);
        }
        self.counters.stored_pages.sub(1);
    }

    /// A slot that cannot be freed is one page less of room in the store, and no more.
    pub(super) fn free_slot(&self, slot: Slot) {
        if self.store.free(slot).is_err() {
            self.counters.free_errors.add(1);
        }
        self.weigh_store();
    }

    /// Maps a page that is the caller's and whose bytes are in the RAM file, and tells whoever waits.
    pub(super) fn map_owned(self: &Arc<Self>, page: PageIndex) {
        self.map_owned_and(page, || {});
    }

    /// Does the books of the page between its mapping and the end of the ownership: whoever sleeps on
    /// it in the kernel runs already.
    fn map_owned_and(self: &Arc<Self>, page: PageIndex, books: impl FnOnce()) {
        let mapped = self.map_until_done(PageRun::single(page));
        self.tell_step(page, Step::Mapped);
        books();
        match mapped {
            Ok(()) => self.put_back(page, self.table.edge(page, PageWord::installed)),
            Err(Refused { error, transient: true }) => {
                let work = Work::new(Arc::clone(self), Job::Remap(page));
                self.again_for(work, WaitsFor::Memory, &error);
            }
            Err(Refused { error, .. }) => self.give_up(page, error),
        }
    }

    /// Puts the claimed neighbours of `page` back.
    fn release_zeros(&self, page: PageIndex, run: PageRun) {
        for other in run.iter().filter(|other| *other != page) {
            self.put_back(other, self.table.edge(other, PageWord::zero_again));
        }
    }

    /// A page has no owner any more: whoever wanted it meanwhile looks, or faults, again.
    pub(super) fn put_back(&self, page: PageIndex, settled: OnSettled) {
        if settled.wanted && !self.is_closing() {
            // What can go wrong here goes wrong with the next system call, too, which reports it.
            let _ = self.userfault.wake(page);
        }
        if settled.waiters {
            self.waiters.tell(page, PageEnd::Ready);
        }
    }

    /// Installs zero pages in a run that is the caller's and whose room is taken, for a fault on `page`.
    /// That page is `work`'s, which is done again when there is no memory for it now.
    pub(super) fn install_zeros(self: &Arc<Self>, page: PageIndex, run: PageRun, mut work: Work) {
        // Counted first: whoever waits runs as soon as the page is there.
        self.counters.pages_touched.add(run.pages().into());
        self.counters.zero_faults.add(1);
        self.counters.fault_around_pages.add(u64::from(run.pages()) - 1);
        let outcome = self.userfault.zero(run);
        let missing = match outcome {
            Ok(Outcome::Done) => Vec::new(),
            _ => self.zero_one_by_one(page, run),
        };
        let missed = |each: &PageIndex| missing.iter().any(|(missed, _)| missed == each);
        if let Some(mut policy) = self.policy() {
            let there = run.iter().filter(|each| !missed(each));
            there.for_each(|each| policy.entered(each, Entry::Fresh));
        }
        for each in run.iter().filter(|each| !missed(each)) {
            self.put_back(each, self.table.edge(each, PageWord::installed));
        }
        if run.pages() > 1 && missing.is_empty() {
            self.tell_mapped(run);
        }
        self.counters.pages_touched.sub(missing.len() as u64);
        self.room.give(missing.len() as u64);
        let mut again = None;
        for (each, refused) in missing {
            match refused {
                Some(Refused { error, transient: false }) => {
                    if each == page {
                        work.done();
                    }
                    self.give_up(each, error);
                }
                Some(Refused { error, .. }) if each == page => again = Some(error),
                // A neighbour need not come now.
                _ => self.put_back(each, self.table.edge(each, PageWord::zero_again)),
            }
        }
        match again {
            Some(error) => self.again_for(work, WaitsFor::Memory, &error),
            None => work.done(),
        }
    }

    /// The kernel stopped somewhere in the run: asks for each page alone, for a clear answer. Returns those
    /// that are not there. Where there is no memory for one, only `page` is asked for after it.
    fn zero_one_by_one(&self, page: PageIndex, run: PageRun) -> Vec<(PageIndex, Option<Refused>)> {
        let mut missing = Vec::new();
        let mut short = false;
        for each in run.iter() {
            if short && each != page {
                missing.push((each, None));
            } else if let Err(refused) = self.zero_until_done(each) {
                short |= refused.transient;
                missing.push((each, Some(refused)));
            }
        }
        missing
    }

    /// Marks the untouched pages of the block, once: from here on their faults come to the vCPU threads.
    fn mark_block(&self, page: PageIndex) {
        let block = page.0 / MARKED_BLOCK_PAGES;
        let (word, bit) = (&self.marked_blocks[block as usize / 64], 1 << (block % 64));
        if word.fetch_or(bit, Ordering::Relaxed) & bit != 0 {
            return;
        }
        let all = PageRun::aligned_block(page, MARKED_BLOCK_PAGES);
        let mut left = all.intersect(self.layout.all_pages());
        while let Some(run) = left {
            // Claimed while it is marked: so that no page is marked that has just been mapped.
            let Some(zeros) = self.table.claim_zero_prefix(run, MARKED_BLOCK_PAGES) else {
                left = run.suffix(1);
                continue;
            };
            self.mark(zeros);
            for each in zeros.iter() {
                self.put_back(each, self.table.edge(each, PageWord::zero_again));
            }
            left = run.suffix(zeros.pages());
        }
    }

    /// Somebody faults on a page that is mapped by all we know: whether there is anything to do only the
    /// kernel knows, and it may have to do I/O for it (a page that the host swapped out).
    pub(super) fn remap(self: &Arc<Self>, page: PageIndex) -> Option<Retry> {
        if self.table.edge(page, PageWord::remap) == Taken::No {
            return None;
        }
        match self.retry(page, Job::Remap(page)) {
            First::Retry(retry) => Some(retry),
            _ => None,
        }
    }
}

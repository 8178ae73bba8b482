//! The second pass of a fault, on a worker: it may wait for the store and for room. A store that fails
//! for a while is asked again and again; who waits for the page goes on waiting, and the VMM is told.

use std::error::Error;
use std::io;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::PagerError;
use super::core::Core;
use super::install::Refused;
use super::trouble::{WaitsFor, is_want_of_memory};
use super::work::{Job, Work};
use crate::address::{PAGE_SIZE, PageBytes, PageIndex, PageRun};
use crate::checksum::checksum;
use crate::pass::MayWait;
use crate::policy::Entry;
use crate::ram::Step;
use crate::stores::{Read, Slot, StoreError, Trouble};
use crate::word::{OnFetched, PageWord};

/// The pause before a failed read is tried again: doubled each time, within these bounds.
const FIRST_PAUSE: Duration = Duration::from_millis(5);
const LONGEST_PAUSE: Duration = Duration::from_millis(500);
/// After this many failures the VMM is told that the guest waits for the store.
const TROUBLE_AFTER: u32 = 4;
/// The most works that wait for a worker and memory; the pages of others are faulted on again.
const MAX_PARKED: usize = 256;
/// A page that the store does not have, or has damaged, is asked for this often before it is lost.
const LOST_AFTER: u32 = 3;

/// Why a page was not read.
enum Failed {
    /// The medium does not answer; it may again.
    Trouble(StoreError),
    /// It answers, but not with this page.
    Damaged(PagerError),
    /// The pager is shutting down.
    Closed,
}

impl Core {
    /// Reads one page of the store and maps it.
    pub(super) fn second_fetch(
        self: &Arc<Self>,
        mut work: Work,
        page: PageIndex,
        slot: Slot,
        pass: &MayWait,
    ) {
        let began = Instant::now();
        self.tell_step(page, Step::Started);
        let mut bytes = [0; PAGE_SIZE];
        match self.read(page, slot, &mut bytes, pass) {
            Ok(()) => {
                self.counters.fetch_latency.record(began.elapsed());
                self.tell_step(page, Step::Read);
                // Dropped, the work puts its page back.
                let Ok(()) = self.take_room(pass) else { return };
                if let Err(error) = self.fill(page, &bytes) {
                    self.room.give(1);
                    return self.not_filled(work, page, error);
                }
                work.done();
                // The policy forgets with whom the page left when it hears that it is back.
                let neighbours = self.neighbours(page);
                self.install_fetched(page);
                self.fetch_ahead(neighbours);
            }
            Err(Failed::Closed) => {}
            Err(Failed::Trouble(error)) => {
                self.counters.read_errors.add(1);
                self.again_for(work, WaitsFor::Store, &error);
            }
            Err(Failed::Damaged(error)) => {
                self.counters.read_errors.add(1);
                if work.attempts + 1 < LOST_AFTER {
                    // Refused, it is dropped and puts its page back.
                    return drop(work.again());
                }
                work.done();
                self.counters.outstanding.sub(1);
                self.give_up(page, error);
            }
        }
    }

    /// Reads a page ahead of its fault. Dropped, the work puts it back: nobody may ever want it, and who
    /// does faults again.
    pub(super) fn second_prefetch(
        self: &Arc<Self>,
        mut work: Work,
        page: PageIndex,
        slot: Slot,
        pass: &MayWait,
    ) {
        // It takes no room that a fault might want.
        if self.room.is_tight_for_prefetch() {
            return;
        }
        let mut bytes = [0; PAGE_SIZE];
        let read = self.read(page, slot, &mut bytes, pass);
        if read.is_ok() && self.room.try_take(1) {
            match self.fill(page, &bytes) {
                Ok(()) => {
                    self.counters.prefetched_pages.add(1);
                    work.done();
                    self.install_fetched(page);
                }
                // Whoever needs it may wait for memory, or learn what is wrong.
                Err(_) => self.room.give(1),
            }
        }
    }

    /// A fetched page could not be put into the RAM file.
    fn not_filled(self: &Arc<Self>, mut work: Work, page: PageIndex, error: io::Error) {
        let transient = is_want_of_memory(&error);
        let error = self.on_pages("fill", PageRun::single(page))(error);
        if transient {
            return self.again_for(work, WaitsFor::Memory, &error);
        }
        work.done();
        self.counters.outstanding.sub(1);
        self.give_up(page, error);
    }

    /// Has the work done again, later and later; after some failures the VMM is told for what it waits.
    pub(super) fn again_for(&self, mut work: Work, what: WaitsFor, error: &dyn Error) {
        if what == WaitsFor::Memory {
            self.counters.memory_waits.add(1);
        }
        if work.attempts + 1 >= TROUBLE_AFTER {
            self.trouble_with(&mut work, what, error);
        }
        // Dropped, it puts its page back.
        if let (Err(work), WaitsFor::Memory) = (work.again(), what) {
            self.park(work);
            self.room.ring();
        }
    }

    /// Keeps a work that waits for memory, until there is memory for somebody to do it, too.
    fn park(&self, work: Work) {
        let mut parked = self.parked();
        if parked.len() < MAX_PARKED && !self.is_closing() {
            parked.push(work);
        }
    }

    /// Offers the parked works again; says how soon that is to be done next.
    pub(super) fn unpark(&self) -> Option<Duration> {
        let parked = std::mem::take(&mut *self.parked());
        let mut next = None;
        for mut work in parked {
            work.attempts += 1;
            let after = pause(work.attempts);
            if let Err(mut work) = self.workers.submit(work, Duration::ZERO) {
                if work.attempts >= TROUBLE_AFTER {
                    let error = io::Error::from_raw_os_error(libc::ENOMEM);
                    self.trouble_with(&mut work, WaitsFor::Memory, &error);
                }
                next = next.into_iter().chain([after]).min();
                self.park(work);
            }
        }
        next
    }

    /// The parked works; held for a moment only.
    pub(super) fn parked(&self) -> MutexGuard<'_, Vec<Work>> {
        self.parked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for room, then fills from the store where it is at hand.
    pub(super) fn second_fill(
        self: &Arc<Self>,
        mut work: Work,
        page: PageIndex,
        slot: Slot,
        pass: &MayWait,
    ) {
        // What is at hand now may have moved when there is room: reading it as from any store is right
        // in both cases.
        let _generation = self.table.edge(page, PageWord::fill_missed);
        work.becomes_fetch(page, slot);
        self.second_fetch(work, page, slot, pass);
    }

    /// Waits for room, then installs zeros.
    pub(super) fn second_zero(self: &Arc<Self>, work: Work, page: PageIndex, pass: &MayWait) {
        // It is no work for the store, which may be dead: it does not help.
        if self.room.take(1, pass, || false).is_ok() {
            self.install_zeros(page, PageRun::single(page), work);
        }
    }

    /// Maps what is in the RAM file.
    pub(super) fn second_map(self: &Arc<Self>, mut work: Work, page: PageIndex) {
        // Counted first: whoever waits runs as soon as the page is there.
        self.counters.remapped_pages.add(1);
        match self.map_until_done(PageRun::single(page)) {
            Ok(()) => {
                work.done();
                self.put_back(page, self.table.edge(page, PageWord::installed));
            }
            Err(Refused { error, transient: true }) => {
                self.counters.remapped_pages.sub(1);
                self.again_for(work, WaitsFor::Memory, &error);
            }
            Err(Refused { error, .. }) => {
                self.counters.remapped_pages.sub(1);
                work.done();
                self.give_up(page, error);
            }
        }
    }

    fn read(
        &self,
        page: PageIndex,
        slot: Slot,
        bytes: &mut PageBytes,
        pass: &MayWait,
    ) -> Result<(), Failed> {
        let mut read = [Read::new(slot, bytes)];
        self.store.read(pass, &mut read);
        let [read] = read;
        let gfn = self.layout.gfn_of(page);
        match read.result {
            Ok(()) if checksum(read.page) == self.table.checksum(page) => Ok(()),
            Ok(()) => Err(Failed::Damaged(PagerError::Checksum { gfn, slot })),
            Err(source) => Err(match source.trouble() {
                Trouble::Closed => Failed::Closed,
                Trouble::Transient => Failed::Trouble(source),
                Trouble::Full | Trouble::Unwanted | Trouble::Lost => {
                    Failed::Damaged(PagerError::Fetch { gfn, source })
                }
            }),
        }
    }

    /// The page's bytes are in the RAM file and its room is taken.
    fn install_fetched(self: &Arc<Self>, page: PageIndex) {
        self.counters.outstanding.sub(1);
        self.counters.fetched_pages.add(1);
        // An Idle page is anybody's: the policy hears of it before it hears what they do with it.
        let policy = self.policy();
        match self.table.edge(page, PageWord::fetched) {
            OnFetched::Wanted => {
                drop(policy);
                self.enter_and_map(page);
            }
            OnFetched::Idle => {
                self.counters.stored_pages.sub(1);
                if let Some(mut policy) = policy {
                    policy.entered(page, Entry::Prefetched);
                }
            }
        }
    }

    /// The pages that left together with this one, if there is room for them.
    fn neighbours(&self, page: PageIndex) -> Vec<PageIndex> {
        let mut neighbours = Vec::new();
        if self.prefetch
            && !self.room.is_tight_for_prefetch()
            && let Some(policy) = self.policy()
        {
            policy.prefetch_neighbours(page, &mut neighbours);
        }
        neighbours
    }

    /// Fetches those of the pages that are in the store and not at hand.
    fn fetch_ahead(self: &Arc<Self>, pages: Vec<PageIndex>) {
        for page in pages {
            let slot = self.table.word(page).slot();
            if slot.is_none_or(|slot| self.store.at_hand(slot)) {
                continue;
            }
            if let Some((slot, _)) = self.table.edge(page, PageWord::prefetch) {
                let work = Work::new(Arc::clone(self), Job::Prefetch(page, slot));
                // Refused, it is dropped and puts its page back.
                drop(self.workers.submit(work, Duration::ZERO));
                // A fault may have joined it before the workers knew of it.
                if self.table.word(page).is_wanted() {
                    self.workers.promote(page.0.into());
                }
            }
        }
    }
}

/// The pause before the next of so many attempts.
pub(super) fn pause(attempts: u32) -> Duration {
    LONGEST_PAUSE.min(FIRST_PAUSE.saturating_mul(1 << attempts.min(10)))
}

//! Which pages to unmap and which to evict: S3-FIFO for a world where most accesses are invisible.
//!
//! ```text
//!                      entered                     aged                     evicted
//!   Out, Ghost ---------------------> Mapped ---------------> Idle ---------------------> Ghost
//!                                        ^     (age: Ageing)    |     (victims: Leaving)
//!                                        +-------- touched -----+
//!
//!   small queue: fresh pages, and pages long gone; touched, or back soon: to the main queue
//!   main queue:  each touch heats the page, up to 3; a mapped page skips as many rounds of ageing,
//!                an idle page is passed over as many times and cools down by one each time
//! ```
//!
//! An access to a Mapped page is not seen. The pager unmaps the pages that have been mapped for
//! longest ([`Policy::age`]); the first access to such an Idle page is a cheap fault
//! ([`Policy::touched`]), and the only hint that there is. Idle pages without one are evicted
//! ([`Policy::victims`]). What S3-FIFO counts at each access is counted here at each fault.
//!
//! How much is aged follows how much comes in: a page that enters allows for two pages to be aged,
//! one to be evicted for it and one to be touched, and a lack of victims for as many as are missing.
//! So in the long run there are at most two faults on idle pages per page that enters (on all traces
//! of `hit_ratios` but one there is less than one), and none at all when everything fits.
//!
//! The pager takes no lock of a page while it asks, so that reports may come late and in any order.
//! Every call is allowed in every state:
//!
//! | report    | Out, Ghost | Mapped  | Ageing  | Idle    | Leaving |
//! |-----------|------------|---------|---------|---------|---------|
//! | entered   | Mapped (Prefetched: Idle) | -    | Mapped  | Mapped (Prefetched: -) | Mapped (Prefetched: -) |
//! | touched   | Mapped     | -       | Mapped  | Mapped  | Mapped  |
//! | aged      | -          | -       | Idle    | -       | -       |
//! | not_aged  | -          | -       | Mapped  | -       | -       |
//! | evicted   | -          | -       | -       | -       | Ghost   |
//! | kept      | -          | -       | -       | -       | Idle    |
//! | left      | Out        | Out     | Out     | Out     | Out     |
//! | gone      | -          | Out     | Out     | Out     | Ghost   |
//!
//! So an outcome ends only the flight that it belongs to, and a fault outruns it. Whoever reports
//! `left` or `gone` has made sure, under the lock around the policy, that the page is out of memory.
//!
//! Pure: no clock, no lock, no system call but the table's mapping.

#[cfg(test)]
mod hit_ratios;
mod lists;
mod neighbours;
pub mod simulate;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod traces;
mod tuning;
mod word;

use std::io;

use self::lists::Lists;
pub(crate) use self::tuning::Tuning;
pub(crate) use self::word::MAX_PAGES;
use self::word::{Batch, Ghost, MAX_HEAT, Place, Queue, Word};
use crate::address::PageIndex;

/// The most pages that one call passes over before it takes what comes, per page asked for: a bound
/// for the time under the lock.
const MAX_PASSES_PER_PAGE: usize = 8;

/// What the policy keeps for each page, in bytes: one word.
pub(crate) const BYTES_PER_PAGE: u64 = 8;

/// How a page came into memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Entry {
    /// It was never touched, or was discarded: its bytes are new.
    Fresh,
    /// Its bytes came from the store because somebody needs them.
    Refault,
    /// Its bytes came from the store because a neighbour was needed; it is not mapped.
    Prefetched,
}

/// How many pages are where, and what happened so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    /// Pages in memory and mapped, Ageing ones among them.
    pub(crate) mapped: u32,
    /// Pages in memory and unmapped, Leaving ones among them.
    pub(crate) idle: u32,
    /// Mapped and idle pages on probation, without those in flight.
    pub(crate) small: u32,
    /// Pages out of memory whose eviction is remembered.
    pub(crate) ghosts: u32,
    /// Pages that came back from the store because somebody needed them.
    pub(crate) refaults: u64,
    /// Of these: pages that had been evicted so recently that a better choice would have kept them.
    pub(crate) recent_refaults: u64,
    /// Faults on idle pages.
    pub(crate) idle_touches: u64,
    /// Pages evicted as victims.
    pub(crate) evictions: u64,
}

/// The eviction policy. See the module's head.
pub(crate) struct Policy {
    lists: Lists,
    tuning: Tuning,
    capacity: u32,
    /// Pages in flight as Ageing.
    ageing: u32,
    /// Pages in flight as Leaving.
    leaving: u32,
    ghosts: u32,
    /// Pages that may be aged without an excess.
    credit: u32,
    batch: Batch,
    refaults: u64,
    recent_refaults: u64,
    idle_touches: u64,
    evictions: u64,
}

impl Policy {
    /// A policy for `pages` pages of RAM, all Out, of which `capacity` pages may be in memory.
    ///
    /// # Errors
    /// When there is no memory for the table of 8 bytes per page, or more pages than it can tell
    /// apart (1 TiB).
    pub(crate) fn new(pages: u32, capacity: u32) -> io::Result<Self> {
        Self::with_tuning(pages, capacity, Tuning::default())
    }

    /// As [`Policy::new`], with other shares.
    ///
    /// # Errors
    /// As [`Policy::new`].
    pub(crate) fn with_tuning(pages: u32, capacity: u32, tuning: Tuning) -> io::Result<Self> {
        Ok(Self {
            lists: Lists::new(pages)?,
            tuning,
            capacity,
            ageing: 0,
            leaving: 0,
            ghosts: 0,
            credit: 0,
            batch: Batch::default(),
            refaults: 0,
            recent_refaults: 0,
            idle_touches: 0,
            evictions: 0,
        })
    }

    /// The resident limit is now `capacity` pages.
    pub(crate) fn set_capacity(&mut self, capacity: u32) {
        self.capacity = capacity;
    }

    /// How many pages are where.
    pub(crate) fn counts(&self) -> Counts {
        let len = |place, queue| self.lists.len(place, queue);
        let (mapped_small, idle_small) =
            (len(Place::Mapped, Queue::Small), len(Place::Idle, Queue::Small));
        Counts {
            mapped: mapped_small + len(Place::Mapped, Queue::Main) + self.ageing,
            idle: idle_small + len(Place::Idle, Queue::Main) + self.leaving,
            small: mapped_small + idle_small,
            ghosts: self.ghosts,
            refaults: self.refaults,
            recent_refaults: self.recent_refaults,
            idle_touches: self.idle_touches,
            evictions: self.evictions,
        }
    }

    /// The page's bytes are in memory, and mapped unless it was prefetched.
    pub(crate) fn entered(&mut self, page: PageIndex, entry: Entry) {
        let word = self.lists.word(page);
        match word.place() {
            Place::Out | Place::Ghost => self.enter(page, word, entry),
            _ if entry == Entry::Prefetched => {}
            _ => self.touched(page),
        }
    }

    /// A fault mapped the page: it was accessed.
    pub(crate) fn touched(&mut self, page: PageIndex) {
        let word = self.lists.word(page);
        match word.place() {
            Place::Out | Place::Ghost => self.enter(page, word, Entry::Refault),
            Place::Mapped => {}
            Place::Ageing | Place::Idle | Place::Leaving => {
                self.idle_touches += 1;
                self.place(page, after_touch(word));
            }
        }
    }

    fn enter(&mut self, page: PageIndex, word: Word, entry: Entry) {
        let recent = self.is_recent(word);
        let word = match entry {
            Entry::Fresh => Word::resident(Place::Mapped, Queue::Small, 0, 0),
            Entry::Prefetched if recent => Word::resident(Place::Idle, Queue::Small, 0, 0),
            Entry::Prefetched => Word::prefetched(),
            Entry::Refault if recent => Word::resident(Place::Mapped, Queue::Main, 0, 0),
            Entry::Refault => Word::resident(Place::Mapped, Queue::Small, 0, 0),
        };
        self.grant(self.tuning.ageings_per_entry);
        if entry == Entry::Refault {
            self.refaults += 1;
            self.recent_refaults += u64::from(recent);
        }
        self.place(page, word);
    }

    /// Whether the page was evicted within the last [`Tuning::ghost_percent`] of a capacity.
    fn is_recent(&self, word: Word) -> bool {
        let window = self.tuning.ghosts(self.capacity);
        word.as_ghost().is_some_and(|ghost| self.clock().wrapping_sub(ghost.clock) < window)
    }

    /// Hands out up to `max` Mapped pages that are to be unmapped now; none while memory is so far
    /// from full, or its pages so rarely replaced, that it would be a fault for nothing. Each wants an [`Policy::aged`] or
    /// [`Policy::not_aged`].
    pub(crate) fn age(&mut self, max: usize, pages: &mut Vec<PageIndex>) {
        let mut passes = max.saturating_mul(MAX_PASSES_PER_PAGE);
        let mut taken = 0;
        while taken < max {
            let mapped = self.mapped(Queue::Small) + self.mapped(Queue::Main);
            if mapped <= self.tuning.mapped(self.capacity)
                || (self.credit == 0 && !self.in_excess())
            {
                return;
            }
            let small_is_large =
                self.mapped(Queue::Small) > self.tuning.small_mapped(self.capacity);
            let queue = if small_is_large || self.mapped(Queue::Main) == 0 {
                Queue::Small
            } else {
                Queue::Main
            };
            let Some(page) = self.lists.head(Place::Mapped, queue) else {
                return;
            };
            let word = self.lists.word(page);
            if word.skip() > 0 && passes > 0 {
                passes -= 1;
                let word = Word::resident(Place::Mapped, queue, word.heat(), word.skip() - 1);
                self.place(page, word);
                continue;
            }
            if !self.in_excess() {
                self.credit -= 1;
            }
            self.place(page, Word::resident(Place::Ageing, queue, word.heat(), 0));
            pages.push(page);
            taken += 1;
        }
    }

    /// Whether there are more pages in memory than there should be, and not all of those beyond are
    /// idle yet. Otherwise ageing is paid for by the pages that come in, so that a guest whose pages
    /// all fit is left in peace: its accesses to idle pages do not make other pages idle.
    fn in_excess(&self) -> bool {
        let counts = self.counts();
        let excess = (counts.mapped + counts.idle).saturating_sub(self.capacity);
        counts.idle + self.ageing < excess
    }

    /// `pages` more may be aged; what is not used does not pile up beyond the idle part.
    fn grant(&mut self, pages: u32) {
        self.credit = self.credit.saturating_add(pages).min(self.tuning.idle(self.capacity));
    }

    fn mapped(&self, queue: Queue) -> u32 {
        self.lists.len(Place::Mapped, queue)
    }

    /// The page was unmapped: its next access is a fault.
    pub(crate) fn aged(&mut self, page: PageIndex) {
        let word = self.lists.word(page);
        if word.place() == Place::Ageing {
            self.place(page, Word::resident(Place::Idle, word.queue(), word.heat(), 0));
        }
    }

    /// The page stays mapped: it is pinned, or was used just now.
    pub(crate) fn not_aged(&mut self, page: PageIndex) {
        let word = self.lists.word(page);
        if word.place() == Place::Ageing {
            self.place(page, Word::resident(Place::Mapped, word.queue(), word.heat(), 0));
        }
    }

    /// Hands out up to `max` Idle pages that are to be evicted now, as one batch. Each wants an
    /// [`Policy::evicted`] or [`Policy::kept`]. When there are fewer, `age` has more to hand out next.
    pub(crate) fn victims(&mut self, max: usize, pages: &mut Vec<PageIndex>) {
        self.batch = self.batch.next();
        let mut passes = max.saturating_mul(MAX_PASSES_PER_PAGE);
        let mut taken = 0;
        while taken < max {
            let Some((page, queue)) = self.next_victim() else {
                let short = u32::try_from(max - taken).unwrap_or(u32::MAX);
                self.grant(short.saturating_sub(self.credit));
                return;
            };
            let word = self.lists.word(page);
            if word.heat() > 0 && passes > 0 {
                passes -= 1;
                self.place(page, Word::resident(Place::Idle, queue, word.heat() - 1, 0));
                continue;
            }
            let word = Word::resident(Place::Leaving, queue, word.heat(), word.skip());
            self.place(page, word.with_flight_batch(self.batch));
            pages.push(page);
            taken += 1;
        }
    }

    /// The small queue has its share; what is beyond it goes first.
    fn next_victim(&self) -> Option<(PageIndex, Queue)> {
        let idle = |queue| self.lists.head(Place::Idle, queue).map(|page| (page, queue));
        let small = self.mapped(Queue::Small) + self.lists.len(Place::Idle, Queue::Small);
        if small > self.tuning.small(self.capacity) {
            idle(Queue::Small).or_else(|| idle(Queue::Main))
        } else {
            idle(Queue::Main).or_else(|| idle(Queue::Small))
        }
    }

    /// The page is in the store and no longer in memory.
    pub(crate) fn evicted(&mut self, page: PageIndex) {
        let word = self.lists.word(page);
        if word.place() == Place::Leaving {
            let ghost = Ghost { batch: word.flight_batch(), clock: self.clock() };
            self.evictions += 1;
            self.place(page, Word::ghost(ghost));
        }
    }

    /// The page stays in memory: its store failed, or somebody pinned it.
    pub(crate) fn kept(&mut self, page: PageIndex) {
        let word = self.lists.word(page);
        if word.place() == Place::Leaving {
            self.place(page, Word::resident(Place::Idle, word.queue(), word.heat(), word.skip()));
        }
    }

    /// The page is out of memory for a reason of somebody else's; nothing is remembered of it.
    pub(crate) fn left(&mut self, page: PageIndex) {
        self.place(page, Word::OUT);
    }

    /// Evictions so far, modulo 2^32: the clock of ghosts.
    const fn clock(&self) -> u32 {
        self.evictions as u32
    }

    /// The page is in the store and no longer in memory, as a victim or because somebody asked for it.
    /// The caller sees to it that nobody brings it back before this is reported.
    pub(crate) fn gone(&mut self, page: PageIndex) {
        match self.lists.word(page).place() {
            Place::Leaving => self.evicted(page),
            Place::Out | Place::Ghost => {}
            Place::Mapped | Place::Ageing | Place::Idle => self.left(page),
        }
    }

    /// Moves the page and keeps count.
    fn place(&mut self, page: PageIndex, word: Word) {
        let (from, to) = (self.lists.word(page).place(), word.place());
        if page.0 >= self.lists.pages() {
            return;
        }
        self.lists.put(page, word);
        self.count(from, u32::wrapping_sub);
        self.count(to, u32::wrapping_add);
    }

    fn count(&mut self, place: Place, step: fn(u32, u32) -> u32) {
        let counter = match place {
            Place::Ageing => &mut self.ageing,
            Place::Leaving => &mut self.leaving,
            Place::Ghost => &mut self.ghosts,
            Place::Out | Place::Mapped | Place::Idle => return,
        };
        *counter = step(*counter, 1);
    }
}

/// An idle page, in flight or not, was accessed: it is proven, except that the first access to a
/// prefetched page proves no more than that the prefetch was good.
fn after_touch(word: Word) -> Word {
    let (queue, heat) = match word.queue() {
        Queue::Small if word.is_prefetched() => (Queue::Small, 0),
        Queue::Small => (Queue::Main, 0),
        Queue::Main => (Queue::Main, (word.heat() + 1).min(MAX_HEAT)),
    };
    Word::resident(Place::Mapped, queue, heat, heat)
}

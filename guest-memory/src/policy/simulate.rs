//! The policy on a recorded trace, beside FIFO, CLOCK, LRU and the offline optimum (Belady).
//!
//! A hit is an access to a page in memory, mapped or idle. The reference policies see every access;
//! ours sees those that are faults. It evicts in batches as the pager does, and so has a little less
//! memory on the average than the others, which evict one page at a time.

use std::collections::BinaryHeap;
use std::io;
use std::num::NonZeroU32;

use super::{Entry, Policy};
use crate::address::PageIndex;

/// The accesses that were counted, and what became of them.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Outcome {
    /// Accesses after the warm-up.
    pub accesses: u64,
    /// Of these: the page was in memory.
    pub hits: u64,
    /// Of these: the page was in memory, unmapped, so that the access was a cheap fault.
    pub idle_faults: u64,
}

impl Outcome {
    /// Hits per access.
    #[must_use]
    pub fn hit_ratio(&self) -> f64 {
        self.hits as f64 / self.accesses.max(1) as f64
    }

    /// Faults on idle pages per access.
    #[must_use]
    pub fn idle_fault_ratio(&self) -> f64 {
        self.idle_faults as f64 / self.accesses.max(1) as f64
    }
}

/// A trace of page numbers, the memory that it is to run in, and how much of it is warm-up.
#[derive(Clone, Copy, Debug)]
pub struct Run<'a> {
    /// The pages in the order of their accesses.
    pub trace: &'a [u32],
    /// Pages that fit in memory.
    pub capacity: NonZeroU32,
    /// Accesses at the trace's beginning that are not counted.
    pub warm_up: usize,
}

impl Run<'_> {
    /// The numbers of pages are below this.
    fn pages(&self) -> usize {
        self.trace.iter().max().map_or(0, |page| *page as usize + 1)
    }

    /// Runs a policy that tells of each access, given its place in the trace and its page, what it was.
    fn outcome(&self, mut access: impl FnMut(usize, u32) -> Access) -> Outcome {
        let mut outcome = Outcome::default();
        for (at, page) in self.trace.iter().enumerate() {
            let access = access(at, *page);
            if at < self.warm_up {
                continue;
            }
            outcome.accesses += 1;
            outcome.hits += u64::from(access != Access::Miss);
            outcome.idle_faults += u64::from(access == Access::IdleFault);
        }
        outcome
    }

    /// Our policy, evicting and ageing up to `batch` pages (at least 1) at a time.
    ///
    /// # Errors
    /// When there is no memory for the policy's table, or a page number is too large for it.
    pub fn ours(&self, batch: usize) -> io::Result<Outcome> {
        let (pages, capacity) = (self.pages(), self.capacity.get());
        let policy = Policy::new(u32::try_from(pages).unwrap_or(u32::MAX), capacity)?;
        let state = vec![Residence::Out; pages];
        let batch = batch.max(1);
        let mut pager = Pager { policy, state, resident: 0, batch, pages: Vec::new() };
        Ok(self.outcome(|_, page| pager.access(page, capacity)))
    }

    /// First in, first out.
    #[must_use]
    pub fn fifo(&self) -> Outcome {
        let mut ring = Ring::new(self.pages(), self.capacity.get());
        self.outcome(|_, page| ring.access(page, false))
    }

    /// CLOCK: FIFO with a second chance for pages that were accessed.
    #[must_use]
    pub fn clock(&self) -> Outcome {
        let mut ring = Ring::new(self.pages(), self.capacity.get());
        self.outcome(|_, page| ring.access(page, true))
    }

    /// The page accessed longest ago goes.
    #[must_use]
    pub fn lru(&self) -> Outcome {
        // The next access of a page that is evicted first is here the last one, negated.
        let mut heap = Heap::new(self.pages(), self.capacity.get());
        self.outcome(|at, page| heap.access(page, usize::MAX - at))
    }

    /// The page whose next access is furthest away goes: no policy has more hits.
    #[must_use]
    pub fn belady(&self) -> Outcome {
        let mut next_of_page = vec![usize::MAX; self.pages()];
        let mut next: Vec<usize> = self
            .trace
            .iter()
            .enumerate()
            .rev()
            .map(|(at, page)| std::mem::replace(&mut next_of_page[*page as usize], at))
            .collect();
        next.reverse();
        let mut heap = Heap::new(self.pages(), self.capacity.get());
        self.outcome(|at, page| heap.access(page, next[at]))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Access {
    Hit,
    IdleFault,
    Miss,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Residence {
    Out,
    Mapped,
    Idle,
}

/// A pager whose fetches and evictions take no time.
struct Pager {
    policy: Policy,
    state: Vec<Residence>,
    resident: u32,
    batch: usize,
    pages: Vec<PageIndex>,
}

impl Pager {
    fn access(&mut self, page: u32, capacity: u32) -> Access {
        let index = PageIndex(page);
        match self.state[page as usize] {
            Residence::Mapped => return Access::Hit,
            Residence::Idle => self.policy.touched(index),
            Residence::Out => {
                while self.resident >= capacity {
                    self.evict();
                    self.age();
                }
                self.policy.entered(index, Entry::Refault);
                self.resident += 1;
            }
        }
        let before = std::mem::replace(&mut self.state[page as usize], Residence::Mapped);
        // The evictor thread never sleeps.
        self.age();
        if before == Residence::Idle { Access::IdleFault } else { Access::Miss }
    }

    fn age(&mut self) {
        self.pages.clear();
        self.policy.age(self.batch, &mut self.pages);
        for page in &self.pages {
            self.state[page.0 as usize] = Residence::Idle;
            self.policy.aged(*page);
        }
    }

    fn evict(&mut self) {
        self.pages.clear();
        self.policy.victims(self.batch, &mut self.pages);
        for page in &self.pages {
            self.state[page.0 as usize] = Residence::Out;
            self.policy.evicted(*page);
        }
        self.resident -= self.pages.len() as u32;
    }
}

/// FIFO and CLOCK.
struct Ring {
    /// The slot of each page in memory.
    slot: Vec<Option<u32>>,
    /// The page of each slot, and whether it was accessed since the hand came by.
    slots: Vec<(u32, bool)>,
    capacity: usize,
    hand: usize,
}

impl Ring {
    fn new(pages: usize, capacity: u32) -> Self {
        let capacity = capacity as usize;
        Self { slot: vec![None; pages], slots: Vec::with_capacity(capacity), capacity, hand: 0 }
    }

    fn access(&mut self, page: u32, second_chance: bool) -> Access {
        if let Some(slot) = self.slot[page as usize] {
            self.slots[slot as usize].1 = second_chance;
            return Access::Hit;
        }
        if self.slots.len() < self.capacity {
            self.slot[page as usize] = Some(self.slots.len() as u32);
            self.slots.push((page, false));
            return Access::Miss;
        }
        while std::mem::take(&mut self.slots[self.hand].1) {
            self.hand = (self.hand + 1) % self.capacity;
        }
        let (old, _) = std::mem::replace(&mut self.slots[self.hand], (page, false));
        self.slot[old as usize] = None;
        self.slot[page as usize] = Some(self.hand as u32);
        self.hand = (self.hand + 1) % self.capacity;
        Access::Miss
    }
}

/// Belady and LRU: the page with the largest key goes.
struct Heap {
    key: Vec<Option<usize>>,
    /// Entries whose key is no longer that of their page are stale.
    heap: BinaryHeap<(usize, u32)>,
    resident: u32,
    capacity: u32,
}

impl Heap {
    fn new(pages: usize, capacity: u32) -> Self {
        Self { key: vec![None; pages], heap: BinaryHeap::new(), resident: 0, capacity }
    }

    fn access(&mut self, page: u32, key: usize) -> Access {
        let hit = self.key[page as usize].replace(key).is_some();
        if !hit {
            self.resident += 1;
            while self.resident > self.capacity {
                self.evict(page);
            }
        }
        self.heap.push((key, page));
        if hit { Access::Hit } else { Access::Miss }
    }

    /// Evicts the page with the largest key, but not `wanted`.
    fn evict(&mut self, wanted: u32) {
        if let Some((key, page)) = self.heap.pop()
            && page != wanted
            && self.key[page as usize] == Some(key)
        {
            self.key[page as usize] = None;
            self.resident -= 1;
        }
    }
}

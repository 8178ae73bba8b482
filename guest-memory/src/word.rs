//! The word that says what is known of one page, and its edges.
//!
//! ```text
//!   Zero    --fault-->  Installing --installed--> Mapped
//!   Mapped  --aged--->  Unmapping  --unmapped---> Idle        (wanted meanwhile: Installing)
//!   Idle    --fault-->  Installing                            an access hint
//!   Idle    --chosen->  Storing --stored--> Dropping --dropped--> Stored
//!   Storing --fault-->  Installing                            what is written is dropped, being late
//!   Stored  --fault-->  Installing  at hand: filled at once
//!                       Fetching    not at hand --fetched--> Installing, or Idle if nobody wants it
//!   Mapped  --fault-->  Installing  the host took the entry away
//!   Installing --not mapped--> Idle, --not filled--> Stored, Zero     the host has no memory for it now
//!   Installing, Fetching --lost--> Failed
//! ```
//!
//! | bits   | meaning |
//! |--------|---------|
//! | 0..=3  | the state: 0 Zero, 1 Installing, 2 Mapped, 3 Unmapping, 4 Idle, 5 Storing, 6 Dropping, 7 Stored, 8 Fetching, 9 Failed |
//! | 4      | WANTED: a fault came while the page had an owner; whoever ends that has to map the page, or wake who sleeps on it |
//! | 5      | WAITERS: somebody is in the wait lists for this page |
//! | 6      | HAS_SLOT: bits 32..=63 name a slot; in Installing to Storing that of an older copy, whose checksum tells whether it is still good |
//! | 7      | always 0 |
//! | 8..=15 | pins: a page with any stays Mapped |
//! | 16..=31| generation: one more with each fetch and each store begun, so that what ends late is known to be late |
//! | 32..=63| the slot in the store, else 0 |
//!
//! The zero word is a page that was never touched, so that a table of such pages costs no memory.
//! In Installing, Unmapping, Dropping and Fetching one thread owns the page: the one whose edge brought
//! it there, or whom that one handed it to. Only the owner has system calls made on the page.

use crate::stores::Slot;

const STATE: u64 = 0xf;
const WANTED: u64 = 1 << 4;
const WAITERS: u64 = 1 << 5;
const HAS_SLOT: u64 = 1 << 6;
const PINS_SHIFT: u32 = 8;
const PINS: u64 = 0xff << PINS_SHIFT;
const GENERATION_SHIFT: u32 = 16;
const GENERATION: u64 = 0xffff << GENERATION_SHIFT;
const SLOT_SHIFT: u32 = 32;

/// The most pins that one page can have at once.
pub(crate) const MAX_PINS: u64 = PINS >> PINS_SHIFT;

/// Where a page is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum PageState {
    /// Never touched: all zero, and no memory is behind it.
    Zero = 0,
    /// Its owner is filling and mapping it; no I/O.
    Installing = 1,
    /// Its bytes are in the RAM file and the guest mapping has it, unless the host took the entry.
    Mapped = 2,
    /// Its owner is taking it out of the guest mapping.
    Unmapping = 3,
    /// Its bytes are in the RAM file only: the next access is a fault, and cheap.
    Idle = 4,
    /// As Idle, and its bytes are being written to the store.
    Storing = 5,
    /// The store has its bytes; its owner is giving the memory back.
    Dropping = 6,
    /// Its bytes are in the store only.
    Stored = 7,
    /// Its owner is reading it from the store, which may take long.
    Fetching = 8,
    /// Its bytes are lost.
    Failed = 9,
}

/// Tells two fetches, or two stores, of one page apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Generation(u16);

/// How a fault on a page is to be answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub(crate) enum OnFault {
    /// Never touched, and the caller's now: install zeros, then [`PageWord::installed`].
    InstallZero,
    /// In the RAM file, and the caller's now: map it, then [`PageWord::installed`].
    Remap,
    /// In the store, at hand, and the caller's now: fill it from there and map it.
    Fill(Slot),
    /// In the store, and the caller's now: see to its fetch.
    StartFetch(Slot, Generation),
    /// Another thread owns it and will map it.
    Join,
    /// It is mapped by all we know.
    Present,
    /// It is lost; nothing can be done.
    Lost,
}

/// Who is there to be told that a page has no owner any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub(crate) struct OnSettled {
    /// The wait lists have somebody for this page.
    pub(crate) waiters: bool,
    /// Somebody may sleep on it in the kernel: they have to be woken, also if it was mapped, for they may
    /// have come when the host had taken the entry away again.
    pub(crate) wanted: bool,
}

/// What the end of an unmapping did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub(crate) enum OnUnmapped {
    /// The page is Idle.
    Idle,
    /// It was wanted meanwhile: it is Installing, and still the caller's to map.
    Wanted,
}

/// What the end of a fetch did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub(crate) enum OnFetched {
    /// Somebody wants it: it is Installing, and still the caller's to map.
    Wanted,
    /// Nobody does (it was fetched ahead): it is Idle.
    Idle,
}

/// Whether the store of a page may go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub(crate) enum OnStored {
    /// The page is Dropping, and the caller's. `older` is the slot of its older copy.
    Drop {
        /// To be freed if it is another than the new one.
        older: Option<Slot>,
    },
    /// The page was used meanwhile: what was written is not needed.
    Late,
}

/// What the end of a drop did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub(crate) enum OnDropped {
    /// The page is Stored.
    Stored,
    /// It was wanted meanwhile. It is Stored: fault it for whoever waits.
    Wanted,
}

/// Whether an edge was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub(crate) enum Taken {
    /// The page is in its new state, and the caller's if that has an owner.
    Yes,
    /// It was in no state for it; nothing changed.
    No,
}

/// Whether a waiter may be added to the wait lists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub(crate) enum OnWait {
    /// An owner will settle the page and then complete whoever waits.
    Waits,
    /// Nobody is at it: look again.
    Settled,
}

/// What a pin did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub(crate) enum OnPin {
    /// The page stays Mapped until it is unpinned.
    Pinned,
    /// It has to be brought in first.
    Absent,
    /// It has [`MAX_PINS`] already.
    TooMany,
}

/// One page's state, packed. Edges change it in place; [`crate::table::PageTable::edge`] makes them
/// atomic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PageWord(u64);

impl PageWord {
    /// Takes a word of the table; only words that [`PageWord::bits`] gave, or 0.
    pub(crate) const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// The word for the table.
    pub(crate) const fn bits(self) -> u64 {
        self.0
    }

    /// Where the page is in its life.
    pub(crate) const fn state(self) -> PageState {
        use PageState as S;
        match self.0 & STATE {
            0 => S::Zero,
            1 => S::Installing,
            2 => S::Mapped,
            3 => S::Unmapping,
            4 => S::Idle,
            5 => S::Storing,
            6 => S::Dropping,
            7 => S::Stored,
            8 => S::Fetching,
            _ => S::Failed,
        }
    }

    /// The slot of its bytes, or of an older copy of them.
    pub(crate) fn slot(self) -> Option<Slot> {
        (self.0 & HAS_SLOT != 0).then_some(Slot((self.0 >> SLOT_SHIFT) as u32))
    }

    /// Is it to be mapped, or somebody to be woken, when its owner is done with it?
    pub(crate) const fn is_wanted(self) -> bool {
        self.0 & (WANTED | WAITERS) != 0
    }

    /// How many pins it has.
    pub(crate) const fn pins(self) -> u64 {
        (self.0 & PINS) >> PINS_SHIFT
    }

    /// Edge: somebody needs the page now. `at_hand` says whether the store can answer without waiting.
    pub(crate) fn fault(&mut self, at_hand: impl Fn(Slot) -> bool) -> OnFault {
        match (self.state(), self.slot()) {
            (PageState::Zero, _) => self.to(PageState::Installing, OnFault::InstallZero),
            (PageState::Idle | PageState::Storing, _) => {
                self.to(PageState::Installing, OnFault::Remap)
            }
            (PageState::Stored, Some(slot)) if at_hand(slot) => {
                self.to(PageState::Installing, OnFault::Fill(slot))
            }
            (PageState::Stored, Some(slot)) => {
                let generation = self.next_generation();
                self.0 |= WANTED;
                self.to(PageState::Fetching, OnFault::StartFetch(slot, generation))
            }
            (
                PageState::Installing
                | PageState::Unmapping
                | PageState::Dropping
                | PageState::Fetching,
                _,
            ) => {
                self.0 |= WANTED;
                OnFault::Join
            }
            (PageState::Mapped, _) => OnFault::Present,
            (PageState::Failed | PageState::Stored, _) => OnFault::Lost,
        }
    }

    /// Edge: a page that is mapped by all we know is faulted on all the same: the host has taken the
    /// entry away, or the message is late.
    pub(crate) fn remap(&mut self) -> Taken {
        self.step(PageState::Mapped, PageState::Installing)
    }

    /// Edge: the page is to be fetched ahead of any fault.
    pub(crate) fn prefetch(&mut self) -> Option<(Slot, Generation)> {
        let slot = self.slot().filter(|_| self.state() == PageState::Stored)?;
        let generation = self.next_generation();
        Some(self.to(PageState::Fetching, (slot, generation)))
    }

    /// Edge: an untouched neighbour of a fault is installed along with it.
    pub(crate) fn claim_zero(&mut self) -> Taken {
        self.step(PageState::Zero, PageState::Installing)
    }

    /// Edge, by the owner: nothing was installed after all (no room, or only a marker was put there).
    pub(crate) fn zero_again(&mut self) -> OnSettled {
        self.owned(PageState::Installing);
        self.settle(PageState::Zero)
    }

    /// Edge, by the owner: the store had moved the page out of reach meanwhile; it is Fetching now.
    pub(crate) fn fill_missed(&mut self) -> Generation {
        self.owned(PageState::Installing);
        self.0 |= WANTED;
        let generation = self.next_generation();
        self.to(PageState::Fetching, generation)
    }

    /// Edge, by the owner: the page is in the guest mapping.
    pub(crate) fn installed(&mut self) -> OnSettled {
        self.owned(PageState::Installing);
        self.settle(PageState::Mapped)
    }

    /// Edge, by the owner: its fetched bytes are in the RAM file.
    pub(crate) fn fetched(&mut self) -> OnFetched {
        self.owned(PageState::Fetching);
        if self.is_wanted() {
            // Mapping it wakes whoever sleeps on it; who comes after that has to be seen.
            self.0 &= !WANTED;
            self.to(PageState::Installing, OnFetched::Wanted)
        } else {
            self.to(PageState::Idle, OnFetched::Idle)
        }
    }

    /// Edge, by the owner: the fetch is given up for now, and the page is Stored as before.
    pub(crate) fn unfetched(&mut self) -> OnSettled {
        self.owned(PageState::Fetching);
        self.settle(PageState::Stored)
    }

    /// Edge, by the owner: the page was not filled after all, and is Stored as before.
    pub(crate) fn unfilled(&mut self) -> OnSettled {
        self.owned(PageState::Installing);
        self.settle(PageState::Stored)
    }

    /// Edge, by the owner: the page's bytes are in the RAM file, but it could not be mapped, and is Idle.
    pub(crate) fn not_mapped(&mut self) -> OnSettled {
        self.owned(PageState::Installing);
        self.settle(PageState::Idle)
    }

    /// Edge, by the owner: the page's bytes are lost.
    pub(crate) fn failed(&mut self) -> OnSettled {
        match self.state() {
            PageState::Installing | PageState::Fetching => self.settle(PageState::Failed),
            other => panic!("a page that is {other:?} cannot fail"),
        }
    }

    /// Edge: the page is to leave the guest mapping.
    pub(crate) fn begin_unmap(&mut self) -> Taken {
        if self.pins() > 0 {
            return Taken::No;
        }
        self.step(PageState::Mapped, PageState::Unmapping)
    }

    /// Edge, by the owner: no vCPU can write the page any more; or, if that `failed`, one may.
    pub(crate) fn unmapped(&mut self, failed: bool) -> OnUnmapped {
        self.owned(PageState::Unmapping);
        if failed || self.is_wanted() {
            self.0 &= !WANTED;
            self.to(PageState::Installing, OnUnmapped::Wanted)
        } else {
            self.to(PageState::Idle, OnUnmapped::Idle)
        }
    }

    /// Edge: the page is to be written to the store. Not a pinned one, which is Idle when the host took it
    /// out of the mapping and has no memory to map it again: its bytes may change without a fault.
    pub(crate) fn begin_store(&mut self) -> Option<Generation> {
        if self.state() != PageState::Idle || self.pins() > 0 {
            return None;
        }
        let generation = self.next_generation();
        Some(self.to(PageState::Storing, generation))
    }

    /// Edge: the store did not take the page. No effect if it was used meanwhile.
    pub(crate) fn not_stored(&mut self, generation: Generation) -> Taken {
        if self.generation() != generation {
            return Taken::No;
        }
        self.step(PageState::Storing, PageState::Idle)
    }

    /// Edge: the store has the page's bytes in `slot`.
    pub(crate) fn stored(&mut self, generation: Generation, slot: Slot) -> OnStored {
        if self.state() != PageState::Storing || self.generation() != generation {
            return OnStored::Late;
        }
        let older = self.slot();
        self.set_slot(Some(slot));
        self.to(PageState::Dropping, OnStored::Drop { older })
    }

    /// Edge, by the owner: the page's memory is given back.
    pub(crate) fn dropped(&mut self) -> OnDropped {
        self.owned(PageState::Dropping);
        let wanted = self.is_wanted();
        self.0 &= !WANTED;
        self.to(PageState::Stored, if wanted { OnDropped::Wanted } else { OnDropped::Stored })
    }

    /// Edge, in Installing only: the store's copy is not kept any longer; the slot is the caller's to
    /// free.
    pub(crate) fn forget_slot(&mut self) -> Option<Slot> {
        self.owned(PageState::Installing);
        let slot = self.slot();
        self.set_slot(None);
        slot
    }

    /// Edge, by whoever stores the page: it differs from its older copy, which is given up; the slot is
    /// the caller's to free. No effect if the page was used meanwhile.
    pub(crate) fn forget_older(&mut self, generation: Generation) -> Option<Slot> {
        if self.state() != PageState::Storing || self.generation() != generation {
            return None;
        }
        let slot = self.slot();
        self.set_slot(None);
        slot
    }

    /// Edge: a page in memory that nobody is at does without its older copy; the slot is the caller's to
    /// free.
    pub(crate) fn forget_copy(&mut self) -> Option<Slot> {
        if !matches!(self.state(), PageState::Mapped | PageState::Idle) {
            return None;
        }
        let slot = self.slot();
        self.set_slot(None);
        slot
    }

    /// Edge: somebody is about to enter the wait lists (under their lock).
    pub(crate) fn wait(&mut self) -> OnWait {
        use PageState as S;
        match self.state() {
            S::Installing | S::Unmapping | S::Dropping | S::Fetching => {
                self.0 |= WAITERS;
                OnWait::Waits
            }
            S::Zero | S::Mapped | S::Idle | S::Storing | S::Stored | S::Failed => OnWait::Settled,
        }
    }

    /// Edge: the page is not to leave the guest mapping.
    pub(crate) fn pin(&mut self) -> OnPin {
        if self.state() != PageState::Mapped {
            return OnPin::Absent;
        }
        if self.pins() == MAX_PINS {
            return OnPin::TooMany;
        }
        self.0 += 1 << PINS_SHIFT;
        OnPin::Pinned
    }

    /// Edge: one pin less.
    pub(crate) fn unpin(&mut self) {
        assert!(self.pins() > 0, "a page without a pin cannot be unpinned");
        self.0 -= 1 << PINS_SHIFT;
    }

    fn generation(self) -> Generation {
        Generation(((self.0 & GENERATION) >> GENERATION_SHIFT) as u16)
    }

    fn next_generation(&mut self) -> Generation {
        let Generation(last) = self.generation();
        let next = last.wrapping_add(1);
        self.0 = (self.0 & !GENERATION) | u64::from(next) << GENERATION_SHIFT;
        Generation(next)
    }

    fn set_slot(&mut self, slot: Option<Slot>) {
        self.0 &= !HAS_SLOT & ((1 << SLOT_SHIFT) - 1);
        if let Some(Slot(slot)) = slot {
            self.0 |= HAS_SLOT | u64::from(slot) << SLOT_SHIFT;
        }
    }

    fn to<V>(&mut self, state: PageState, verdict: V) -> V {
        self.0 = (self.0 & !STATE) | state as u64;
        verdict
    }

    fn step(&mut self, from: PageState, to: PageState) -> Taken {
        if self.state() == from { self.to(to, Taken::Yes) } else { Taken::No }
    }

    /// Ends an ownership: the wait lists are the caller's to empty.
    fn settle(&mut self, state: PageState) -> OnSettled {
        let (waiters, wanted) = (self.0 & WAITERS != 0, self.0 & WANTED != 0);
        self.0 &= !(WAITERS | WANTED);
        self.to(state, OnSettled { waiters, wanted })
    }

    /// An edge that only the owner takes was taken by somebody else: a bug.
    fn owned(self, state: PageState) {
        assert_eq!(self.state(), state, "this edge belongs to the owner of a page in that state");
    }
}

#[cfg(test)]
#[path = "word_tests.rs"]
mod tests;

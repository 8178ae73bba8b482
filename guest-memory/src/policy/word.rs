//! What the policy knows of one page, packed into one word.
//!
//! | bits    | in a list (Mapped, Idle) | in flight (Ageing, Leaving) | out of memory          |
//! |---------|--------------------------|-----------------------------|------------------------|
//! | 0..=2   | place: 2 Mapped, 4 Idle  | 3 Ageing, 5 Leaving         | 0 Out, 1 Ghost         |
//! | 3       | queue: 0 small, 1 main   | the same                    | 0                      |
//! | 4..=5   | heat                     | the same                    | 0                      |
//! | 6..=7   | Mapped: rounds to skip   | 0                           | 0                      |
//! |         | Idle: 1 is prefetched    | Leaving: as Idle            |                        |
//! | 8..=35  | page before, plus 1      | 0                           | 8..=31: batch (Ghost)  |
//! | 36..=63 | page behind, plus 1      | 36..=59: batch (Leaving)    | 32..=63: clock (Ghost) |
//!
//! The zero word is a page that the policy has never heard of, so that a table of such pages costs no
//! memory. 28 bits of page number are a guest of 1 TiB.

use crate::address::PageIndex;

/// The most pages that a link can tell apart (one number is "none").
pub(crate) const MAX_PAGES: u32 = (1 << LINK_BITS) - 1;
/// The most heat that a word can hold.
pub(super) const MAX_HEAT: u8 = 3;

const LINK_BITS: u32 = 28;
const PREV: Field = Field::new(8, LINK_BITS);
const NEXT: Field = Field::new(36, LINK_BITS);
const PLACE: Field = Field::new(0, 3);
const MAIN: Field = Field::new(3, 1);
const HEAT: Field = Field::new(4, 2);
const SKIP: Field = Field::new(6, 2);
const GHOST_BATCH: Field = Field::new(8, Batch::BITS);
const GHOST_CLOCK: Field = Field::new(32, 32);
const FLIGHT_BATCH: Field = Field::new(36, Batch::BITS);

/// Some bits of a word.
#[derive(Clone, Copy)]
struct Field {
    shift: u32,
    mask: u64,
}

impl Field {
    const fn new(shift: u32, bits: u32) -> Self {
        Self { shift, mask: (1 << bits) - 1 }
    }

    const fn of(self, word: u64) -> u64 {
        word >> self.shift & self.mask
    }

    /// Bits of `value` beyond the field are cut off.
    const fn set(self, word: u64, value: u64) -> u64 {
        word & !(self.mask << self.shift) | (value & self.mask) << self.shift
    }
}

/// Where a page is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// Not in memory, and nothing is remembered of it.
    Out,
    /// Not in memory; its eviction is remembered.
    Ghost,
    /// In memory and mapped for the guest: its accesses are invisible.
    Mapped,
    /// Mapped, and handed out by `age`.
    Ageing,
    /// In memory and unmapped: its next access is a fault.
    Idle,
    /// Idle, and handed out by `victims`.
    Leaving,
}

/// The two queues of S3-FIFO.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Queue {
    /// On probation: new pages, and pages that were long gone.
    Small,
    /// Pages that were touched again.
    Main,
}

/// Pages that were handed out as victims together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Batch(u32);

impl Batch {
    /// Numbers come again after 16 million batches; a ghost of that age is told apart by its clock.
    const BITS: u32 = 24;

    /// The batch after this one.
    pub(super) const fn next(self) -> Self {
        Self((self.0 + 1) & ((1 << Self::BITS) - 1))
    }
}

/// What is remembered of an eviction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ghost {
    /// The batch that the page left with.
    pub(super) batch: Batch,
    /// Evictions before this one, modulo 2^32.
    pub(super) clock: u32,
}

/// One page's word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Word(pub(super) u64);

impl Word {
    /// A page that is Out, with nothing remembered.
    pub(super) const OUT: Self = Self(0);

    /// A page out of memory whose eviction is remembered.
    pub(super) const fn ghost(ghost: Ghost) -> Self {
        let word = PLACE.set(0, 1);
        let word = GHOST_BATCH.set(word, ghost.batch.0 as u64);
        Self(GHOST_CLOCK.set(word, ghost.clock as u64))
    }

    pub(super) const fn place(self) -> Place {
        match PLACE.of(self.0) {
            0 => Place::Out,
            1 => Place::Ghost,
            2 => Place::Mapped,
            3 => Place::Ageing,
            4 => Place::Idle,
            _ => Place::Leaving,
        }
    }

    pub(super) const fn queue(self) -> Queue {
        if MAIN.of(self.0) == 0 { Queue::Small } else { Queue::Main }
    }

    /// How many passes the page has left before it is evicted.
    pub(super) const fn heat(self) -> u8 {
        HEAT.of(self.0) as u8
    }

    /// How many rounds a Mapped page stays so without being looked at; 1 also for an Idle or Leaving
    /// page that was prefetched.
    pub(super) const fn skip(self) -> u8 {
        SKIP.of(self.0) as u8
    }

    /// A page that was prefetched, and that nobody has accessed yet.
    pub(super) const fn prefetched() -> Self {
        Self::resident(Place::Idle, Queue::Small, 0, 1)
    }

    /// Whether nobody has accessed the page since it was prefetched.
    pub(super) const fn is_prefetched(self) -> bool {
        matches!(self.place(), Place::Idle | Place::Leaving) && self.skip() > 0
    }

    /// The page before it in its list.
    pub(super) const fn prev(self) -> Option<PageIndex> {
        link(PREV.of(self.0))
    }

    /// The page behind it in its list.
    pub(super) const fn next(self) -> Option<PageIndex> {
        link(NEXT.of(self.0))
    }

    /// The eviction that is remembered; `None` unless the page is a ghost.
    pub(super) const fn as_ghost(self) -> Option<Ghost> {
        match self.place() {
            Place::Ghost => Some(Ghost {
                batch: Batch(GHOST_BATCH.of(self.0) as u32),
                clock: GHOST_CLOCK.of(self.0) as u32,
            }),
            _ => None,
        }
    }

    /// The batch of a page that is Leaving.
    pub(super) const fn flight_batch(self) -> Batch {
        Batch(FLIGHT_BATCH.of(self.0) as u32)
    }

    /// A page in memory, in no list yet.
    pub(super) const fn resident(place: Place, queue: Queue, heat: u8, skip: u8) -> Self {
        let place = match place {
            Place::Out => 0,
            Place::Ghost => 1,
            Place::Mapped => 2,
            Place::Ageing => 3,
            Place::Idle => 4,
            Place::Leaving => 5,
        };
        let word = PLACE.set(0, place);
        let word = MAIN.set(word, matches!(queue, Queue::Main) as u64);
        let word = HEAT.set(word, heat as u64);
        Self(SKIP.set(word, skip as u64))
    }

    pub(super) const fn with_flight_batch(self, batch: Batch) -> Self {
        Self(FLIGHT_BATCH.set(self.0, batch.0 as u64))
    }

    pub(super) const fn with_prev(self, page: Option<PageIndex>) -> Self {
        Self(PREV.set(self.0, link_bits(page)))
    }

    pub(super) const fn with_next(self, page: Option<PageIndex>) -> Self {
        Self(NEXT.set(self.0, link_bits(page)))
    }
}

const fn link(bits: u64) -> Option<PageIndex> {
    match bits {
        0 => None,
        bits => Some(PageIndex(bits as u32 - 1)),
    }
}

const fn link_bits(page: Option<PageIndex>) -> u64 {
    match page {
        None => 0,
        Some(page) => page.0 as u64 + 1,
    }
}

//! Where each page of the tiered store is, and which compressed page is the oldest.
//!
//! ```text
//!   slot -> entry    nothing | the slot behind | object
//!   object           Queued  --begin_move--> Moving --end_move--> gone, its entry says behind
//!                       |       <--(error)--    |
//!                      free                    free
//!                       v                       v
//!                      gone                  Orphan --end_move--> gone, and so is its copy behind
//! ```
//! A slot's number stays the same while its page moves.

use super::codec::Packed;
use super::slabs::{Place, Slabs};
use crate::stores::{MAX_SLOTS, Slot};

/// An entry: nothing here.
const NOTHING: u32 = u32::MAX;
/// In an entry: the page is behind; the other bits are its slot there.
const BEHIND: u32 = 1 << 31;
/// No object.
const NONE: u32 = u32::MAX;
/// How many entries or objects are allocated at a time, so that none is ever copied.
const CHUNK: usize = 4096;

/// Where a page is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub(super) enum Found {
    /// Here; so many bytes were copied.
    Here(usize),
    /// Behind, in this slot.
    Behind(Slot),
    /// Nowhere: the slot holds no page.
    Nowhere,
}

/// What was freed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub(super) enum Freed {
    /// A page that was here.
    Here,
    /// A page behind, in this slot, which the caller has to free.
    Behind(Slot),
    /// Nothing: the slot holds no page.
    Nothing,
}

/// A page on its way to the store behind. It can be read here until it is there.
#[derive(Debug)]
pub(super) struct Move {
    object: u32,
    /// Its compressed bytes.
    pub(super) packed: Vec<u8>,
}

/// What became of a move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub(super) enum Moved {
    /// The page is where the caller said, or stays here.
    Done,
    /// The page was freed meanwhile; its copy behind, in this slot, is the caller's to free.
    Unwanted(Slot),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// In the list by age.
    Queued,
    /// In no list: somebody is writing it to the store behind.
    Moving,
    /// As `Moving`, and freed meanwhile: it has neither bytes nor a slot.
    Orphan,
    /// Not in use.
    Unused,
}

/// One compressed page.
#[derive(Clone, Copy, Debug)]
struct Object {
    place: Place,
    len: u16,
    state: State,
    slot: u32,
    older: u32,
    newer: u32,
}

/// All pages of the tiered store.
#[derive(Debug)]
pub(super) struct Table {
    slabs: Slabs,
    entries: Chunks<u32>,
    free_slots: Vec<u32>,
    objects: Chunks<Object>,
    free_objects: Vec<u32>,
    oldest: u32,
    newest: u32,
    pages: u64,
}

impl Table {
    /// No pages; those that are compressed go into `slabs`.
    pub(super) fn new(slabs: Slabs) -> Self {
        Self {
            slabs,
            entries: Chunks::default(),
            free_slots: Vec::new(),
            objects: Chunks::default(),
            free_objects: Vec::new(),
            oldest: NONE,
            newest: NONE,
            pages: 0,
        }
    }

    /// Keeps a compressed page; `None` when there is no room.
    pub(super) fn insert(&mut self, packed: &[u8]) -> Option<Slot> {
        let place = self.slabs.insert(packed)?;
        let Some(slot) = self.take_slot() else {
            self.slabs.remove(place, packed.len());
            return None;
        };
        let object = Object {
            place,
            len: packed.len() as u16,
            state: State::Queued,
            slot: slot.0,
            older: NONE,
            newer: NONE,
        };
        let number = match self.free_objects.pop() {
            Some(number) => {
                self.objects[number] = object;
                number
            }
            None => self.objects.push(object),
        };
        self.entries[slot.0] = number;
        self.push_newest(number);
        self.pages += 1;
        Some(slot)
    }

    /// Keeps the place of a page that went straight to the store behind; `None` when there are too
    /// many pages.
    pub(super) fn insert_behind(&mut self, behind: Slot) -> Option<Slot> {
        let slot = self.take_slot()?;
        self.entries[slot.0] = BEHIND | behind.0;
        Some(slot)
    }

    /// Finds a page, and copies its bytes if they are here.
    pub(super) fn find(&self, slot: Slot, packed: &mut Packed) -> Found {
        match self.entry(slot) {
            NOTHING => Found::Nowhere,
            entry if entry & BEHIND != 0 => Found::Behind(Slot(entry & !BEHIND)),
            number => {
                let Object { place, len, .. } = self.objects[number];
                packed[..len.into()].copy_from_slice(self.slabs.get(place, len.into()));
                Found::Here(len.into())
            }
        }
    }

    /// Whether a page is here.
    pub(super) fn is_here(&self, slot: Slot) -> bool {
        self.entry(slot) & BEHIND == 0
    }

    /// Whether a page is in this slot of the store behind.
    pub(super) fn is_behind(&self, slot: Slot, behind: Slot) -> bool {
        self.entry(slot) == BEHIND | behind.0
    }

    /// Forgets a page.
    pub(super) fn free(&mut self, slot: Slot) -> Freed {
        let entry = self.entry(slot);
        if entry == NOTHING {
            return Freed::Nothing;
        }
        self.entries[slot.0] = NOTHING;
        self.free_slots.push(slot.0);
        if entry & BEHIND != 0 {
            return Freed::Behind(Slot(entry & !BEHIND));
        }
        let Object { place, len, state, .. } = self.objects[entry];
        self.slabs.remove(place, len.into());
        self.pages -= 1;
        match state {
            State::Moving => self.objects[entry].state = State::Orphan,
            _ => {
                self.unlink(entry);
                self.release(entry);
            }
        }
        Freed::Here
    }

    /// Takes up to `max` of the oldest pages out of the list, to be written to the store behind.
    pub(super) fn begin_move(&mut self, max: usize) -> Vec<Move> {
        let mut moves = Vec::new();
        while moves.len() < max && self.oldest != NONE {
            let number = self.oldest;
            self.unlink(number);
            let object = &mut self.objects[number];
            object.state = State::Moving;
            let packed = self.slabs.get(object.place, object.len.into()).to_vec();
            moves.push(Move { object: number, packed });
        }
        moves
    }

    /// A move is over: the page is in this slot behind, or (`None`) it has to stay. Pages that stay
    /// are the oldest again, so a batch is to be ended from its last to its first.
    pub(super) fn end_move(&mut self, moved: &Move, behind: Option<Slot>) -> Moved {
        let number = moved.object;
        let Object { place, len, state, slot, .. } = self.objects[number];
        match (state, behind) {
            (State::Orphan, behind) => {
                self.release(number);
                behind.map_or(Moved::Done, Moved::Unwanted)
            }
            (_, Some(behind)) => {
                self.slabs.remove(place, len.into());
                self.entries[slot] = BEHIND | behind.0;
                self.pages -= 1;
                self.release(number);
                Moved::Done
            }
            (_, None) => {
                self.objects[number].state = State::Queued;
                self.push_oldest(number);
                Moved::Done
            }
        }
    }

    /// Compressed pages that are here.
    pub(super) fn pages(&self) -> u64 {
        self.pages
    }

    /// The memory for pages that are here.
    pub(super) fn slabs(&self) -> &Slabs {
        &self.slabs
    }

    /// What these tables take, in bytes.
    pub(super) fn metadata_bytes(&self) -> u64 {
        let free = (self.free_slots.capacity() + self.free_objects.capacity()) * 4;
        let tables = self.entries.bytes() + self.objects.bytes() + free;
        tables as u64 + self.slabs.metadata_bytes()
    }

    fn entry(&self, slot: Slot) -> u32 {
        self.entries.get(slot.0).copied().unwrap_or(NOTHING)
    }

    fn take_slot(&mut self) -> Option<Slot> {
        if let Some(slot) = self.free_slots.pop() {
            return Some(Slot(slot));
        }
        (self.entries.len() < MAX_SLOTS).then(|| Slot(self.entries.push(NOTHING)))
    }

    /// The object's number may be used again.
    fn release(&mut self, number: u32) {
        self.objects[number].state = State::Unused;
        self.free_objects.push(number);
    }

    fn push_newest(&mut self, number: u32) {
        let older = std::mem::replace(&mut self.newest, number);
        (self.objects[number].older, self.objects[number].newer) = (older, NONE);
        match older {
            NONE => self.oldest = number,
            older => self.objects[older].newer = number,
        }
    }

    fn push_oldest(&mut self, number: u32) {
        let newer = std::mem::replace(&mut self.oldest, number);
        (self.objects[number].older, self.objects[number].newer) = (NONE, newer);
        match newer {
            NONE => self.newest = number,
            newer => self.objects[newer].older = number,
        }
    }

    fn unlink(&mut self, number: u32) {
        let Object { older, newer, state, .. } = self.objects[number];
        debug_assert_eq!(state, State::Queued);
        match older {
            NONE => self.oldest = newer,
            older => self.objects[older].newer = newer,
        }
        match newer {
            NONE => self.newest = older,
            newer => self.objects[newer].older = older,
        }
    }
}

/// A growing array that never moves its elements.
#[derive(Debug)]
struct Chunks<T> {
    chunks: Vec<Vec<T>>,
}

impl<T> Default for Chunks<T> {
    fn default() -> Self {
        Self { chunks: Vec::new() }
    }
}

impl<T> Chunks<T> {
    fn len(&self) -> u32 {
        let last = self.chunks.last().map_or(0, Vec::len);
        (self.chunks.len().saturating_sub(1) * CHUNK + last) as u32
    }

    fn push(&mut self, element: T) -> u32 {
        let index = self.len();
        if (index as usize).is_multiple_of(CHUNK) {
            self.chunks.push(Vec::with_capacity(CHUNK));
        }
        self.chunks[index as usize / CHUNK].push(element);
        index
    }

    fn get(&self, index: u32) -> Option<&T> {
        self.chunks.get(index as usize / CHUNK)?.get(index as usize % CHUNK)
    }

    fn bytes(&self) -> usize {
        self.chunks.len() * CHUNK * size_of::<T>()
    }
}

impl<T> std::ops::Index<u32> for Chunks<T> {
    type Output = T;

    fn index(&self, index: u32) -> &T {
        &self.chunks[index as usize / CHUNK][index as usize % CHUNK]
    }
}

impl<T> std::ops::IndexMut<u32> for Chunks<T> {
    fn index_mut(&mut self, index: u32) -> &mut T {
        &mut self.chunks[index as usize / CHUNK][index as usize % CHUNK]
    }
}

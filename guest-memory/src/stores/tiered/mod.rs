//! Compressed pages in host memory, and behind them a store for those that are too many, or do not
//! compress.
//!
//! ```text
//!   write --> compress --> slabs (budget) --full--> the oldest 32 pages move behind, then again
//!                 |                                       | the store behind refuses
//!                 +-- does not get smaller --+            v
//!                                            +-----> straight behind; its error is the write's
//! ```
//! Pages move inside `write`, which may wait. One mutex guards the tables and the memory; it is held
//! for copies of compressed bytes, never while compressing, decompressing or doing I/O.

mod codec;
mod slabs;
mod table;
#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use self::codec::Packed;
use self::slabs::{MAX_OBJECT_BYTES, SLAB_BYTES, Slabs};
use self::table::{Found, Freed, Move, Moved, Table};
use super::meter::{Counter, Meter, TierReport};
use super::{OpenError, Read, Slot, Store, StoreError, Write};
use crate::address::{PAGE_SIZE, PageBytes};
use crate::pass::{MayWait, NoWait};

const TIER: &str = "lz4";
/// How many pages move at a time.
const MOVE_BATCH: usize = 32;
/// How often room is made for one page before it goes straight behind: others may take the room, or
/// no slab may get empty by it.
const MAX_MOVES: usize = 4;
/// What decompression is expected to take.
const EXPECTED_READ: Duration = Duration::from_micros(3);

/// The compressed tier and what is behind it.
pub(crate) struct Tiered {
    behind: Option<Arc<dyn Store>>,
    budget_bytes: u64,
    table: Mutex<Table>,
    /// As the table has it, for those who ask without its lock.
    memory_bytes: AtomicU64,
    closed: AtomicBool,
    demotions: Counter,
    meter: Meter,
}

impl Tiered {
    /// An empty store that takes at most `budget_bytes` bytes of memory for pages, rounded down to
    /// whole slabs.
    pub(crate) fn new(
        budget_bytes: u64,
        behind: Option<Arc<dyn Store>>,
    ) -> Result<Self, OpenError> {
        let slabs = Slabs::new(budget_bytes)
            .map_err(|source| OpenError::Addresses { bytes: budget_bytes, source })?;
        Ok(Self {
            behind,
            budget_bytes: budget_bytes - budget_bytes % SLAB_BYTES as u64,
            table: Mutex::new(Table::new(slabs)),
            memory_bytes: AtomicU64::new(0),
            closed: AtomicBool::new(false),
            demotions: Counter::default(),
            meter: Meter::new(EXPECTED_READ),
        })
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().expect("nothing panics with this lock held")
    }

    /// Changes the table and keeps its memory in view.
    fn change<T>(&self, change: impl FnOnce(&mut Table) -> T) -> T {
        let mut table = self.table();
        let result = change(&mut table);
        self.memory_bytes.store(table.slabs().memory_bytes(), Ordering::Relaxed);
        result
    }

    /// Reads a page that is here; says where it is otherwise.
    fn read_here(&self, slot: Slot, page: &mut PageBytes) -> Result<Option<Slot>, StoreError> {
        if self.closed.load(Ordering::Relaxed) {
            return Err(StoreError::Closed);
        }
        let mut packed: Packed = [0; MAX_OBJECT_BYTES];
        match self.find(slot, &mut packed) {
            Found::Nowhere => Err(StoreError::Empty(slot)),
            Found::Behind(behind) => Ok(Some(behind)),
            Found::Here(len) => {
                self.meter.hits.add(1);
                codec::decompress(&packed[..len], page).map(|()| None).map_err(|codec::Corrupt| {
                    let reason = "its compressed bytes are no page any more";
                    StoreError::Lost { tier: TIER, slot, reason }
                })
            }
        }
    }

    fn find(&self, slot: Slot, packed: &mut Packed) -> Found {
        self.table().find(slot, packed)
    }

    /// Keeps a page here if it gets smaller and there is, or can be made, room. `stuck` says that
    /// room cannot be made now, so that the other pages of a batch need not try.
    fn write_here(
        &self,
        pass: &MayWait,
        page: &PageBytes,
        stuck: &mut bool,
    ) -> Result<Slot, NotHere> {
        let mut packed: Packed = [0; MAX_OBJECT_BYTES];
        let len = codec::compress(page, &mut packed).ok_or(NotHere::Incompressible)?;
        for _ in 0..=MAX_MOVES {
            if let Some(slot) = self.change(|table| table.insert(&packed[..len])) {
                return Ok(slot);
            }
            if *stuck {
                break;
            }
            *stuck = self.make_room(pass).is_err();
        }
        Err(NotHere::NoRoom)
    }

    /// Moves some of the oldest pages to the store behind.
    fn make_room(&self, pass: &MayWait) -> Result<(), Stuck> {
        let behind = self.behind.as_ref().ok_or(Stuck)?;
        let mut moves = self.table().begin_move(MOVE_BATCH);
        let mut pages = vec![[0; PAGE_SIZE]; moves.len()];
        let whole = moves.iter().zip(&mut pages).map(|(moved, page)| unpack(moved, page));
        let whole = whole.take_while(|whole| *whole).count();
        // Bytes that are no page stay where they are: whoever reads them learns of it.
        let broken = moves.split_off(whole);
        let mut writes: Vec<_> = pages[..whole].iter().map(Write::new).collect();
        if whole > 0 {
            behind.write(pass, &mut writes);
        }
        let places: Vec<_> = writes.into_iter().map(|write| write.result.ok()).collect();
        let moved = places.iter().flatten().count();
        self.demotions.add(moved as u64);
        let unwanted: Vec<_> = self.change(|table| {
            for broken in broken.iter().rev() {
                let _: Moved = table.end_move(broken, None);
            }
            let ended = moves.iter().zip(places).rev();
            ended.map(|(moved, place)| table.end_move(moved, place)).collect()
        });
        for moved in unwanted {
            if let Moved::Unwanted(slot) = moved {
                let freed = behind.free(slot);
                debug_assert!(freed.is_ok(), "{freed:?}");
            }
        }
        if moved > 0 { Ok(()) } else { Err(Stuck) }
    }

    /// Stores pages behind, without compressing them.
    fn write_behind(&self, pass: &MayWait, writes: Vec<(&mut Write<'_>, NotHere)>) {
        let Some(behind) = &self.behind else {
            for (write, why) in writes {
                write.result = Err(match why {
                    NotHere::Incompressible => StoreError::Incompressible,
                    NotHere::NoRoom => self.full(),
                });
            }
            return;
        };
        let mut inner: Vec<_> = writes.iter().map(|(write, _)| Write::new(write.page)).collect();
        if inner.is_empty() {
            return;
        }
        behind.write(pass, &mut inner);
        for ((write, _), inner) in writes.into_iter().zip(inner) {
            write.result = inner.result.and_then(|behind_slot| {
                let slot = self.table().insert_behind(behind_slot);
                slot.ok_or_else(|| {
                    let _ = behind.free(behind_slot);
                    self.full()
                })
            });
        }
    }

    fn full(&self) -> StoreError {
        StoreError::Full { tier: TIER, capacity_bytes: self.budget_bytes }
    }
}

/// Why a page is not kept compressed.
#[derive(Clone, Copy, Debug)]
enum NotHere {
    Incompressible,
    NoRoom,
}

/// No page could be moved.
#[derive(Debug)]
struct Stuck;

fn unpack(moved: &Move, page: &mut PageBytes) -> bool {
    codec::decompress(&moved.packed, page).is_ok()
}

impl Store for Tiered {
    fn read_now(
        &self,
        pass: &NoWait,
        slot: Slot,
        page: &mut PageBytes,
    ) -> Result<bool, StoreError> {
        match (self.read_here(slot, page)?, &self.behind) {
            (Some(place), Some(behind)) => behind.read_now(pass, place, page),
            (here, _) => Ok(here.is_none()),
        }
    }

    fn at_hand(&self, slot: Slot) -> bool {
        self.table().is_here(slot)
    }

    fn read(&self, pass: &MayWait, reads: &mut [Read<'_>]) {
        let mut elsewhere = Vec::new();
        for read in reads {
            match self.read_here(read.slot, read.page) {
                Ok(None) => read.result = Ok(()),
                Ok(Some(place)) => elsewhere.push((place, read)),
                Err(error) => read.result = Err(error),
            }
        }
        let Some(behind) = self.behind.as_ref().filter(|_| !elsewhere.is_empty()) else {
            return;
        };
        let mut inner = Vec::with_capacity(elsewhere.len());
        let mut outer = Vec::with_capacity(elsewhere.len());
        for (place, read) in elsewhere {
            inner.push(Read::new(place, &mut *read.page));
            outer.push((read.slot, &mut read.result));
        }
        behind.read(pass, &mut inner);
        let table = self.table();
        for ((slot, result), inner) in outer.into_iter().zip(inner) {
            // Whoever frees a page while it is read gets its bytes or this, but never another's.
            let still = table.is_behind(slot, inner.slot);
            *result = if still { inner.result } else { Err(StoreError::Empty(slot)) };
        }
    }

    fn write(&self, pass: &MayWait, writes: &mut [Write<'_>]) {
        if self.closed.load(Ordering::Relaxed) {
            writes.iter_mut().for_each(|write| write.result = Err(StoreError::Closed));
            return;
        }
        let start = Instant::now();
        let mut others = Vec::new();
        let mut stuck = false;
        for write in &mut *writes {
            match self.write_here(pass, write.page, &mut stuck) {
                Ok(slot) => write.result = Ok(slot),
                Err(why) => others.push((write, why)),
            }
        }
        self.write_behind(pass, others);
        self.meter.count_writes(start, writes);
    }

    fn free(&self, slot: Slot) -> Result<(), StoreError> {
        match (self.change(|table| table.free(slot)), &self.behind) {
            (Freed::Nothing, _) => Err(StoreError::Empty(slot)),
            (Freed::Behind(place), Some(behind)) => behind.free(place),
            _ => Ok(()),
        }
    }

    fn expected_read(&self) -> Duration {
        self.behind.as_ref().map_or(EXPECTED_READ, |behind| behind.expected_read())
    }

    fn memory_bytes(&self) -> u64 {
        let behind = self.behind.as_ref().map_or(0, |behind| behind.memory_bytes());
        self.memory_bytes.load(Ordering::Relaxed) + behind
    }

    fn report(&self) -> Vec<TierReport> {
        let table = self.table();
        let report = self.meter.report(TIER.to_owned());
        let mut tiers = vec![TierReport {
            pages: table.pages(),
            stored_bytes: table.slabs().object_bytes(),
            memory_bytes: table.slabs().memory_bytes(),
            metadata_bytes: table.metadata_bytes(),
            capacity_bytes: Some(self.budget_bytes),
            demotions: self.demotions.get(),
            ..report
        }];
        drop(table);
        tiers.extend(self.behind.iter().flat_map(|behind| behind.report()));
        tiers
    }

    fn close(&self) {
        self.closed.store(true, Ordering::Relaxed);
        if let Some(behind) = &self.behind {
            behind.close();
        }
    }
}

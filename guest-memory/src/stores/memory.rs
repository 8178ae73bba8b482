//! Pages in host memory that is no part of the process's resident set. It stands for a medium that
//! takes I/O: its pages are not at hand.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::meter::{Meter, TierReport};
use super::slots::{Slots, offset};
use super::{OpenError, Read, Slot, Store, StoreError, Write};
use crate::address::{PAGE_BYTES, PageBytes};
use crate::pass::{MayWait, NoWait};
use crate::sys::memfd;

const TIER: &str = "memory";
/// What a read is expected to take before there was one.
const EXPECTED_READ: Duration = Duration::from_micros(5);

/// A store in a memory file of its own. The file is never mapped; a freed slot gives its memory back.
#[derive(Debug)]
pub(crate) struct Memory {
    file: File,
    slots: Mutex<Slots>,
    bounded: bool,
    closed: AtomicBool,
    meter: Meter,
}

impl Memory {
    /// An empty store for `size_bytes` bytes of pages, or as many as there is memory for.
    pub(crate) fn new(size_bytes: Option<u64>) -> Result<Self, OpenError> {
        Ok(Self {
            file: memfd::create(c"nowait-store", 0).map_err(OpenError::MemoryFile)?,
            slots: Mutex::new(Slots::new(TIER, size_bytes)),
            bounded: size_bytes.is_some(),
            closed: AtomicBool::new(false),
            meter: Meter::new(EXPECTED_READ),
        })
    }

    fn slots(&self) -> std::sync::MutexGuard<'_, Slots> {
        self.slots.lock().expect("nothing panics with this lock held")
    }

    fn check_open(&self) -> Result<(), StoreError> {
        if self.closed.load(Ordering::Relaxed) { Err(StoreError::Closed) } else { Ok(()) }
    }

    fn read_one(&self, slot: Slot, page: &mut PageBytes) -> Result<(), StoreError> {
        self.check_open()?;
        self.slots().check(slot)?;
        self.file
            .read_exact_at(page, offset(slot))
            .map_err(|source| StoreError::io(TIER, "read", source))
    }

    fn write_one(&self, page: &PageBytes) -> Result<Slot, StoreError> {
        self.check_open()?;
        let slot = self.slots().take()?;
        let written = self.file.write_all_at(page, offset(slot));
        let mut slots = self.slots();
        match written {
            Ok(()) => slots.hold(slot),
            Err(_) => slots.release(slot),
        }
        written.map(|()| slot).map_err(|source| StoreError::io(TIER, "write", source))
    }
}

impl Store for Memory {
    fn read_now(&self, _: &NoWait, slot: Slot, _: &mut PageBytes) -> Result<bool, StoreError> {
        self.slots().check(slot).map(|()| false)
    }

    fn at_hand(&self, _: Slot) -> bool {
        false
    }

    fn read(&self, _: &MayWait, reads: &mut [Read<'_>]) {
        let start = Instant::now();
        for read in &mut *reads {
            read.result = self.read_one(read.slot, read.page);
        }
        self.meter.count_reads(start, reads);
    }

    fn write(&self, _: &MayWait, writes: &mut [Write<'_>]) {
        let start = Instant::now();
        for write in &mut *writes {
            write.result = self.write_one(write.page);
        }
        self.meter.count_writes(start, writes);
    }

    fn free(&self, slot: Slot) -> Result<(), StoreError> {
        self.slots().forget(slot)?;
        // A hole that cannot be made costs memory until the slot is used again, and nothing else.
        let _ = memfd::punch(&self.file, offset(slot), PAGE_BYTES);
        self.slots().release(slot);
        self.meter.pages.sub(1);
        Ok(())
    }

    fn expected_read(&self) -> Duration {
        self.meter.expected_read()
    }

    /// None: this store stands for a medium elsewhere.
    fn memory_bytes(&self) -> u64 {
        0
    }

    fn report(&self) -> Vec<TierReport> {
        let slots = self.slots();
        let report = self.meter.report(TIER.to_owned());
        vec![TierReport {
            stored_bytes: report.pages * PAGE_BYTES,
            metadata_bytes: slots.metadata_bytes(),
            capacity_bytes: self.bounded.then(|| slots.capacity_bytes()),
            ..report
        }]
    }

    fn close(&self) {
        self.closed.store(true, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stores::testing::{self, Model};
    use proptest::prelude::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn a_freed_slot_gives_its_memory_back() {
        let store = Memory::new(None).unwrap();
        let slot = testing::write(&store, &testing::page(1)).unwrap();
        assert_eq!(store.file.metadata().unwrap().blocks() * 512, PAGE_BYTES);
        store.free(slot).unwrap();
        assert_eq!(store.file.metadata().unwrap().blocks(), 0);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn it_keeps_what_a_map_keeps(ops in testing::operations(60)) {
            let store = Memory::new(Some(40 * PAGE_BYTES)).unwrap();
            Model::new(Some(40)).run(&store, &ops)?;
        }
    }
}

//! Pages in a file or on a block device.
//!
//! ```text
//!   slot n -> bytes start + n * 4096 ..    start is 0 in a file, 1 MiB on a block device
//!
//!   write --take slots--> aligned copies --one io_uring batch--> hold slots, or release them
//! ```
//! Freed slots are used again before the file grows; their old bytes stay in the file until then, and
//! until the file is closed.

mod engine;
mod target;
#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

pub use target::FileError;

use self::engine::Engine;
use self::target::Target;
use super::meter::{Meter, TierReport};
use super::slots::{Slots, offset};
use super::{FileSpec, Read, Slot, Store, StoreError, Write};
use crate::address::{PAGE_BYTES, PageBytes};
use crate::pass::{MayWait, NoWait};

const TIER: &str = "file";
/// The file grows by this many bytes at a time: writes within a file can be done side by side, writes
/// at its end cannot.
const GROWTH_BYTES: u64 = 16 << 20;
/// What a read is expected to take before there was one.
const EXPECTED_READ: Duration = Duration::from_micros(200);

/// A store in a file.
pub(crate) struct FileStore {
    name: String,
    target: Target,
    engine: Engine,
    slots: Mutex<Slots>,
    /// How far the file has grown, in bytes.
    grown: Mutex<u64>,
    closed: AtomicBool,
    meter: Meter,
}

impl FileStore {
    /// Opens or creates the file.
    pub(crate) fn new(spec: &FileSpec) -> Result<Self, FileError> {
        let target = Target::open(spec)?;
        let engine = Engine::new(&target.file).map_err(|source| FileError::System {
            action: "open",
            path: spec.path.clone(),
            source,
        })?;
        Ok(Self {
            name: super::LayerSpec::File(spec.clone()).to_string(),
            slots: Mutex::new(Slots::new(TIER, target.size_bytes)),
            // A device does not grow.
            grown: Mutex::new(if target.start > 0 { u64::MAX } else { 0 }),
            target,
            engine,
            closed: AtomicBool::new(false),
            meter: Meter::new(EXPECTED_READ),
        })
    }

    fn slots(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().expect("nothing panics with this lock held")
    }

    fn check_open(&self) -> Result<(), StoreError> {
        if self.closed.load(Ordering::Relaxed) { Err(StoreError::Closed) } else { Ok(()) }
    }

    /// Grows the file beyond the last of these offsets. Where that does not work the write finds out
    /// why, or does without.
    fn grow(&self, offsets: &[u64]) {
        let end = offsets.iter().max().map_or(0, |last| last + PAGE_BYTES);
        let mut grown = self.grown.lock().expect("nothing panics with this lock held");
        if end > *grown {
            let bound = self.target.size_bytes.unwrap_or(u64::MAX);
            let new = end.next_multiple_of(GROWTH_BYTES).min(bound.max(end));
            let flags = rustix::fs::FallocateFlags::empty();
            let room = rustix::fs::fallocate(&self.target.file, flags, *grown, new - *grown);
            if room.is_ok() || rustix::fs::ftruncate(&self.target.file, new).is_ok() {
                *grown = new;
            }
        }
    }

    fn offset(&self, slot: Slot) -> u64 {
        self.target.start + offset(slot)
    }
}

/// The error of one page, and of all pages of a batch that failed as a whole.
fn error(action: &'static str, source: &std::io::Error) -> StoreError {
    let source = match source.raw_os_error() {
        Some(code) => std::io::Error::from_raw_os_error(code),
        None => std::io::Error::new(source.kind(), source.to_string()),
    };
    StoreError::io(TIER, action, source)
}

impl Store for FileStore {
    fn read_now(&self, _: &NoWait, slot: Slot, _: &mut PageBytes) -> Result<bool, StoreError> {
        self.slots().check(slot).map(|()| false)
    }

    fn at_hand(&self, _: Slot) -> bool {
        false
    }

    fn read(&self, _: &MayWait, reads: &mut [Read<'_>]) {
        let start = Instant::now();
        let slots = self.slots();
        for read in &mut *reads {
            read.result = self.check_open().and_then(|()| slots.check(read.slot));
        }
        drop(slots);
        let mut there: Vec<_> = reads.iter_mut().filter(|read| read.result.is_ok()).collect();
        let offsets: Vec<_> = there.iter().map(|read| self.offset(read.slot)).collect();
        let answers = self.engine.read(&offsets, |index, page| match page {
            Ok(page) => *there[index].page = *page,
            Err(source) => there[index].result = Err(error("read", &source)),
        });
        if let Err(source) = answers {
            there.iter_mut().for_each(|read| read.result = Err(error("read", &source)));
        }
        self.meter.count_reads(start, reads);
    }

    fn write(&self, _: &MayWait, writes: &mut [Write<'_>]) {
        let start = Instant::now();
        let mut slots = self.slots();
        for write in &mut *writes {
            write.result = self.check_open().and_then(|()| slots.take());
        }
        drop(slots);
        let placed = writes.iter().filter_map(|write| Some((*write.result.as_ref().ok()?, write)));
        let (places, pages): (Vec<Slot>, Vec<&PageBytes>) =
            placed.map(|(slot, write)| (slot, write.page)).unzip();
        let offsets: Vec<_> = places.iter().map(|slot| self.offset(*slot)).collect();
        self.grow(&offsets);
        let answers = self.engine.write(&offsets, &pages);
        let mut slots = self.slots();
        let placed = writes.iter_mut().filter(|write| write.result.is_ok());
        match answers {
            Ok(answers) => {
                for ((write, slot), answer) in placed.zip(places).zip(answers) {
                    match answer {
                        Ok(()) => slots.hold(slot),
                        Err(source) => {
                            slots.release(slot);
                            write.result = Err(error("write", &source));
                        }
                    }
                }
            }
            // These slots may be written at any time: they are never used again.
            Err(source) => placed.for_each(|write| write.result = Err(error("write", &source))),
        }
        drop(slots);
        self.meter.count_writes(start, writes);
    }

    fn free(&self, slot: Slot) -> Result<(), StoreError> {
        let mut slots = self.slots();
        slots.forget(slot)?;
        slots.release(slot);
        self.meter.pages.sub(1);
        Ok(())
    }

    fn expected_read(&self) -> Duration {
        self.meter.expected_read()
    }

    /// None: with O_DIRECT there is no copy, and without it the copies are the page cache's, which
    /// the kernel drops when it needs the memory.
    fn memory_bytes(&self) -> u64 {
        0
    }

    fn report(&self) -> Vec<TierReport> {
        let report = self.meter.report(self.name.clone());
        let slots = self.slots();
        let cache = match self.target.direct {
            true => "O_DIRECT",
            false => "through the page cache, for O_DIRECT does not work there",
        };
        vec![TierReport {
            stored_bytes: report.pages * PAGE_BYTES,
            metadata_bytes: slots.metadata_bytes(),
            capacity_bytes: self.target.size_bytes.map(|_| slots.capacity_bytes()),
            notes: vec![cache.to_owned(), self.engine.note()],
            ..report
        }]
    }

    /// Reads and writes that the kernel has begun are waited for by their callers.
    fn close(&self) {
        self.closed.store(true, Ordering::Relaxed);
    }
}

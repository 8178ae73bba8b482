//! The threads that touch pages and check what they find.

use std::fs::File;
use std::hint::black_box;
use std::io::Write;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hdrhistogram::Histogram;
use hdrhistogram::serialization::{Serializer, V2Serializer};
use nowait_wire::agent::{ACCESS_DIGITS, Kind, MAX_OVERRUN_US, Pressure, Workload};

use super::course::Course;
use super::gate::Gate;
use super::pattern::{self, COPY_BYTES, Compressible, Copied, Xorshift};
use super::record::Record;
use super::{WorkloadError, evict};
use crate::sys::{self, Pages};

/// What the threads of one run share, and what they have done.
pub(super) struct Faulting {
    buffer: Buffer,
    course: Course,
    kind: Kind,
    touched: AtomicU64,
    wrong: AtomicU64,
    /// Threads that have not ended, and the end of the last of those that have.
    running: AtomicU64,
    last_end_ns: AtomicU64,
    /// Of 100 touches so many write.
    write_percent: u8,
    /// How long touches took, in microseconds, of the threads that have ended.
    access_us: Mutex<Histogram<u64>>,
    /// Where touches are written down.
    record: Option<Arc<Record>>,
}

/// How a page is touched.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Touch {
    Read,
    /// By a store of this process.
    Write,
    /// By `read(2)`.
    Copy,
}

/// What came of it.
struct Touched {
    /// The page held what it had to.
    good: bool,
    /// From the access to its completion.
    access_ns: u64,
}

fn no_accesses() -> Result<Histogram<u64>, WorkloadError> {
    Histogram::new_with_bounds(1, MAX_OVERRUN_US, ACCESS_DIGITS)
        .map_err(|e| WorkloadError::Thread(format!("cannot make a histogram: {e}")))
}

impl Faulting {
    /// Makes a buffer ready, which is evicted if the workload says so.
    pub(super) fn prepare(
        workload: &Workload,
        kept: Option<Buffer>,
    ) -> Result<Self, WorkloadError> {
        let faulting = Self::new(workload, kept)?;
        match workload.pressure {
            Pressure::Evict => evict::evict(&faulting.buffer.pages)?,
            // They leave by themselves.
            Pressure::Limit { .. } => {}
        }
        Ok(faulting)
    }

    /// The same without the eviction.
    pub(super) fn new(workload: &Workload, kept: Option<Buffer>) -> Result<Self, WorkloadError> {
        Ok(Self {
            buffer: match kept {
                Some(kept) => kept,
                None => Buffer::new(workload.pages, Compressible(workload.compressible_percent))?,
            },
            course: Course::new(workload.pages, workload.pressure),
            kind: workload.kind,
            touched: AtomicU64::new(0),
            wrong: AtomicU64::new(0),
            running: AtomicU64::new(u64::from(workload.threads)),
            last_end_ns: AtomicU64::new(0),
            write_percent: workload.write_percent,
            access_us: Mutex::new(no_accesses()?),
            record: None,
        })
    }

    /// Has its touches written down.
    pub(super) fn recorded(self, record: Option<Arc<Record>>) -> Self {
        Self { record, ..self }
    }

    /// The buffer, for another run.
    pub(super) fn into_buffer(self) -> Buffer {
        self.buffer
    }

    /// Touches that the threads have made and checked.
    pub(super) fn pages_touched(&self) -> u64 {
        self.touched.load(Ordering::Acquire)
    }

    /// Touches that did not find what had to be there.
    pub(super) fn data_errors(&self) -> u64 {
        self.wrong.load(Ordering::Acquire)
    }

    /// How long touches took, for the host.
    pub(super) fn access_us_hdr(&self) -> Result<String, WorkloadError> {
        let histogram = self.access_us.lock().unwrap_or_else(PoisonError::into_inner);
        let mut bytes = Vec::new();
        V2Serializer::new()
            .serialize(&histogram, &mut bytes)
            .map_err(|e| WorkloadError::Thread(format!("cannot encode the access times: {e}")))?;
        Ok(STANDARD.encode(bytes))
    }

    /// The body of the faulting thread with this number: takes pages until the time is over or none
    /// is left, but at least one, if there is one: a guest whose own kernel is out of memory may run
    /// its threads only when the time is over, and what they wait for is what is measured. The last
    /// one to end sets `end_ns`. `None` when there was no run.
    pub(super) fn run(
        &self,
        thread: u32,
        duration_ns: u64,
        gate: &Gate,
        end_ns: &AtomicU64,
    ) -> Option<()> {
        let mut course = self.course.of_thread(thread);
        let mut dice = Xorshift::new(WRITE_SEED, u64::from(thread));
        let (set_up, accesses) = match no_accesses() {
            Ok(accesses) => (Ok(()), Some(accesses)),
            Err(error) => (Err(error.to_string()), None),
        };
        let start_ns = gate.arrive(set_up)?;
        let mut accesses = accesses?;
        sys::sleep_until(start_ns);
        let mut touched_one = false;
        loop {
            let now_ns = sys::now_ns();
            if touched_one && now_ns >= start_ns + duration_ns {
                break;
            }
            self.course.at(now_ns - start_ns, duration_ns);
            let Some(index) = course.next() else {
                break;
            };
            if let Some(record) = &self.record {
                record.touch(index);
            }
            let touch = match self.kind {
                Kind::Copy => Touch::Copy,
                _ if dice.next() % 100 < u64::from(self.write_percent) => Touch::Write,
                _ => Touch::Read,
            };
            // Reads of pages that nobody writes to need not be kept apart.
            let touched = match touch {
                Touch::Read if self.write_percent == 0 => Some(self.buffer.check(index)),
                touch => self.buffer.change(index, touch),
            };
            let Some(Touched { good, access_ns }) = touched else {
                continue;
            };
            if !good {
                self.wrong.fetch_add(1, Ordering::AcqRel);
            }
            touched_one = true;
            accesses.saturating_record(access_ns.div_ceil(1000));
            self.touched.fetch_add(1, Ordering::AcqRel);
        }
        self.last_end_ns.fetch_max(sys::now_ns(), Ordering::AcqRel);
        let mut all = self.access_us.lock().unwrap_or_else(PoisonError::into_inner);
        // Of the same bounds.
        let _ = all.add(&accesses);
        drop(all);
        if self.running.fetch_sub(1, Ordering::AcqRel) == 1 {
            end_ns.store(self.last_end_ns.load(Ordering::Acquire), Ordering::Release);
        }
        Some(())
    }
}

/// Seeds which touches write.
const WRITE_SEED: u64 = 0x6e6f_7761_6974_0004;
/// Set in a page's version while a thread is at it. No run is long enough for a version to get there.
const BUSY: u32 = 1 << 31;

/// The pages that threads touch, and the file from which `read(2)` copies to them.
pub(crate) struct Buffer {
    pages: Pages,
    share: Compressible,
    file: File,
    content: Vec<u8>,
    /// The version of the bytes that were last copied to each page, and [`BUSY`]; 0: none.
    versions: Vec<AtomicU32>,
}

impl Buffer {
    /// Makes the pages and fills them.
    fn new(pages: u32, share: Compressible) -> Result<Self, WorkloadError> {
        let pages = Pages::new(pages as usize).map_err(WorkloadError::Memory)?;
        pattern::fill(&pages, share);
        let content = pattern::file_content();
        let file = sys::memory_file("nowait-copy").and_then(|mut file| {
            file.write_all(&content)?;
            Ok(file)
        });
        let versions = std::iter::repeat_with(|| AtomicU32::new(0)).take(pages.len()).collect();
        Ok(Self { pages, share, file: file.map_err(WorkloadError::File)?, content, versions })
    }

    /// Can this workload go on with it?
    pub(super) fn fits(&self, workload: &Workload) -> bool {
        let share = Compressible(workload.compressible_percent);
        self.pages.len() == workload.pages as usize && self.share == share
    }

    fn copied(&self, index: usize, version: u32) -> Copied<'_> {
        let offset = pattern::file_offset(index, version);
        let bytes = &self.content[offset..offset + COPY_BYTES];
        Copied { at_bytes: pattern::copy_at_bytes(version), bytes }
    }

    /// Reads a page to which nobody writes.
    fn check(&self, index: usize) -> Touched {
        let version = self.versions[index].load(Ordering::Acquire);
        let access_ns = self.access(index);
        Touched { good: self.holds(index, version), access_ns }
    }

    /// Reads one word: how long it took.
    fn access(&self, index: usize) -> u64 {
        let before_ns = sys::now_ns();
        black_box(self.pages.page(index)[0].load(Ordering::Acquire));
        sys::now_ns() - before_ns
    }

    /// Touches a page in this way, by the next version if it writes, then checks all of it. `None`:
    /// another thread is doing so.
    fn change(&self, index: usize, touch: Touch) -> Option<Touched> {
        let version = &self.versions[index];
        let old = version.fetch_or(BUSY, Ordering::Acquire);
        if old & BUSY != 0 {
            return None;
        }
        let new = if touch == Touch::Read { old } else { old + 1 };
        let (access_ns, done) = match touch {
            Touch::Read => (self.access(index), true),
            Touch::Write => (self.write(index, new), true),
            Touch::Copy => self.copy(index, new),
        };
        let good = done && self.holds(index, new);
        version.store(new, Ordering::Release);
        Some(Touched { good, access_ns })
    }

    /// Writes a version by stores: how long the first one took.
    fn write(&self, index: usize, version: u32) -> u64 {
        let Copied { at_bytes, bytes } = self.copied(index, version);
        let words = &self.pages.page(index)[at_bytes / 8..];
        let before_ns = sys::now_ns();
        let mut access_ns = None;
        for (word, value) in words.iter().zip(bytes.chunks_exact(8)) {
            let value = u64::from_le_bytes(value.try_into().unwrap_or_default());
            word.store(value, Ordering::Release);
            access_ns.get_or_insert_with(|| sys::now_ns() - before_ns);
        }
        access_ns.unwrap_or_default()
    }

    /// Has the kernel copy a version to a page: how long that took, and whether it was done.
    fn copy(&self, index: usize, version: u32) -> (u64, bool) {
        let offset = pattern::file_offset(index, version) as u64;
        let at_bytes = pattern::copy_at_bytes(version);
        let before_ns = sys::now_ns();
        let read = self.pages.read_file_into(&self.file, offset, index, at_bytes, COPY_BYTES);
        (sys::now_ns() - before_ns, matches!(read, Ok(COPY_BYTES)))
    }

    /// Whether a page holds this version and the one before it, of which 0 is the pattern.
    fn holds(&self, index: usize, last: u32) -> bool {
        let copied = [last, last.saturating_sub(1)].map(|version| self.copied(index, version));
        let known = last.min(2) as usize;
        pattern::verify(&self.pages, self.share, index, &copied[..known])
    }
}
#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_copy_is_expected_beside_the_one_before() {
        let buffer = Buffer::new(2, Compressible(50)).unwrap();
        let copy = |index| buffer.change(index, Touch::Copy).map(|touched| touched.good);
        for copies in 0..300 {
            assert!(buffer.check(1).good, "after {copies} copies");
            let touch = [Touch::Copy, Touch::Write, Touch::Read][copies % 3];
            assert!(buffer.change(1, touch).unwrap().good, "{copies}");
        }
        let words = || buffer.pages.page(1).iter();
        // The page comes back as it was before the last copy.
        let older: Vec<u64> = words().map(|word| word.load(Ordering::Relaxed)).collect();
        assert_eq!(copy(1), Some(true));
        words().zip(older).for_each(|(word, value)| word.store(value, Ordering::Relaxed));
        assert!(!buffer.check(1).good);
        assert_eq!(copy(1), Some(false));
        assert_eq!(copy(0), Some(true));
    }

    #[test]
    fn a_page_at_which_a_thread_is_is_left_alone() {
        let buffer = Buffer::new(1, Compressible(50)).unwrap();
        buffer.versions[0].fetch_or(BUSY, Ordering::Relaxed);
        for touch in [Touch::Copy, Touch::Write, Touch::Read] {
            assert!(buffer.change(0, touch).is_none());
        }
        assert!(pattern::verify(&buffer.pages, buffer.share, 0, &[]));
    }
}

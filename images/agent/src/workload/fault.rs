//! The threads that touch pages and check what they find.

use std::fs::File;
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use nowait_wire::agent::{Kind, Pressure, Workload};

use super::course::Course;
use super::gate::Gate;
use super::pattern::{self, COPY_BYTES, Compressible, Copied};
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
    /// Where touches are written down.
    record: Option<Arc<Record>>,
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

    /// The body of the faulting thread with this number: takes pages until the time is over or none
    /// is left. The last one to end sets `end_ns`. `None` when there was no run.
    pub(super) fn run(
        &self,
        thread: u32,
        duration_ns: u64,
        gate: &Gate,
        end_ns: &AtomicU64,
    ) -> Option<()> {
        let mut course = self.course.of_thread(thread);
        let start_ns = gate.arrive(Ok(()))?;
        sys::sleep_until(start_ns);
        while sys::now_ns() < start_ns + duration_ns {
            let Some(index) = course.next() else {
                break;
            };
            if let Some(record) = &self.record {
                record.touch(index);
            }
            let good = match self.kind {
                Kind::Copy => self.buffer.copy(index),
                Kind::Idle | Kind::User => Some(self.buffer.check(index)),
            };
            let Some(good) = good else {
                continue;
            };
            if !good {
                self.wrong.fetch_add(1, Ordering::AcqRel);
            }
            self.touched.fetch_add(1, Ordering::AcqRel);
        }
        self.last_end_ns.fetch_max(sys::now_ns(), Ordering::AcqRel);
        if self.running.fetch_sub(1, Ordering::AcqRel) == 1 {
            end_ns.store(self.last_end_ns.load(Ordering::Acquire), Ordering::Release);
        }
        Some(())
    }
}

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

    /// Reads a page to which nobody copies: whether it holds what it must.
    fn check(&self, index: usize) -> bool {
        let version = self.versions[index].load(Ordering::Acquire);
        self.holds(index, version)
    }

    /// Copies the next version to a page, which is how the page is touched, then checks all of it:
    /// whether it holds what it must. `None`: another thread is doing so.
    fn copy(&self, index: usize) -> Option<bool> {
        let version = &self.versions[index];
        let old = version.fetch_or(BUSY, Ordering::Acquire);
        if old & BUSY != 0 {
            return None;
        }
        let new = old + 1;
        let offset = pattern::file_offset(index, new) as u64;
        let at_bytes = pattern::copy_at_bytes(new);
        let read = self.pages.read_file_into(&self.file, offset, index, at_bytes, COPY_BYTES);
        let good = matches!(read, Ok(COPY_BYTES)) && self.holds(index, new);
        version.store(new, Ordering::Release);
        Some(good)
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
        for copies in 0..300 {
            assert!(buffer.check(1), "after {copies} copies");
            assert_eq!(buffer.copy(1), Some(true), "copy {copies}");
        }
        let words = || buffer.pages.page(1).iter();
        // The page comes back as it was before the last copy.
        let older: Vec<u64> = words().map(|word| word.load(Ordering::Relaxed)).collect();
        assert_eq!(buffer.copy(1), Some(true));
        words().zip(older).for_each(|(word, value)| word.store(value, Ordering::Relaxed));
        assert!(!buffer.check(1));
        assert_eq!(buffer.copy(1), Some(false));
        assert_eq!(buffer.copy(0), Some(true));
    }

    #[test]
    fn a_page_at_which_a_thread_is_is_left_alone() {
        let buffer = Buffer::new(1, Compressible(50)).unwrap();
        buffer.versions[0].fetch_or(BUSY, Ordering::Relaxed);
        assert_eq!(buffer.copy(0), None);
        assert!(pattern::verify(&buffer.pages, buffer.share, 0, &[]));
    }
}

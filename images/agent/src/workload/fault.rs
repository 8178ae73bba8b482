//! The threads that touch pages and check what they find.

use std::fs::File;
use std::io::{self, Write};
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use nowait_wire::agent::{Kind, Pressure, Workload};

use super::course::Course;
use super::gate::Gate;
use super::pattern::{self, COPY_BYTES, Copied};
use super::{WorkloadError, evict};
use crate::sys::{self, Pages};

/// The pages of one run and what the threads that share them have done.
pub(super) struct Faulting {
    pages: Pages,
    course: Course,
    /// For [`Kind::Copy`].
    source: Option<Source>,
    touched: AtomicU64,
    wrong: AtomicU64,
    /// Threads that have not ended, and the end of the last of those that have.
    running: AtomicU64,
    last_end_ns: AtomicU64,
}

impl Faulting {
    /// Makes the pages, fills them and, if the workload says so, has them evicted.
    pub(super) fn prepare(workload: &Workload) -> Result<Self, WorkloadError> {
        let faulting = Self::fill(workload)?;
        match workload.pressure {
            Pressure::Evict => evict::evict(&faulting.pages)?,
            // They leave by themselves.
            Pressure::Limit { .. } => {}
        }
        Ok(faulting)
    }

    /// Makes the pages and fills them.
    pub(super) fn fill(workload: &Workload) -> Result<Self, WorkloadError> {
        let pages = Pages::new(workload.pages as usize).map_err(WorkloadError::Memory)?;
        pattern::fill(&pages);
        let source = (workload.kind == Kind::Copy)
            .then(|| Source::new(pages.len()))
            .transpose()
            .map_err(WorkloadError::File)?;
        Ok(Self {
            pages,
            course: Course::new(workload.pages, workload.pressure),
            source,
            touched: AtomicU64::new(0),
            wrong: AtomicU64::new(0),
            running: AtomicU64::new(u64::from(workload.threads)),
            last_end_ns: AtomicU64::new(0),
        })
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
            let good = match &self.source {
                None => pattern::verify(&self.pages, index, &[]),
                Some(source) => match source.copy(&self.pages, index) {
                    Some(good) => good,
                    // Another thread is at this page.
                    None => continue,
                },
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

/// Set in a page's version while a thread is at it.
const BUSY: u8 = 1 << 7;
/// The last version; the first one follows it, which goes to the other place in the page.
const LAST_VERSION: u8 = 126;

/// The file from which `read(2)` copies, and what it has copied to where.
struct Source {
    file: File,
    content: Vec<u8>,
    /// The version of the bytes that were last copied to each page; 0: none.
    versions: Vec<AtomicU8>,
}

impl Source {
    fn new(pages: usize) -> io::Result<Self> {
        let content = pattern::file_content();
        let mut file = sys::memory_file("nowait-copy")?;
        file.write_all(&content)?;
        let versions = std::iter::repeat_with(|| AtomicU8::new(0)).take(pages).collect();
        Ok(Self { file, content, versions })
    }

    fn copied(&self, index: usize, version: u8) -> Copied<'_> {
        let offset = pattern::file_offset(index, version);
        let bytes = &self.content[offset..offset + COPY_BYTES];
        Copied { at_bytes: pattern::copy_at_bytes(version), bytes }
    }

    /// Copies the next version to a page, which is how the page is touched, then checks all of it:
    /// whether it holds what it must. `None`: another thread is doing so.
    fn copy(&self, pages: &Pages, index: usize) -> Option<bool> {
        let version = &self.versions[index];
        let old = version.fetch_or(BUSY, Ordering::Acquire);
        if old & BUSY != 0 {
            return None;
        }
        let new = if old == LAST_VERSION { 1 } else { old + 1 };
        let offset = pattern::file_offset(index, new) as u64;
        let copied = self.copied(index, new);
        let read = pages.read_file_into(&self.file, offset, index, copied.at_bytes, COPY_BYTES);
        let expected = [copied, self.copied(index, old)];
        // Version 0 is the pattern.
        let expected = if old == 0 { &expected[..1] } else { &expected };
        let good = matches!(read, Ok(COPY_BYTES)) && pattern::verify(pages, index, expected);
        version.store(new, Ordering::Release);
        Some(good)
    }
}

const _: () = assert!(LAST_VERSION.is_multiple_of(2) && LAST_VERSION < BUSY);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_copy_is_expected_beside_the_one_before() {
        let pages = Pages::new(2).unwrap();
        pattern::fill(&pages);
        let source = Source::new(2).unwrap();
        // Past the last version.
        for _ in 0..300 {
            assert_eq!(source.copy(&pages, 1), Some(true));
        }
        // The page comes back as it was before the last copy.
        let before: Vec<u64> =
            pages.page(1).iter().map(|word| word.load(Ordering::Relaxed)).collect();
        assert_eq!(source.copy(&pages, 1), Some(true));
        for (word, value) in pages.page(1).iter().zip(before) {
            word.store(value, Ordering::Relaxed);
        }
        assert_eq!(source.copy(&pages, 1), Some(false));
        assert_eq!(source.copy(&pages, 0), Some(true));
    }

    #[test]
    fn a_page_at_which_a_thread_is_is_left_alone() {
        let pages = Pages::new(1).unwrap();
        pattern::fill(&pages);
        let source = Source::new(1).unwrap();
        source.versions[0].fetch_or(BUSY, Ordering::Relaxed);
        assert_eq!(source.copy(&pages, 0), None);
        assert!(pattern::verify(&pages, 0, &[]));
    }
}

//! The threads that touch evicted pages and check what they find.

use std::fs::File;
use std::io::Write;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use nowait_wire::agent::{Kind, Workload};

use super::gate::Gate;
use super::pattern::{self, COPY_AT_BYTES, COPY_BYTES};
use super::{WorkloadError, evict};
use crate::sys::{self, Pages};

/// The pages of one run and what the threads that share them have done.
pub(super) struct Faulting {
    pages: Pages,
    order: Vec<u32>,
    /// The file for [`Kind::Copy`] and its content.
    source: Option<(File, Vec<u8>)>,
    /// The next entry of `order` that a thread takes.
    next: AtomicUsize,
    touched: AtomicU64,
    wrong: AtomicU64,
    /// Threads that have not ended, and the end of the last of those that have.
    running: AtomicU64,
    last_end_ns: AtomicU64,
}

impl Faulting {
    /// Makes the pages, fills them and has them evicted.
    pub(super) fn prepare(workload: &Workload) -> Result<Self, WorkloadError> {
        let faulting = Self::fill(workload)?;
        evict::evict(&faulting.pages)?;
        Ok(faulting)
    }

    /// Makes the pages and fills them.
    pub(super) fn fill(workload: &Workload) -> Result<Self, WorkloadError> {
        let pages = Pages::new(workload.pages as usize).map_err(WorkloadError::Memory)?;
        pattern::fill(&pages);
        let source = (workload.kind == Kind::Copy)
            .then(|| {
                let content = pattern::file_content();
                let mut file = sys::memory_file("nowait-copy")?;
                file.write_all(&content)?;
                Ok((file, content))
            })
            .transpose()
            .map_err(WorkloadError::File)?;
        Ok(Self {
            pages,
            order: pattern::order(workload.pages),
            source,
            next: AtomicUsize::new(0),
            touched: AtomicU64::new(0),
            wrong: AtomicU64::new(0),
            running: AtomicU64::new(u64::from(workload.threads)),
            last_end_ns: AtomicU64::new(0),
        })
    }

    /// Pages that the threads have touched.
    pub(super) fn pages_touched(&self) -> u64 {
        self.touched.load(Ordering::Acquire)
    }

    /// Pages that did not hold what they had to.
    pub(super) fn data_errors(&self) -> u64 {
        self.wrong.load(Ordering::Acquire)
    }

    /// The body of a faulting thread: takes pages until the time is over or none is left. The last
    /// one to end sets `end_ns`. `None` when there was no run.
    pub(super) fn run(&self, duration_ns: u64, gate: &Gate, end_ns: &AtomicU64) -> Option<()> {
        let start_ns = gate.arrive(Ok(()))?;
        sys::sleep_until(start_ns);
        while sys::now_ns() < start_ns + duration_ns {
            let taken = self.next.fetch_add(1, Ordering::Relaxed);
            let Some(&index) = self.order.get(taken) else {
                break;
            };
            if !self.touch(index as usize) {
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

    /// Touches one page, from here or by `read(2)`: whether it holds what it must.
    fn touch(&self, index: usize) -> bool {
        let Some((file, content)) = &self.source else {
            return pattern::verify(&self.pages, index, None);
        };
        let offset = pattern::file_offset(index);
        let read = self.pages.read_file_into(file, offset as u64, index, COPY_AT_BYTES, COPY_BYTES);
        let expected = &content[offset..offset + COPY_BYTES];
        matches!(read, Ok(COPY_BYTES)) && pattern::verify(&self.pages, index, Some(expected))
    }
}

//! What all threads of the pager share: where pages are, and the way to change it.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use super::PagerError;
use super::trouble::Trouble;
use super::work::{Work, Workers};
use crate::address::{PageIndex, PageRun};
use crate::ages::Fetches;
use crate::layout::RamLayout;
use crate::policy::Policy;
use crate::ram::{OnMapped, OnStep, Step};
use crate::room::Room;
use crate::stats::Counters;
use crate::stores::Store;
use crate::sys::{GuestMapping, Userfault};
use crate::table::PageTable;
use crate::waiters::{PageEnd, Waiters};
use crate::word::{Generation, PageWord};

/// No lock in here is held across I/O or a wait.
pub(crate) struct Core {
    pub(super) layout: RamLayout,
    pub(super) file: Arc<File>,
    pub(super) mapping: GuestMapping,
    pub(super) alias: GuestMemoryMmap,
    /// The host had swap at the start: a page in the RAM file may need I/O to be mapped.
    pub(super) host_swaps: bool,
    pub(super) userfault: Userfault,
    pub(super) table: PageTable,
    pub(super) waiters: Waiters,
    pub(super) store: Arc<dyn Store>,
    pub(super) policy: Mutex<Policy>,
    pub(super) room: Room,
    /// Batches of pages that are Storing and that no worker has begun to write. There is a work for
    /// each, but whoever waits for room takes one before.
    pub(super) leaving: Mutex<VecDeque<Vec<(PageIndex, Generation)>>>,
    /// Where the next search for copies that can be done without begins.
    pub(super) copies_from: AtomicU32,
    pub(super) workers: Arc<dyn Workers>,
    pub(super) counters: Counters,
    /// Those under way, with their age.
    pub(super) fetches: Arc<Fetches>,
    pub(super) on_mapped: Option<OnMapped>,
    pub(super) on_step: Option<OnStep>,
    pub(super) fault_around_pages: u32,
    /// Absent and idle pages carry a marker.
    pub(super) markers: bool,
    /// A bit for each block of [`MARKED_BLOCK_PAGES`] whose untouched pages carry markers.
    pub(super) marked_blocks: Vec<AtomicU64>,
    pub(super) pinned_pages: AtomicU64,
    pub(super) prefetch: bool,
    pub(super) closing: AtomicBool,
    pub(super) failure: OnceLock<PagerError>,
    /// Readable when there is a failure or a trouble, or a trouble is over.
    pub(super) event: EventFd,
    pub(super) trouble: Trouble,
    /// Works for which there was no worker when the host had no memory: not even for a thread, it may be.
    /// The evictor offers them again.
    pub(super) parked: Mutex<Vec<Work>>,
}

/// Untouched pages get their markers block by block, when the first of the block is touched: a marker
/// costs a page table entry. 2 MiB is what one page of entries maps.
pub(super) const MARKED_BLOCK_PAGES: u32 = 512;

impl Core {
    /// Keeps the first failure and tells the VMM.
    pub(super) fn fail(&self, error: PagerError) {
        // At the end everything fails that is still under way.
        if !self.is_closing() && self.failure.set(error).is_ok() {
            self.ring();
        }
    }

    /// Has the VMM look at what has failed or is in trouble.
    pub(super) fn ring(&self) {
        // It can only fail when the counter is full, and then the event is there already.
        let _ = self.event.write(1);
    }

    /// The page is lost for ever: whoever waits is told, and the VMM.
    pub(super) fn give_up(&self, page: PageIndex, error: PagerError) {
        let settled = self.table.edge(page, PageWord::failed);
        self.fail(error);
        if settled.waiters {
            self.waiters.tell(page, PageEnd::Lost);
        }
    }

    /// The policy, if there is a limit that asks for one. Held for work on page numbers only.
    pub(super) fn policy(&self) -> Option<MutexGuard<'_, Policy>> {
        self.room.limited().then(|| self.policy_always())
    }

    /// The policy, limit or no limit.
    pub(super) fn policy_always(&self) -> MutexGuard<'_, Policy> {
        self.policy.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Is the shutdown under way?
    pub(super) fn is_closing(&self) -> bool {
        self.closing.load(Ordering::SeqCst)
    }

    /// These pages are in the guest mapping now, in a run worth telling.
    pub(super) fn tell_mapped(&self, run: PageRun) {
        if let Some(told) = &self.on_mapped {
            for (gpa, bytes) in self.layout.guest_ranges(run) {
                told(gpa, bytes);
            }
        }
    }

    /// A fault on this page has come so far.
    pub(super) fn tell_step(&self, page: PageIndex, step: Step) {
        if let Some(told) = &self.on_step {
            told(self.layout.gfn_of(page), step);
        }
    }

    /// An error about some pages, with the frame's number. EIO and EHWPOISON of memory are the memory's.
    pub(super) fn on_pages(
        &self,
        action: &'static str,
        run: PageRun,
    ) -> impl FnOnce(io::Error) -> PagerError + use<> {
        let gfn = self.layout.gfn_of(run.first());
        let pages = run.pages();
        move |source| match source.raw_os_error() {
            Some(libc::EIO | libc::EHWPOISON) => PagerError::Memory { gfn, source },
            _ => PagerError::Pages { action, gfn, pages, source },
        }
    }

    /// Keeps the account of what the store has in memory up to date.
    pub(super) fn weigh_store(&self) {
        // Threads may come here with older news than another one brought: whoever is last looks again.
        loop {
            let bytes = self.store.memory_bytes();
            self.room.set_stored(bytes);
            if self.store.memory_bytes() == bytes {
                return;
            }
        }
    }
}

//! From RAM at rest to a running pager.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::{self, JoinHandle};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::core::{Core, MARKED_BLOCK_PAGES};
use super::trouble::Trouble;
use super::work::Workers;
use super::{Pager, PagerConfig, PagerError, block_pages, check_limit, events, evictor, system};
use crate::address::{PageIndex, PageRun, pages_in};
use crate::ages::Fetches;
use crate::policy::{Entry, MAX_PAGES as MAX_POLICY_PAGES, Policy};
use crate::ram::GuestRam;
use crate::room::Room;
use crate::stats::Counters;
use crate::stores::{self, Store};
use crate::sys::{Outcome, Userfault, memfd, view};
use crate::table::PageTable;
use crate::waiters::Waiters;
use crate::word::{PageWord, Taken};

/// The most pages that are populated by one system call (64 MiB).
const POPULATE_CHUNK_PAGES: u32 = 16 << 10;
/// The stacks of the pager's threads, in bytes: a batch of pages is on the heap.
const STACK_BYTES: usize = 256 << 10;

impl GuestRam {
    /// Registers RAM with userfaultfd, maps what the loader wrote, and starts the pager's threads. From
    /// here on the alias belongs to [`Pager::pin`].
    ///
    /// # Errors
    /// [`PagerError::FaultAround`], [`PagerError::LimitTooSmall`]; [`PagerError::Userfault`] when this
    /// host or user cannot use userfaultfd; [`PagerError::Store`]; or what the kernel said.
    pub fn start(
        self,
        config: &PagerConfig,
        workers: Arc<dyn Workers>,
    ) -> Result<Pager, PagerError> {
        let store = stores::open(&config.store)?;
        self.start_with_store(config, workers, store)
    }

    /// As [`GuestRam::start`], with a store of the caller's in place of `config.store`.
    ///
    /// # Errors
    /// As [`GuestRam::start`].
    pub fn start_with_store(
        self,
        config: &PagerConfig,
        workers: Arc<dyn Workers>,
        store: Arc<dyn Store>,
    ) -> Result<Pager, PagerError> {
        let core = Arc::new(self.prepare(config, workers, store)?);
        let stop = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map_err(system("make an eventfd"))?;
        let stopped = stop.try_clone().map_err(system("clone an eventfd"))?;
        let pager = Pager { core: Arc::clone(&core), stop, threads: Mutex::default() };
        let events = Arc::clone(&core);
        // Should the second thread not start, dropping the pager ends the first.
        pager.add(spawn("pager", move || events::run(&events, &stopped))?);
        pager.add(spawn("evictor", move || evictor::run(&core))?);
        Ok(pager)
    }

    /// All but the threads: registered, and everything mapped that is to be there at the start.
    pub(super) fn prepare(
        self,
        config: &PagerConfig,
        workers: Arc<dyn Workers>,
        store: Arc<dyn Store>,
    ) -> Result<Core, PagerError> {
        let fault_around_pages = block_pages(config.fault_around_bytes)?;
        check_limit(config.resident_limit_bytes)?;
        let userfault = Userfault::register(&self.mapping, config.markers)?;
        let pages = self.layout.all_pages().pages();
        let tables = || system("make the tables of page states");
        let room = Room::new(config.resident_limit_bytes);
        let capacity = u32::try_from(room.capacity_pages()).unwrap_or(u32::MAX);
        // Without a limit the policy is asked nothing, and pages beyond what it can tell apart do no harm.
        let policy_pages = if room.limited() { pages } else { pages.min(MAX_POLICY_PAGES) };
        let event = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map_err(system("make an eventfd"))?;
        let blocks = pages.div_ceil(MARKED_BLOCK_PAGES).div_ceil(u64::BITS);
        let core = Core {
            table: PageTable::new(pages).map_err(tables())?,
            policy: Mutex::new(Policy::new(policy_pages, capacity).map_err(tables())?),
            waiters: Waiters::new(),
            layout: self.layout,
            file: self.file,
            mapping: self.mapping,
            alias: self.alias,
            host_swaps: view::host_swaps(),
            userfault,
            store,
            room,
            leaving: Mutex::default(),
            copies_from: AtomicU32::new(0),
            workers,
            counters: Counters::default(),
            fetches: Fetches::new().map_err(tables())?,
            on_mapped: self.on_mapped,
            on_step: self.on_step,
            fault_around_pages,
            markers: config.markers,
            marked_blocks: (0..blocks).map(|_| AtomicU64::new(0)).collect(),
            pinned_pages: AtomicU64::new(0),
            prefetch: config.prefetch,
            closing: AtomicBool::new(false),
            failure: OnceLock::new(),
            event,
            trouble: Trouble::default(),
            parked: Mutex::default(),
        };
        core.map_loaded()?;
        if config.populate {
            core.populate()?;
        }
        Ok(core)
    }
}

impl Pager {
    fn add(&self, thread: JoinHandle<()>) {
        super::lock(&self.threads).push(thread);
    }
}

fn spawn(
    name: &'static str,
    run: impl FnOnce() + Send + 'static,
) -> Result<JoinHandle<()>, PagerError> {
    let thread = thread::Builder::new().name(name.into()).stack_size(STACK_BYTES);
    thread.spawn(run).map_err(system("start a thread"))
}

/// What happens before the guest runs: nobody waits for a page yet, and nobody else maps any.
impl Core {
    /// Maps what the loader wrote: all that is no hole in the RAM file. It counts towards the limit, and
    /// may exceed it until the evictor runs.
    fn map_loaded(&self) -> Result<(), PagerError> {
        let searching = || system("find the loaded parts of guest RAM");
        let mut file = self.file.try_clone().map_err(searching())?;
        let mut offset = 0;
        while let Some((start, len)) = memfd::next_data(&mut file, offset).map_err(searching())? {
            offset = start + len;
            let first = PageIndex::containing(start);
            let pages = pages_in(len);
            let Some(run) = first.zip(pages).and_then(|(first, n)| PageRun::new(first, n)) else {
                continue;
            };
            for page in run.iter() {
                let Taken::Yes = self.table.edge(page, PageWord::claim_zero) else { continue };
            }
            self.map_until_done(run).map_err(|refused| refused.error)?;
            self.enter_at_start(run);
            self.counters.pages_loaded.add(run.pages().into());
            self.tell_mapped(run);
        }
        Ok(())
    }

    /// Installs zero pages wherever the loader wrote nothing.
    fn populate(&self) -> Result<(), PagerError> {
        let mut left = Some(self.layout.all_pages());
        while let Some(run) = left {
            // Skips the loaded pages one by one; the chunk ends where the next of them is.
            let Some(zeros) = self.table.claim_zero_prefix(run, POPULATE_CHUNK_PAGES) else {
                left = run.suffix(1);
                continue;
            };
            if !matches!(self.userfault.zero(zeros), Ok(Outcome::Done)) {
                let zeroed = zeros.iter().try_for_each(|page| self.zero_until_done(page));
                zeroed.map_err(|refused| refused.error)?;
            }
            self.enter_at_start(zeros);
            left = run.suffix(zeros.pages());
        }
        Ok(())
    }

    fn enter_at_start(&self, run: PageRun) {
        self.room.force(run.pages().into());
        self.counters.pages_touched.add(run.pages().into());
        let mut policy = self.policy();
        for page in run.iter() {
            // Nobody has run yet: nobody waits.
            let _nobody = self.table.edge(page, PageWord::installed);
            if let Some(policy) = &mut policy {
                policy.entered(page, Entry::Fresh);
            }
        }
    }
}

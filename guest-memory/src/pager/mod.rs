//! The pager: every fault is looked up without waiting; what needs time goes to workers; pages leave
//! memory in the background so that the resident limit holds.
//!
//! ```text
//!   vCPU threads  --- marker: Pager::fault ----+
//!   pager thread  --- userfaultfd: events -----+--> first pass (first) --> mapped (install)
//!   devices       --- Pager::pin --------------+        |
//!                                                     Retry
//!                                                       v
//!   Workers (a pool, not of this crate) ---------> second pass (second) --> store, room --> mapped
//!        ^
//!        +--- write_back <--- evictor thread: ages, chooses victims
//!
//!   all of them: page words (word, table), wait lists (waiters), room, policy, counters  = core
//! ```

mod core;
mod error;
mod events;
mod evictor;
mod first;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod install;
mod pin;
mod second;
mod start;
mod trouble;
mod work;
mod write_back;

use std::io;
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::EventFd;

use self::core::Core;
use self::first::{First, Source};
use crate::address::{Gfn, PAGE_BYTES, PageIndex, pages_in};
use crate::ages::FetchAges;
use crate::layout::{HOLE_START, RamLayout};
use crate::pass::MayWait;
use crate::policy::{Entry, Policy};
use crate::ram::{GuestSlot, slots};
use crate::stats::PagerStats;
use crate::stores::StoreSpec;
use crate::survey::{Survey, survey};
use crate::sys::view;
use crate::waiters::Waiter;
use crate::word::{OnWait, PageState, PageWord};

pub use error::PagerError;
pub use pin::Pinned;
pub use trouble::Health;
pub use work::{Work, WorkClass, Workers};

/// The largest fault-around, in bytes: what one fault may take, others wait for.
pub const MAX_FAULT_AROUND_BYTES: u64 = 2 << 20;
// So that no block of fault-around has pages of both sides of the hole.
const _: () = assert!(HOLE_START.0.is_multiple_of(MAX_FAULT_AROUND_BYTES));

/// The smallest resident limit, in bytes: below, the pages that one instruction needs at once crowd each
/// other out.
pub const MIN_RESIDENT_LIMIT_BYTES: u64 = 4 << 20;

/// How often a caller's fault that finds the page in other hands, or gone again, looks anew before it
/// lets the guest fault again.
const LOOKS: u32 = 16;
/// How many pages the policy is told of under one lock.
const SURVEY_PAGES: u32 = 1024;
/// How long an eviction that somebody asked for waits for a page that another thread is at.
const OWNER_PAUSE: Duration = Duration::from_micros(20);
const OWNER_LIMIT: Duration = Duration::from_millis(20);

/// How the pager works.
#[derive(Clone, Debug, PartialEq)]
pub struct PagerConfig {
    /// Where evicted pages go.
    pub store: StoreSpec,
    /// A fault on an untouched page also installs its untouched neighbours in the aligned block of
    /// this many bytes: a power of two from [`PAGE_BYTES`] (none) to [`MAX_FAULT_AROUND_BYTES`].
    pub fault_around_bytes: u64,
    /// Install all of RAM at the start.
    pub populate: bool,
    /// How much of guest RAM may be in memory, in bytes: the RAM file's pages and what the store keeps
    /// in memory. At least [`MIN_RESIDENT_LIMIT_BYTES`].
    pub resident_limit_bytes: Option<u64>,
    /// Put a UFFDIO_POISON marker on absent and idle pages (Linux 6.6 and later): a vCPU thread that
    /// meets one gets SIGBUS with the address and asks [`Pager::fault`]. Without, all faults come as
    /// userfaultfd messages.
    pub markers: bool,
    /// Fetch pages ahead that left memory together with the one that a fault is about.
    pub prefetch: bool,
}

impl Default for PagerConfig {
    fn default() -> Self {
        Self {
            store: StoreSpec::default(),
            fault_around_bytes: 1 << 20,
            populate: false,
            resident_limit_bytes: None,
            markers: false,
            prefetch: true,
        }
    }
}

/// How a fault of the caller's stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Fault {
    /// The page is mapped, or nearly: access it (again).
    Hit(Hit),
    /// It was mapped already, by all we know.
    Present,
    /// It is on its way; the waiter is told when it has come, exactly once.
    Waits {
        /// How long it may take, by the store's last reads; zero when another thread is at it and does no
        /// I/O.
        expected: Duration,
    },
    /// Its bytes are lost.
    Lost,
}

/// Where a page was that could be had without waiting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hit {
    /// Nowhere: it is zero.
    Zero,
    /// In the RAM file.
    Resident,
    /// In the store, which has it in memory or knows its bytes.
    AtHand,
}

/// Demand-paged guest RAM at work. Shared by reference; every method may be called from a vCPU
/// thread outside `KVM_RUN`.
pub struct Pager {
    core: Arc<Core>,
    stop: EventFd,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Pager {
    /// Somebody needs this page, outside the kernel's own waiting: answers without waiting. `lane` is
    /// for fairness, see [`Work::lane`].
    ///
    /// # Errors
    /// [`PagerError::OutOfRange`].
    pub fn fault(&self, gfn: Gfn, lane: u16, waiter: &Waiter) -> Result<Fault, PagerError> {
        let page = self.page_of(gfn)?;
        Ok(self.core.fault(page, lane, waiter))
    }

    /// A waiter that was told to wait does so no more: it is not told when the page comes.
    pub fn leave(&self, gfn: Gfn, waiter: &Waiter) {
        if let Ok(page) = self.page_of(gfn) {
            self.core.waiters.leave(page, waiter);
        }
    }

    /// Has the mapping of a page made anew that is mapped by all we know, and yet cannot be accessed.
    pub fn remap(&self, gfn: Gfn) {
        if let Some(retry) = self.page_of(gfn).ok().and_then(|page| self.core.remap(page)) {
            // Refused, it is dropped, and maps the page itself.
            drop(self.core.workers.submit(retry.0, Duration::ZERO));
        }
    }

    /// Could this page be accessed now without waiting? By all we know: it may leave at any moment.
    #[must_use]
    pub fn is_mapped(&self, gfn: Gfn) -> bool {
        let core = &self.core;
        self.page_of(gfn).is_ok_and(|page| {
            core.table.state(page) == PageState::Mapped
                && (!core.host_swaps || view::is_in_memory(&core.alias, &core.layout, page))
        })
    }

    /// The frame at an address of the guest mapping.
    #[must_use]
    pub fn gfn_at(&self, hva: u64) -> Option<Gfn> {
        let page = self.core.mapping.page_at(usize::try_from(hva).ok()?)?;
        Some(self.core.layout.gfn_of(page))
    }

    /// Moves the listed pages to the store, and returns how many of them are out of memory then:
    /// a page that was not in memory counts; one that is pinned, or just on its way in or out, does
    /// not. When it returns, the next access of each of these is a fault. A frame listed twice counts
    /// once. Waits for the store.
    ///
    /// # Errors
    /// [`PagerError::OutOfRange`] before anything is done; [`PagerError::Evict`] when the store
    /// refuses a page; [`PagerError::Stopped`].
    pub fn evict(&self, gfns: &[Gfn]) -> Result<u32, PagerError> {
        self.core.evict(&self.sorted(gfns)?)
    }

    /// Moves all of RAM to the store, but for what is pinned or just on its way, and returns how many pages
    /// are out of memory then. Waits for the store.
    ///
    /// # Errors
    /// As [`Pager::evict`].
    pub fn evict_all(&self) -> Result<u32, PagerError> {
        let mut done = 0;
        let mut left = Some(self.core.layout.all_pages());
        while let Some(run) = left {
            let pages: Vec<PageIndex> = run.iter().take(SURVEY_PAGES as usize).collect();
            done += self.core.evict(&pages)?;
            left = run.suffix(SURVEY_PAGES.min(run.pages()));
        }
        Ok(done)
    }

    /// Takes the listed pages out of the guest mapping only, and returns how many of them are not mapped
    /// then: the next access of each is a fault, and its bytes are at hand. For measurements.
    ///
    /// # Errors
    /// [`PagerError::OutOfRange`] before anything is done, or what the kernel said.
    pub fn unmap(&self, gfns: &[Gfn]) -> Result<u32, PagerError> {
        let pages = self.sorted(gfns)?;
        for chunk in pages.chunks(write_back::BATCH_PAGES) {
            chunk.iter().for_each(|page| self.core.wait_for_owner(*page));
            self.core.unmap(chunk)?;
        }
        let mapped = |page: &&PageIndex| self.core.table.state(**page) == PageState::Mapped;
        Ok((pages.len() - pages.iter().filter(mapped).count()) as u32)
    }

    /// Another resident limit from now on; `None` is none. A smaller one takes effect in the background.
    ///
    /// # Errors
    /// [`PagerError::LimitTooSmall`].
    pub fn set_resident_limit(&self, bytes: Option<u64>) -> Result<(), PagerError> {
        check_limit(bytes)?;
        self.core.set_limit(bytes);
        Ok(())
    }

    /// The counters now. This never waits.
    #[must_use]
    pub fn stats(&self) -> PagerStats {
        // A memory file always has metadata; 512 is the unit of st_blocks.
        let resident = self.core.file.metadata().map_or(0, |m| m.blocks() * 512);
        self.core.stats(resident)
    }

    /// How long the fetches that are under way have been. This never waits.
    #[must_use]
    pub fn fetch_ages(&self) -> FetchAges {
        self.core.fetches.ages(Instant::now())
    }

    /// In which states pages are, in so many parts of RAM, or as many as it has pages. Of a large guest it
    /// looks at a sample. This never waits, and takes some milliseconds.
    #[must_use]
    pub fn survey(&self, cells: u32) -> Survey {
        let (core, all) = (&self.core, self.core.layout.all_pages());
        survey(&core.table, all, cells, |slot| core.store.at_hand(slot))
    }

    /// Where KVM finds RAM; the mapping lives as long as the pager.
    #[must_use]
    pub fn slots(&self) -> Vec<GuestSlot> {
        slots(&self.core.layout, &self.core.mapping)
    }

    /// The layout of RAM.
    #[must_use]
    pub fn layout(&self) -> &RamLayout {
        &self.core.layout
    }

    /// Why the guest cannot go on, if so: some page cannot be had. Whoever needs it waits until the
    /// shutdown.
    #[must_use]
    pub fn failure(&self) -> Option<&PagerError> {
        self.core.failure.get()
    }

    /// What the store does not do at the moment; nothing is lost by it.
    #[must_use]
    pub fn health(&self) -> Health {
        self.core.health()
    }

    /// Readable after [`Pager::failure`] or [`Pager::health`] changed; reading it clears it.
    #[must_use]
    pub fn event(&self) -> &EventFd {
        &self.core.event
    }

    /// Ends the pager's threads, in bounded time, and wakes whoever still waits for a page. After this,
    /// absent pages read as zeros: no vCPU may run any more, but the VM must not be closed before,
    /// since KVM's workers may wait for pages. The workers' owner closes them after this and drops
    /// what they had not begun. A second call does nothing; dropping does the same.
    pub fn shutdown(&self) {
        if self.core.closing.swap(true, Ordering::SeqCst) {
            return;
        }
        // They have the core, and would keep it.
        drop(std::mem::take(&mut *self.core.parked()));
        // No thread can wait any more, whatever it is at.
        self.core.store.close();
        self.core.room.close();
        let _ = self.stop.write(1);
        let threads = std::mem::take(&mut *lock(&self.threads));
        for thread in threads {
            // They catch their panics.
            let _ = thread.join();
        }
        self.core.userfault.unregister(&self.core.mapping);
    }

    /// The pages of these frames, each once.
    fn sorted(&self, gfns: &[Gfn]) -> Result<Vec<PageIndex>, PagerError> {
        let mut pages = gfns.iter().map(|gfn| self.page_of(*gfn)).collect::<Result<Vec<_>, _>>()?;
        pages.sort_unstable();
        pages.dedup();
        Ok(pages)
    }

    fn page_of(&self, gfn: Gfn) -> Result<PageIndex, PagerError> {
        let page = self.core.layout.page_of(gfn);
        page.ok_or(PagerError::OutOfRange(gfn))
    }
}

impl Core {
    /// A fault of the caller's, see [`Pager::fault`].
    fn fault(self: &Arc<Self>, page: PageIndex, lane: u16, waiter: &Waiter) -> Fault {
        for _ in 0..LOOKS {
            match self.first_pass(page, Source::Direct) {
                First::Hit(hit) => return Fault::Hit(hit),
                First::Present => return Fault::Present,
                First::Lost => return Fault::Lost,
                First::Joined => match self.waiters.add(self.table.cell(page), page, waiter) {
                    OnWait::Waits => return Fault::Waits { expected: self.expected(page) },
                    OnWait::Settled => {}
                },
                First::Retry(retry) => {
                    // The page is the retry's: nobody can settle it before it is handed on.
                    let OnWait::Waits = self.waiters.add(self.table.cell(page), page, waiter)
                    else {
                        unreachable!("the page of a retry has an owner");
                    };
                    let expected = self.expected(page);
                    // Refused, it is dropped, and tells the waiter to look again.
                    drop(self.workers.submit(retry.0.for_lane(lane), Duration::ZERO));
                    return Fault::Waits { expected };
                }
            }
        }
        // In and out all the time: the guest's next try is as good as another of ours.
        Fault::Hit(Hit::Resident)
    }

    /// How long a page that is on its way may take.
    fn expected(&self, page: PageIndex) -> Duration {
        match self.table.state(page) {
            crate::word::PageState::Fetching => self.store.expected_read(),
            _ => Duration::ZERO,
        }
    }

    /// See [`Pager::evict`]; the pages are sorted, each once.
    fn evict(self: &Arc<Self>, pages: &[PageIndex]) -> Result<u32, PagerError> {
        use crate::word::PageState as S;
        let pass = MayWait::second_pass();
        let mut done = 0;
        for chunk in pages.chunks(write_back::BATCH_PAGES) {
            if self.is_closing() {
                return Err(PagerError::Stopped);
            }
            chunk.iter().for_each(|page| self.wait_for_owner(*page));
            self.unmap(chunk)?;
            let absent =
                |page: &&PageIndex| matches!(self.table.state(**page), S::Zero | S::Stored);
            done += chunk.iter().filter(absent).count() as u32;
            let begun = |page: &PageIndex| {
                self.table.edge(*page, PageWord::begin_store).map(|generation| (*page, generation))
            };
            let batch: Vec<_> = chunk.iter().filter_map(begun).collect();
            let written = self.write_back(&batch, &pass);
            done += written.pages;
            if let Some((page, source)) = written.refused {
                let gfn = self.layout.gfn_of(page);
                return Err(PagerError::Evict { gfn, done, source });
            }
        }
        Ok(done)
    }

    /// Whoever maps a page has the guest run a moment before it lets go of the page.
    fn wait_for_owner(&self, page: PageIndex) {
        use crate::word::PageState as S;
        let until = Instant::now() + OWNER_LIMIT;
        while matches!(self.table.state(page), S::Installing | S::Unmapping | S::Dropping)
            && Instant::now() < until
        {
            std::thread::sleep(OWNER_PAUSE);
        }
    }

    fn set_limit(&self, bytes: Option<u64>) {
        if self.room.set_limit(bytes) || bytes.is_none() {
            return;
        }
        // Without a limit nobody told the policy what is in memory and what is not.
        let mut late = Vec::new();
        let mut left = Some(self.layout.all_pages());
        while let Some(run) = left {
            let mut policy = self.policy_always();
            for page in run.iter().take(SURVEY_PAGES as usize) {
                if !self.survey(&mut policy, page) {
                    late.push(page);
                }
            }
            left = run.suffix(SURVEY_PAGES.min(run.pages()));
        }
        // Who was installing these may have asked for the limit before there was one.
        for page in late {
            self.wait_for_owner(page);
            self.survey(&mut self.policy_always(), page);
        }
    }

    /// Tells the policy whether a page is in memory; false if that is just being decided.
    fn survey(&self, policy: &mut Policy, page: PageIndex) -> bool {
        use crate::word::PageState as S;
        match self.table.state(page) {
            S::Mapped | S::Unmapping | S::Idle | S::Storing => policy.entered(page, Entry::Fresh),
            S::Zero | S::Stored | S::Failed => policy.left(page),
            S::Dropping | S::Fetching => {}
            S::Installing => return false,
        }
        true
    }

    fn stats(&self, resident_bytes: u64) -> PagerStats {
        let mut stats = self.counters.snapshot(self.layout.total_bytes(), resident_bytes);
        stats.resident_limit_bytes = self.room.limit_bytes();
        stats.store_memory_bytes = self.store.memory_bytes();
        stats.limit_exceeded = self.room.is_stuck();
        stats.tiers = self.store.report();
        stats.pager_bytes_per_page = crate::table::BYTES_PER_PAGE + crate::policy::BYTES_PER_PAGE;
        let counts = self.policy_always().counts();
        stats.mapped_pages = counts.mapped.into();
        stats.idle_pages = counts.idle.into();
        stats.refaults = counts.recent_refaults;
        stats
    }
}

impl Drop for Pager {
    fn drop(&mut self) {
        self.shutdown();
    }
}

impl std::fmt::Debug for Pager {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pager")
            .field("layout", &self.core.layout)
            .field("stats", &self.stats())
            .field("failure", &self.failure())
            .finish_non_exhaustive()
    }
}

// vCPU threads share the handle.
const _: () = {
    const fn shared<T: Send + Sync>() {}
    shared::<Pager>();
};

/// A mutex of this crate holds values that a panic leaves whole.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn system(action: &'static str) -> impl FnOnce(io::Error) -> PagerError {
    move |source| PagerError::System { action, source }
}

fn check_limit(bytes: Option<u64>) -> Result<(), PagerError> {
    match bytes {
        Some(bytes) if bytes < MIN_RESIDENT_LIMIT_BYTES => Err(PagerError::LimitTooSmall(bytes)),
        _ => Ok(()),
    }
}

/// The number of pages in a block of fault-around.
fn block_pages(fault_around_bytes: u64) -> Result<u32, PagerError> {
    let valid = fault_around_bytes.is_power_of_two()
        && (PAGE_BYTES..=MAX_FAULT_AROUND_BYTES).contains(&fault_around_bytes);
    pages_in(fault_around_bytes)
        .filter(|_| valid)
        .ok_or(PagerError::FaultAround(fault_around_bytes))
}

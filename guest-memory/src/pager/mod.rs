//! The pager: one thread that owns the state of every page, and the handle to it.
//!
//! ```text
//!   vCPUs, KVM's workers --- userfaultfd -----------+
//!   Pager (handle)       --- channel + eventfd -----+--> pager thread (worker) --> store
//!   deadlines of fetches --- timeout of ppoll ------+        |
//!                                                            +--> counters, failure
//! ```

mod access;
mod error;
mod evict;
mod fault;
mod start;
#[cfg(test)]
mod tests;
mod worker;

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;

use vmm_sys_util::eventfd::EventFd;

use crate::address::{Gfn, PAGE_BYTES, PAGE_SIZE, PageBytes, PageIndex};
use crate::layout::{HOLE_START, RamLayout};
use crate::ram::{GuestSlot, slots};
use crate::stats::{Counters, PagerStats};
use crate::store::StoreSpec;
use crate::sys::{GuestMapping, Userfault};

pub use error::PagerError;

/// The largest fault-around, in bytes: what one fault may take, others wait for.
pub const MAX_FAULT_AROUND_BYTES: u64 = 2 << 20;
// So that no block of fault-around has pages of both sides of the hole.
const _: () = assert!(HOLE_START.0.is_multiple_of(MAX_FAULT_AROUND_BYTES));

/// The most requests that wait for the pager thread; the next one blocks its caller.
const MAX_REQUESTS: usize = 64;
/// The most pages that one eviction request has: a fault waits at most for these.
const EVICT_CHUNK_PAGES: usize = 128;

/// How the pager works.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PagerConfig {
    /// Where evicted pages go.
    pub store: StoreSpec,
    /// A fault on an untouched page also installs its untouched neighbours in the aligned block of
    /// this many bytes: a power of two from [`PAGE_BYTES`] (none) to [`MAX_FAULT_AROUND_BYTES`].
    pub fault_around_bytes: u64,
    /// Install all of RAM at the start.
    pub populate: bool,
}

impl Default for PagerConfig {
    fn default() -> Self {
        Self { store: StoreSpec::default(), fault_around_bytes: 64 << 10, populate: false }
    }
}

/// What the handle and the pager thread share. No page state: that is the thread's alone.
struct Shared {
    layout: RamLayout,
    file: Arc<File>,
    mapping: GuestMapping,
    counters: Counters,
    failure: OnceLock<PagerError>,
    failure_event: EventFd,
    /// The userfaultfd of a thread that failed. It stays open until the shutdown: closing it would
    /// let the guest read zeros where its data was.
    abandoned: Mutex<Option<Userfault>>,
}

impl Shared {
    /// Keeps the first failure and tells the VMM.
    fn fail(&self, error: PagerError) {
        if self.failure.set(error).is_ok() {
            // It can only fail when the counter is full, and then the event is there already.
            let _ = self.failure_event.write(1);
        }
    }
}

/// A question to the pager thread; every one but `Stop` is answered or its reply is dropped.
enum Request {
    /// Moves these pages, sorted and each once, to the store.
    Evict {
        pages: Vec<PageIndex>,
        reply: SyncSender<Result<u32, PagerError>>,
    },
    Access(PageIndex, access::Access),
    Stop,
}

/// Demand-paged guest RAM at work. Shared by reference; every method may be called from a vCPU
/// thread outside `KVM_RUN`.
pub struct Pager {
    shared: Arc<Shared>,
    requests: SyncSender<Request>,
    /// Counts the requests in the channel, to wake the thread.
    bell: Arc<EventFd>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Pager {
    /// Moves the listed pages to the store, and returns how many of them are out of memory then:
    /// a page that was not in memory counts, a page that is just being fetched does not. When it
    /// returns, the next access of each of these is a fault. A frame listed twice counts once.
    ///
    /// # Errors
    /// [`PagerError::OutOfRange`] before anything is done; [`PagerError::Evict`] when the store
    /// refuses a page; [`PagerError::Stopped`].
    pub fn evict(&self, gfns: &[Gfn]) -> Result<u32, PagerError> {
        let mut pages = gfns.iter().map(|gfn| self.page_of(*gfn)).collect::<Result<Vec<_>, _>>()?;
        pages.sort_unstable();
        pages.dedup();
        let mut total = 0;
        for chunk in pages.chunks(EVICT_CHUNK_PAGES) {
            let pages = chunk.to_vec();
            match self.ask(|reply| Request::Evict { pages, reply }) {
                Ok(done) => total += done,
                Err(PagerError::Evict { gfn, done, source }) => {
                    let done = total + done;
                    return Err(PagerError::Evict { gfn, done, source });
                }
                Err(other) => return Err(other),
            }
        }
        Ok(total)
    }

    /// Reads a page of guest RAM, fetching it if need be.
    ///
    /// # Errors
    /// [`PagerError::OutOfRange`], [`PagerError::Lost`], [`PagerError::Busy`],
    /// [`PagerError::Stopped`], or what the kernel said.
    pub fn read_page(&self, gfn: Gfn, bytes: &mut PageBytes) -> Result<(), PagerError> {
        let page = self.page_of(gfn)?;
        let read = self.ask(|reply| Request::Access(page, access::Access::Read { reply }))?;
        bytes.copy_from_slice(&read[..]);
        Ok(())
    }

    /// Writes into a page of guest RAM, fetching it if need be; `offset` in bytes.
    ///
    /// # Errors
    /// [`PagerError::BeyondPage`], and as [`Pager::read_page`].
    pub fn write_bytes(&self, gfn: Gfn, offset: usize, bytes: &[u8]) -> Result<(), PagerError> {
        let page = self.page_of(gfn)?;
        if offset > PAGE_SIZE || bytes.len() > PAGE_SIZE - offset {
            let len = bytes.len();
            return Err(PagerError::BeyondPage { offset, len });
        }
        let bytes = bytes.to_vec();
        self.ask(|reply| {
            let write = access::Access::Write { offset, bytes, reply };
            Request::Access(page, write)
        })
    }

    /// Waits until the pager thread has done what it is at. Whoever got a page runs a moment before
    /// the page is counted; after this, [`Pager::stats`] has every fault that was over before.
    ///
    /// # Errors
    /// [`PagerError::Stopped`]; the counters do not change any more then.
    pub fn settle(&self) -> Result<(), PagerError> {
        let pages = Vec::new();
        self.ask(|reply| Request::Evict { pages, reply }).map(drop)
    }

    /// The counters now. This never waits for the pager thread.
    #[must_use]
    pub fn stats(&self) -> PagerStats {
        // A memory file always has metadata; 512 is the unit of st_blocks.
        let resident = self.shared.file.metadata().map_or(0, |m| m.blocks() * 512);
        let total = self.shared.layout.total_bytes();
        self.shared.counters.snapshot(total, resident)
    }

    /// Where KVM finds RAM; the mapping lives as long as the pager.
    #[must_use]
    pub fn slots(&self) -> Vec<GuestSlot> {
        slots(&self.shared.layout, &self.shared.mapping)
    }

    /// The layout of RAM.
    #[must_use]
    pub fn layout(&self) -> &RamLayout {
        &self.shared.layout
    }

    /// Why the guest cannot go on, if so: some page cannot be had. Whoever needs it waits until the
    /// shutdown.
    #[must_use]
    pub fn failure(&self) -> Option<&PagerError> {
        self.shared.failure.get()
    }

    /// Becomes (and stays) readable when there is a [`Pager::failure`].
    #[must_use]
    pub fn failure_event(&self) -> &EventFd {
        &self.shared.failure_event
    }

    /// Ends the pager thread, in bounded time: fetches under way are completed without waiting for
    /// the store's latency, and whoever still waits for a page is woken. After this, absent pages
    /// read as zeros: no vCPU may run any more, but the VM must not be closed before, since KVM's
    /// workers may wait for pages. A second call does nothing; dropping does the same.
    pub fn shutdown(&self) {
        let thread = self.lock(&self.thread).take();
        if let Some(thread) = thread {
            // An error means that the thread has ended already.
            let _ = self.send(Request::Stop);
            // The thread catches its panics.
            let _ = thread.join();
        }
        drop(self.lock(&self.shared.abandoned).take());
    }

    fn page_of(&self, gfn: Gfn) -> Result<PageIndex, PagerError> {
        let page = self.shared.layout.page_of(gfn);
        page.ok_or(PagerError::OutOfRange(gfn))
    }

    fn ask<T>(
        &self,
        request: impl FnOnce(SyncSender<Result<T, PagerError>>) -> Request,
    ) -> Result<T, PagerError> {
        let (reply, answer): (_, Receiver<_>) = sync_channel(1);
        self.send(request(reply))?;
        // A dropped reply means that the thread has ended.
        answer.recv().unwrap_or(Err(PagerError::Stopped))
    }

    fn send(&self, request: Request) -> Result<(), PagerError> {
        self.requests.send(request).map_err(|_| PagerError::Stopped)?;
        self.bell.write(1).map_err(system("ring its own thread"))
    }

    /// Both mutexes hold an option that is only taken: a panic while one is held leaves it whole.
    fn lock<'a, T>(&self, mutex: &'a Mutex<T>) -> std::sync::MutexGuard<'a, T> {
        mutex.lock().unwrap_or_else(PoisonError::into_inner)
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
            .field("layout", &self.shared.layout)
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

fn system(action: &'static str) -> impl FnOnce(io::Error) -> PagerError {
    move |source| PagerError::System { action, source }
}

/// The number of pages in a block of fault-around.
fn block_pages(fault_around_bytes: u64) -> Result<u32, PagerError> {
    let valid = fault_around_bytes.is_power_of_two()
        && (PAGE_BYTES..=MAX_FAULT_AROUND_BYTES).contains(&fault_around_bytes);
    crate::address::pages_in(fault_around_bytes)
        .filter(|_| valid)
        .ok_or(PagerError::FaultAround(fault_around_bytes))
}

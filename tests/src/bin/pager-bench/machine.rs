//! A pager at work, with the workers that the VMM gives it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use async_pf::{Class, Key, Lane, Medium, Pool, PoolConfig, Ticket};
use guest_memory::stores::{Store, testing};
use guest_memory::{
    Gfn, GuestRam, PAGE_BYTES, PageBytes, Pager, PagerConfig, RamLayout, StoreSpec, Work,
    WorkClass, Workers,
};

use crate::memory::Pages;

/// How long a set-up may take.
const LIMIT: Duration = Duration::from_secs(60);
/// Frames evicted with one call.
const EVICT_AT_ONCE: usize = 1024;

/// The pool of async-pf as the pager's workers.
struct Crew(Pool<Work>);

impl Workers for Crew {
    fn submit(&self, work: Work, after: Duration) -> Result<(), Work> {
        let class = match work.class() {
            WorkClass::Fault => Class::Fault,
            WorkClass::Prefetch => Class::Prefetch,
            WorkClass::WriteBack => Class::WriteBack,
        };
        let medium = Medium(u8::from(!work.needs_store()));
        let ticket = Ticket::new(class, Lane(work.lane()), medium).with_key(Key(work.key()));
        let submitted = match after {
            Duration::ZERO => self.0.submit(ticket, work),
            after => self.0.submit_after(after, ticket, work),
        };
        submitted.map_err(|rejected| rejected.job)
    }

    fn promote(&self, key: u64) {
        let _ = self.0.promote(Key(key), Class::Fault, Lane(0));
    }
}

/// Guest RAM of which every page is a fault of its own: no fault-around, no prefetch, no markers. It has a
/// limit that is never near, so that the policy is asked.
pub(crate) struct Machine {
    pub(crate) pager: Pager,
    crew: Arc<Crew>,
    pages: u32,
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.pager.shutdown();
        drop(self.crew.0.close(Duration::from_secs(1)));
    }
}

impl Machine {
    /// RAM of so many pages, never touched.
    pub(crate) fn zero(pages: u32) -> Result<Self> {
        Self::with_store(pages, false, testing::open("memory")?)
    }

    fn with_store(pages: u32, populate: bool, store: Arc<dyn Store>) -> Result<Self> {
        let config = PagerConfig {
            store: StoreSpec::default(),
            fault_around_bytes: PAGE_BYTES,
            populate,
            resident_limit_bytes: Some(far(pages)),
            markers: false,
            prefetch: false,
        };
        let ram = GuestRam::new(&RamLayout::new(u64::from(pages) * PAGE_BYTES)?)?;
        let crew = Arc::new(Crew(Pool::new(PoolConfig::sized(64, 2), Arc::new(Work::run))?));
        let pager = ram.start_with_store(&config, crew.clone(), store)?;
        Ok(Self { pager, crew, pages })
    }

    /// RAM whose pages are all in the store.
    pub(crate) fn stored(
        pages: u32,
        store: &str,
        content: impl Fn(u32, &mut PageBytes),
    ) -> Result<Self> {
        let machine = Self::with_store(pages, true, testing::open(store)?)?;
        let mut bytes = [0; PAGE_BYTES as usize];
        for page in 0..pages {
            content(page, &mut bytes);
            machine.memory()?.fill(page, &bytes);
        }
        let gfns: Vec<_> = (0..u64::from(pages)).map(Gfn).collect();
        for some in gfns.chunks(EVICT_AT_ONCE) {
            let evicted = machine.pager.evict(some)?;
            if evicted as usize != some.len() {
                bail!("{evicted} of {} pages were evicted", some.len());
            }
        }
        Ok(machine)
    }

    /// RAM whose pages are in the RAM file, and nearly all not mapped: what the evictor makes idle under a
    /// small limit, with a store that is so slow to write that nothing leaves.
    pub(crate) fn idle(pages: u32) -> Result<Self> {
        let machine = Self::with_store(pages, true, testing::open("raw+delay=0us,write=60s")?)?;
        machine.pager.set_resident_limit(Some(guest_memory::MIN_RESIDENT_LIMIT_BYTES))?;
        let began = Instant::now();
        let most_mapped = guest_memory::MIN_RESIDENT_LIMIT_BYTES / PAGE_BYTES;
        while machine.pager.stats().mapped_pages > most_mapped {
            if began.elapsed() > LIMIT {
                bail!("{:?}", machine.pager.stats());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        machine.pager.set_resident_limit(Some(far(pages)))?;
        // The evictor's last turn.
        std::thread::sleep(Duration::from_millis(20));
        Ok(machine)
    }

    /// Its pages.
    pub(crate) fn memory(&self) -> Result<Pages<'_>> {
        Pages::of(&self.pager).with_context(|| format!("{} pages", self.pages))
    }
}

/// A limit that this much RAM never comes near.
fn far(pages: u32) -> u64 {
    (u64::from(pages) * PAGE_BYTES * 2).max(guest_memory::MIN_RESIDENT_LIMIT_BYTES)
}

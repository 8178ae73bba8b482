//! A machine of threads: each stands for a vCPU and touches guest RAM through the guest mapping, as
//! KVM's guest would.
// Unsafe: the guest mapping is memory that the library never touches; here its users are played.
#![allow(unsafe_code)]
// Every test file uses its own part of this.
#![allow(dead_code, unreachable_pub)]

pub mod server;
pub mod vcpu;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use async_pf::{Class, Key, Lane, Medium, Pool, PoolConfig, Ticket};
use guest_memory::stores::Store;
use guest_memory::{
    Gfn, GuestRam, GuestSlot, PAGE_BYTES, PageBytes, Pager, PagerConfig, PagerError, PagerStats,
    RamLayout, Sleeper, Work, WorkClass, Workers,
};

/// How long a condition may take to come true.
const LIMIT: Duration = Duration::from_secs(20);

/// The pool of async-pf as the pager's workers, as the VMM has it.
pub struct Crew(Pool<Work>, AtomicBool);

impl Crew {
    pub fn new() -> Arc<Self> {
        let run = Arc::new(Work::run);
        Arc::new(Self(Pool::new(PoolConfig::sized(64, 2), run).unwrap(), AtomicBool::new(false)))
    }

    /// From now on it takes no work, or does again: as when there is no memory for a thread.
    pub fn refuse(&self, refuses: bool) {
        self.1.store(refuses, Ordering::SeqCst);
    }

    pub fn close(&self) {
        drop(self.0.close(Duration::from_secs(1)));
    }
}

impl Workers for Crew {
    fn submit(&self, work: Work, after: Duration) -> Result<(), Work> {
        if self.1.load(Ordering::SeqCst) {
            return Err(work);
        }
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

/// Running guest RAM.
pub struct Machine {
    pub pager: Pager,
    pub crew: Arc<Crew>,
    slots: Vec<GuestSlot>,
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.pager.shutdown();
        self.crew.close();
    }
}

impl Machine {
    /// RAM of `pages` pages without fault-around; `None`, with the reason printed, where userfaultfd
    /// cannot be used.
    pub fn small(pages: u64, store: &str) -> Option<Self> {
        Self::start(
            ram(pages * PAGE_BYTES),
            PagerConfig { store: store.parse().unwrap(), ..plain() },
        )
    }

    pub fn start(ram: GuestRam, config: PagerConfig) -> Option<Self> {
        let crew = Crew::new();
        Self::or_skip(ram.start(&config, crew.clone()), crew)
    }

    /// With a store of the test's own.
    pub fn with_store(ram: GuestRam, config: PagerConfig, store: Arc<dyn Store>) -> Option<Self> {
        let crew = Crew::new();
        Self::or_skip(ram.start_with_store(&config, crew.clone(), store), crew)
    }

    fn or_skip(started: Result<Pager, PagerError>, crew: Arc<Crew>) -> Option<Self> {
        match started {
            Ok(pager) => {
                let slots = pager.slots();
                Some(Self { pager, crew, slots })
            }
            Err(PagerError::Userfault(error)) => {
                println!("SKIP: {error}");
                None
            }
            Err(other) => panic!("cannot start the pager: {other}"),
        }
    }

    /// A page as a device sees it.
    pub fn read_page(&self, gfn: u64, bytes: &mut PageBytes) -> Result<(), PagerError> {
        self.pager.read_page(Gfn(gfn), bytes, &Arc::new(Sleeper::default()))
    }

    /// Bytes of a page, written as a device does.
    pub fn write_bytes(&self, gfn: u64, offset: usize, bytes: &[u8]) -> Result<(), PagerError> {
        self.pager.write_bytes(Gfn(gfn), offset, bytes, &Arc::new(Sleeper::default()))
    }

    /// The word at this guest physical address, in the guest mapping.
    pub fn word(&self, gpa: u64) -> &AtomicU64 {
        assert_eq!(gpa % 8, 0);
        // SAFETY: the address is aligned, lies in the guest mapping, which lives as long as `self`,
        // and is only ever accessed atomically, by the kernel, or by the guest's copy loops.
        unsafe { &*(self.hva(gpa) as *const AtomicU64) }
    }

    pub fn read(&self, gpa: u64) -> u64 {
        self.word(gpa).load(Ordering::Relaxed)
    }

    pub fn write(&self, gpa: u64, value: u64) {
        self.word(gpa).store(value, Ordering::Relaxed);
    }

    /// Where the guest mapping has this address.
    pub fn hva(&self, gpa: u64) -> u64 {
        let slot = self.slots.iter().find(|s| (s.gpa..s.gpa + s.len).contains(&gpa));
        let slot = slot.unwrap_or_else(|| panic!("{gpa:#x} is not in guest RAM"));
        slot.hva + (gpa - slot.gpa)
    }

    pub fn stats(&self) -> PagerStats {
        self.pager.stats()
    }

    /// Takes one page out of the guest mapping behind the pager's back, as the host's reclaim does.
    pub fn reclaim_mapping(&self, gpa: u64) {
        let page = self.hva(gpa) as *mut libc::c_void;
        // SAFETY: a shared mapping loses no bytes by this.
        let result = unsafe { libc::madvise(page, PAGE_BYTES as usize, libc::MADV_DONTNEED) };
        assert_eq!(result, 0);
    }
}

/// RAM of this size, at rest.
pub fn ram(bytes: u64) -> GuestRam {
    GuestRam::new(&RamLayout::new(bytes).unwrap()).unwrap()
}

/// No fault-around, pages in host memory.
pub fn plain() -> PagerConfig {
    PagerConfig { fault_around_bytes: PAGE_BYTES, ..PagerConfig::default() }
}

/// The address of a page of low RAM.
pub fn page(number: u64) -> u64 {
    number * PAGE_BYTES
}

/// Waits for a condition.
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < LIMIT, "not within {LIMIT:?}: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// splitmix64.
pub struct Rng(u64);

impl Rng {
    /// A generator from `NOWAIT_TEST_SEED`, or from the clock; prints its seed.
    pub fn from_environment() -> Self {
        let given = std::env::var("NOWAIT_TEST_SEED").ok();
        let seed = match given.map(|seed| seed.parse()) {
            Some(seed) => seed.expect("NOWAIT_TEST_SEED is a number"),
            None => std::time::UNIX_EPOCH.elapsed().map_or(1, |now| now.as_nanos() as u64),
        };
        println!("seed: run again with NOWAIT_TEST_SEED={seed}");
        Self(seed)
    }

    /// Another generator, for another thread.
    pub fn split(&mut self) -> Self {
        Self(self.next())
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number under `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

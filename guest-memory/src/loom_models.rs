//! Models of one page: every interleaving of two or three threads, up to a number of preemptions.
//!
//! ```text
//!   RUSTFLAGS="--cfg loom" cargo test -p guest-memory --release --lib loom_models --target-dir target/loom
//! ```
//!
//! The word's edges and the wait lists are the real ones. Around them is a pager of a few lines, which does
//! what the real one does with one page; a guest that counts up in it; a store; and a cell that only the
//! page's owner may touch, so that loom finds two owners, or an owner that does not see what the last
//! one did.

use loom::cell::UnsafeCell;
use loom::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use loom::sync::{Arc, Mutex, Notify};
use loom::thread;

use crate::address::PageIndex;
use crate::stores::Slot;
use crate::table::{WordCell, edge};
use crate::waiters::{PageEnd, Sleeper, Waiter, Waiters, Wake, Woken};
use crate::word::{
    Generation, OnDropped, OnFault, OnFetched, OnSettled, OnStored, OnUnmapped, OnWait, PageState,
    PageWord, Taken,
};

/// Preemptions that a model tries, and models of more threads.
const PREEMPTIONS: usize = 4;
const FEW_PREEMPTIONS: usize = 3;
const PAGE: PageIndex = PageIndex(0);

/// The word, in loom's memory.
struct Cell(AtomicU64);

impl WordCell for Cell {
    fn load(&self) -> u64 {
        self.0.load(Ordering::Acquire)
    }

    fn replace(&self, current: u64, new: u64) -> Result<(), u64> {
        self.0.compare_exchange(current, new, Ordering::AcqRel, Ordering::Acquire).map(drop)
    }
}

/// A thread that waits, in loom's world, and how often it was told.
struct Told {
    bell: Notify,
    times: AtomicUsize,
}

impl Wake for Told {
    fn wake(&self, _: u64, end: PageEnd) {
        assert_eq!(end, PageEnd::Ready);
        self.times.fetch_add(1, Ordering::SeqCst);
        self.bell.notify();
    }
}

/// One page and all that has to do with it.
struct Page {
    word: Cell,
    waiters: Waiters,
    /// Touched by the owner only.
    owner: UnsafeCell<()>,
    /// The bytes in the RAM file; a hole is 0.
    bytes: AtomicU64,
    /// Is it in the guest mapping? Accesses of the guest and changes of the mapping exclude each other.
    mapped: Mutex<bool>,
    /// The store: bytes by slot.
    slots: [AtomicU64; 3],
    free_slot: AtomicUsize,
    /// The thread that sleeps in the kernel, if there is one, is woken.
    kernel: Notify,
    sleeps: AtomicBool,
}

impl Page {
    /// A page in this state that has counted to 1.
    fn new(state: PageState) -> Arc<Self> {
        let mut word = PageWord::from_bits(0);
        assert_eq!(word.claim_zero(), Taken::Yes);
        let _ = word.installed();
        let (mut bytes, mut slots) = (1, [0; 3]);
        if state != PageState::Mapped {
            assert_eq!(word.begin_unmap(), Taken::Yes);
            assert_eq!(word.unmapped(false), OnUnmapped::Idle);
        }
        if state == PageState::Stored {
            let generation = word.begin_store().unwrap();
            assert_eq!(word.stored(generation, Slot(0)), OnStored::Drop { older: None });
            assert_eq!(word.dropped(), OnDropped::Stored);
            (bytes, slots[0]) = (0, 1);
        }
        assert_eq!(word.state(), state);
        Arc::new(Self {
            word: Cell(AtomicU64::new(word.bits())),
            waiters: Waiters::new(),
            owner: UnsafeCell::new(()),
            bytes: AtomicU64::new(bytes),
            mapped: Mutex::new(state == PageState::Mapped),
            slots: slots.map(AtomicU64::new),
            free_slot: AtomicUsize::new(1),
            kernel: Notify::new(),
            sleeps: AtomicBool::new(false),
        })
    }

    fn edge<V>(&self, taken: impl FnMut(&mut PageWord) -> V) -> V {
        edge(&self.word, taken)
    }

    /// The caller owns the page.
    fn own(&self) {
        self.owner.with_mut(|_| ());
    }

    fn set_mapped(&self, mapped: bool) {
        *self.mapped.lock().unwrap() = mapped;
        if mapped {
            self.wake_kernel();
        }
    }

    fn wake_kernel(&self) {
        if self.sleeps.load(Ordering::SeqCst) {
            self.kernel.notify();
        }
    }

    /// As `Core::map_owned`.
    fn map_owned(&self) {
        self.own();
        self.set_mapped(true);
        if self.edge(PageWord::installed).waiters {
            self.waiters.tell(PAGE, PageEnd::Ready);
        }
    }

    /// As `Core::put_back`.
    fn put_back(&self, settled: OnSettled) {
        if settled.wanted {
            self.wake_kernel();
        }
        if settled.waiters {
            self.waiters.tell(PAGE, PageEnd::Ready);
        }
    }

    /// As `Core::second_fetch`; or the pool refuses it.
    fn second(&self, slot: Slot, refused: bool) {
        self.own();
        if refused {
            return self.put_back(self.edge(PageWord::unfetched));
        }
        let bytes = self.slots[slot.0 as usize].load(Ordering::Relaxed);
        self.bytes.store(bytes, Ordering::Relaxed);
        if self.edge(PageWord::fetched) == OnFetched::Wanted {
            self.map_owned();
        }
    }

    /// As `Core::first_pass`: does the page have another owner?
    fn first_pass(&self) -> First {
        match self.edge(|word| word.fault(|_| false)) {
            OnFault::Remap => {
                self.map_owned();
                First::Done
            }
            OnFault::StartFetch(slot, _) => First::Retry(slot),
            OnFault::Join => First::Joined,
            OnFault::Present => First::Done,
            other => unreachable!("{other:?}"),
        }
    }

    /// A vCPU thread counts up, as with markers: as `Core::fault`, and a sleep. The first `refusals` of its
    /// fetches find no worker.
    fn count_up(&self, mut refusals: usize) {
        let told = std::sync::Arc::new(Told { bell: Notify::new(), times: AtomicUsize::new(0) });
        let waiter = Waiter { wake: told.clone(), token: 0 };
        let mut waits = 0;
        while !self.access() {
            let waited = match self.first_pass() {
                First::Done => false,
                First::Joined => self.waiters.add(&self.word, PAGE, &waiter) == OnWait::Waits,
                First::Retry(slot) => {
                    assert_eq!(self.waiters.add(&self.word, PAGE, &waiter), OnWait::Waits);
                    self.second(slot, refusals > 0);
                    refusals = refusals.saturating_sub(1);
                    true
                }
            };
            if waited {
                // loom's bell may ring for nothing.
                while told.times.load(Ordering::SeqCst) == waits {
                    told.bell.wait();
                }
                waits += 1;
            }
            assert_eq!(told.times.load(Ordering::SeqCst), waits, "once for each wait");
        }
    }

    /// A thread counts up that sleeps in the kernel, with the pager thread that gets its message.
    fn count_up_by_message(&self) {
        self.sleeps.store(true, Ordering::SeqCst);
        while !self.access() {
            if let First::Retry(slot) = self.first_pass() {
                self.second(slot, false);
            }
            // A message about a mapped page wakes whoever sleeps, too.
            if *self.mapped.lock().unwrap() {
                continue;
            }
            self.kernel.wait();
        }
    }

    fn access(&self) -> bool {
        let mapped = self.mapped.lock().unwrap();
        if *mapped {
            self.bytes.fetch_add(1, Ordering::Relaxed);
        }
        *mapped
    }

    /// As `Core::unmap`.
    fn age(&self) {
        if self.edge(PageWord::begin_unmap) == Taken::Yes {
            self.own();
            self.set_mapped(false);
            if self.edge(|word| word.unmapped(false)) == OnUnmapped::Wanted {
                self.map_owned();
            }
        }
    }

    /// As `Core::write_back`.
    fn store(&self) {
        let Some(generation) = self.edge(PageWord::begin_store) else { return };
        let slot = Slot(self.free_slot.fetch_add(1, Ordering::Relaxed) as u32);
        let bytes = self.bytes.load(Ordering::Relaxed);
        self.slots[slot.0 as usize].store(bytes, Ordering::Relaxed);
        self.finish_store(generation, slot);
    }

    fn finish_store(&self, generation: Generation, slot: Slot) {
        let OnStored::Drop { .. } = self.edge(|word| word.stored(generation, slot)) else { return };
        self.own();
        self.bytes.store(0, Ordering::Relaxed);
        if self.edge(PageWord::dropped) == OnDropped::Wanted
            && let First::Retry(slot) = self.first_pass()
        {
            self.second(slot, false);
        }
    }

    /// All threads have ended: nobody waits, and this is what the page has.
    fn ended_with(&self, counted: u64) {
        let word = PageWord::from_bits(self.word.load());
        assert!(!word.is_wanted());
        let bytes = match word.state() {
            PageState::Stored => &self.slots[word.slot().unwrap().0 as usize],
            PageState::Mapped | PageState::Idle => &self.bytes,
            other => panic!("left {other:?}"),
        };
        assert_eq!(bytes.load(Ordering::Relaxed), counted);
        assert_eq!(*self.mapped.lock().unwrap(), word.state() == PageState::Mapped);
    }
}

enum First {
    Done,
    Joined,
    Retry(Slot),
}

type Part = fn(&Page);

/// Threads at one page, which has counted to `counted` in the end.
fn model(preemptions: usize, state: PageState, parts: &[Part], counted: u64) {
    let parts = parts.to_vec();
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(move || {
        let page = Page::new(state);
        let threads: Vec<_> = parts[1..]
            .iter()
            .map(|part| {
                let (part, page) = (*part, page.clone());
                thread::spawn(move || part(&page))
            })
            .collect();
        parts[0](&page);
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        page.ended_with(counted);
    });
}

fn age_and_store(page: &Page) {
    page.age();
    page.store();
}

#[test]
fn a_fault_against_an_unmapping() {
    model(PREEMPTIONS, PageState::Mapped, &[Page::age, |page| page.count_up(0)], 2);
    model(PREEMPTIONS, PageState::Mapped, &[Page::age, Page::count_up_by_message], 2);
}

#[test]
fn a_fault_against_a_store() {
    model(PREEMPTIONS, PageState::Idle, &[Page::store, |page| page.count_up(0)], 2);
    model(PREEMPTIONS, PageState::Idle, &[Page::store, Page::count_up_by_message], 2);
}

#[test]
fn faults_against_the_whole_way_out() {
    let twice: Part = |page| {
        page.count_up(0);
        page.count_up(0);
    };
    model(PREEMPTIONS, PageState::Mapped, &[age_and_store, twice], 3);
}

#[test]
fn two_faults_against_a_store() {
    let parts: &[Part] = &[Page::store, |page| page.count_up(0), |page| page.count_up(0)];
    model(FEW_PREEMPTIONS, PageState::Idle, parts, 3);
}

#[test]
fn two_faults_on_a_stored_page() {
    model(PREEMPTIONS, PageState::Stored, &[|page| page.count_up(0), |page| page.count_up(0)], 3);
    model(PREEMPTIONS, PageState::Stored, &[|page| page.count_up(0), Page::count_up_by_message], 3);
}

#[test]
fn whoever_joins_a_fetch_that_is_refused_is_told_to_look_again() {
    model(PREEMPTIONS, PageState::Stored, &[|page| page.count_up(1), |page| page.count_up(0)], 3);
    model(PREEMPTIONS, PageState::Stored, &[|page| page.count_up(1), Page::count_up_by_message], 3);
}

#[test]
fn a_store_that_ends_late_is_dropped() {
    // Two stores of one page, with an access in between.
    let parts: &[Part] = &[Page::store, |page| {
        page.count_up(0);
        age_and_store(page);
    }];
    model(PREEMPTIONS, PageState::Idle, parts, 2);
}

#[test]
fn a_fetch_ahead_against_a_fault() {
    let ahead: Part = |page| {
        if let Some((slot, _)) = page.edge(PageWord::prefetch) {
            page.second(slot, false);
        }
    };
    model(PREEMPTIONS, PageState::Stored, &[ahead, |page| page.count_up(0)], 2);
    model(PREEMPTIONS, PageState::Stored, &[ahead, Page::count_up_by_message], 2);
}

#[test]
fn a_pinned_page_does_not_leave() {
    let pinned: Part = |page| {
        if page.edge(PageWord::pin) == crate::word::OnPin::Pinned {
            assert!(*page.mapped.lock().unwrap());
            page.bytes.fetch_add(1, Ordering::Relaxed);
            page.edge(PageWord::unpin);
        } else {
            page.count_up(0);
        }
    };
    model(PREEMPTIONS, PageState::Mapped, &[age_and_store, pinned], 2);
}

#[test]
fn a_sleeper_hears_of_its_page_and_of_interrupts() {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(PREEMPTIONS);
    builder.check(|| {
        let sleeper = std::sync::Arc::new(Sleeper::default());
        let old = sleeper.begin();
        let waiter = sleeper.begin();
        let page = thread::spawn(move || {
            old.wake.wake(old.token, PageEnd::Lost);
            waiter.wake.wake(waiter.token, PageEnd::Ready);
        });
        let interrupter = thread::spawn({
            let sleeper = sleeper.clone();
            move || sleeper.interrupt()
        });
        if sleeper.wait(None) == Woken::Interrupted {
            assert_eq!(sleeper.wait(None), Woken::Page(PageEnd::Ready));
        } else {
            // The interrupt is for the next wait.
            let _next = sleeper.begin();
            assert_eq!(sleeper.wait(None), Woken::Interrupted);
        }
        page.join().unwrap();
        interrupter.join().unwrap();
    });
}

//! Failures of the store, and the end.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::{Machine, eventually, page, plain, ram};
use guest_memory::stores::{self, Read, Slot, Store, StoreError, StoreSpec, TierReport, Write};
use guest_memory::{Gfn, MayWait, NoWait, PAGE_BYTES, PAGE_SIZE, PageBytes, PagerError};

/// A page that begins with this word cannot be read back.
const LOST: u64 = 0xbad;
/// A page that begins with this word has its worker panic.
const PANIC: u64 = 0xdead;
/// A page that begins with this word is refused.
const FULL: u64 = 0xf011;

/// A store on a broken medium.
struct Broken {
    memory: Arc<dyn Store>,
    freed: Arc<AtomicU64>,
}

fn first_word(page: &PageBytes) -> u64 {
    u64::from_le_bytes(page[..8].try_into().unwrap())
}

impl Store for Broken {
    fn read_now(&self, _: &NoWait, _: Slot, _: &mut PageBytes) -> Result<bool, StoreError> {
        Ok(false)
    }

    fn at_hand(&self, _: Slot) -> bool {
        false
    }

    fn read(&self, pass: &MayWait, reads: &mut [Read<'_>]) {
        self.memory.read(pass, reads);
        for read in reads {
            assert_ne!(first_word(read.page), PANIC);
            if first_word(read.page) == LOST {
                read.result = Err(StoreError::Empty(read.slot));
            }
        }
    }

    fn write(&self, pass: &MayWait, writes: &mut [Write<'_>]) {
        for write in writes {
            if first_word(write.page) == FULL {
                write.result = Err(StoreError::Full { tier: "test", capacity_bytes: 1 });
            } else {
                self.memory.write(pass, std::slice::from_mut(write));
            }
        }
    }

    fn free(&self, slot: Slot) -> Result<(), StoreError> {
        self.freed.fetch_add(1, Ordering::Relaxed);
        self.memory.free(slot)
    }

    fn expected_read(&self) -> Duration {
        self.memory.expected_read()
    }

    fn memory_bytes(&self) -> u64 {
        0
    }

    fn report(&self) -> Vec<TierReport> {
        self.memory.report()
    }

    fn close(&self) {
        self.memory.close();
    }
}

/// Eight pages; page `n` begins with `words[n]`.
fn broken(words: &[u64]) -> Option<(Machine, Arc<AtomicU64>)> {
    let freed = Arc::new(AtomicU64::new(0));
    let memory = stores::open(&StoreSpec::default()).unwrap();
    let store = Arc::new(Broken { memory, freed: Arc::clone(&freed) });
    let machine = Machine::with_store(ram(8 * PAGE_BYTES), plain(), store)?;
    for (number, word) in (0..).zip(words) {
        machine.write(page(number), *word);
        machine.write(page(number) + 8, number + 100);
    }
    Some((machine, freed))
}

#[test]
fn a_lost_page_is_told_and_the_others_go_on() {
    let Some((machine, freed)) = broken(&[LOST, 1, 2]) else {
        return;
    };
    let pager = &machine.pager;
    assert_eq!(pager.evict(&[Gfn(0), Gfn(1), Gfn(2)]).unwrap(), 3);
    assert!(pager.failure().is_none() && pager.event().read().is_err());
    thread::scope(|scope| {
        let waiter = scope.spawn(|| machine.read(page(0)));
        eventually("the failure is told", || pager.event().read().is_ok());
        let failure = pager.failure().unwrap();
        assert!(matches!(failure, PagerError::Fetch { gfn: Gfn(0), .. }), "{failure}");
        // The others are served; the lost page is never given out, not even as zeros.
        assert_eq!(machine.read(page(1) + 8), 101);
        let error = machine.read_page(0, &mut [0; PAGE_SIZE]).unwrap_err();
        assert!(matches!(error, PagerError::Lost(Gfn(0))));
        thread::sleep(Duration::from_millis(50));
        assert!(!waiter.is_finished());
        pager.shutdown();
        waiter.join().unwrap();
    });
    // The copies are kept: the pages may stay as they are.
    assert_eq!(freed.load(Ordering::Relaxed), 0);
    assert!(matches!(pager.evict(&[Gfn(1)]), Err(PagerError::Stopped)));
}

#[test]
fn a_page_that_the_store_refuses_stays() {
    let Some((machine, _)) = broken(&[1, 2, FULL, 3]) else {
        return;
    };
    let error = machine.pager.evict(&[Gfn(7), Gfn(0), Gfn(1), Gfn(2), Gfn(3)]).unwrap_err();
    assert!(matches!(error, PagerError::Evict { gfn: Gfn(2), done: 4, .. }), "{error}");
    assert!(error.to_string().contains("0x2"));
    for (number, word) in (0..).zip([1, 2, FULL, 3]) {
        assert_eq!(
            (machine.read(page(number)), machine.read(page(number) + 8)),
            (word, number + 100)
        );
    }
    assert!(machine.pager.failure().is_none());
    let stats = machine.stats();
    assert_eq!((stats.evicted_pages, stats.write_errors), (3, 1));
}

#[test]
fn after_a_panic_the_guest_waits_and_reads_no_zeros() {
    let Some((machine, _)) = broken(&[PANIC, 1]) else {
        return;
    };
    let pager = &machine.pager;
    assert_eq!(pager.evict(&[Gfn(0), Gfn(1)]).unwrap(), 2);
    thread::scope(|scope| {
        let first = scope.spawn(|| machine.read(page(0)));
        eventually("the failure is told", || pager.failure().is_some());
        assert!(matches!(pager.failure(), Some(PagerError::Panicked)));
        assert_eq!(machine.read(page(1) + 8), 101);
        thread::sleep(Duration::from_millis(50));
        assert!(!first.is_finished());
        pager.shutdown();
    });
}

#[test]
fn shutdown_ends_hundreds_of_waits_at_once() {
    const WAITERS: u64 = 300;
    let Some(machine) = Machine::small(WAITERS, "delay=60s") else {
        return;
    };
    (0..WAITERS).for_each(|number| machine.write(page(number), number + 1));
    let all: Vec<_> = (0..WAITERS).map(Gfn).collect();
    assert_eq!(machine.pager.evict(&all).unwrap(), 300);
    thread::scope(|scope| {
        for number in 0..WAITERS {
            let machine = &machine;
            // Every tenth asks as the VMM does.
            scope.spawn(move || {
                if number % 10 == 0 {
                    let error = machine.read_page(number, &mut [0; PAGE_SIZE]).unwrap_err();
                    assert!(matches!(error, PagerError::Stopped), "{error}");
                } else {
                    machine.read(page(number));
                }
            });
        }
        eventually("all are under way", || machine.stats().outstanding == WAITERS);
        let start = Instant::now();
        machine.pager.shutdown();
        machine.crew.close();
        assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    });
    let stats = machine.stats();
    assert_eq!((stats.fetched_pages, stats.outstanding), (0, 0));
    assert_eq!(stats.outstanding_max, WAITERS);
    machine.pager.shutdown();
}

#[test]
fn a_dropped_pager_takes_its_thread_along() {
    let Some(machine) = Machine::small(1, "memory") else {
        return;
    };
    machine.write(page(0), 1);
    let start = Instant::now();
    drop(machine);
    assert!(start.elapsed() < Duration::from_secs(5));
}

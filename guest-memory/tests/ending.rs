//! Failures of the store, and the end.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::{Machine, eventually, page, plain, ram};
use guest_memory::store::{MemoryStore, Slot, Store, StoreError};
use guest_memory::{Gfn, PAGE_BYTES, PAGE_SIZE, PageBytes, PagerError};

/// A page that begins with this word cannot be read back.
const LOST: u64 = 0xbad;
/// A page that begins with this word ends the pager thread.
const PANIC: u64 = 0xdead;
/// A page that begins with this word is refused.
const FULL: u64 = 0xf011;

/// A store on a broken medium.
struct Broken {
    memory: MemoryStore,
    freed: Arc<AtomicU64>,
}

fn first_word(page: &PageBytes) -> u64 {
    u64::from_le_bytes(page[..8].try_into().unwrap())
}

impl Store for Broken {
    fn write(&mut self, page: &PageBytes) -> Result<Slot, StoreError> {
        if first_word(page) == FULL {
            return Err(StoreError::Full { slots: 1 });
        }
        self.memory.write(page)
    }

    fn read(&mut self, slot: Slot, page: &mut PageBytes) -> Result<(), StoreError> {
        self.memory.read(slot, page)?;
        assert_ne!(first_word(page), PANIC);
        if first_word(page) == LOST {
            return Err(StoreError::Empty(slot));
        }
        Ok(())
    }

    fn free(&mut self, slot: Slot) -> Result<(), StoreError> {
        self.freed.fetch_add(1, Ordering::Relaxed);
        self.memory.free(slot)
    }
}

/// Eight pages; page `n` begins with `words[n]`, and all are evicted unless the store is full.
fn broken(words: &[u64]) -> Option<(Machine, Arc<AtomicU64>)> {
    let freed = Arc::new(AtomicU64::new(0));
    let store = Broken { memory: MemoryStore::new().unwrap(), freed: Arc::clone(&freed) };
    let started = ram(8 * PAGE_BYTES).start_with_store(&plain(), Box::new(store));
    let machine = Machine::or_skip(started)?;
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
    assert!(pager.failure().is_none() && pager.failure_event().read().is_err());
    thread::scope(|scope| {
        let waiter = scope.spawn(|| machine.read(page(0)));
        eventually("the failure is told", || pager.failure_event().read().is_ok());
        let failure = pager.failure().unwrap();
        assert!(matches!(failure, PagerError::Fetch { gfn: Gfn(0), .. }), "{failure}");
        // The others are served; the lost page is never given out, not even as zeros.
        assert_eq!(machine.read(page(1) + 8), 101);
        let error = pager.read_page(Gfn(0), &mut [0; PAGE_SIZE]).unwrap_err();
        assert!(matches!(error, PagerError::Lost(Gfn(0))));
        thread::sleep(Duration::from_millis(50));
        assert!(!waiter.is_finished());
        pager.shutdown();
        waiter.join().unwrap();
    });
    assert_eq!(freed.load(Ordering::Relaxed), 1);
    assert!(matches!(pager.evict(&[Gfn(1)]), Err(PagerError::Stopped)));
}

#[test]
fn a_page_that_the_store_refuses_stays() {
    let Some((machine, _)) = broken(&[1, 2, FULL, 3]) else {
        return;
    };
    let error = machine.pager.evict(&[Gfn(7), Gfn(0), Gfn(1), Gfn(2), Gfn(3)]).unwrap_err();
    assert!(matches!(error, PagerError::Evict { gfn: Gfn(2), done: 2, .. }), "{error}");
    assert!(error.to_string().contains("0x2"));
    for (number, word) in (0..).zip([1, 2, FULL, 3]) {
        assert_eq!(
            (machine.read(page(number)), machine.read(page(number) + 8)),
            (word, number + 100)
        );
    }
    assert!(machine.pager.failure().is_none());
    assert_eq!(machine.stats().evicted_pages, 2);
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
        let second = scope.spawn(|| machine.read(page(1)));
        thread::sleep(Duration::from_millis(50));
        assert!(!first.is_finished() && !second.is_finished());
        assert!(matches!(pager.evict(&[Gfn(1)]), Err(PagerError::Stopped)));
        pager.shutdown();
    });
}

#[test]
fn shutdown_completes_hundreds_of_fetches_at_once() {
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
                    let mut bytes = [0; PAGE_SIZE];
                    machine.pager.read_page(Gfn(number), &mut bytes).unwrap();
                    assert_eq!(first_word(&bytes), number + 1);
                } else {
                    assert_eq!(machine.read(page(number)), number + 1);
                }
            });
        }
        eventually("all are under way", || machine.stats().outstanding == WAITERS);
        let start = Instant::now();
        machine.pager.shutdown();
        assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    });
    let stats = machine.stats();
    assert_eq!((stats.fetched_pages, stats.outstanding), (WAITERS, 0));
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

//! Pages that go to the store and come back.
// Unsafe: a read(2) into guest RAM, as a device or a guest's own system call would do.
#![allow(unsafe_code)]

mod common;

use std::io::Write;
use std::os::fd::AsRawFd;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use common::{Machine, Rng, page};
use guest_memory::{Gfn, PAGE_BYTES, PAGE_SIZE, PagerError};

fn gfns(range: std::ops::Range<u64>) -> Vec<Gfn> {
    range.map(Gfn).collect()
}

/// Fills pages with a pattern that names page and word.
fn fill(machine: &Machine, pages: std::ops::Range<u64>) {
    for number in pages {
        (0..512).for_each(|word| machine.write(page(number) + 8 * word, number << 32 | word));
    }
}

fn check(machine: &Machine, number: u64) {
    for word in 0..512 {
        assert_eq!(machine.read(page(number) + 8 * word), number << 32 | word);
    }
}

#[test]
fn evicted_pages_leave_memory_and_come_back() {
    let Some(machine) = Machine::small(300, "memory") else {
        return;
    };
    fill(&machine, 0..200);
    assert_eq!(machine.pager.evict(&gfns(0..200)).unwrap(), 200);
    let stats = machine.stats();
    assert_eq!((stats.resident_bytes, stats.stored_bytes), (0, 200 * PAGE_BYTES));
    (0..200).for_each(|number| check(&machine, number));
    // A page's books are done after it is mapped.
    common::eventually("the last page is counted", || machine.stats().stored_bytes == 0);
    let stats = machine.stats();
    assert_eq!((stats.evicted_pages, stats.fetched_pages), (200, 200));
    assert_eq!(stats.resident_bytes, 200 * PAGE_BYTES);
    assert_eq!(stats.pages_touched, 200, "a page counts once, however often it comes");
}

#[test]
fn a_page_is_mapped_from_its_first_touch_to_its_eviction() {
    let Some(machine) = Machine::small(8, "memory") else {
        return;
    };
    let mapped = |gfn| machine.pager.is_mapped(Gfn(gfn));
    assert!(!mapped(1), "never touched");
    machine.write(page(1), 1);
    common::eventually("its books are done", || mapped(1));
    assert!(!mapped(2));
    assert_eq!(machine.pager.evict(&[Gfn(1)]).unwrap(), 1);
    assert!(!mapped(1), "evicted");
    assert_eq!(machine.read(page(1)), 1);
    common::eventually("it is back", || mapped(1));
    assert!(!mapped(8) && !mapped(u64::MAX), "no RAM");
}

#[test]
fn what_is_not_resident_counts_as_done() {
    let Some(machine) = Machine::small(8, "memory") else {
        return;
    };
    machine.write(page(1), 1);
    assert_eq!(machine.pager.evict(&gfns(0..3)).unwrap(), 3);
    assert_eq!(machine.pager.evict(&[Gfn(1), Gfn(1), Gfn(2)]).unwrap(), 2);
    assert_eq!(machine.pager.evict(&[]).unwrap(), 0);
    assert_eq!(machine.stats().evicted_pages, 1);
    let outside = machine.pager.evict(&[Gfn(0), Gfn(8)]).unwrap_err();
    assert!(matches!(outside, PagerError::OutOfRange(Gfn(8))));
    assert_eq!(machine.read(page(1)), 1);
}

#[test]
fn fetches_overlap() {
    const THREADS: u64 = 8;
    const PAGES: u64 = 16;
    let Some(machine) = Machine::small(THREADS * PAGES, "delay=20ms") else {
        return;
    };
    fill(&machine, 0..THREADS * PAGES);
    assert_eq!(machine.pager.evict(&gfns(0..THREADS * PAGES)).unwrap(), 128);
    let together = Barrier::new(THREADS as usize);
    thread::scope(|scope| {
        for thread in 0..THREADS {
            let (machine, together) = (&machine, &together);
            scope.spawn(move || {
                together.wait();
                (0..PAGES).for_each(|i| check(machine, i * THREADS + thread));
            });
        }
    });
    let stats = machine.stats();
    assert_eq!(stats.fetched_pages, THREADS * PAGES);
    assert_eq!((stats.outstanding_max, stats.outstanding), (THREADS, 0));
}

#[test]
fn threads_that_want_one_page_share_its_fetch() {
    let Some(machine) = Machine::small(1, "delay=50ms") else {
        return;
    };
    fill(&machine, 0..1);
    assert_eq!(machine.pager.evict(&[Gfn(0)]).unwrap(), 1);
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| check(&machine, 0));
        }
    });
    let stats = machine.stats();
    assert_eq!((stats.fetched_pages, stats.outstanding_max), (1, 1));
    assert!(stats.messages_joined >= 1, "{stats:?}");
}

#[test]
fn a_page_that_is_being_fetched_is_not_evicted() {
    let Some(machine) = Machine::small(1, "delay=100ms") else {
        return;
    };
    fill(&machine, 0..1);
    assert_eq!(machine.pager.evict(&[Gfn(0)]).unwrap(), 1);
    thread::scope(|scope| {
        scope.spawn(|| check(&machine, 0));
        common::eventually("the fetch begins", || machine.stats().outstanding == 1);
        assert_eq!(machine.pager.evict(&[Gfn(0)]).unwrap(), 0);
    });
    assert_eq!(machine.stats().evicted_pages, 1);
}

#[test]
fn no_write_is_lost_to_an_eviction() {
    const WRITERS: u64 = 4;
    const PAGES: u64 = 32;
    const ROUNDS: u64 = 300;
    let Some(machine) = Machine::small(PAGES, "memory") else {
        return;
    };
    let mut rng = Rng::from_environment();
    let running = AtomicBool::new(true);
    thread::scope(|scope| {
        let writers: Vec<_> = (0..WRITERS)
            .map(|writer| {
                let machine = &machine;
                // Each writer counts in its own word of every page.
                scope.spawn(move || {
                    let evicted = || machine.pager.stats().evicted_pages;
                    for round in 0.. {
                        if round > ROUNDS && evicted() > 8 * PAGES {
                            break;
                        }
                        for number in 0..PAGES {
                            let word = machine.word(page(number) + 8 * writer);
                            assert_eq!(word.load(Ordering::Relaxed), round, "page {number}");
                            word.store(round + 1, Ordering::Relaxed);
                        }
                    }
                })
            })
            .collect();
        scope.spawn(|| {
            while running.load(Ordering::Relaxed) {
                let first = rng.below(PAGES);
                let end = PAGES.min(first + 1 + rng.below(8));
                machine.pager.evict(&gfns(first..end)).unwrap();
            }
        });
        let results: Vec<_> = writers.into_iter().map(thread::ScopedJoinHandle::join).collect();
        running.store(false, Ordering::Relaxed);
        assert!(results.iter().all(Result::is_ok));
    });
    let stats = machine.stats();
    println!("{stats:?}");
    assert!(stats.evicted_pages > PAGES);
}

#[test]
fn the_kernel_may_touch_absent_pages_too() {
    let Some(machine) = Machine::small(4, "delay=5ms") else {
        return;
    };
    fill(&machine, 0..4);
    assert_eq!(machine.pager.evict(&gfns(0..4)).unwrap(), 4);
    let (reader, mut writer) = std::io::pipe().unwrap();
    writer.write_all(&[0xab; 2 * PAGE_SIZE]).unwrap();
    let target = machine.hva(page(1) + 2048) as *mut libc::c_void;
    // SAFETY: two pages from here are guest RAM, which nobody else accesses now.
    let read = unsafe { libc::read(reader.as_raw_fd(), target, 2 * PAGE_SIZE) };
    assert_eq!(read, 2 * PAGE_SIZE as isize);
    assert_eq!(machine.read(page(1) + 2040), 1 << 32 | 255);
    assert_eq!(machine.read(page(1) + 2048), 0xabab_abab_abab_abab);
    assert_eq!(machine.read(page(3) + 2048), 3 << 32 | 256);
}

#[test]
fn the_vmm_reads_and_writes_through_the_pager() {
    let Some(machine) = Machine::small(8, "delay=5ms") else {
        return;
    };
    let pager = &machine.pager;
    fill(&machine, 0..2);
    let mut bytes = [0; PAGE_SIZE];
    // Untouched: zeros, and still untouched.
    machine.read_page(5, &mut bytes).unwrap();
    assert_eq!((bytes, machine.stats().pages_touched), ([0; PAGE_SIZE], 2));
    machine.write_bytes(5, 4088, &5_u64.to_le_bytes()).unwrap();
    assert_eq!((machine.read(page(5) + 4088), machine.stats().pages_touched), (5, 3));
    // Resident.
    machine.write_bytes(1, 8, &9_u64.to_le_bytes()).unwrap();
    assert_eq!(machine.read(page(1) + 8), 9);
    // In the store.
    assert_eq!(pager.evict(&gfns(0..2)).unwrap(), 2);
    machine.write_bytes(0, 0, &7_u64.to_le_bytes()).unwrap();
    assert_eq!((machine.read(page(0)), machine.read(page(0) + 8)), (7, 1));
    machine.read_page(1, &mut bytes).unwrap();
    assert_eq!(bytes[8..16], 9_u64.to_le_bytes());
    assert_eq!(machine.stats().fetched_pages, 2);
}

#[test]
fn accesses_beyond_their_page_or_ram_are_refused() {
    let Some(machine) = Machine::small(2, "memory") else {
        return;
    };
    for (offset, len) in [(4096, 1), (4095, 2), (0, 4097), (usize::MAX, 1)] {
        let error = machine.write_bytes(0, offset, &vec![0; len]).unwrap_err();
        assert!(matches!(error, PagerError::BeyondPage { .. }), "{error}");
    }
    machine.write_bytes(0, 4096, &[]).unwrap();
    for gfn in [2, 0xf_ffff, u64::MAX] {
        let error = machine.read_page(gfn, &mut [0; PAGE_SIZE]).unwrap_err();
        assert!(matches!(error, PagerError::OutOfRange(Gfn(n)) if n == gfn));
    }
    assert_eq!(machine.stats().pages_touched, 0);
}

//! The VMM's own accesses: what is pinned stays, what is seen is exactly that, and there are bounds.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use common::{Machine, Rng, eventually, page, plain, ram};
use guest_memory::{
    Gfn, Gpa, MIN_RESIDENT_LIMIT_BYTES, PAGE_BYTES, PAGE_SIZE, PagerConfig, PagerError, Pinned,
    Sleeper,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

const LIMIT: u64 = MIN_RESIDENT_LIMIT_BYTES;
const LIMIT_PAGES: u64 = LIMIT / PAGE_BYTES;

fn limited(markers: bool) -> PagerConfig {
    PagerConfig { resident_limit_bytes: Some(LIMIT), markers, ..plain() }
}

fn pin(machine: &Machine, ranges: &[(u64, u64)]) -> Result<Pinned, PagerError> {
    let ranges: Vec<_> = ranges.iter().map(|(at, len)| (Gpa(*at), *len)).collect();
    machine.pager.pin(&ranges, &Arc::default())
}

#[test]
fn a_view_has_exactly_the_pinned_pages() {
    let Some(machine) = Machine::start(ram((3 << 30) + page(16)), plain()) else { return };
    let end_of_low = (3 << 30) - PAGE_BYTES;
    // Unsorted, twice the same, over the end of a page, on both sides of the hole, and nothing at all.
    let ranges = [
        (page(9) + 4000, 200),
        (page(2), 1),
        (page(10), PAGE_BYTES),
        (end_of_low, PAGE_BYTES),
        (4 << 30, 8),
        (page(5), 0),
    ];
    let pinned = pin(&machine, &ranges).unwrap();
    let regions: Vec<_> = pinned.iter().map(|r| (r.start_addr().0, r.len())).collect();
    let expected = [(page(2), 1), (page(9), 2), (end_of_low, 1), (4 << 30, 1)];
    assert_eq!(regions, expected.map(|(at, pages)| (at, page(pages))));
    pinned.write_obj(7_u64, GuestAddress(page(9) + 4090)).unwrap();
    assert_eq!(pinned.read_obj::<u64>(GuestAddress(page(9) + 4090)).unwrap(), 7);
    for outside in [
        page(1),
        page(3),
        page(5),
        page(8),
        page(11) - 4,
        end_of_low - 8,
        3 << 30,
        (4 << 30) + page(1),
    ] {
        pinned.read_obj::<u64>(GuestAddress(outside)).unwrap_err();
    }
    drop(pinned);
    assert_eq!(machine.stats().pages_touched, 5);
}

#[test]
fn pins_are_bounded_and_refused_ones_leave_nothing_pinned() {
    let Some(machine) = Machine::start(ram(page(2000)), plain()) else { return };
    for (at, len) in [(0, page(513)), (0, u64::MAX), (u64::MAX, 2)] {
        let error = pin(&machine, &[(at, len)]).unwrap_err();
        assert!(
            matches!(error, PagerError::PinTooLarge { .. } | PagerError::OutOfRange(_)),
            "{error}"
        );
    }
    let error = pin(&machine, &[(0, page(300)), (page(1000), page(300))]).unwrap_err();
    assert!(matches!(error, PagerError::PinTooLarge { .. }), "{error}");
    let error = pin(&machine, &[(page(1), 1), (page(2000), 1)]).unwrap_err();
    assert!(matches!(error, PagerError::OutOfRange(Gfn(2000))), "{error}");
    assert_eq!(machine.stats().pages_touched, 0, "nothing was done before that was known");
    // 255 pins of one page, and no more; together with others that are refused none stays.
    let mut pins: Vec<_> = (0..255).map(|_| pin(&machine, &[(page(7), 1)]).unwrap()).collect();
    let error = pin(&machine, &[(page(6), page(2))]).unwrap_err();
    assert!(matches!(error, PagerError::Busy { limit: 255, .. }), "{error}");
    assert_eq!(machine.pager.evict(&[Gfn(6), Gfn(7)]).unwrap(), 1);
    pins.pop();
    let one_more = pin(&machine, &[(page(6), page(2))]).unwrap();
    pins.clear();
    assert_eq!(machine.pager.evict(&[Gfn(6), Gfn(7)]).unwrap(), 0);
    drop(one_more);
    assert_eq!(machine.pager.evict(&[Gfn(6), Gfn(7)]).unwrap(), 2);
}

#[test]
fn pinned_pages_stay_while_all_others_come_and_go() {
    for markers in [false, true] {
        let Some(machine) = Machine::start(ram(4 * LIMIT), limited(markers)) else { return };
        let by = Arc::new(Sleeper::default());
        let write = |number: u64, word: u64| {
            machine.pager.write_bytes(Gfn(number), 8, &word.to_le_bytes(), &by).unwrap();
        };
        (0..4 * LIMIT_PAGES).for_each(|number| write(number, number));
        // Nearly a quarter of the limit, in two pins; most of it is in the store now.
        let pins =
            [(0, page(190)), (page(3000), page(56))].map(|range| pin(&machine, &[range]).unwrap());
        (0..4 * LIMIT_PAGES).for_each(|number| write(number, 2 * number));
        let all: Vec<_> = (0..190).chain(3000..3056).map(Gfn).collect();
        assert_eq!(machine.pager.evict(&all).unwrap(), 0, "none of them left");
        for (number, at) in
            (0..190).map(|n| (n, &pins[0])).chain((3000..3056).map(|n| (n, &pins[1])))
        {
            assert_eq!(at.read_obj::<u64>(GuestAddress(page(number) + 8)).unwrap(), 2 * number);
        }
        eventually("the limit holds", || machine.stats().resident_bytes <= LIMIT);
        drop(pins);
        assert_eq!(machine.pager.evict(&all).unwrap(), 246);
    }
}

#[test]
fn pins_together_have_a_quarter_of_the_limit_and_the_guest_the_rest() {
    let Some(machine) = Machine::start(ram(2 * LIMIT), limited(false)) else { return };
    let quarter = LIMIT_PAGES / 4;
    let held = pin(&machine, &[(0, page(quarter))]).unwrap();
    let refused = pin(&machine, &[(page(quarter), 1)]).unwrap_err();
    assert!(
        matches!(refused, PagerError::Busy { limit, .. } if limit as u64 == quarter),
        "{refused}"
    );
    // What is not pinned makes room for what the guest wants.
    (quarter..2 * LIMIT_PAGES).for_each(|number| machine.write(page(number), number));
    (quarter..2 * LIMIT_PAGES).for_each(|number| assert_eq!(machine.read(page(number)), number));
    drop(held);
    pin(&machine, &[(page(quarter), 1)]).unwrap();
}

#[test]
fn devices_and_guest_write_the_same_pages() {
    const PAGES: u64 = 2 * LIMIT_PAGES;
    let Some(machine) = Machine::start(ram(page(PAGES)), limited(false)) else { return };
    let mut rng = Rng::from_environment();
    let running = AtomicBool::new(true);
    thread::scope(|scope| {
        // Each has a word of every page; it counts up, by the alias or by the guest mapping.
        let threads: Vec<_> = (0..4)
            .map(|lane| {
                let (machine, mut rng) = (&machine, rng.split());
                scope.spawn(move || {
                    let mut counts = vec![0_u64; PAGES as usize];
                    let by = Arc::new(Sleeper::default());
                    for _ in 0..5000 {
                        let number = rng.below(PAGES);
                        let (at, count) = (page(number) + 8 * lane, &mut counts[number as usize]);
                        if lane % 2 == 0 {
                            let pinned = machine.pager.pin(&[(Gpa(at), 8)], &by).unwrap();
                            assert_eq!(pinned.read_obj::<u64>(GuestAddress(at)).unwrap(), *count);
                            pinned.write_obj(*count + 1, GuestAddress(at)).unwrap();
                        } else {
                            assert_eq!(machine.read(at), *count);
                            machine.write(at, *count + 1);
                        }
                        *count += 1;
                    }
                })
            })
            .collect();
        scope.spawn(|| {
            while running.load(Ordering::Relaxed) {
                let gfns: Vec<_> = (0..rng.below(64)).map(|_| Gfn(rng.below(PAGES))).collect();
                machine.pager.evict(&gfns).unwrap();
            }
        });
        let ended: Vec<_> = threads.into_iter().map(thread::ScopedJoinHandle::join).collect();
        running.store(false, Ordering::Relaxed);
        assert!(ended.iter().all(Result::is_ok));
    });
    assert!(machine.pager.failure().is_none());
}

#[test]
fn reading_an_untouched_page_does_not_touch_it() {
    let Some(machine) = Machine::start(ram(page(4)), plain()) else { return };
    let mut bytes = [1; PAGE_SIZE];
    machine.read_page(2, &mut bytes).unwrap();
    assert_eq!((bytes, machine.stats().pages_touched), ([0; PAGE_SIZE], 0));
}

//! Random reads, writes and evictions against a reference, on all ways to a page at once.

mod common;

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use common::{Machine, Rng, page};
use guest_memory::{Gfn, PAGE_SIZE, PagerConfig};

const PAGES: u64 = 256;
const VCPUS: u64 = 4;
/// Words of a page that one thread has for itself.
const LANE_WORDS: u64 = 512 / (VCPUS + 1);

/// What one thread wrote: `words[page][word]`.
struct Reference(Vec<[u64; LANE_WORDS as usize]>);

impl Reference {
    fn new() -> Self {
        Self(vec![[0; LANE_WORDS as usize]; PAGES as usize])
    }
}

/// A vCPU: reads and writes its lane of every page.
fn vcpu(machine: &Machine, lane: u64, mut rng: Rng, ops: u64) {
    let mut reference = Reference::new();
    for op in 0..ops {
        let (number, word) = (rng.below(PAGES), rng.below(LANE_WORDS));
        let gpa = page(number) + 8 * (lane * LANE_WORDS + word);
        let expected = &mut reference.0[number as usize][word as usize];
        if rng.below(2) == 0 {
            *expected = rng.next();
            machine.write(gpa, *expected);
        } else {
            assert_eq!(machine.read(gpa), *expected, "lane {lane} op {op} gpa {gpa:#x}");
        }
    }
}

/// The VMM: evicts, and reads and writes its own lane through the pager.
fn vmm(machine: &Machine, mut rng: Rng, running: &AtomicBool) -> u64 {
    let mut reference = Reference::new();
    let mut ops = 0;
    let lane = (VCPUS * LANE_WORDS) as usize;
    while running.load(Ordering::Relaxed) {
        ops += 1;
        let (number, word) = (rng.below(PAGES), rng.below(LANE_WORDS) as usize);
        let expected = &mut reference.0[number as usize][word];
        let offset = 8 * (lane + word);
        match rng.below(10) {
            0..4 => {
                let list: Vec<_> = (0..rng.below(40)).map(|_| Gfn(rng.below(PAGES))).collect();
                machine.pager.evict(&list).unwrap();
            }
            4 => {
                let end = PAGES.min(number + 200);
                let list: Vec<_> = (number..end).map(Gfn).collect();
                machine.pager.evict(&list).unwrap();
            }
            5 => machine.reclaim_mapping(page(number)),
            6..8 => {
                *expected = rng.next();
                let bytes = expected.to_le_bytes();
                machine.write_bytes(number, offset, &bytes).unwrap();
            }
            _ => {
                let mut bytes = [0; PAGE_SIZE];
                machine.read_page(number, &mut bytes).unwrap();
                assert_eq!(bytes[offset..offset + 8], expected.to_le_bytes(), "page {number}");
            }
        }
    }
    ops
}

fn stress(store: &str, ops: u64) {
    let config = PagerConfig {
        store: store.parse().unwrap(),
        fault_around_bytes: 64 << 10,
        ..PagerConfig::default()
    };
    let Some(machine) = Machine::start(common::ram(page(PAGES)), config) else {
        return;
    };
    let mut rng = Rng::from_environment();
    let running = AtomicBool::new(true);
    thread::scope(|scope| {
        let vcpus: Vec<_> = (0..VCPUS)
            .map(|lane| {
                let (machine, rng) = (&machine, rng.split());
                scope.spawn(move || vcpu(machine, lane, rng, ops))
            })
            .collect();
        let rng = rng.split();
        let vmm = scope.spawn(|| vmm(&machine, rng, &running));
        let vcpus: Vec<_> = vcpus.into_iter().map(thread::ScopedJoinHandle::join).collect();
        running.store(false, Ordering::Relaxed);
        assert!(vcpus.iter().all(Result::is_ok), "a vCPU read what it did not write");
        println!("vCPU operations: {}; VMM operations: {}", VCPUS * ops, vmm.join().unwrap());
    });
    // A page's books are done after it is mapped.
    common::eventually("the last pages are counted", || {
        let stats = machine.stats();
        stats.resident_bytes + stats.stored_bytes == 4096 * stats.pages_touched
    });
    let stats = machine.stats();
    println!("{stats:?}");
    assert!(machine.pager.failure().is_none());
    assert_eq!(stats.outstanding, 0);
    let back = stats.fetched_pages + stats.hits_stored;
    assert_eq!(stats.stored_bytes, 4096 * (stats.evicted_pages - back));
    assert_eq!(stats.resident_bytes + stats.stored_bytes, 4096 * stats.pages_touched);
}

#[test]
fn every_thread_reads_what_it_wrote() {
    stress("memory", 100_000);
}

#[test]
fn every_thread_reads_what_it_wrote_from_a_slow_store() {
    stress("delay=500us", 20_000);
}

//! Stores that fail for a while, and the promise that nothing is lost by it.

mod common;

use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::{Machine, Rng, eventually, page, plain, ram};
use guest_memory::stores::testing::{self, Switch, switchable};
use guest_memory::{
    Gfn, Health, MIN_RESIDENT_LIMIT_BYTES, PAGE_BYTES, PAGE_SIZE, PagerConfig, PagerError,
};

const LIMIT: u64 = MIN_RESIDENT_LIMIT_BYTES;
const LIMIT_PAGES: u64 = LIMIT / PAGE_BYTES;

fn limited() -> PagerConfig {
    PagerConfig { resident_limit_bytes: Some(LIMIT), ..plain() }
}

/// RAM of three times the limit on a store that can be turned off; as much of it as fits is written.
fn switched(store: &str, config: PagerConfig) -> Option<(Machine, Switch)> {
    let (store, switch) = switchable(testing::open(store).unwrap());
    Some((Machine::with_store(ram(3 * LIMIT), config, store)?, switch))
}

fn fill(machine: &Machine, pages: std::ops::Range<u64>) {
    pages.for_each(|number| machine.write(page(number) + 8 * (number % 512), number + 1));
}

fn check(machine: &Machine, pages: std::ops::Range<u64>) {
    for number in pages {
        assert_eq!(machine.read(page(number) + 8 * (number % 512)), number + 1, "page {number}");
    }
}

/// The event rings, and the health is then as it should be.
fn health_becomes(machine: &Machine, what: &str, is_so: impl Fn(&Health) -> bool) {
    eventually(what, || is_so(&machine.pager.health()));
    eventually("the VMM is told", || machine.pager.event().read().is_ok());
}

#[test]
fn reads_that_fail_are_tried_until_the_store_answers_again() {
    let Some((machine, switch)) = switched("raw+memory", plain()) else { return };
    fill(&machine, 0..32);
    let all: Vec<_> = (0..32).map(Gfn).collect();
    assert_eq!(machine.pager.evict(&all).unwrap(), 32);
    for _ in 0..2 {
        switch.down();
        thread::scope(|scope| {
            let guests: Vec<_> = (0..8)
                .map(|n| {
                    scope.spawn({
                        let machine = &machine;
                        move || check(machine, n..n + 1)
                    })
                })
                .collect();
            health_becomes(&machine, "reads are in trouble", |health| health.reads.is_some());
            assert_eq!(machine.pager.health().writes, None);
            let why = machine.pager.health().reads.unwrap();
            assert!(why.contains("cannot read"), "{why}");
            // With a backoff: no storm of reads.
            let before = machine.stats().read_errors;
            thread::sleep(Duration::from_millis(300));
            let tries = machine.stats().read_errors - before;
            assert!(tries < 8 * 30, "{tries} reads in 300 ms");
            assert!(!guests.iter().any(thread::ScopedJoinHandle::is_finished));
            switch.up();
        });
        health_becomes(&machine, "all is well", |health| *health == Health::default());
        assert!(machine.pager.failure().is_none());
        machine.pager.evict(&all).unwrap();
    }
    check(&machine, 0..32);
}

#[test]
fn writes_that_fail_keep_pages_in_memory_and_evictions_go_on_later() {
    let Some((machine, switch)) = switched("raw+memory", limited()) else { return };
    switch.down();
    fill(&machine, 0..2 * LIMIT_PAGES);
    health_becomes(&machine, "writes are in trouble", |health| health.writes.is_some());
    assert_eq!(machine.pager.health().reads, None);
    let stats = machine.stats();
    assert!(stats.limit_exceeded && stats.resident_bytes == 2 * LIMIT, "{stats:?}");
    // It asks now and then, and not all the time, even while the guest goes on.
    let (start, before) = (Instant::now(), machine.stats());
    while start.elapsed() < Duration::from_secs(1) {
        check(&machine, 0..2 * LIMIT_PAGES);
    }
    let after = machine.stats();
    let tries = after.write_errors - before.write_errors;
    let rounds = start.elapsed().as_millis() as u64 / 200 + 1;
    assert!((1..=64 * (rounds + 1)).contains(&tries), "{tries} pages tried in a second");
    switch.up();
    health_becomes(&machine, "all is well", |health| *health == Health::default());
    eventually("the limit holds again", || machine.stats().resident_bytes <= LIMIT);
    assert!(!machine.stats().limit_exceeded);
    check(&machine, 0..2 * LIMIT_PAGES);
}

#[test]
fn trouble_with_writes_ends_when_there_is_no_limit_any_more() {
    let Some((machine, switch)) = switched("raw+memory", limited()) else { return };
    switch.down();
    fill(&machine, 0..2 * LIMIT_PAGES);
    eventually("writes are in trouble", || machine.pager.health().writes.is_some());
    machine.pager.set_resident_limit(None).unwrap();
    eventually("nobody cares", || machine.pager.health() == Health::default());
    assert!(!machine.stats().limit_exceeded);
    switch.up();
    machine.pager.set_resident_limit(Some(LIMIT)).unwrap();
    eventually("the limit holds", || machine.stats().resident_bytes <= LIMIT);
    check(&machine, 0..2 * LIMIT_PAGES);
}

#[test]
fn a_full_store_stops_evictions_and_says_so() {
    // Room for half of what is over.
    let config =
        PagerConfig { store: format!("raw+memory={}", LIMIT / 2).parse().unwrap(), ..limited() };
    let Some(machine) = Machine::start(ram(3 * LIMIT), config) else { return };
    fill(&machine, 0..2 * LIMIT_PAGES);
    health_becomes(&machine, "writes are in trouble", |health| health.writes.is_some());
    let why = machine.pager.health().writes.unwrap();
    assert!(why.contains("full"), "{why}");
    let stats = machine.stats();
    assert!(stats.limit_exceeded && stats.resident_bytes >= LIMIT + LIMIT / 2, "{stats:?}");
    check(&machine, 0..2 * LIMIT_PAGES);
    check(&machine, 0..2 * LIMIT_PAGES);
    assert!(machine.pager.failure().is_none());
    // With a limit that there is room for, all is well.
    machine.pager.set_resident_limit(Some(4 * LIMIT)).unwrap();
    eventually("all is well", || machine.pager.health() == Health::default());
    check(&machine, 0..2 * LIMIT_PAGES);
}

#[test]
fn copies_of_pages_in_memory_do_not_fill_the_store() {
    // There is room for all that is not in memory, and for a few batches more.
    let size = LIMIT + 4 * 64 * PAGE_BYTES;
    let config = PagerConfig { store: format!("raw+memory={size}").parse().unwrap(), ..limited() };
    let Some(machine) = Machine::start(ram(3 * LIMIT), config) else { return };
    fill(&machine, 0..2 * LIMIT_PAGES);
    for _ in 0..4 {
        check(&machine, 0..2 * LIMIT_PAGES);
    }
    eventually("the limit holds", || machine.stats().resident_bytes <= LIMIT);
    assert_eq!(machine.pager.health(), Health::default());
    let stats = machine.stats();
    println!(
        "{} refused, {} of {} clean",
        stats.write_errors, stats.clean_pages, stats.evicted_pages
    );
    assert_eq!(stats.free_errors, 0);
}

/// A file system of this many bytes, for root; unmounted when dropped.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn new(bytes: u64) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let size = format!("size={bytes}");
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &size, "none"]).arg(dir.path()).stderr(Stdio::null());
        let mounted = mount.status().is_ok_and(|status| status.success());
        if !mounted {
            println!("SKIP: only root may mount a small file system");
        }
        mounted.then(|| Self(dir))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0.path()).status();
    }
}

#[test]
fn a_disk_without_space_is_a_full_store_and_has_room_again_later() {
    let Some(disk) = SmallDisk::new(LIMIT) else { return };
    let other = disk.0.path().join("other");
    std::fs::write(&other, vec![1; (LIMIT / 2) as usize]).unwrap();
    let store = format!("raw+file={}", disk.0.path().display()).parse().unwrap();
    let Some(machine) = Machine::start(ram(3 * LIMIT), PagerConfig { store, ..limited() }) else {
        return;
    };
    fill(&machine, 0..LIMIT_PAGES * 7 / 4);
    health_becomes(&machine, "writes are in trouble", |health| health.writes.is_some());
    let why = machine.pager.health().writes.unwrap();
    assert!(why.contains("no space left"), "{why}");
    check(&machine, 0..LIMIT_PAGES * 7 / 4);
    std::fs::remove_file(&other).unwrap();
    health_becomes(&machine, "all is well", |health| *health == Health::default());
    eventually("the limit holds again", || machine.stats().resident_bytes <= LIMIT);
    check(&machine, 0..LIMIT_PAGES * 7 / 4);
    drop(machine);
}

#[test]
fn stores_that_fail_at_random_lose_nothing() {
    for store in [
        "raw+fail=write:rate=0.2,seed=1+fail=read:rate=0.2,seed=2+memory",
        "fail=write:rate=0.2,seed=3+fail=read:rate=0.2,seed=4+lz4=512K+delay=100us",
        "fail=read:rate=0.01,kind=corrupt,seed=5+lz4=512K+memory",
    ] {
        let mut rng = Rng::from_environment();
        let config = PagerConfig { store: store.parse().unwrap(), ..limited() };
        let Some(machine) = Machine::start(ram(2 * LIMIT), config) else { return };
        fill(&machine, 0..2 * LIMIT_PAGES);
        thread::scope(|scope| {
            for _ in 0..4 {
                let (machine, mut rng) = (&machine, rng.split());
                scope.spawn(move || {
                    for _ in 0..1000 {
                        let number = rng.below(2 * LIMIT_PAGES);
                        check(machine, number..number + 1);
                    }
                });
            }
        });
        eventually("all is well", || machine.pager.health() == Health::default());
        let stats = machine.stats();
        println!("{store}: {} read errors, {} write errors", stats.read_errors, stats.write_errors);
        assert!(machine.pager.failure().is_none(), "{:?}", machine.pager.failure());
        assert_eq!(stats.outstanding, 0);
    }
}

#[test]
fn a_page_that_is_damaged_on_the_medium_is_lost_by_name() {
    let config = PagerConfig {
        store: "raw+fail=read:rate=1,kind=corrupt+memory".parse().unwrap(),
        ..plain()
    };
    let Some(machine) = Machine::start(ram(8 * PAGE_BYTES), config) else { return };
    fill(&machine, 0..2);
    assert_eq!(machine.pager.evict(&[Gfn(1)]).unwrap(), 1);
    let error = machine.read_page(1, &mut [0; PAGE_SIZE]).unwrap_err();
    assert!(matches!(error, PagerError::Lost(Gfn(1))), "{error}");
    let failure = machine.pager.failure().unwrap();
    assert!(matches!(failure, PagerError::Checksum { gfn: Gfn(1), .. }), "{failure}");
    assert_eq!(machine.stats().read_errors, 3, "it is asked for again before that");
    check(&machine, 0..1);
}

#[test]
fn shutdown_in_the_middle_of_trouble_is_quick() {
    for down_for_good in [false, true] {
        let Some((machine, switch)) = switched("raw+memory", limited()) else { return };
        fill(&machine, 0..2 * LIMIT_PAGES);
        switch.down();
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            for lane in 0..16 {
                let (machine, stop) = (&machine, &stop);
                scope.spawn(move || {
                    for number in (lane..2 * LIMIT_PAGES).step_by(16) {
                        if stop.load(Ordering::Relaxed) {
                            return;
                        }
                        machine.read(page(number));
                    }
                });
            }
            eventually("reads are in trouble", || machine.pager.health().reads.is_some());
            if !down_for_good {
                switch.up();
            }
            stop.store(true, Ordering::Relaxed);
            let start = Instant::now();
            machine.pager.shutdown();
            machine.crew.close();
            assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
        });
        assert!(machine.pager.failure().is_none(), "{:?}", machine.pager.failure());
    }
}

#[test]
fn a_write_through_a_pin_is_not_lost_to_an_older_copy() {
    let Some((machine, switch)) = switched("raw+memory", plain()) else { return };
    let by = Arc::default();
    fill(&machine, 0..1);
    for round in 1..=20 {
        assert_eq!(machine.pager.evict(&[Gfn(0)]).unwrap(), 1);
        // The guest only reads: what it finds is what the device wrote last.
        assert_eq!(machine.read(page(0)), round);
        machine.pager.write_bytes(Gfn(0), 0, &(round + 1).to_le_bytes(), &by).unwrap();
        if round % 3 == 0 {
            // The older copy stays when the new one is refused.
            switch.down();
            machine.pager.evict(&[Gfn(0)]).unwrap_err();
            switch.up();
        }
    }
    let stats = machine.stats();
    assert_eq!((stats.clean_pages, stats.evicted_pages), (0, 20));
    // Nothing was written: clean, by content.
    assert_eq!(machine.pager.evict(&[Gfn(0)]).unwrap(), 1);
    assert_eq!(machine.read(page(0)), 21);
    assert_eq!(machine.pager.evict(&[Gfn(0)]).unwrap(), 1);
    assert_eq!(machine.stats().clean_pages, 1);
}

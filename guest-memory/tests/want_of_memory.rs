//! A host that has no memory for pages for a while. RAM is a file in a tmpfs of its own that is too small
//! for it: the kernel's answers are those of a host without memory, and nobody else is harmed.

mod common;

use std::fs::File;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use common::{Machine, eventually, page, plain};
use guest_memory::stores::testing;
use guest_memory::{
    Fault, Gfn, GuestRam, Health, Hit, PAGE_BYTES, PageEnd, PagerConfig, RamLayout, Sleeper, Woken,
};

/// Pages of RAM, and those that there is memory for.
const PAGES: u64 = 256;
const MEMORY_PAGES: u64 = 64;

/// A tmpfs that goes with this value.
struct Tmpfs(tempfile::TempDir);

impl Tmpfs {
    /// `None`, with the reason printed, for who may not mount one.
    fn mount() -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        match mount(&["-t", "tmpfs", "-o", &size(MEMORY_PAGES), "tmpfs"], dir.path()) {
            Ok(()) => Some(Self(dir)),
            Err(why) => {
                println!("SKIP: needs root: it mounts a small tmpfs ({why})");
                None
            }
        }
    }

    fn resize(&self, pages: u64) {
        let options = format!("remount,{}", size(pages));
        mount(&["-o", &options], self.0.path()).unwrap();
    }

    fn ram(&self) -> GuestRam {
        let path = self.0.path().join("ram");
        let file = File::options().read(true).write(true).create_new(true).open(path).unwrap();
        file.set_len(PAGES * PAGE_BYTES).unwrap();
        GuestRam::in_file(&RamLayout::new(PAGES * PAGE_BYTES).unwrap(), file).unwrap()
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(self.0.path()).status();
    }
}

fn size(pages: u64) -> String {
    format!("huge=never,size={}", pages * PAGE_BYTES)
}

fn mount(arguments: &[&str], at: &Path) -> Result<(), String> {
    let output = Command::new("mount").args(arguments).arg(at).output();
    let output = output.map_err(|error| error.to_string())?;
    let why = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    if output.status.success() { Ok(()) } else { Err(why) }
}

fn gfns(pages: std::ops::Range<u64>) -> Vec<Gfn> {
    pages.map(Gfn).collect()
}

fn fill(machine: &Machine, pages: std::ops::Range<u64>) {
    pages.for_each(|number| machine.write(page(number) + 8 * (number % 512), number + 1));
}

fn check(machine: &Machine, pages: std::ops::Range<u64>) {
    for number in pages {
        assert_eq!(machine.read(page(number) + 8 * (number % 512)), number + 1, "page {number}");
    }
}

/// Fetched, compressed and zero pages wait while there is no memory, and come when there is some.
fn waits_and_goes_on(store: &str, fault_around_bytes: u64) {
    let Some(tmpfs) = Tmpfs::mount() else { return };
    let config = PagerConfig { fault_around_bytes, ..plain() };
    let store = testing::open(store).unwrap();
    let Some(machine) = Machine::with_store(tmpfs.ram(), config, store) else { return };
    for round in 0..2 {
        // 32 pages leave, and others take their place.
        tmpfs.resize(MEMORY_PAGES);
        fill(&machine, 0..MEMORY_PAGES);
        assert_eq!(machine.pager.evict(&gfns(0..32)).unwrap(), 32);
        fill(&machine, MEMORY_PAGES..MEMORY_PAGES + 32);
        let waits = machine.stats().memory_waits;
        thread::scope(|scope| {
            let stored = scope.spawn(|| check(&machine, 0..32));
            let zero = scope.spawn(|| fill(&machine, 200..216));
            eventually("somebody waits for memory", || machine.pager.health().memory.is_some());
            eventually("the VMM is told", || machine.pager.event().read().is_ok());
            let health = machine.pager.health();
            let why = health.memory.clone().unwrap();
            assert!(why.contains("guest frame 0x"), "{why}");
            assert_eq!(Health { memory: None, ..health }, Health::default());
            // With a backoff: no storm of tries.
            let before = machine.stats().memory_waits;
            thread::sleep(Duration::from_millis(300));
            let tries = machine.stats().memory_waits - before;
            assert!(tries < 2 * 40, "{tries} tries in 300 ms");
            assert!(!stored.is_finished() && !zero.is_finished());
            tmpfs.resize(PAGES);
        });
        eventually("all is well", || machine.pager.health() == Health::default());
        assert!(machine.stats().memory_waits > waits);
        assert!(machine.pager.failure().is_none(), "{:?}", machine.pager.failure());
        check(&machine, 0..MEMORY_PAGES + 32);
        check(&machine, 200..216);
        println!("round {round}: {} waits", machine.stats().memory_waits - waits);
        let all = gfns(0..PAGES);
        assert_eq!(machine.pager.evict(&all).unwrap(), PAGES as u32);
        eventually("the books are in order", || {
            let stats = machine.stats();
            stats.resident_bytes == 0 && stats.stored_bytes == 4096 * stats.pages_touched
        });
    }
    check(&machine, 0..MEMORY_PAGES + 32);
}

#[test]
fn fetched_pages_wait_for_memory() {
    waits_and_goes_on("raw+memory", PAGE_BYTES);
}

#[test]
fn compressed_pages_wait_for_memory() {
    waits_and_goes_on("lz4=1M+memory", PAGE_BYTES);
}

#[test]
fn fault_around_does_without_neighbours_when_there_is_no_memory_for_them() {
    waits_and_goes_on("raw+memory", 32 * PAGE_BYTES);
}

/// There is no memory for a thread to wait for memory either: the VMM is told all the same, whoever faults
/// sleeps, and the page comes when there is memory.
#[test]
fn without_a_worker_it_is_waited_for_too() {
    for markers in [false, true] {
        let Some(tmpfs) = Tmpfs::mount() else { return };
        let config = PagerConfig { markers, ..plain() };
        let store = testing::open("raw+memory").unwrap();
        let Some(machine) = Machine::with_store(tmpfs.ram(), config, store) else { return };
        machine.crew.refuse(true);
        let sleeper = Arc::<Sleeper>::default();
        for number in 0..MEMORY_PAGES {
            assert_eq!(
                machine.pager.fault(Gfn(number), 1, &sleeper.begin()).unwrap(),
                Fault::Hit(Hit::Zero)
            );
        }
        let waiter = sleeper.begin();
        let mut fault = machine.pager.fault(Gfn(100), 1, &waiter).unwrap();
        if matches!(fault, Fault::Hit(_)) {
            // It was one until it turned out that there is no memory.
            fault = machine.pager.fault(Gfn(100), 1, &waiter).unwrap();
        }
        assert!(matches!(fault, Fault::Waits { .. }), "{fault:?}");
        eventually("the VMM is told", || machine.pager.health().memory.is_some());
        let before = machine.stats().memory_waits;
        assert_eq!(sleeper.wait(Some(Duration::from_millis(300))), Woken::TimedOut);
        assert_eq!(machine.stats().memory_waits, before, "nobody can try");
        tmpfs.resize(PAGES);
        machine.crew.refuse(false);
        assert_eq!(sleeper.wait(None), Woken::Page(PageEnd::Ready));
        eventually("all is well", || machine.pager.health() == Health::default());
        assert_eq!(machine.pager.fault(Gfn(100), 1, &sleeper.begin()).unwrap(), Fault::Present);
        // What is still parked does not keep the pager.
        tmpfs.resize(MEMORY_PAGES + 1);
        machine.crew.refuse(true);
        let _waits = machine.pager.fault(Gfn(101), 1, &sleeper.begin()).unwrap();
    }
}

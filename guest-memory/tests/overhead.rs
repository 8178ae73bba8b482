//! The pager's own memory. The only test of its file: it measures the whole process.

mod common;

use common::{Machine, ram};
use guest_memory::{PAGE_BYTES, PagerConfig};

/// A line of /proc/self/status, in bytes.
fn status_bytes(key: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(key)).unwrap();
    let kib: u64 = line.trim_matches([':', '\t', ' ', 'k', 'B']).parse().unwrap();
    kib * 1024
}

/// What a guest of this size costs when it touches one page in every MiB of its first 128, and as
/// many are evicted.
fn cost(memory_bytes: u64) -> Option<u64> {
    let before = status_bytes("RssAnon");
    let config = PagerConfig { fault_around_bytes: PAGE_BYTES, ..PagerConfig::default() };
    let machine = Machine::start(ram(memory_bytes), config)?;
    let addresses = || (0..128).map(|mib| mib << 20);
    addresses().for_each(|gpa| machine.write(gpa, gpa));
    let gfns: Vec<_> = addresses().map(|gpa| guest_memory::Gpa(gpa).gfn()).collect();
    assert_eq!(machine.pager.evict(&gfns).unwrap(), 128);
    addresses().for_each(|gpa| assert_eq!(machine.read(gpa), gpa));
    let cost = status_bytes("RssAnon").saturating_sub(before);
    println!("{} MiB of guest RAM: {} KiB of our own", memory_bytes >> 20, cost >> 10);
    Some(cost)
}

#[test]
fn a_large_guest_costs_no_more_than_a_small_one() {
    // The first one also pays what the allocator and the first thread keep.
    let Some(_) = cost(128 << 20) else { return };
    // What the allocator gives back, and when, is its own affair: the least of three.
    let least = |bytes| (0..3).filter_map(|_| cost(bytes)).min().unwrap();
    let (small, large, huge) = (least(128 << 20), least(4 << 30), least(1 << 40));
    let margin = 64 << 10;
    assert!(large <= small + margin, "{large} bytes against {small}");
    assert!(huge <= small + margin, "{huge} bytes against {small}");
    assert!(small <= 1 << 20, "{small} bytes for a small guest");
}

//! What is present when, and how absent pages come: zero faults, loaded pages, fault-around.

mod common;

use std::time::Duration;

use common::{Crew, Machine, page, plain, ram};
use guest_memory::{Gfn, Gpa, PAGE_BYTES, PAGE_SIZE, PagerConfig, PagerError};
use vm_memory::{Bytes, GuestAddress};

const GIB: u64 = 1 << 30;

#[test]
fn nothing_is_present_at_the_start() {
    let Some(machine) = Machine::small(1024, "memory") else {
        return;
    };
    let stats = machine.stats();
    assert_eq!((stats.resident_bytes, stats.pages_touched), (0, 0));
    assert_eq!(stats.total_bytes, 1024 * PAGE_BYTES);
}

#[test]
fn an_untouched_page_is_zeros_and_one_fault() {
    let Some(machine) = Machine::small(16, "memory") else {
        return;
    };
    assert_eq!(machine.read(page(3) + 8), 0);
    machine.write(page(5), 7);
    assert_eq!(machine.read(page(5)), 7);
    let stats = machine.stats();
    assert_eq!((stats.messages_missing, stats.messages_minor), (2, 0));
    assert_eq!((stats.zero_faults, stats.fault_around_pages), (2, 0));
    assert_eq!((stats.pages_touched, stats.resident_bytes), (2, 2 * PAGE_BYTES));
}

#[test]
fn loaded_pages_are_mapped_before_the_guest_runs() {
    let mut ram = ram(64 * PAGE_BYTES);
    let bytes: Vec<u8> = (0..3 * PAGE_BYTES).map(|i| (i % 251) as u8).collect();
    let loader = ram.loader();
    loader.write_slice(&bytes, GuestAddress(page(10) + 100)).unwrap();
    loader.write_slice(&[9], GuestAddress(page(63) + 4095)).unwrap();
    let Some(machine) = Machine::start(ram, plain()) else {
        return;
    };
    for offset in (0..bytes.len() - 8).step_by(8) {
        let gpa = (page(10) + 100 + offset as u64).next_multiple_of(8);
        let at = (gpa - page(10) - 100) as usize;
        if at + 8 <= bytes.len() {
            let expected = u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
            assert_eq!(machine.read(gpa), expected);
        }
    }
    assert_eq!(machine.read(page(63) + 4088), 9 << 56);
    let stats = machine.stats();
    assert_eq!(stats.messages_missing + stats.messages_minor, 0);
    assert_eq!((stats.pages_loaded, stats.pages_touched), (5, 5));
}

#[test]
fn fault_around_installs_the_untouched_part_of_the_block() {
    // 40 pages: blocks of 16, the last one cut short; a loaded page splits the first one.
    let mut ram = ram(40 * PAGE_BYTES);
    ram.loader().write_slice(&[1], GuestAddress(page(9))).unwrap();
    let config = PagerConfig { fault_around_bytes: 16 * PAGE_BYTES, ..PagerConfig::default() };
    let Some(machine) = Machine::start(ram, config) else {
        return;
    };
    let touch = |number, zero_faults, around| {
        machine.write(page(number), number);
        let stats = machine.stats();
        assert_eq!((stats.zero_faults, stats.fault_around_pages), (zero_faults, around));
    };
    touch(5, 1, 8); // 0..9
    touch(0, 1, 8);
    touch(8, 1, 8);
    touch(10, 2, 13); // 10..16
    touch(37, 3, 20); // 32..40
    touch(20, 4, 35); // 16..32
    (0..40).for_each(|number| assert_ne!(machine.read(page(number)), u64::MAX));
    let stats = machine.stats();
    assert_eq!((stats.messages_missing, stats.messages_minor), (4, 0));
    assert_eq!((stats.pages_touched, stats.resident_bytes), (40, 40 * PAGE_BYTES));
}

#[test]
fn fault_around_brings_less_when_the_limit_is_near() {
    let config = PagerConfig {
        fault_around_bytes: 64 * PAGE_BYTES,
        resident_limit_bytes: Some(1024 * PAGE_BYTES),
        ..PagerConfig::default()
    };
    let Some(machine) = Machine::start(ram(4096 * PAGE_BYTES), config) else {
        return;
    };
    let touched = |number| {
        let before = machine.stats().pages_touched;
        machine.write(page(number), number);
        machine.stats().pages_touched - before
    };
    // Until less than a quarter of the limit is free.
    assert!((0..13).all(|block| touched(64 * block) == 64));
    assert_eq!((touched(13 * 64), touched(13 * 64 + 15), touched(13 * 64 + 16)), (16, 0, 16));
    // Pages go from here on; where the evictor keeps up, sixteen come with a fault.
    (864..4096).for_each(|number| machine.write(page(number), number));
    let stats = machine.stats();
    assert_eq!(stats.pages_touched, 4096);
    assert!(stats.zero_faults < 4096 - 864 + 15, "{} faults", stats.zero_faults);
    assert!(stats.resident_bytes <= 1024 * PAGE_BYTES, "{} bytes", stats.resident_bytes);
    assert!((864..4096).all(|number| machine.read(page(number)) == number));
}

#[test]
fn whoever_fills_page_tables_ahead_is_told_of_runs() {
    // 3 GiB and a little: the last block lies behind the hole.
    let mut ram = ram((3 << 30) + 16 * PAGE_BYTES);
    ram.loader().write_slice(&[1; 2 * PAGE_SIZE], GuestAddress(page(9))).unwrap();
    let (sender, told) = std::sync::mpsc::channel();
    ram.on_mapped(Box::new(move |gpa, bytes| {
        // The test may have ended.
        let _ = sender.send((gpa.0, bytes));
    }));
    let config = PagerConfig { fault_around_bytes: 16 * PAGE_BYTES, ..PagerConfig::default() };
    let Some(machine) = Machine::start(ram, config) else {
        return;
    };
    let next = || told.recv_timeout(Duration::from_secs(10)).unwrap();
    assert_eq!(next(), (page(9), 2 * PAGE_BYTES));
    machine.write(page(3), 1);
    assert_eq!(next(), (page(0), 9 * PAGE_BYTES));
    machine.write((4 << 30) + page(5), 1);
    assert_eq!(next(), (4 << 30, 16 * PAGE_BYTES));
    machine.stats();
    assert!(told.try_recv().is_err());
}

#[test]
fn populated_ram_has_no_faults() {
    let mut ram = ram(256 * PAGE_BYTES);
    ram.loader().write_slice(&[3], GuestAddress(page(100))).unwrap();
    let populate = PagerConfig { populate: true, ..plain() };
    let Some(machine) = Machine::start(ram, populate) else {
        return;
    };
    for number in 0..256 {
        assert_eq!(machine.read(page(number)), if number == 100 { 3 } else { 0 });
    }
    let stats = machine.stats();
    assert_eq!(stats.messages_missing + stats.messages_minor, 0);
    assert_eq!((stats.pages_touched, stats.pages_loaded), (256, 1));
    assert_eq!(stats.resident_bytes, stats.total_bytes);
}

#[test]
fn ram_goes_on_behind_the_hole() {
    let mut ram = ram(4 * GIB);
    let loader = ram.loader();
    loader.write_slice(&[1], GuestAddress(3 * GIB - 8)).unwrap();
    loader.write_slice(&[2], GuestAddress(4 * GIB)).unwrap();
    loader.write_slice(&[0], GuestAddress(3 * GIB)).unwrap_err();
    let config = PagerConfig { fault_around_bytes: 16 * PAGE_BYTES, ..PagerConfig::default() };
    let Some(machine) = Machine::start(ram, config) else {
        return;
    };
    assert_eq!((machine.read(3 * GIB - 8), machine.read(4 * GIB)), (1, 2));
    machine.write(5 * GIB - 8, 3);
    // The pages on both sides of the hole are neighbours in the file; fault-around keeps them apart.
    machine.write(4 * GIB + page(1), 4);
    let high = Gpa(5 * GIB - 8).gfn();
    assert_eq!(machine.pager.evict(&[high, Gpa(4 * GIB).gfn()]).unwrap(), 2);
    assert_eq!((machine.read(5 * GIB - 8), machine.read(4 * GIB)), (3, 2));
    let in_hole = machine.pager.evict(&[high, Gpa(3 * GIB).gfn()]).unwrap_err();
    assert!(matches!(in_hole, PagerError::OutOfRange(Gfn(0xc0000))));
    // 1 + 15 of the high end, 1 + 14 beside the loaded page, 2 loaded ones.
    assert_eq!(machine.stats().pages_touched, 33);
}

#[test]
fn a_page_that_the_host_unmapped_is_mapped_again() {
    let Some(machine) = Machine::small(4, "memory") else {
        return;
    };
    machine.write(page(1), 77);
    machine.reclaim_mapping(page(1));
    assert_eq!(machine.read(page(1)), 77);
    let stats = machine.stats();
    assert_eq!((stats.messages_minor, stats.remapped_pages), (1, 1));
    assert_eq!((stats.pages_touched, stats.zero_faults), (1, 1));
}

#[test]
fn a_fault_around_that_is_no_block_is_refused() {
    for bad in [0, 1, 2048, 12288, 4 << 20, u64::MAX] {
        let config = PagerConfig { fault_around_bytes: bad, ..plain() };
        let error = ram(PAGE_BYTES).start(&config, Crew::new()).unwrap_err();
        assert!(matches!(error, PagerError::FaultAround(n) if n == bad));
        assert!(error.to_string().contains(&bad.to_string()));
    }
}

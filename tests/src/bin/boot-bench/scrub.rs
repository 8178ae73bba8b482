//! Free memory in a known state before each boot.
//!
//! QEMU's TCG, which the emulated machine runs on, remembers what it translated from a page of that
//! machine's memory, and a later store into the page is slow until the translation has been found and
//! dropped. A guest that ended leaves such pages to the next one: whoever boots after a large guest
//! pays for it. Writing to all free memory beforehand pays that price outside of the measurement, for
//! every VMM alike. On hardware it does no harm.

use std::fs;

use anyhow::{Context, Result};

/// What is left alone, in bytes: the machine needs some of its free memory meanwhile.
const LEAVE_BYTES: usize = 192 << 20;
const PAGE_BYTES: usize = 4096;

/// Takes nearly all free memory, writes to every page of it, and gives it back.
pub(crate) fn free_memory() -> Result<()> {
    let bytes = free_bytes()?.saturating_sub(LEAVE_BYTES);
    let mut memory = vec![0_u8; bytes];
    for page in memory.chunks_mut(PAGE_BYTES) {
        page[0] = 1;
    }
    // Without it the writes have no use and may be left out.
    std::hint::black_box(&memory);
    Ok(())
}

/// `MemFree`: what a new process gets without anything being written or dropped.
fn free_bytes() -> Result<usize> {
    let meminfo = fs::read_to_string("/proc/meminfo").context("reading /proc/meminfo")?;
    let kib = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemFree:"))
        .and_then(|rest| rest.split_whitespace().next()?.parse::<usize>().ok())
        .context("MemFree in /proc/meminfo")?;
    Ok(kib << 10)
}

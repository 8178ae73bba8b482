//! What the boot loader says.
// Unsafe: it says it by physical addresses.
#![allow(unsafe_code)]

use core::ffi::CStr;
use core::sync::atomic::{AtomicU64, Ordering};

/// EAX at the entry.
const MAGIC: u32 = 0x2bad_b002;
const HAS_MEMORY: u32 = 1 << 0;
const HAS_COMMAND_LINE: u32 = 1 << 2;
/// Where the memory above it is counted from, in bytes.
const UPPER_MEMORY: u64 = 1 << 20;

/// The end of RAM below 4 GiB, in bytes.
static RAM_END: AtomicU64 = AtomicU64::new(0);

/// The end of RAM below 4 GiB, in bytes.
pub(crate) fn ram_end() -> u64 {
    RAM_END.load(Ordering::Relaxed)
}

/// Reads the Multiboot information: keeps the size of RAM, and returns the command line. `None` when
/// this is no Multiboot.
pub(crate) fn command_line(magic: u32, information: u32) -> Option<&'static str> {
    if magic != MAGIC {
        return None;
    }
    // SAFETY: Multiboot's EBX is the address of at least these fields (Specification 0.6.96, 3.3), which
    // is identity-mapped, and nobody writes there.
    let word = |index: usize| unsafe { *(information as usize as *const u32).add(index) };
    let flags = word(0);
    if flags & HAS_MEMORY != 0 {
        RAM_END.store(UPPER_MEMORY + (u64::from(word(2)) << 10), Ordering::Relaxed);
    }
    if flags & HAS_COMMAND_LINE == 0 {
        return Some("");
    }
    // SAFETY: the address of a string that ends with 0, likewise.
    unsafe { CStr::from_ptr(word(4) as usize as *const _) }.to_str().ok()
}

//! Page faults that are none: everything below 4 GiB is mapped for good, so a #PF there says that KVM
//! itself could not read a page table.

use core::sync::atomic::{AtomicU64, Ordering};

use crate::cpu;
use crate::interrupts::{self, Frame, Handled, PAGE_FAULT};
use crate::memory::{self, PAGE_BYTES};

/// All that is mapped, in bytes.
const MAPPED_BYTES: u64 = 4 << 30;
/// More than this without progress is a loop.
const MOST_IN_A_ROW: u64 = 16;

static COUNT: AtomicU64 = AtomicU64::new(0);
static IN_A_ROW: AtomicU64 = AtomicU64::new(0);

/// Counts false page faults from here on, and goes on after each as a kernel would that finds the page
/// mapped: it looks, and so has the processor bring the page tables in.
pub(super) fn begin() {
    COUNT.store(0, Ordering::SeqCst);
    progress();
    interrupts::set_hook(PAGE_FAULT, look);
}

/// The code got further.
pub(super) fn progress() {
    IN_A_ROW.store(0, Ordering::SeqCst);
}

/// How many there have been since [`begin`].
pub(super) fn end() -> u64 {
    interrupts::clear_hook(PAGE_FAULT);
    COUNT.load(Ordering::SeqCst)
}

fn look(_: &mut Frame) -> Handled {
    let address = cpu::cr2();
    let in_a_row = IN_A_ROW.fetch_add(1, Ordering::SeqCst);
    if address >= MAPPED_BYTES || in_a_row > MOST_IN_A_ROW {
        return Handled::No;
    }
    COUNT.fetch_add(1, Ordering::SeqCst);
    memory::words(address & !(PAGE_BYTES - 1))[0].load(Ordering::SeqCst);
    Handled::Yes
}

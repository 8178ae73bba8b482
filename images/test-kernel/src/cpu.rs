//! Instructions that have no name in Rust.
// Unsafe: inline assembly. Nothing here breaks memory safety: ports, control registers that are read, and
// instructions that wait.
#![allow(unsafe_code)]

use core::arch::asm;
use core::arch::x86_64::{__cpuid_count, _rdtsc, CpuidResult};

/// The most processors.
pub(crate) const MAX_CPUS: usize = 2;

/// The processor that runs this: 0 is the boot processor. From the task register.
pub(crate) fn number() -> usize {
    let selector: u16;
    // SAFETY: reads a register.
    unsafe { asm!("str {:x}", out(reg) selector, options(nomem, nostack, preserves_flags)) };
    crate::descriptors::cpu_of(selector)
}

/// CPUID.
pub(crate) fn cpuid(leaf: u32, subleaf: u32) -> CpuidResult {
    #[allow(unused_unsafe, reason = "safe in newer versions of core")]
    // SAFETY: every x86-64 processor has it.
    unsafe {
        __cpuid_count(leaf, subleaf)
    }
}

/// The time-stamp counter.
pub(crate) fn tsc() -> u64 {
    // SAFETY: every x86-64 processor has it.
    unsafe { _rdtsc() }
}

/// The address of the last page fault; in an async page fault, its token.
pub(crate) fn cr2() -> u64 {
    let value;
    // SAFETY: reads a register.
    unsafe { asm!("mov {}, cr2", out(reg) value, options(nomem, nostack, preserves_flags)) };
    value
}

/// Writes 8 bits to a port.
pub(crate) fn out8(port: u16, value: u8) {
    // SAFETY: no device here does anything to memory but the paging port, which takes 32 bits.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nostack, preserves_flags)) };
}

/// Writes 32 bits to a port.
pub(crate) fn out32(port: u16, value: u32) {
    // SAFETY: the paging port writes to the page that is named, which the caller gives away (evict.rs).
    unsafe {
        asm!("out dx, eax", in("dx") port, in("eax") value, options(nostack, preserves_flags));
    };
}

/// Reads 8 bits from a port.
pub(crate) fn in8(port: u16) -> u8 {
    let value;
    // SAFETY: changes no memory.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nostack, preserves_flags)) };
    value
}

/// Interrupts on, for a moment's work or for good.
pub(crate) fn interrupts_on() {
    // SAFETY: handlers save every register.
    unsafe { asm!("sti", options(nostack)) };
}

/// Interrupts off.
pub(crate) fn interrupts_off() {
    // SAFETY: as above.
    unsafe { asm!("cli", options(nostack)) };
}

/// Interrupts on, waits for one, and off again: `sti; hlt; cli`.
pub(crate) fn wait_for_interrupt() {
    // SAFETY: as above. The shadow of STI leaves no room between the two.
    unsafe { asm!("sti", "hlt", "cli", options(nostack)) };
}

/// Waits, with interrupts as they are.
pub(crate) fn halt() {
    // SAFETY: waits.
    unsafe { asm!("hlt", options(nostack, preserves_flags)) };
}

/// Lets the other hyperthread run.
pub(crate) fn relax() {
    core::hint::spin_loop();
}

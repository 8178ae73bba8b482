//! Instructions that KVM emulates, each right behind the request that evicts what it needs: nothing is
//! executed in between, so nothing is brought in by chance.
// Unsafe: string instructions in inline assembly.
#![allow(unsafe_code)]

use core::arch::asm;

use nowait_wire::paging::PORT;

use crate::boot;
use crate::memory::{PAGE_BYTES, Pages};

/// What is evicted before an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Evicted {
    /// Nothing: the instruction alone.
    Nothing,
    /// The pages of its operand in RAM.
    Operand,
    /// The last page table on the way to its operand in RAM.
    Table,
    /// Both.
    OperandAndTable,
    /// The kernel with its code and all page tables, and the operand's pages.
    Everything,
}

impl Evicted {
    pub(super) const ALL: [Self; 5] =
        [Self::Nothing, Self::Operand, Self::Table, Self::OperandAndTable, Self::Everything];

    /// The frames to evict, for an operand on these pages.
    pub(super) fn frames(self, operand: Pages) -> impl Iterator<Item = u64> {
        let table = boot::tables_of(operand.address(0))[3];
        let (operand_too, table_too, kernel_too) = match self {
            Self::Nothing => (false, false, false),
            Self::Operand => (true, false, false),
            Self::Table => (false, true, false),
            Self::OperandAndTable => (true, true, false),
            Self::Everything => (true, false, true),
        };
        // The table is part of the kernel.
        operand
            .frames()
            .filter(move |_| operand_too)
            .chain(core::iter::once(table).filter(move |_| table_too))
            .chain(boot::kernel_frames().filter(move |_| kernel_too))
    }
}

/// Two pages in a 2 MiB block of their own, whose table leads nowhere else. The operand crosses from one
/// to the other.
pub(super) const OPERANDS: [Pages; 2] = [Pages::new(3 * 512, 2), Pages::new(5 * 512, 2)];

/// Where an operand of this many bytes begins.
pub(super) fn operand(pages: Pages, bytes: u64) -> u64 {
    pages.address(0) + PAGE_BYTES - bytes / 2
}

/// `OUT` of a paging request, then `REP OUTSB`.
pub(super) fn rep_outsb(request: u32, port: u16, from: u64, count: u64) {
    // SAFETY: reads `count` bytes at `from`, which is mapped; the request names pages that come back.
    unsafe {
        asm!("out dx, eax", "mov edx, {port:e}", "rep outsb", port = in(reg) u32::from(port),
            inout("edx") u32::from(PORT) => _, in("eax") request, inout("rsi") from => _,
            inout("rcx") count => _, options(nostack));
    }
}

/// `OUT` of a paging request, then `REP INSB`.
pub(super) fn rep_insb(request: u32, port: u16, to: u64, count: u64) {
    // SAFETY: writes `count` bytes at `to`, which are a test's; otherwise as above.
    unsafe {
        asm!("out dx, eax", "mov edx, {port:e}", "rep insb", port = in(reg) u32::from(port),
            inout("edx") u32::from(PORT) => _, in("eax") request, inout("rdi") to => _,
            inout("rcx") count => _, options(nostack));
    }
}

/// `OUT` of a paging request, then one `MOVSD`.
pub(super) fn movsd(request: u32, from: u64, to: u64) {
    // SAFETY: 4 bytes from a mapped address to one that is a test's or a device's; otherwise as above.
    unsafe {
        asm!("out dx, eax", "movsd", in("edx") u32::from(PORT), in("eax") request,
            inout("rsi") from => _, inout("rdi") to => _, options(nostack));
    }
}

/// `OUT` of a paging request, then a load of 4 bytes.
pub(super) fn load(request: u32, from: u64) -> u32 {
    let value;
    // SAFETY: as above.
    unsafe {
        asm!("out dx, eax", "mov {value:e}, [{from}]", in("edx") u32::from(PORT), in("eax") request,
            from = in(reg) from, value = out(reg) value, options(nostack));
    }
    value
}

/// `OUT` of a paging request, then a `PUSH` of 8 bytes from this address onto a stack at `stack`.
pub(super) fn push(request: u32, from: u64, stack: u64) {
    // SAFETY: interrupts are off, and exceptions have stacks of their own, so that the stack pointer may
    // be anything for two instructions; 8 bytes below `stack` are a test's.
    unsafe {
        asm!("xchg rsp, {stack}", "out dx, eax", "push qword ptr [{from}]", "mov rsp, {stack}",
            in("edx") u32::from(PORT), in("eax") request, from = in(reg) from,
            stack = inout(reg) stack => _);
    }
}

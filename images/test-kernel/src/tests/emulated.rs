//! Instructions that KVM emulates, each right behind the request that evicts what it needs: nothing is
//! executed in between, so nothing is brought in by chance.
// Unsafe: string instructions in inline assembly.
#![allow(unsafe_code)]

use core::arch::asm;
use core::sync::atomic::Ordering;

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

/// Code for each of the operands, in a block of its own too.
pub(super) const SITES: [Pages; 2] = [Pages::new(6 * 512, 1), Pages::new(7 * 512, 1)];

/// `OUT DX, EAX; MOV EDX, R8D; REP OUTSB; RET`, with 0 behind it.
pub(super) const REP_OUTSB: u64 = u64::from_le_bytes([0xef, 0x44, 0x89, 0xc2, 0xf3, 0x6e, 0xc3, 0]);
/// The same with `REP INSB`.
pub(super) const REP_INSB: u64 = u64::from_le_bytes([0xef, 0x44, 0x89, 0xc2, 0xf3, 0x6c, 0xc3, 0]);

/// Puts the code of a string instruction there, which has the paging request in front of it.
pub(super) fn write_code(site: Pages, code: u64) {
    site.words(0)[0].store(code, Ordering::SeqCst);
}

/// Runs it: `OUT` of a paging request, then the string instruction from or to `operand`.
pub(super) fn run_code(site: Pages, request: u32, port: u16, operand: u64, count: u64) {
    // SAFETY: one of the two codes above; it reads or writes `count` bytes of a test's pages, and the
    // request names pages that come back.
    unsafe {
        asm!("call {site}", site = in(reg) site.address(0), in("edx") u32::from(PORT),
            in("eax") request, in("r8d") u32::from(port), inout("rsi") operand => _,
            inout("rdi") operand => _, inout("rcx") count => _, lateout("rdx") _);
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

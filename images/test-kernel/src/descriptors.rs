//! Segments and task states: one GDT for all processors, one TSS with its stacks for each.
// Unsafe: loading descriptor tables, and a pointer shared with the boot code.
#![allow(unsafe_code)]

use core::arch::asm;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::boot::Stack;
use crate::cpu::MAX_CPUS;

/// 64-bit code of ring 0.
pub(crate) const KERNEL_CODE: u16 = 0x08;
/// Data and stack of ring 3, with its privilege level.
pub(crate) const USER_DATA: u16 = 0x18 | 3;
/// 64-bit code of ring 3, with its privilege level.
pub(crate) const USER_CODE: u16 = 0x20 | 3;
/// The first processor's TSS; each takes two entries.
pub(crate) const TSS: u16 = 0x28;
/// The bytes of a TSS's descriptor.
pub(crate) const TSS_DESCRIPTOR_BYTES: u16 = 16;

const ENTRIES: usize = 10;
/// As LGDT wants it.
pub(crate) const GDT_LIMIT: u16 = (ENTRIES * 8 - 1) as u16;

/// The descriptors.
#[repr(C, align(16))]
pub(crate) struct Gdt([AtomicU64; ENTRIES]);

/// 0x48 is 32-bit code, for processors on their way up.
pub(crate) static GDT: Gdt = Gdt([
    AtomicU64::new(0),
    AtomicU64::new(0x00af_9b00_0000_ffff), // 0x08: 64-bit code
    AtomicU64::new(0x00cf_9300_0000_ffff), // 0x10: data
    AtomicU64::new(0x00cf_f300_0000_ffff), // 0x18: data of ring 3
    AtomicU64::new(0x00af_fb00_0000_ffff), // 0x20: 64-bit code of ring 3
    AtomicU64::new(0),                     // 0x28: TSS of processor 0
    AtomicU64::new(0),
    AtomicU64::new(0), // 0x38: TSS of processor 1
    AtomicU64::new(0),
    AtomicU64::new(0x00cf_9b00_0000_ffff), // 0x48: 32-bit code
]);

/// What LGDT and LIDT read. In 32-bit mode the upper half of the address is not looked at.
#[repr(C, packed)]
pub(crate) struct Pointer<T: 'static> {
    pub(crate) limit: u16,
    pub(crate) base: &'static T,
}

/// The GDT's.
pub(crate) static GDT_POINTER: Pointer<Gdt> = Pointer { limit: GDT_LIMIT, base: &GDT };

/// Exceptions and interrupts run on stacks of their own, since code of ring 0 may use the 128 bytes
/// below its stack pointer. Each kind has one, so that they nest; a kind does not nest with itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum IstStack {
    /// #PF, and async page faults with it.
    PageFault = 1,
    /// #GP.
    Protection = 2,
    /// Vectors from 32 on.
    Interrupt = 3,
    /// Everything else.
    Other = 4,
}

const IST_STACKS: usize = 4;

/// One processor's TSS and stacks.
#[repr(C, align(4096))]
struct Task {
    segment: [AtomicU32; 26],
    ring0: Stack,
    ist: [Stack; IST_STACKS],
}

static TASKS: [Task; MAX_CPUS] = [const {
    Task {
        segment: [const { AtomicU32::new(0) }; 26],
        ring0: Stack::new(),
        ist: [const { Stack::new() }; IST_STACKS],
    }
}; MAX_CPUS];

/// In words of 32 bits: RSP0, IST1, the I/O permission bitmap's offset (Intel SDM 3A, 8.7).
const RSP0: usize = 1;
const IST1: usize = 9;
const IO_MAP: usize = 25;

/// The processor with this task register.
pub(crate) fn cpu_of(selector: u16) -> usize {
    usize::from(selector.saturating_sub(TSS) / TSS_DESCRIPTOR_BYTES)
}

/// Makes processor `cpu`'s TSS and loads it.
pub(crate) fn load(cpu: usize) {
    let task = &TASKS[cpu];
    let limit = size_of_val(&task.segment) as u64 - 1;
    let put = |word: usize, value: u64| {
        task.segment[word].store(value as u32, Ordering::Relaxed);
        task.segment[word + 1].store((value >> 32) as u32, Ordering::Relaxed);
    };
    put(RSP0, task.ring0.top());
    for (number, stack) in task.ist.iter().enumerate() {
        put(IST1 + 2 * number, stack.top());
    }
    // Behind the limit: no port is allowed.
    task.segment[IO_MAP].store((limit as u32 + 1) << 16, Ordering::Relaxed);
    let base = (&raw const task.segment) as u64;
    let descriptor = limit | (base & 0xff_ffff) << 16 | 0x89 << 40 | (base >> 24 & 0xff) << 56;
    let selector = TSS + cpu as u16 * TSS_DESCRIPTOR_BYTES;
    GDT.0[usize::from(selector) / 8].store(descriptor, Ordering::SeqCst);
    GDT.0[usize::from(selector) / 8 + 1].store(base >> 32, Ordering::SeqCst);
    // SAFETY: the descriptor was just made, and is available; its stacks are nobody else's.
    unsafe { asm!("ltr {:x}", in(reg) selector, options(nostack, preserves_flags)) };
}

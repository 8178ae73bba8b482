//! The registers with which the boot processor enters the kernel.

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::layout::{GDT, PAGE_TABLES};
use super::{BootError, Entry};

const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Bit 1 of RFLAGS is always set; interrupts are off.
const RFLAGS_RESERVED: u64 = 1 << 1;

/// Flat 4 GiB descriptors at the selectors that the 64-bit boot protocol asks for
/// (`__BOOT_CS` 0x10 and `__BOOT_DS` 0x18), and a TSS behind them.
const GDT_ENTRIES: [u64; 5] = [
    0,
    0,
    0x00af_9b00_0000_ffff, // 0x10: 64-bit code, present, accessed
    0x00cf_9300_0000_ffff, // 0x18: data, writable, present, accessed
    0x008f_8b00_0000_ffff, // 0x20: busy TSS
];
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TSS_SELECTOR: u16 = 0x20;

const TYPE_CODE_READ_ACCESSED: u8 = 0xb;
const TYPE_DATA_WRITE_ACCESSED: u8 = 0x3;
const TYPE_TSS_BUSY: u8 = 0xb;

/// Writes the boot GDT to guest memory.
///
/// # Errors
/// When guest memory ends below it.
pub fn write_gdt(memory: &GuestMemoryMmap) -> Result<(), BootError> {
    let bytes: Vec<u8> = GDT_ENTRIES.iter().flat_map(|entry| entry.to_le_bytes()).collect();
    memory.write_slice(&bytes, GuestAddress(GDT)).map_err(BootError::tables)
}

/// The general registers at the kernel's entry.
#[must_use]
pub fn general(entry: Entry) -> kvm_regs {
    let regs = kvm_regs { rflags: RFLAGS_RESERVED, ..kvm_regs::default() };
    match entry {
        Entry::Protected32 { rip, rax, rbx } => kvm_regs { rip, rax, rbx, ..regs },
        Entry::Long64 { rip, rsi } => kvm_regs { rip, rsi, ..regs },
    }
}

/// Changes the special registers of a vCPU after reset to those at the kernel's entry.
pub fn special(entry: Entry, sregs: &mut kvm_sregs) {
    let long = matches!(entry, Entry::Long64 { .. });
    let flat = |selector, type_| kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        s: 1,
        g: 1,
        db: 1,
        ..kvm_segment::default()
    };
    let data = flat(DATA_SELECTOR, TYPE_DATA_WRITE_ACCESSED);
    sregs.cs = flat(CODE_SELECTOR, TYPE_CODE_READ_ACCESSED);
    if long {
        (sregs.cs.l, sregs.cs.db) = (1, 0);
    }
    (sregs.ds, sregs.es, sregs.fs) = (data, data, data);
    (sregs.gs, sregs.ss) = (data, data);
    sregs.tr = kvm_segment {
        limit: 0x67,
        selector: TSS_SELECTOR,
        type_: TYPE_TSS_BUSY,
        present: 1,
        ..kvm_segment::default()
    };
    let limit = (size_of_val(&GDT_ENTRIES) - 1) as u16;
    sregs.gdt = kvm_dtable { base: GDT, limit, ..kvm_dtable::default() };
    sregs.idt = kvm_dtable::default();
    sregs.cr0 = CR0_PE | CR0_ET;
    sregs.cr4 = 0;
    if long {
        sregs.cr3 = PAGE_TABLES;
        sregs.cr4 = CR4_PAE;
        sregs.cr0 |= CR0_PG;
        sregs.efer |= EFER_LME | EFER_LMA;
    }
}

//! The probe guest itself: its code, its tables, and where they lie in its memory.
//!
//! ```text
//! gpa  0x1000    0x2000  0x3000  0x4000  0x5000  0x6000  0x7000..0x8000  0xf000
//!      programs  PML4    PDPT    PD      GDT     IDT     stack           the marked page
//! ```
//!
//! One 2 MiB page maps gva = gpa. Vectors without a gate end in a triple fault, which is what an
//! unexpected exception should do here.

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};

/// Guest RAM in bytes: 16 pages.
pub(super) const RAM_BYTES: usize = 0x1_0000;
/// The page whose host mapping carries the marker: the last one, which nothing else uses.
pub(super) const MARKED_PAGE: usize = 0xf000;
/// The port that the guest reports on: 0x80, where firmware writes its POST codes.
pub(super) const PORT: u16 = 0x80;
/// What the guest writes first.
pub(super) const OUT_STARTED: u8 = 1;
/// What its breakpoint handler writes.
pub(super) const OUT_IN_HANDLER: u8 = 2;
/// What it writes after the handler returned.
pub(super) const OUT_RETURNED: u8 = 3;
/// What lies in the first byte of the marked page once it is served.
pub(super) const MARKED_BYTE: u8 = 0x5a;

/// Where the first steps begin.
pub(super) const START: u64 = 0x1000;
/// Where the step with the marker begins.
pub(super) const READ_START: u64 = 0x1400;
/// Where a loop of port writes begins.
pub(super) const LOOP_START: u64 = 0x1600;
const HANDLER: u64 = 0x1800;
const PML4: u64 = 0x2000;
const PDPT: u64 = 0x3000;
const PD: u64 = 0x4000;
const GDT: u64 = 0x5000;
const IDT: u64 = 0x6000;
const STACK_TOP: u64 = 0x8000;

/// At [`START`]. `OUT imm8, AL` keeps the port inside the instruction.
#[rustfmt::skip]
const PROGRAM: &[u8] = &[
    0xb0, OUT_STARTED,              // mov al, 1
    0xe6, PORT as u8,               // out 0x80, al
    0xcc,                           // int3                  -> BREAKPOINT_HANDLER
    0xb0, OUT_RETURNED,             // mov al, 3
    0xe6, PORT as u8,               // out 0x80, al
    0xf4,                           // hlt
];

/// At [`READ_START`]: reads the marked page.
#[rustfmt::skip]
const READ_PROGRAM: &[u8] = &[
    0x8a, 0x04, 0x25,               // mov al, [MARKED_PAGE] disp32, no base, no index
        0x00, 0xf0, 0x00, 0x00,
    0xe6, PORT as u8,               // out 0x80, al
    0xf4,                           // hlt
];

/// At [`LOOP_START`]: exits, for ever.
#[rustfmt::skip]
const LOOP_PROGRAM: &[u8] = &[
    0xe6, PORT as u8,               // out 0x80, al
    0xeb, 0xfc,                     // jmp back
];

/// What vector 3 does. #BP is a trap: the return address is the instruction behind INT3.
#[rustfmt::skip]
const BREAKPOINT_HANDLER: &[u8] = &[
    0xb0, OUT_IN_HANDLER,           // mov al, 2
    0xe6, PORT as u8,               // out 0x80, al
    0x48, 0xcf,                     // iretq
];

const CODE_SELECTOR: u16 = 0x08;
const DATA_SELECTOR: u16 = 0x10;
/// Flat descriptors, DPL 0, accessed: 64-bit code (L), read/write data (B).
const GDT_ENTRIES: [u64; 3] = [0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

/// Page table bits: present, writable; and a 2 MiB page in the PD.
const PRESENT_WRITABLE: u64 = 0x3;
const LARGE_PAGE: u64 = 0x80;

const BREAKPOINT_VECTOR: u64 = 3;
/// Bytes 4 and 5 of a gate: present, DPL 0, 64-bit interrupt gate; no IST.
const INTERRUPT_GATE: u64 = 0x8e00;
const GATE_BYTES: u64 = 16;

/// The contents of guest RAM at the start: (gpa, bytes). The rest is zero.
pub(super) fn image() -> Vec<(usize, Vec<u8>)> {
    let gate_low = (HANDLER & 0xffff)
        | u64::from(CODE_SELECTOR) << 16
        | INTERRUPT_GATE << 32
        | (HANDLER >> 16 & 0xffff) << 48;
    vec![
        (START as usize, PROGRAM.to_vec()),
        (READ_START as usize, READ_PROGRAM.to_vec()),
        (LOOP_START as usize, LOOP_PROGRAM.to_vec()),
        (HANDLER as usize, BREAKPOINT_HANDLER.to_vec()),
        (PML4 as usize, words(&[PDPT | PRESENT_WRITABLE])),
        (PDPT as usize, words(&[PD | PRESENT_WRITABLE])),
        (PD as usize, words(&[LARGE_PAGE | PRESENT_WRITABLE])),
        (GDT as usize, words(&GDT_ENTRIES)),
        ((IDT + BREAKPOINT_VECTOR * GATE_BYTES) as usize, words(&[gate_low, HANDLER >> 32])),
    ]
}

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// The registers to start with: at `rip`, interrupts off.
pub(super) fn regs(rip: u64) -> kvm_regs {
    kvm_regs { rip, rsp: STACK_TOP, rflags: 0x2, ..Default::default() }
}

/// Puts the vCPU straight into 64-bit mode: `sregs` as KVM gave them, with segments, tables and
/// control registers replaced (Intel SDM volume 3, 11.8.5, the state at the end of it).
pub(super) fn set_long_mode(sregs: &mut kvm_sregs) {
    const CR0_PE_ET_NE_PG: u64 = 1 | 1 << 4 | 1 << 5 | 1 << 31;
    const CR4_PAE: u64 = 1 << 5;
    const EFER_LME_LMA: u64 = 1 << 8 | 1 << 10;

    let data = kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: DATA_SELECTOR,
        type_: 3,
        present: 1,
        dpl: 0,
        db: 1,
        s: 1,
        l: 0,
        g: 1,
        ..Default::default()
    };
    sregs.cs = kvm_segment { selector: CODE_SELECTOR, type_: 11, db: 0, l: 1, ..data };
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    // VMX refuses to enter without a busy 64-bit TSS; nothing reads it, as no gate changes stacks.
    sregs.tr = kvm_segment { selector: 0, type_: 11, s: 0, g: 0, db: 0, limit: 0x67, ..data };
    let gdt_limit = size_of_val(&GDT_ENTRIES) as u16 - 1;
    sregs.gdt = kvm_dtable { base: GDT, limit: gdt_limit, ..Default::default() };
    let idt_limit = ((BREAKPOINT_VECTOR + 1) * GATE_BYTES) as u16 - 1;
    sregs.idt = kvm_dtable { base: IDT, limit: idt_limit, ..Default::default() };
    sregs.cr3 = PML4;
    sregs.cr4 = CR4_PAE;
    sregs.cr0 = CR0_PE_ET_NE_PG;
    sregs.efer = EFER_LME_LMA;
}

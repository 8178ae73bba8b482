//! From the boot loader's 32-bit protected mode, or a SIPI's real mode, to 64-bit code.
//!
//! ```text
//!   multiboot_entry -> page tables -> enter_long -> kernel_main (boot stack)
//!   trampoline (real mode, copied below 1 MiB) -> enter_long -> ap_main (AP stack)
//! ```
//!
//! The identity map covers 4 GiB for both privilege levels: the first 32 MiB in 4 KiB pages, whose tables
//! can be evicted one by one, the rest in 2 MiB pages.
// Unsafe: assembly that runs before there is any Rust, and pages shared with it.
#![allow(unsafe_code)]

use core::sync::atomic::AtomicU64;

use crate::memory::PAGE_BYTES;

/// One page table of any level.
#[repr(C, align(4096))]
pub(crate) struct Table(pub(crate) [AtomicU64; 512]);

impl Table {
    const fn new() -> Self {
        Self([const { AtomicU64::new(0) }; 512])
    }
}

/// Tables with entries for 4 KiB pages.
const SMALL_TABLES: usize = 16;
/// Addresses below this are mapped by 4 KiB pages, in bytes.
pub(crate) const SMALL_PAGES_END: u64 = (SMALL_TABLES as u64) << 21;

static PML4: Table = Table::new();
static PDPT: Table = Table::new();
static DIRECTORIES: [Table; 4] = [const { Table::new() }; 4];
static SMALL: [Table; SMALL_TABLES] = [const { Table::new() }; SMALL_TABLES];

/// A stack.
#[repr(C, align(4096))]
pub(crate) struct Stack([AtomicU64; Self::BYTES / 8]);

impl Stack {
    const BYTES: usize = 64 << 10;

    pub(crate) const fn new() -> Self {
        Self([const { AtomicU64::new(0) }; Self::BYTES / 8])
    }

    /// The address that the stack grows down from.
    pub(crate) fn top(&self) -> u64 {
        (&raw const *self) as u64 + Self::BYTES as u64
    }
}

static BOOT_STACK: Stack = Stack::new();
static AP_STACK: Stack = Stack::new();

/// The frames of the page tables that translate this address, the root first.
pub(crate) fn tables_of(address: u64) -> [u64; 4] {
    let frame = |table: &Table| (&raw const *table) as u64 / PAGE_BYTES;
    [
        frame(&PML4),
        frame(&PDPT),
        frame(&DIRECTORIES[(address >> 30) as usize & 3]),
        frame(&SMALL[(address >> 21) as usize % SMALL_TABLES]),
    ]
}

/// The frames of the kernel: its code, data, stacks and page tables.
pub(crate) fn kernel_frames() -> core::ops::Range<u64> {
    let (start, end) = image::bounds();
    start / PAGE_BYTES..end / PAGE_BYTES
}

/// The code that a processor runs after its SIPI, to be copied below 1 MiB.
pub(crate) fn trampoline() -> &'static [u8] {
    image::trampoline()
}

#[cfg(panic = "abort")]
mod image {
    //! What the linker script and the assembly name.

    unsafe extern "C" {
        static kernel_start: u8;
        static kernel_end: u8;
        static trampoline_start: u8;
        static trampoline_end: u8;
    }

    pub(super) fn bounds() -> (u64, u64) {
        ((&raw const kernel_start) as u64, (&raw const kernel_end) as u64)
    }

    pub(super) fn trampoline() -> &'static [u8] {
        let (start, end) = (&raw const trampoline_start, &raw const trampoline_end);
        // SAFETY: both labels stand in this order in .text, which is mapped and never written.
        unsafe { core::slice::from_raw_parts(start, end as usize - start as usize) }
    }
}

#[cfg(not(panic = "abort"))]
pub(crate) use image::NAMED;

#[cfg(not(panic = "abort"))]
mod image {
    //! An ordinary program has none of it.

    use super::{AP_STACK, BOOT_STACK, Stack};
    use crate::descriptors::{GDT_POINTER, Gdt, Pointer};

    type Entries = (extern "C" fn(u32, u32) -> !, extern "C" fn() -> !);

    /// What the assembly names: so that it counts as used.
    pub(crate) static NAMED: (Entries, [&Stack; 2], &Pointer<Gdt>) =
        ((crate::kernel_main, crate::smp::ap_main), [&BOOT_STACK, &AP_STACK], &GDT_POINTER);

    pub(super) fn bounds() -> (u64, u64) {
        (0, 0)
    }

    pub(super) fn trampoline() -> &'static [u8] {
        &[]
    }
}

#[cfg(panic = "abort")]
core::arch::global_asm!(
    r#"
    .section .multiboot, "a"
    .balign 4
    .long 0x1badb002, 3, -(0x1badb002 + 3)

    .section .text.boot, "ax"
    .code32
    .global multiboot_entry
multiboot_entry:
    cli
    cld
    lea esp, [{boot_stack} + {stack_bytes}]
    mov edi, eax
    mov esi, ebx

    // 4 KiB pages: present, writable, for user mode too.
    xor ecx, ecx
2:  mov eax, ecx
    shl eax, 12
    or eax, 7
    mov [{small} + ecx * 8], eax
    inc ecx
    cmp ecx, {small_tables} * 512
    jne 2b
    // 2 MiB pages.
    xor ecx, ecx
2:  mov eax, ecx
    shl eax, 21
    or eax, 0x87
    mov [{directories} + ecx * 8], eax
    inc ecx
    cmp ecx, 4 * 512
    jne 2b
    // The first of them by 4 KiB pages.
    xor ecx, ecx
2:  mov eax, ecx
    shl eax, 12
    add eax, offset {small} + 7
    mov [{directories} + ecx * 8], eax
    inc ecx
    cmp ecx, {small_tables}
    jne 2b
    xor ecx, ecx
2:  mov eax, ecx
    shl eax, 12
    add eax, offset {directories} + 7
    mov [{pdpt} + ecx * 8], eax
    inc ecx
    cmp ecx, 4
    jne 2b
    mov eax, offset {pdpt} + 7
    mov [{pml4}], eax

    lgdt [{gdt_pointer}]
    mov ebp, offset boot_long

    // To 64-bit code at EBP, with the stack in ESP. EDI and ESI are kept.
enter_long:
    mov eax, 0x620           // CR4: PAE, OSFXSR, OSXMMEXCPT
    mov cr4, eax
    mov eax, offset {pml4}
    mov cr3, eax
    mov ecx, 0xc0000080      // EFER: LME
    rdmsr
    or eax, 0x100
    wrmsr
    mov eax, 0x80010033      // CR0: PG, WP, NE, ET, MP, PE
    mov cr0, eax
    push 0x08
    push ebp
    retf

    .code64
boot_long:
    mov eax, 0x10
    mov ds, eax
    mov es, eax
    mov ss, eax
    xor ebp, ebp
    call {kernel_main}
    ud2

ap_long:
    mov eax, 0x10
    mov ds, eax
    mov es, eax
    mov ss, eax
    xor ebp, ebp
    call {ap_main}
    ud2

    .code32
ap_protected:
    mov eax, 0x10
    mov ds, eax
    mov es, eax
    mov ss, eax
    lea esp, [{ap_stack} + {stack_bytes}]
    mov ebp, offset ap_long
    jmp enter_long

    .code16
    .global trampoline_start
trampoline_start:
    jmp 2f
    .org trampoline_start + 8
    .word {gdt_limit}
    .long {gdt}
2:  cli
    cld
    mov ax, cs
    mov ds, ax
    .byte 0x66               // lgdt with a 32-bit base
    lgdt [8]
    mov eax, cr0
    or eax, 1
    mov cr0, eax
    .byte 0x66, 0xea         // jmp 0x48:ap_protected
    .long ap_protected
    .word 0x48
    .global trampoline_end
trampoline_end:
    .code64
    "#,
    boot_stack = sym BOOT_STACK,
    ap_stack = sym AP_STACK,
    stack_bytes = const Stack::BYTES,
    small = sym SMALL,
    small_tables = const SMALL_TABLES,
    directories = sym DIRECTORIES,
    pdpt = sym PDPT,
    pml4 = sym PML4,
    gdt_pointer = sym crate::descriptors::GDT_POINTER,
    gdt = sym crate::descriptors::GDT,
    gdt_limit = const crate::descriptors::GDT_LIMIT,
    kernel_main = sym crate::kernel_main,
    ap_main = sym crate::smp::ap_main,
);

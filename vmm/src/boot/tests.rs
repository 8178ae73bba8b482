//! Kernels of all kinds, good and bad, made up byte by byte, and where they end up in memory.

use std::io::Write;

use guest_memory::RamLayout;
use proptest::prelude::*;
use tempfile::NamedTempFile;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::detect::{Format, Kernel, KernelError};
use super::*;

const MIB: u64 = 1 << 20;

fn file(bytes: &[u8]) -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    file
}

fn open(bytes: &[u8]) -> Result<Kernel, KernelError> {
    Kernel::open(file(bytes).path())
}

/// An ELF with one PT_LOAD segment of these bytes, and a PVH note if there is an entry.
struct Elf {
    class: u8,
    machine: u16,
    address: u64,
    memory_bytes: u64,
    code: Vec<u8>,
    pvh_entry: Option<u32>,
}

impl Elf {
    fn pvh() -> Self {
        Self {
            class: 2,
            machine: 62,
            address: MIB,
            memory_bytes: 8192,
            code: vec![0xf4; 4096],
            pvh_entry: Some(0x10_0000),
        }
    }

    fn multiboot() -> Self {
        let header = [0x1bad_b002u32, 0, 0u32.wrapping_sub(0x1bad_b002)];
        let mut code: Vec<u8> = header.iter().flat_map(|word| word.to_le_bytes()).collect();
        code.resize(64, 0xf4);
        Self { class: 1, machine: 3, code, memory_bytes: 64, pvh_entry: None, ..Self::pvh() }
    }

    fn build(&self) -> Vec<u8> {
        let wide = self.class == 2;
        let header_bytes: u64 = if wide { 64 } else { 52 };
        let program_header_bytes: u64 = if wide { 56 } else { 32 };
        let count = 1 + u64::from(self.pvh_entry.is_some());
        let note_at = header_bytes + count * program_header_bytes;
        let mut note = Vec::new();
        if let Some(entry) = self.pvh_entry {
            for word in [4u32, 4, 18, u32::from_le_bytes(*b"Xen\0"), entry] {
                note.extend(word.to_le_bytes());
            }
        }
        let code_at = note_at + note.len() as u64;
        let mut out = vec![0x7f, b'E', b'L', b'F', self.class, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        let word = |out: &mut Vec<u8>, value: u64| {
            out.extend_from_slice(&value.to_le_bytes()[..if wide { 8 } else { 4 }]);
        };
        out.extend(2u16.to_le_bytes());
        out.extend(self.machine.to_le_bytes());
        out.extend(1u32.to_le_bytes());
        for value in [self.address, header_bytes, 0] {
            word(&mut out, value);
        }
        out.extend(0u32.to_le_bytes());
        for value in [header_bytes, program_header_bytes, count, 0, 0, 0] {
            out.extend((value as u16).to_le_bytes());
        }
        let segment =
            |out: &mut Vec<u8>, kind: u32, offset: u64, address: u64, file: u64, memory: u64| {
                out.extend(kind.to_le_bytes());
                if wide {
                    out.extend(7u32.to_le_bytes());
                }
                for value in [offset, address, address, file, memory] {
                    word(out, value);
                }
                if !wide {
                    out.extend(7u32.to_le_bytes());
                }
                word(out, 4);
            };
        let length = self.code.len() as u64;
        segment(&mut out, 1, code_at, self.address, length, self.memory_bytes);
        if self.pvh_entry.is_some() {
            segment(&mut out, 4, note_at, 0, note.len() as u64, note.len() as u64);
        }
        out.extend(note);
        out.extend(&self.code);
        out
    }
}

fn bzimage() -> Vec<u8> {
    let mut image = vec![0; 0x400 + 8192];
    image[0x1f1] = 1; // setup sectors
    image[0x202..0x206].copy_from_slice(b"HdrS");
    image[0x206..0x208].copy_from_slice(&0x020fu16.to_le_bytes());
    image[0x211] = 1; // LOADED_HIGH
    image[0x214..0x218].copy_from_slice(&0x10_0000u32.to_le_bytes());
    image[0x22c..0x230].copy_from_slice(&0x7fff_ffffu32.to_le_bytes());
    image[0x400..0x404].copy_from_slice(&[0x28, 0xb5, 0x2f, 0xfd]); // zstd
    image[0x236..0x238].copy_from_slice(&1u16.to_le_bytes()); // XLF_KERNEL_64
    image[0x24c..0x250].copy_from_slice(&8192u32.to_le_bytes()); // payload_length
    image[0x258..0x260].copy_from_slice(&(16 * MIB).to_le_bytes()); // pref_address
    image[0x260..0x264].copy_from_slice(&(4u32 << 20).to_le_bytes()); // init_size
    image
}

fn ram(bytes: u64) -> (GuestMemoryMmap, RamLayout) {
    let layout = RamLayout::new(bytes).unwrap();
    let ranges: Vec<_> = layout
        .regions()
        .iter()
        .map(|region| (GuestAddress(region.start.0), region.len as usize))
        .collect();
    (GuestMemoryMmap::from_ranges(&ranges).unwrap(), layout)
}

fn try_load(kernel: &[u8], initrd: Option<&Path>, bytes: u64) -> Result<Entry, BootError> {
    let kernel = open(kernel).unwrap();
    let (memory, layout) = ram(bytes);
    load(&memory, &layout, &Payload { kernel: &kernel, initrd, cmdline: "a=b", cpus: 1 })
}

#[test]
fn each_format_is_recognised() {
    assert_eq!(open(&Elf::pvh().build()).unwrap().format, Format::Pvh);
    assert_eq!(open(&Elf::multiboot().build()).unwrap().format, Format::Multiboot);
    assert_eq!(open(&bzimage()).unwrap().format, Format::BzImage);
}

#[test]
fn each_bad_kernel_is_refused_by_its_own_error() {
    assert!(matches!(Kernel::open(Path::new("/nonexistent")), Err(KernelError::Read { .. })));
    assert!(matches!(Kernel::open(Path::new("/")), Err(KernelError::NotAFile { .. })));
    assert!(matches!(open(&[]), Err(KernelError::Empty(_))));
    assert!(matches!(open(b"#!/bin/sh\n"), Err(KernelError::Unknown { .. })));
    assert!(matches!(open(&[0x1f, 0x8b, 8, 0]), Err(KernelError::Unknown { .. })));
    let arm = Elf { machine: 183, ..Elf::pvh() };
    assert!(matches!(open(&arm.build()), Err(KernelError::Machine { .. })));
    let plain32 = Elf { code: vec![0xf4; 64], ..Elf::multiboot() };
    assert!(matches!(open(&plain32.build()), Err(KernelError::Only32Bit(_))));
    let mut old = bzimage();
    old[0x236] = 0;
    assert!(matches!(open(&old), Err(KernelError::Only32Bit(_))));
    let low = Elf { address: 0x7000, ..Elf::pvh() };
    assert!(matches!(open(&low.build()), Err(KernelError::TooLow { address: 0x7000, .. })));
    let whole = Elf::pvh().build();
    assert!(matches!(open(&whole[..whole.len() - 1]), Err(KernelError::Damaged { .. })));
    assert!(matches!(open(&whole[..80]), Err(KernelError::Damaged { .. })));
    let liar = Elf { memory_bytes: 1, ..Elf::pvh() };
    assert!(matches!(open(&liar.build()), Err(KernelError::Damaged { .. })));
}

#[test]
fn a_fifo_is_refused_without_waiting_for_its_writer() {
    let directory = tempfile::TempDir::new().unwrap();
    let fifo = directory.path().join("fifo");
    assert!(std::process::Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    assert!(matches!(Kernel::open(&fifo), Err(KernelError::NotAFile { .. })));
    let error = try_load(&Elf::pvh().build(), Some(&fifo), 16 * MIB).unwrap_err();
    assert!(error.to_string().contains("not a regular file"), "{error}");
}

#[test]
fn a_pvh_kernel_lies_where_it_wants_and_is_entered_by_its_note() {
    let kernel = open(&Elf::pvh().build()).unwrap();
    let (memory, layout) = ram(16 * MIB);
    let initrd = file(&[0x5a; 5000]);
    let payload = Payload { kernel: &kernel, initrd: Some(initrd.path()), cmdline: "a=b", cpus: 2 };
    let entry = load(&memory, &layout, &payload).unwrap();
    assert_eq!(entry, Entry::Protected32 { rip: MIB, rax: 0, rbx: layout::BOOT_INFO });
    assert_eq!(memory.read_obj::<u8>(GuestAddress(MIB)).unwrap(), 0xf4);
    let mut cmdline = [0; 4];
    memory.read_slice(&mut cmdline, GuestAddress(layout::CMDLINE)).unwrap();
    assert_eq!(&cmdline, b"a=b\0");
    let module = 16 * MIB - 8192;
    assert_eq!(memory.read_obj::<u64>(GuestAddress(layout::BOOT_TABLES + 0x800)).unwrap(), module);
    assert_eq!(memory.read_obj::<u8>(GuestAddress(module + 4999)).unwrap(), 0x5a);
}

#[test]
fn a_bzimage_is_entered_in_64_bit_mode_above_its_preferred_address() {
    let initrd = file(&[1; 100]);
    let entry = try_load(&bzimage(), Some(initrd.path()), 32 * MIB).unwrap();
    assert_eq!(entry, Entry::Long64 { rip: MIB + 0x200, rsi: layout::BOOT_INFO });
    let small = try_load(&bzimage(), None, 16 * MIB).unwrap_err();
    assert!(matches!(small, BootError::KernelTooLarge { end, .. } if end == 20 * MIB), "{small}");
    let mut cut = bzimage();
    cut.truncate(0x400 + 4096);
    let error = try_load(&cut, None, 32 * MIB).unwrap_err();
    assert!(error.to_string().contains("truncated"), "{error}");
}

#[test]
fn a_multiboot_kernel_gets_its_module_and_memory_map() {
    let kernel = open(&Elf::multiboot().build()).unwrap();
    let (memory, layout) = ram(16 * MIB);
    let module = file(b"module");
    let payload = Payload { kernel: &kernel, initrd: Some(module.path()), cmdline: "x", cpus: 1 };
    let entry = load(&memory, &layout, &payload).unwrap();
    let magic = u64::from(multiboot::BOOTLOADER_MAGIC);
    assert_eq!(entry, Entry::Protected32 { rip: MIB, rax: magic, rbx: layout::BOOT_INFO });
    let word = |at: u64| memory.read_obj::<u32>(GuestAddress(at)).unwrap();
    assert_eq!(word(layout::BOOT_INFO), 0b100_1101);
    assert_eq!(word(layout::BOOT_INFO + 20), 1, "one module");
    let module_at = u64::from(word(layout::BOOT_INFO + 24));
    assert_eq!(word(module_at + 4) - word(module_at), 6);
    assert_eq!(memory.read_obj::<u8>(GuestAddress(word(module_at).into())).unwrap(), b'm');
}

#[test]
fn an_initrd_that_does_not_fit_is_refused_with_its_size() {
    let large = NamedTempFile::new().unwrap();
    large.as_file().set_len(64 * MIB).unwrap();
    let error = try_load(&Elf::pvh().build(), Some(large.path()), 16 * MIB).unwrap_err();
    assert!(matches!(error, BootError::InitrdTooLarge { .. }), "{error}");
    assert!(error.to_string().contains("64 MiB"), "{error}");
    let empty = file(&[]);
    let error = try_load(&Elf::pvh().build(), Some(empty.path()), 16 * MIB).unwrap_err();
    assert!(error.to_string().contains("empty"), "{error}");
    assert!(try_load(&Elf::pvh().build(), Some(Path::new("/nonexistent")), 16 * MIB).is_err());
}

#[test]
fn a_kernel_larger_than_memory_is_refused() {
    let large = Elf { memory_bytes: 64 * MIB, ..Elf::pvh() };
    let error = try_load(&large.build(), None, 16 * MIB).unwrap_err();
    assert!(matches!(error, BootError::KernelTooLarge { .. }), "{error}");
    let far = Elf { address: 1 << 40, ..Elf::pvh() };
    assert!(try_load(&far.build(), None, 16 * MIB).is_err());
}

#[test]
fn an_elf_that_contradicts_itself_is_refused() {
    let change = |at: usize, bytes: &[u8]| {
        let mut image = Elf::pvh().build();
        image[at..at + bytes.len()].copy_from_slice(bytes);
        image
    };
    let damaged = |image: &[u8], word: &str| match open(image) {
        Err(KernelError::Damaged { detail, .. }) => assert!(detail.contains(word), "{detail}"),
        other => panic!("{word}: {other:?}"),
    };
    damaged(&change(16, &[4, 0]), "core dump");
    // The note becomes a second segment with bytes of the first.
    let mut second = 1u32.to_le_bytes().to_vec();
    second.extend([7, 0, 0, 0]);
    let at = 64 + 56;
    let mut overlapping = change(at, &second);
    overlapping[at + 24..at + 32].copy_from_slice(&(MIB + 4096).to_le_bytes());
    damaged(&overlapping, "overlap");
    damaged(&change(at + 8, &u64::MAX.to_le_bytes()), "outside the file");
    let elsewhere = Elf { pvh_entry: Some(0x20_0000), ..Elf::pvh() };
    let error = try_load(&elsewhere.build(), None, 16 * MIB).unwrap_err();
    assert!(error.to_string().contains("entry point 0x200000"), "{error}");
}

#[test]
fn a_bzimage_with_a_wrong_setup_size_is_refused() {
    for sectors in [0, 2, 200] {
        let mut image = bzimage();
        image.resize(0x400 + 64 * 1024, 0);
        image[0x1f1] = sectors;
        let error = try_load(&image, None, 32 * MIB).unwrap_err();
        assert!(matches!(error, BootError::Kernel { .. }), "{sectors}: {error}");
    }
}

#[test]
fn an_elf_without_pvh_note_is_refused() {
    let error =
        try_load(&Elf { pvh_entry: None, ..Elf::pvh() }.build(), None, 16 * MIB).unwrap_err();
    assert!(error.to_string().contains("CONFIG_PVH"), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Random damage to good kernels: refused or loaded, never a panic and never outside RAM.
    #[test]
    fn damaged_kernels_never_panic(
        which in 0..3usize,
        damage in prop::collection::vec((0..400usize, any::<u8>()), 1..8),
        cut in prop::option::of(0..5000usize),
    ) {
        let mut bytes = [Elf::pvh().build(), Elf::multiboot().build(), bzimage()][which].clone();
        for (at, value) in damage {
            let at = if which == 2 { at + 0x1f0 } else { at };
            if let Some(byte) = bytes.get_mut(at) {
                *byte = value;
            }
        }
        if let Some(cut) = cut {
            bytes.truncate(cut);
        }
        if let Ok(kernel) = open(&bytes) {
            let (memory, layout) = ram(8 * MIB);
            let payload = Payload { kernel: &kernel, initrd: None, cmdline: "", cpus: 1 };
            let _ = load(&memory, &layout, &payload);
        }
    }

    /// Whole fields with the values that arithmetic trips over.
    #[test]
    fn absurd_header_fields_never_panic(
        which in 0..3usize,
        fields in prop::collection::vec((0..100usize, 1..4usize, 0..9usize), 1..4),
    ) {
        const ABSURD: [u64; 9] = [
            0, 1, 0x7fff, 0xffff, 0x7fff_ffff, 0xffff_ffff, 0x10_0000, i64::MAX as u64, u64::MAX,
        ];
        let mut bytes = [Elf::pvh().build(), Elf::multiboot().build(), bzimage()][which].clone();
        for (index, width, value) in fields {
            let at = if which == 2 { 0x1f1 } else { 0 } + 2 * index;
            let width = 1 << width;
            let field = &ABSURD[value].to_le_bytes()[..width];
            if let Some(to) = bytes.get_mut(at..at + width) {
                to.copy_from_slice(field);
            }
        }
        if let Ok(kernel) = open(&bytes) {
            let (memory, layout) = ram(8 * MIB);
            let payload = Payload { kernel: &kernel, initrd: None, cmdline: "", cpus: 1 };
            let _ = load(&memory, &layout, &payload);
        }
    }

    #[test]
    fn random_files_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
        let _ = open(&bytes);
    }
}

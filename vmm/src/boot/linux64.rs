//! The 64-bit Linux boot protocol for bzImages (Documentation/arch/x86/boot.rst, "64-bit Boot Protocol").

use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::KernelLoader;
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::bzimage::BzImage;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryMmap};

use super::detect::Kernel;
use super::layout::{ACPI, BOOT_INFO, CMDLINE, KERNEL_MIN, MapRange, PAGE_TABLES};
use super::{BootError, Entry, Loaded};

/// The 64-bit entry point, in bytes from the start of the protected-mode kernel.
const ENTRY_OFFSET: u64 = 0x200;
/// `type_of_loader`: no assigned loader id.
const LOADER_UNDEFINED: u8 = 0xff;
/// The identity map covers 4 GiB: kernel, zero page, command line and initrd all lie in it.
const IDENTITY_GIB: u64 = 4;
const PRESENT_WRITABLE: u64 = 0b11;
const PAGE_2_MIB: u64 = 1 << 7;

pub(super) fn load(
    memory: &GuestMemoryMmap,
    kernel: &Kernel,
) -> Result<(Loaded, setup_header), BootError> {
    let refuse = |detail: String| BootError::Kernel { path: kernel.path.clone(), detail };
    let mut file = kernel.file.try_clone().map_err(|error| refuse(error.to_string()))?;
    let start = GuestAddress(KERNEL_MIN);
    let result = BzImage::load(memory, Some(start), &mut file, Some(start))
        .map_err(|error| refuse(format!("{error} (does it fit into --memory?)")))?;
    let header = result.setup_header.ok_or_else(|| refuse("it has no setup header".into()))?;
    // The kernel moves itself to its preferred address and decompresses there; both end at init_size.
    let (preferred, init_bytes) = (header.pref_address, u64::from(header.init_size));
    let end = preferred
        .max(KERNEL_MIN)
        .checked_add(init_bytes)
        .ok_or_else(|| refuse("its preferred address is beyond 64 bits".into()))?;
    check_payload(&header, result.kernel_end - KERNEL_MIN).map_err(refuse)?;
    check_magic(memory, KERNEL_MIN + u64::from(header.payload_offset)).map_err(refuse)?;
    let loaded = Loaded {
        entry: result.kernel_load.raw_value() + ENTRY_OFFSET,
        end: end.max(result.kernel_end),
        initrd_max: u64::from(header.initrd_addr_max),
    };
    Ok((loaded, header))
}

/// A truncated bzImage still has a good header: its compressed payload must lie in the file.
fn check_payload(header: &setup_header, loaded_bytes: u64) -> Result<(), String> {
    let (offset, length) = (header.payload_offset, header.payload_length);
    let end = u64::from(offset) + u64::from(length);
    if end > loaded_bytes {
        return Err(format!(
            "it is truncated: the compressed kernel ends at byte {end} of {loaded_bytes}; copy it again"
        ));
    }
    Ok(())
}

/// The first bytes of what a bzImage may carry: gzip, bzip2, LZMA, xz, LZO, LZ4, zstd, plain ELF
/// (Documentation/arch/x86/boot.rst, `payload_offset`).
const PAYLOADS: [&[u8]; 8] = [
    &[0x1f, 0x8b],
    b"BZh",
    &[0x5d, 0, 0],
    &[0xfd, b'7', b'z', b'X', b'Z'],
    &[0x89, b'L', b'Z', b'O'],
    &[0x02, 0x21, 0x4c, 0x18],
    &[0x28, 0xb5, 0x2f, 0xfd],
    &[0x7f, b'E', b'L', b'F'],
];

/// With a wrong number of setup sectors the wrong part of the file was loaded: what is not where the
/// header says it is says so.
fn check_magic(memory: &GuestMemoryMmap, payload: u64) -> Result<(), String> {
    let found = memory.read_obj::<[u8; 8]>(GuestAddress(payload)).unwrap_or_default();
    if PAYLOADS.iter().any(|magic| found.starts_with(magic)) {
        return Ok(());
    }
    Err("it is damaged: there is no compressed kernel where its setup header says; copy it again"
        .into())
}

pub(super) fn finish(
    memory: &GuestMemoryMmap,
    loaded: &Loaded,
    header: setup_header,
    map: &[MapRange],
    initrd: Option<(u64, u64)>,
    cmdline_bytes: usize,
) -> Result<Entry, BootError> {
    let mut params = boot_params { hdr: header, acpi_rsdp_addr: ACPI, ..boot_params::default() };
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.cmd_line_ptr = CMDLINE as u32;
    params.hdr.cmdline_size = cmdline_bytes as u32;
    if let Some((address, bytes)) = initrd {
        // Both fit: the initrd is placed below initrd_addr_max, which has 32 bits.
        params.hdr.ramdisk_image = address as u32;
        params.hdr.ramdisk_size = bytes as u32;
    }
    for (entry, range) in params.e820_table.iter_mut().zip(map) {
        *entry =
            boot_e820_entry { addr: range.start, size: range.len, r#type: range.kind.e820_type() };
    }
    params.e820_entries = map.len() as u8;
    LinuxBootConfigurator::write_bootparams(
        &BootParams::new(&params, GuestAddress(BOOT_INFO)),
        memory,
    )
    .map_err(BootError::tables)?;
    memory
        .write_slice(&identity_page_tables(), GuestAddress(PAGE_TABLES))
        .map_err(BootError::tables)?;
    Ok(Entry::Long64 { rip: loaded.entry, rsi: BOOT_INFO })
}

/// PML4, PDPT and one PD a GiB, in 2 MiB pages, to be written at [`PAGE_TABLES`].
fn identity_page_tables() -> Vec<u8> {
    let page = |index: u64| PAGE_TABLES + index * 4096;
    let mut entries = vec![0u64; 512 * (2 + IDENTITY_GIB as usize)];
    entries[0] = page(1) | PRESENT_WRITABLE;
    for gib in 0..IDENTITY_GIB {
        entries[512 + gib as usize] = page(2 + gib) | PRESENT_WRITABLE;
    }
    for (index, entry) in entries[1024..].iter_mut().enumerate() {
        *entry = ((index as u64) << 21) | PAGE_2_MIB | PRESENT_WRITABLE;
    }
    entries.iter().flat_map(|entry| entry.to_le_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_tables_map_4_gib_onto_themselves() {
        let bytes = identity_page_tables();
        let entry = |address: u64| {
            let at = (address - PAGE_TABLES) as usize;
            u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
        };
        for address in [0, 0x12_3456, 0xbfff_ffff, 0xffff_ffffu64] {
            let pdpt = entry(PAGE_TABLES) & !0xfff;
            let pd = entry(pdpt + 8 * (address >> 30)) & !0xfff;
            let pte = entry(pd + 8 * (address >> 21 & 511));
            assert_eq!(pte & PAGE_2_MIB, PAGE_2_MIB);
            assert_eq!((pte & !0x1f_ffff) | (address & 0x1f_ffff), address);
        }
    }
}

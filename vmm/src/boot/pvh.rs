//! The PVH boot protocol for ELF `vmlinux` kernels (Xen's `start_info.h`; Linux `CONFIG_PVH`).

use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::KernelLoader;
use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use linux_loader::loader::elf::{Elf, PvhBootCapability};
use vm_memory::{Address, GuestAddress, GuestMemoryMmap};

use super::detect::{Kernel, Segment};
use super::layout::{ACPI, BOOT_INFO, BOOT_TABLES, CMDLINE, KERNEL_MIN, MapRange};
use super::{BootError, Entry, Loaded};

/// `XEN_HVM_START_MAGIC_VALUE`: "xEn3" with the 0x80 bit of the "E" set.
const START_MAGIC: u32 = 0x336e_c578;
/// Version 1 of the structure has the memory map.
const START_VERSION: u32 = 1;
/// The module list follows the memory map in its page.
const MODULES: u64 = BOOT_TABLES + 0x800;

pub(super) fn load(memory: &GuestMemoryMmap, kernel: &Kernel) -> Result<Loaded, BootError> {
    let refuse = |detail: String| BootError::Kernel { path: kernel.path.clone(), detail };
    let mut file = kernel.file.try_clone().map_err(|error| refuse(error.to_string()))?;
    let result = Elf::load(memory, None, &mut file, Some(GuestAddress(KERNEL_MIN)))
        .map_err(|error| refuse(error.to_string()))?;
    let PvhBootCapability::PvhEntryPresent(entry) = result.pvh_boot_cap else {
        return Err(refuse(
            "it has no PVH entry point: build it with CONFIG_PVH=y, or give the bzImage".into(),
        ));
    };
    // The loader's own end leaves out segments that are all zero.
    let end = kernel.segments.last().map_or(result.kernel_end, Segment::end);
    Ok(Loaded { entry: entry.raw_value(), end, initrd_max: u64::from(u32::MAX) })
}

pub(super) fn finish(
    memory: &GuestMemoryMmap,
    entry: u64,
    map: &[MapRange],
    initrd: Option<(u64, u64)>,
) -> Result<Entry, BootError> {
    let memmap: Vec<_> = map
        .iter()
        .map(|range| hvm_memmap_table_entry {
            addr: range.start,
            size: range.len,
            type_: range.kind.e820_type(),
            reserved: 0,
        })
        .collect();
    let mut start = hvm_start_info {
        magic: START_MAGIC,
        version: START_VERSION,
        cmdline_paddr: CMDLINE,
        rsdp_paddr: ACPI,
        memmap_paddr: BOOT_TABLES,
        memmap_entries: memmap.len() as u32,
        ..hvm_start_info::default()
    };
    let module =
        initrd.map(|(paddr, size)| hvm_modlist_entry { paddr, size, ..Default::default() });
    if module.is_some() {
        start.nr_modules = 1;
        start.modlist_paddr = MODULES;
    }
    let mut params = BootParams::new(&start, GuestAddress(BOOT_INFO));
    params.set_sections(&memmap, GuestAddress(BOOT_TABLES));
    if let Some(module) = module {
        params.set_modules(&[module], GuestAddress(MODULES));
    }
    PvhBootConfigurator::write_bootparams(&params, memory).map_err(BootError::tables)?;
    Ok(Entry::Protected32 { rip: entry, rax: 0, rbx: BOOT_INFO })
}

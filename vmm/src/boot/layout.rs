//! Where things lie in guest physical memory, and the memory map that the guest is told.
//!
//! ```text
//!   0x0000_0500  boot GDT
//!   0x0000_6000  hvm_start_info (PVH), zero page (bzImage) or Multiboot information
//!   0x0000_7000  memory map and module list
//!   0x0000_9000  page tables (bzImage): PML4, PDPT, four PDs
//!   0x0002_0000  kernel command line
//!   0x0009_fc00  -- end of low RAM; reserved from here to 1 MiB --
//!   0x000e_0000  ACPI tables (RSDP first: inside the range that kernels scan for it)
//!   0x0010_0000  kernel
//!        …
//!   top of RAM below 3 GiB: initrd, as high as the kernel accepts
//!   0xc000_0000  hole: I/O APIC 0xfec0_0000, local APICs 0xfee0_0000, KVM's own pages
//!   0x1_0000_0000  the rest of RAM
//! ```

use guest_memory::RamRegion;

/// The boot GDT.
pub const GDT: u64 = 0x500;
/// `hvm_start_info`, zero page or Multiboot information.
pub const BOOT_INFO: u64 = 0x6000;
/// Memory map table and module list.
pub const BOOT_TABLES: u64 = 0x7000;
/// Page tables for the 64-bit boot protocol.
pub const PAGE_TABLES: u64 = 0x9000;
/// The kernel command line, NUL-terminated.
pub const CMDLINE: u64 = 0x2_0000;
/// The longest command line, in bytes, without its NUL (x86 `COMMAND_LINE_SIZE` is 2048).
pub const CMDLINE_MAX_BYTES: usize = 2047;
/// The end of conventional memory; a page of EBDA would begin here.
pub const LOW_RAM_END: u64 = 0x9_fc00;
/// The ACPI tables.
pub const ACPI: u64 = 0xe_0000;
/// The end of the room for ACPI tables.
pub const ACPI_END: u64 = 0x10_0000;
/// The first address that a kernel may be loaded to.
pub const KERNEL_MIN: u64 = 0x10_0000;
/// The local APICs' MMIO page.
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// The I/O APIC's MMIO page.
pub const IO_APIC: u32 = 0xfec0_0000;
/// Three pages for KVM's real-mode TSS on Intel (`KVM_SET_TSS_ADDR`).
pub const KVM_TSS: u64 = 0xfffb_d000;
/// One page for KVM's identity map on Intel (`KVM_SET_IDENTITY_MAP_ADDR`).
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;

/// What a range of the guest's memory map is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RangeKind {
    /// RAM that the guest may use.
    Ram,
    /// Not for the guest's use.
    Reserved,
}

impl RangeKind {
    /// The type number: the same in E820, PVH and Multiboot memory maps.
    #[must_use]
    pub fn e820_type(self) -> u32 {
        match self {
            Self::Ram => 1,
            Self::Reserved => 2,
        }
    }
}

/// One range of the guest's memory map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapRange {
    /// First guest physical address.
    pub start: u64,
    /// Length in bytes, never 0.
    pub len: u64,
    /// What it is.
    pub kind: RangeKind,
}

/// The memory map (E820) for RAM with these regions.
#[must_use]
pub fn memory_map(regions: &[RamRegion]) -> Vec<MapRange> {
    let mut map = Vec::new();
    let mut push = |start: u64, end: u64, kind| {
        if start < end {
            map.push(MapRange { start, len: end - start, kind });
        }
    };
    push(0, LOW_RAM_END, RangeKind::Ram);
    push(LOW_RAM_END, KERNEL_MIN, RangeKind::Reserved);
    for region in regions {
        let (start, end) = (region.start.0, region.start.0 + region.len);
        push(start.max(KERNEL_MIN), end, RangeKind::Ram);
    }
    map
}

/// The end of the RAM below the 3 GiB hole.
#[must_use]
pub fn low_ram_end(regions: &[RamRegion]) -> u64 {
    regions.first().map_or(0, |region| region.start.0 + region.len)
}

#[cfg(test)]
mod tests {
    use super::*;
    use guest_memory::RamLayout;

    fn map(bytes: u64) -> Vec<MapRange> {
        memory_map(RamLayout::new(bytes).unwrap().regions())
    }

    #[test]
    fn small_ram_is_one_range_above_1_mib() {
        let map = map(128 << 20);
        assert_eq!(map.len(), 3);
        assert_eq!(map[2], MapRange { start: 1 << 20, len: 127 << 20, kind: RangeKind::Ram });
    }

    #[test]
    fn large_ram_leaves_the_hole_out() {
        let map = map(4 << 30);
        assert_eq!(map[2].start + map[2].len, 3 << 30);
        assert_eq!(map[3], MapRange { start: 4 << 30, len: 1 << 30, kind: RangeKind::Ram });
    }

    #[test]
    fn ranges_ascend_without_overlap() {
        for bytes in [16 << 20, 3 << 30, (3 << 30) + 4096, 64 << 30] {
            for pair in map(bytes).windows(2) {
                assert!(pair[0].start + pair[0].len <= pair[1].start);
            }
        }
    }
}

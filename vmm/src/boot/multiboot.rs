//! Multiboot 1 kernels: 32-bit ELF images with one optional module and a command line, as bare-metal
//! test kernels use (Multiboot Specification 0.6.96, <https://www.gnu.org/software/grub/manual/multiboot/>).

use object::LittleEndian;
use object::elf::{self, FileHeader32};
use object::read::ReadCache;
use object::read::elf::{FileHeader, ProgramHeader};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryMmap};

use super::layout::{BOOT_INFO, BOOT_TABLES, CMDLINE, MapRange, RangeKind};
use super::{BootError, Entry, Loaded, detect::Kernel};

/// The header lies in the first 8192 bytes of the image.
pub const SEARCH_BYTES: usize = 8192;
/// EAX at the entry of a Multiboot kernel.
pub const BOOTLOADER_MAGIC: u32 = 0x2bad_b002;

const HEADER_MAGIC: u32 = 0x1bad_b002;
/// Header flags of requirements that a boot loader must understand (bits 0 to 15); we align modules
/// (bit 0) and give memory information (bit 1).
const UNDERSTOOD_REQUIREMENTS: u32 = 0b11;
const REQUIREMENTS_MASK: u32 = 0xffff;

const INFO_MEMORY: u32 = 1 << 0;
const INFO_CMDLINE: u32 = 1 << 2;
const INFO_MODULES: u32 = 1 << 3;
const INFO_MEMORY_MAP: u32 = 1 << 6;

/// The Multiboot information structure up to the memory map (section 3.3).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Info {
    flags: u32,
    mem_lower_kib: u32,
    mem_upper_kib: u32,
    boot_device: u32,
    cmdline: u32,
    mods_count: u32,
    mods_addr: u32,
    symbols: [u32; 4],
    mmap_length: u32,
    mmap_addr: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Module {
    start: u32,
    end: u32,
    string: u32,
    reserved: u32,
}

/// Finds a valid Multiboot 1 header in the head of an image and returns its flags.
#[must_use]
pub fn find_header(head: &[u8]) -> Option<u32> {
    let word =
        |at: usize| head.get(at..at + 4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]));
    (0..head.len().min(SEARCH_BYTES)).step_by(4).find_map(|at| {
        let (magic, flags, checksum) = (word(at)?, word(at + 4)?, word(at + 8)?);
        let sum = magic.wrapping_add(flags).wrapping_add(checksum);
        let understood = flags & REQUIREMENTS_MASK & !UNDERSTOOD_REQUIREMENTS == 0;
        (magic == HEADER_MAGIC && sum == 0 && understood).then_some(flags)
    })
}

/// Loads the ELF segments of a Multiboot kernel.
pub(super) fn load(memory: &GuestMemoryMmap, kernel: &Kernel) -> Result<Loaded, BootError> {
    let damaged = |detail: String| BootError::Kernel { path: kernel.path.clone(), detail };
    let cache = ReadCache::new(&kernel.file);
    let header = FileHeader32::<LittleEndian>::parse(&cache).map_err(|e| damaged(e.to_string()))?;
    let segments =
        header.program_headers(LittleEndian, &cache).map_err(|e| damaged(e.to_string()))?;
    let mut end = 0;
    for segment in segments {
        let file_bytes = segment.p_filesz.get(LittleEndian);
        if segment.p_type(LittleEndian) != elf::PT_LOAD {
            continue;
        }
        let address = u64::from(segment.p_paddr.get(LittleEndian));
        end = end.max(address + u64::from(segment.p_memsz.get(LittleEndian)));
        if file_bytes > 0 {
            let bytes = segment
                .data(LittleEndian, &cache)
                .map_err(|()| damaged("a segment lies outside the file".into()))?;
            memory
                .write_slice(bytes, GuestAddress(address))
                .map_err(|_| BootError::KernelTooLarge { path: kernel.path.clone(), end })?;
        }
    }
    Ok(Loaded {
        entry: u64::from(header.e_entry.get(LittleEndian)),
        end,
        initrd_max: u64::from(u32::MAX),
    })
}

/// Writes the Multiboot information and returns how to enter the kernel.
pub(super) fn finish(
    memory: &GuestMemoryMmap,
    entry: u64,
    map: &[MapRange],
    initrd: Option<(u64, u64)>,
) -> Result<Entry, BootError> {
    let low = map.iter().find(|range| range.kind == RangeKind::Ram && range.start > 0);
    let upper_kib = low.map_or(0, |range| range.len >> 10);
    let mut tables = Vec::new();
    for range in map {
        // size (of what follows), base, length, type.
        tables.extend_from_slice(&20u32.to_le_bytes());
        tables.extend_from_slice(&range.start.to_le_bytes());
        tables.extend_from_slice(&range.len.to_le_bytes());
        tables.extend_from_slice(&range.kind.e820_type().to_le_bytes());
    }
    let map_len = tables.len() as u32;
    let mut info = Info {
        flags: INFO_MEMORY | INFO_CMDLINE | INFO_MEMORY_MAP,
        mem_lower_kib: 639,
        mem_upper_kib: u32::try_from(upper_kib).unwrap_or(u32::MAX),
        cmdline: CMDLINE as u32,
        mmap_length: map_len,
        mmap_addr: BOOT_TABLES as u32,
        ..Info::default()
    };
    if let Some((address, bytes)) = initrd {
        info.flags |= INFO_MODULES;
        info.mods_count = 1;
        info.mods_addr = BOOT_TABLES as u32 + map_len;
        // Both fit: a module is placed below 3 GiB.
        let module = Module {
            start: address as u32,
            end: (address + bytes) as u32,
            string: CMDLINE as u32,
            reserved: 0,
        };
        tables.extend_from_slice(module.as_slice());
    }
    memory.write_slice(&tables, GuestAddress(BOOT_TABLES)).map_err(BootError::tables)?;
    memory.write_slice(info.as_slice(), GuestAddress(BOOT_INFO)).map_err(BootError::tables)?;
    Ok(Entry::Protected32 { rip: entry, rax: u64::from(BOOTLOADER_MAGIC), rbx: BOOT_INFO })
}

mod bytes {
    //! The two structures are written to guest memory as bytes.
    #![allow(unsafe_code, reason = "ByteValued is an unsafe trait: it promises plain old data")]
    use super::{Info, Module};
    use vm_memory::ByteValued;

    // SAFETY: repr(C), only u32 fields, no padding: every bit pattern is valid.
    unsafe impl ByteValued for Info {}
    // SAFETY: as above.
    unsafe impl ByteValued for Module {}
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(flags: u32) -> Vec<u8> {
        let checksum = 0u32.wrapping_sub(HEADER_MAGIC).wrapping_sub(flags);
        [HEADER_MAGIC, flags, checksum].iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    #[test]
    fn the_header_is_found_on_a_4_byte_boundary_only() {
        let mut image = vec![0; 4096];
        image.extend(header(3));
        assert_eq!(find_header(&image), Some(3));
        image.insert(0, 0);
        assert_eq!(find_header(&image), None);
    }

    #[test]
    fn a_wrong_checksum_or_an_unknown_requirement_is_no_header() {
        let mut wrong = header(0);
        wrong[8] ^= 1;
        assert_eq!(find_header(&wrong), None);
        assert_eq!(find_header(&header(1 << 2)), None, "video mode");
        assert_eq!(find_header(&header(1 << 16)), Some(1 << 16), "optional");
    }

    #[test]
    fn the_header_may_be_cut_at_the_end() {
        let image = header(0);
        for len in 0..image.len() {
            assert_eq!(find_header(&image[..len]), None);
        }
    }
}

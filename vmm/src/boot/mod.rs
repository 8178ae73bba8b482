//! Putting a kernel, its initrd and its tables into guest RAM, and the state in which a vCPU enters it.
//!
//! ```text
//!   Kernel::open (detect.rs)  -> format, before anything of the VM exists
//!   load()  -> kernel  (pvh.rs | linux64.rs | multiboot.rs)
//!           -> initrd, as high below 3 GiB as the kernel accepts
//!           -> command line, ACPI tables, memory map
//!           -> Entry: the registers of the boot processor (regs.rs)
//! ```
//!
//! Everything is written through the alias, before the pager starts.

pub mod acpi;
pub mod detect;
pub mod layout;
mod linux64;
pub mod multiboot;
mod pvh;
pub mod regs;

use std::path::{Path, PathBuf};

use guest_memory::{Gpa, RamLayout};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::{operand, size};
use detect::{Format, Kernel};

/// How the boot processor enters the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// 32-bit protected mode without paging (PVH, Multiboot).
    Protected32 {
        /// Instruction pointer.
        rip: u64,
        /// EAX (Multiboot: the magic number).
        rax: u64,
        /// EBX: address of the start info.
        rbx: u64,
    },
    /// 64-bit mode with identity-mapped page tables (bzImage).
    Long64 {
        /// Instruction pointer.
        rip: u64,
        /// RSI: address of the zero page.
        rsi: u64,
    },
}

/// Why a guest could not be put together.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The kernel's contents.
    #[error("cannot load kernel '{path}': {detail}")]
    Kernel {
        /// The kernel.
        path: PathBuf,
        /// What is wrong with it.
        detail: String,
    },
    /// The kernel does not fit.
    #[error("kernel '{path}' needs memory up to {end:#x}: give the guest more with --memory")]
    KernelTooLarge {
        /// The kernel.
        path: PathBuf,
        /// The end of the memory that it needs, in bytes.
        end: u64,
    },
    /// The initrd cannot be read.
    #[error("cannot read initrd '{path}': {detail}")]
    Initrd {
        /// The initrd.
        path: PathBuf,
        /// Why.
        detail: String,
    },
    /// The initrd does not fit.
    #[error(
        "initrd '{path}' has {}, but only {} are free above the kernel: give the guest more with --memory",
        size::show(*bytes), size::show(*room)
    )]
    InitrdTooLarge {
        /// The initrd.
        path: PathBuf,
        /// Its size.
        bytes: u64,
        /// The room between the kernel and the top of RAM.
        room: u64,
    },
    /// The tables do not fit in guest memory.
    #[error("cannot write the boot tables to guest memory: {0}")]
    Tables(String),
}

impl BootError {
    fn tables(error: impl std::fmt::Display) -> Self {
        Self::Tables(error.to_string())
    }
}

/// What a loader says about the kernel that it loaded.
#[derive(Clone, Copy, Debug)]
struct Loaded {
    entry: u64,
    /// The end of the memory that the kernel needs before it has its own allocator.
    end: u64,
    /// The highest address that the initrd may touch.
    initrd_max: u64,
}

/// Everything that goes into guest RAM before it runs.
#[derive(Debug)]
pub struct Payload<'a> {
    /// The kernel.
    pub kernel: &'a Kernel,
    /// The initrd, or the module of a Multiboot kernel.
    pub initrd: Option<&'a Path>,
    /// The kernel command line; checked by the caller against [`layout::CMDLINE_MAX_BYTES`].
    pub cmdline: &'a str,
    /// Number of processors, for the ACPI tables.
    pub cpus: u32,
}

const PAGE_BYTES: u64 = 4096;

/// Writes a payload into guest RAM.
///
/// # Errors
/// When a file cannot be read or something does not fit.
pub fn load(
    memory: &GuestMemoryMmap,
    ram: &RamLayout,
    payload: &Payload<'_>,
) -> Result<Entry, BootError> {
    let kernel = payload.kernel;
    let top = layout::low_ram_end(ram.regions());
    let fits = |end: u64| {
        let too_large = || BootError::KernelTooLarge { path: kernel.path.clone(), end };
        if end > top { Err(too_large()) } else { Ok(()) }
    };
    // Before a byte is written: what an absurd header asks for is not made present.
    fits(kernel.segments.last().map_or(0, detect::Segment::end))?;
    for segment in &kernel.segments {
        guest_memory::make_present(memory, Gpa(segment.address), segment.file_bytes);
    }
    let (loaded, header) = match kernel.format {
        Format::Pvh => (pvh::load(memory, kernel)?, None),
        Format::BzImage => {
            let (loaded, header) = linux64::load(memory, kernel)?;
            (loaded, Some(header))
        }
        Format::Multiboot => (multiboot::load(memory, kernel)?, None),
    };
    fits(loaded.end)?;
    check_entry(kernel, loaded.entry)?;
    let initrd = match payload.initrd {
        Some(path) => Some(load_initrd(memory, path, &loaded, top)?),
        None => None,
    };
    let mut cmdline = payload.cmdline.as_bytes().to_vec();
    cmdline.push(0);
    memory.write_slice(&cmdline, GuestAddress(layout::CMDLINE)).map_err(BootError::tables)?;
    let tables = acpi::build(layout::ACPI, payload.cpus);
    debug_assert!(layout::ACPI + tables.len() as u64 <= layout::ACPI_END);
    memory.write_slice(&tables, GuestAddress(layout::ACPI)).map_err(BootError::tables)?;

    let map = layout::memory_map(ram.regions());
    match (kernel.format, header) {
        (Format::BzImage, Some(header)) => {
            linux64::finish(memory, &loaded, header, &map, initrd, payload.cmdline.len())
        }
        (Format::Multiboot, _) => multiboot::finish(memory, loaded.entry, &map, initrd),
        _ => pvh::finish(memory, loaded.entry, &map, initrd),
    }
}

/// An ELF is entered where it has code: in what came from its file.
fn check_entry(kernel: &Kernel, entry: u64) -> Result<(), BootError> {
    let holds = |s: &detect::Segment| (s.address..s.address + s.file_bytes).contains(&entry);
    if kernel.segments.is_empty() || kernel.segments.iter().any(holds) {
        return Ok(());
    }
    Err(BootError::Kernel {
        path: kernel.path.clone(),
        detail: format!("its entry point {entry:#x} lies outside of its segments; build it again"),
    })
}

/// Loads the initrd as high as it may lie and returns its address and length in bytes.
fn load_initrd(
    memory: &GuestMemoryMmap,
    path: &Path,
    loaded: &Loaded,
    top: u64,
) -> Result<(u64, u64), BootError> {
    let unreadable = |detail: String| BootError::Initrd { path: path.to_owned(), detail };
    let (mut file, bytes) = operand::open_regular(path).map_err(|e| unreadable(e.to_string()))?;
    let floor = loaded.end.next_multiple_of(PAGE_BYTES);
    let ceiling = top.min(loaded.initrd_max.saturating_add(1));
    let room = ceiling.saturating_sub(floor);
    if bytes == 0 {
        return Err(unreadable("it is empty".into()));
    }
    if bytes > room {
        return Err(BootError::InitrdTooLarge { path: path.to_owned(), bytes, room });
    }
    let address = (ceiling - bytes) & !(PAGE_BYTES - 1);
    guest_memory::make_present(memory, Gpa(address), bytes);
    let length = usize::try_from(bytes).map_err(|e| unreadable(e.to_string()))?;
    memory
        .read_exact_volatile_from(GuestAddress(address), &mut file, length)
        .map_err(|e| unreadable(e.to_string()))?;
    Ok((address, bytes))
}

#[cfg(test)]
mod tests;

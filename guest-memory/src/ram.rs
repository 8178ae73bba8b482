//! Guest RAM before the pager runs: a memory file, mapped twice.
//!
//! ```text
//!   guest mapping  --- in KVM's memslots, registered with userfaultfd, never touched by the VMM
//!        \
//!         memfd    --- the bytes that are in memory; everything else is a hole
//!        /
//!   alias          --- plain; for the loader before the pager runs, and then for pinned pages only
//! ```

use std::fs::File;
use std::io;
use std::sync::Arc;

use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::address::{Gfn, Gpa};
use crate::layout::RamLayout;
use crate::sys::{GuestMapping, keep_private, memfd, populate};

/// Why guest RAM could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum RamError {
    /// There is no memory file to be had.
    #[error(
        "cannot create the memory file of {bytes} bytes for guest RAM: {source}; \
         raise the file limits (ulimit -n, ulimit -f)"
    )]
    File {
        /// The size of guest RAM.
        bytes: u64,
        /// What the kernel said.
        source: io::Error,
    },
    /// The file cannot be mapped.
    #[error(
        "cannot map {bytes} bytes of guest RAM ({mapping}): {source}; \
         raise the address space limit (ulimit -v) or give the guest less memory"
    )]
    Map {
        /// Which of the two mappings.
        mapping: &'static str,
        /// The size of guest RAM.
        bytes: u64,
        /// What the kernel said.
        source: io::Error,
    },
}

/// A part of guest RAM as KVM's memslots need it: `len` bytes at guest physical address `gpa` are
/// found at address `hva` of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestSlot {
    /// Guest physical address.
    pub gpa: u64,
    /// Address in this process, of the guest mapping. For KVM only: touching it from here is a fault
    /// that the pager answers as if it came from the guest.
    pub hva: u64,
    /// Length in bytes.
    pub len: u64,
}

/// A step of a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// A message of userfaultfd came for the page; other faults come by calls.
    Message,
    /// It went to the workers.
    Queued,
    /// A worker began to read the page from the store.
    Started,
    /// Its bytes have come.
    Read,
    /// It is mapped; whoever waits is told next.
    Mapped,
}

/// Hears of the steps of faults.
pub type OnStep = Box<dyn Fn(Gfn, Step) + Send + Sync>;

/// Told of guest physical pages that were just mapped in the guest mapping, `bytes` from the address
/// on: the loaded parts, and what fault-around brings in. Called on whichever thread mapped them; must
/// not wait.
pub type OnMapped = Box<dyn Fn(Gpa, u64) + Send + Sync>;

/// Guest RAM, absent but for what the loader writes.
pub struct GuestRam {
    pub(crate) layout: RamLayout,
    pub(crate) file: Arc<File>,
    pub(crate) mapping: GuestMapping,
    pub(crate) alias: GuestMemoryMmap,
    pub(crate) on_mapped: Option<OnMapped>,
    pub(crate) on_step: Option<OnStep>,
}

impl GuestRam {
    /// Makes RAM of this layout. Nothing of it takes memory yet, so that it may well be larger than
    /// the host's.
    ///
    /// # Errors
    /// When the memory file or one of its mappings cannot be had.
    pub fn new(layout: &RamLayout) -> Result<Self, RamError> {
        let bytes = layout.total_bytes();
        let file = memfd::create(c"nowait-ram", bytes)
            .map_err(|source| RamError::File { bytes, source })?;
        Self::in_file(layout, file)
    }

    /// As [`GuestRam::new`], in a file of the caller's in a tmpfs, all of it a hole. For tests: such a
    /// file system can be full.
    ///
    /// # Errors
    /// When one of the file's mappings cannot be had.
    #[doc(hidden)]
    pub fn in_file(layout: &RamLayout, file: File) -> Result<Self, RamError> {
        let bytes = layout.total_bytes();
        let refused = |mapping| move |source| RamError::Map { mapping, bytes, source };
        let too_long = |_| io::Error::from_raw_os_error(libc::ENOMEM);
        let mapping = usize::try_from(bytes)
            .map_err(too_long)
            .and_then(|len| GuestMapping::new(&file, len))
            .map_err(refused("guest mapping"))?;
        let file = Arc::new(file);
        let alias = map_alias(layout, &file).map_err(refused("alias"))?;
        Ok(Self { layout: layout.clone(), file, mapping, alias, on_mapped: None, on_step: None })
    }

    /// Has the pager tell of the runs of pages that it maps, so that second-stage page tables can be
    /// filled before the guest asks.
    pub fn on_mapped(&mut self, told: OnMapped) {
        self.on_mapped = Some(told);
    }

    /// From now on `told` hears of each step of a fault, on the thread that takes it. It must not wait, and
    /// must not call the pager.
    pub fn on_step(&mut self, told: OnStep) {
        self.on_step = Some(told);
    }

    /// RAM by guest physical address, for the loader. What is written here, zeros included, is
    /// present and mapped when the guest starts.
    pub fn loader(&mut self) -> &GuestMemoryMmap {
        &self.alias
    }

    /// Where KVM finds RAM.
    #[must_use]
    pub fn slots(&self) -> Vec<GuestSlot> {
        slots(&self.layout, &self.mapping)
    }
}

impl std::fmt::Debug for GuestRam {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GuestRam").field("layout", &self.layout).finish_non_exhaustive()
    }
}

/// Makes a range of RAM present in one go before the loader writes it, for a page fault a page costs
/// more than the copy. What cannot be made present (outside RAM, no memory) is left to the write, which
/// says what is wrong.
pub fn make_present(memory: &GuestMemoryMmap, start: Gpa, bytes: u64) {
    let Ok(bytes) = usize::try_from(bytes) else { return };
    for slice in memory.get_slices(GuestAddress(start.0), bytes).map_while(Result::ok) {
        populate(&slice);
    }
}

pub(crate) fn slots(layout: &RamLayout, mapping: &GuestMapping) -> Vec<GuestSlot> {
    let base = mapping.address() as u64;
    let slot = |region: &crate::RamRegion| {
        let Gpa(gpa) = region.start;
        GuestSlot { gpa, hva: base + region.file_offset, len: region.len }
    };
    layout.regions().iter().map(slot).collect()
}

fn map_alias(layout: &RamLayout, file: &Arc<File>) -> io::Result<GuestMemoryMmap> {
    let ranges = layout.regions().iter().map(|region| {
        let offset = FileOffset::from_arc(Arc::clone(file), region.file_offset);
        let Gpa(gpa) = region.start;
        (GuestAddress(gpa), region.len as usize, Some(offset))
    });
    let alias = GuestMemoryMmap::from_ranges_with_files(ranges).map_err(io::Error::other)?;
    for region in vm_memory::GuestMemoryBackend::iter(&alias) {
        keep_private(region.as_ptr() as usize, region.len() as usize)?;
    }
    Ok(alias)
}

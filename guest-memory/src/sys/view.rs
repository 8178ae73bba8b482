//! Views of parts of the alias, as vm-memory's guest memory.
// Unsafe: a region of vm-memory is made of a part of a mapping that another one owns.
#![allow(unsafe_code)]

use std::io;

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

use crate::address::{PageIndex, runs};
use crate::layout::RamLayout;

/// These pages (sorted, each once) of the alias, where the guest has them. The view must not outlive the
/// alias.
pub(crate) fn of(
    alias: &GuestMemoryMmap,
    layout: &RamLayout,
    pages: &[PageIndex],
) -> io::Result<GuestMemoryMmap> {
    let mut regions = Vec::new();
    for (gpa, bytes) in runs(pages).flat_map(|run| layout.guest_ranges(run)) {
        let len = usize::try_from(bytes).map_err(io::Error::other)?;
        let host = alias.get_slice(GuestAddress(gpa.0), len).map_err(io::Error::other)?;
        let address = host.ptr_guard_mut().as_ptr();
        // SAFETY: the range was just found in the alias, a shared mapping with these rights that lives
        // as long as the pager's core, which whoever has the view keeps; `build_raw` does not own
        // it and will not unmap it.
        let region = unsafe {
            MmapRegion::build_raw(
                address,
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
            )
        };
        let region = region.map_err(io::Error::other)?;
        let region = GuestRegionMmap::new(region, GuestAddress(gpa.0));
        regions.push(region.ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))?);
    }
    if regions.is_empty() {
        return Ok(GuestMemoryMmap::default());
    }
    GuestMemoryMmap::from_regions(regions).map_err(io::Error::other)
}

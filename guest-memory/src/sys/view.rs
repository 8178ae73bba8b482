//! Views of parts of the alias, as vm-memory's guest memory; and which of its pages the host has in memory.
// Unsafe: a region of vm-memory is made of a part of a mapping that another one owns; and mincore.
#![allow(unsafe_code)]

use std::io;

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

use crate::address::{PAGE_SIZE, PageIndex, PageRun, runs};
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

/// Whether the host has this page of the alias in memory, or will say nothing else: a page that it has
/// swapped out is mapped only after I/O (mincore(2)). Never waits.
pub(crate) fn is_in_memory(alias: &GuestMemoryMmap, layout: &RamLayout, page: PageIndex) -> bool {
    let Some((gpa, _)) = layout.guest_ranges(PageRun::single(page)).next() else { return true };
    let Ok(host) = alias.get_slice(GuestAddress(gpa.0), PAGE_SIZE) else { return true };
    let mut resident = 1_u8;
    // SAFETY: the page was just found in the alias; the kernel writes one byte for one page.
    let asked = unsafe {
        libc::mincore(host.ptr_guard_mut().as_ptr().cast(), PAGE_SIZE, &raw mut resident)
    };
    asked != 0 || resident & 1 != 0
}

/// Whether this host swaps at all, now.
pub(crate) fn host_swaps() -> bool {
    // A line of titles, and one for each swap area.
    std::fs::read_to_string("/proc/swaps").is_ok_and(|swaps| swaps.lines().count() > 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ram::GuestRam;
    use vm_memory::Bytes;

    #[test]
    fn what_is_not_in_memory_is_told_from_what_is() {
        let layout = RamLayout::new(4 << 20).unwrap();
        let mut ram = GuestRam::new(&layout).unwrap();
        ram.loader().write_obj(7_u8, GuestAddress(5 * PAGE_SIZE as u64)).unwrap();
        let page = |number: u64| PageIndex::containing(number * PAGE_SIZE as u64).unwrap();
        let mut is_there = |number| is_in_memory(ram.loader(), &layout, page(number));
        assert!(is_there(5));
        // A hole, as a page that was swapped out, is not in the page cache.
        assert!(!is_there(6));
    }
}

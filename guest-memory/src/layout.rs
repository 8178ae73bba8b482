//! Where guest RAM lies in the guest's physical address space.
//!
//! ```text
//!   0             3 GiB       4 GiB
//!   |  low RAM    |   hole    |  the rest of RAM ...
//!                   devices,
//!                   APICs
//! ```
//!
//! In the RAM file the parts follow one another without the hole.

use crate::address::{Gfn, Gpa, PAGE_BYTES, PageIndex, PageRun, is_page_multiple, pages_in};

/// Where the hole for devices and interrupt controllers begins.
pub const HOLE_START: Gpa = Gpa(3 << 30);
/// Where RAM goes on behind the hole.
pub const HOLE_END: Gpa = Gpa(4 << 30);
/// The largest RAM, in bytes (8 TiB): page numbers fit in 32 bits, and two mappings of it fit in a
/// process.
pub const MAX_MEMORY_BYTES: u64 = 8 << 40;

/// Why guest memory of some size cannot be laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// A guest without memory.
    #[error("guest memory is 0 bytes: give it at least one page of {PAGE_BYTES} bytes")]
    Zero,
    /// Not a whole number of pages.
    #[error(
        "guest memory of {0} bytes is not a multiple of the page size: round it to {PAGE_BYTES} bytes"
    )]
    Unaligned(u64),
    /// More than [`MAX_MEMORY_BYTES`].
    #[error("guest memory of {0} bytes is too large: at most {MAX_MEMORY_BYTES} bytes (8 TiB)")]
    TooLarge(u64),
}

/// One contiguous part of guest RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RamRegion {
    /// Its first guest physical address.
    pub start: Gpa,
    /// Its length, in bytes; a multiple of [`PAGE_BYTES`] and never 0.
    pub len: u64,
    /// Where it begins in the RAM file, in bytes.
    pub file_offset: u64,
}

impl RamRegion {
    fn end(&self) -> Gpa {
        Gpa(self.start.0 + self.len)
    }
}

/// The layout of guest RAM: one region, or two around the hole below 4 GiB.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RamLayout {
    regions: Vec<RamRegion>,
    total_bytes: u64,
}

impl RamLayout {
    /// Lays out `memory_bytes` bytes of RAM: up to 3 GiB from address 0, the rest from 4 GiB.
    ///
    /// # Errors
    /// When the size is 0, not a multiple of the page size, or over [`MAX_MEMORY_BYTES`].
    pub fn new(memory_bytes: u64) -> Result<Self, LayoutError> {
        if memory_bytes == 0 {
            return Err(LayoutError::Zero);
        }
        if !is_page_multiple(memory_bytes) {
            return Err(LayoutError::Unaligned(memory_bytes));
        }
        if memory_bytes > MAX_MEMORY_BYTES {
            return Err(LayoutError::TooLarge(memory_bytes));
        }
        let low = memory_bytes.min(HOLE_START.0);
        let mut regions = vec![RamRegion { start: Gpa(0), len: low, file_offset: 0 }];
        if memory_bytes > low {
            regions.push(RamRegion { start: HOLE_END, len: memory_bytes - low, file_offset: low });
        }
        Ok(Self { regions, total_bytes: memory_bytes })
    }

    /// The regions, by rising address.
    #[must_use]
    pub fn regions(&self) -> &[RamRegion] {
        &self.regions
    }

    /// The size of all regions together, in bytes.
    #[must_use]
    pub fn total_bytes(&self) -> u64 {
        self.total_bytes
    }

    /// One past the highest address of RAM.
    #[must_use]
    pub fn end_gpa(&self) -> Gpa {
        self.regions.last().map_or(Gpa(0), RamRegion::end)
    }

    /// All pages of RAM.
    pub(crate) fn all_pages(&self) -> PageRun {
        let pages = pages_in(self.total_bytes).and_then(|n| PageRun::new(PageIndex(0), n));
        pages.expect("1 to MAX_MEMORY_BYTES bytes were checked in `new`")
    }

    /// The page of this frame; `None` outside RAM.
    pub(crate) fn page_of(&self, gfn: Gfn) -> Option<PageIndex> {
        let gpa = gfn.gpa()?;
        let region =
            self.regions.iter().find(|region| region.start <= gpa && gpa < region.end())?;
        PageIndex::containing(region.file_offset + (gpa.0 - region.start.0))
    }

    /// The frame of this page, which must lie in RAM.
    pub(crate) fn gfn_of(&self, page: PageIndex) -> Gfn {
        let region = self.region_of(page);
        Gpa(region.start.0 + (page.file_offset() - region.file_offset)).gfn()
    }

    /// Where the guest has the pages of a run that lies in RAM: one range, or one on each side of the
    /// hole; address and length in bytes.
    pub(crate) fn guest_ranges(&self, run: PageRun) -> impl Iterator<Item = (Gpa, u64)> + use<> {
        let start = run.first().file_offset();
        let end = start + run.byte_len();
        let within = move |region: RamRegion| {
            let from = start.max(region.file_offset);
            let to = end.min(region.file_offset + region.len);
            (from < to).then(|| (Gpa(region.start.0 + (from - region.file_offset)), to - from))
        };
        self.regions.clone().into_iter().filter_map(within)
    }

    fn region_of(&self, page: PageIndex) -> &RamRegion {
        let split = self.regions.partition_point(|region| region.file_offset <= page.file_offset());
        // The first region begins at 0, so at least one lies at or before every page.
        &self.regions[split - 1]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::address::PAGE_SIZE;
    use proptest::prelude::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn sizes_that_cannot_be() {
        assert_eq!(RamLayout::new(0), Err(LayoutError::Zero));
        assert_eq!(RamLayout::new(4097), Err(LayoutError::Unaligned(4097)));
        let too_large = MAX_MEMORY_BYTES + PAGE_BYTES;
        assert_eq!(RamLayout::new(too_large), Err(LayoutError::TooLarge(too_large)));
        let message = RamLayout::new(4097).unwrap_err().to_string();
        assert!(message.contains("4097") && message.contains("4096"));
        assert!(RamLayout::new(MAX_MEMORY_BYTES).is_ok());
    }

    #[test]
    fn three_gib_are_one_region_and_a_page_more_makes_two() {
        let below = RamLayout::new(3 * GIB).unwrap();
        assert_eq!(below.regions().len(), 1);
        assert_eq!(below.end_gpa(), Gpa(3 * GIB));
        let above = RamLayout::new(3 * GIB + PAGE_BYTES).unwrap();
        let high = RamRegion { start: Gpa(4 * GIB), len: PAGE_BYTES, file_offset: 3 * GIB };
        assert_eq!(above.regions()[1..], [high]);
        assert_eq!(above.end_gpa(), Gpa(4 * GIB + PAGE_BYTES));
    }

    #[test]
    fn the_hole_has_no_pages() {
        let layout = RamLayout::new(4 * GIB).unwrap();
        let low_pages = (3 * GIB / PAGE_BYTES) as u32;
        assert_eq!(layout.page_of(Gpa(3 * GIB - 1).gfn()), Some(PageIndex(low_pages - 1)));
        assert_eq!(layout.page_of(Gpa(3 * GIB).gfn()), None);
        assert_eq!(layout.page_of(Gpa(4 * GIB - 1).gfn()), None);
        assert_eq!(layout.page_of(Gpa(4 * GIB).gfn()), Some(PageIndex(low_pages)));
        assert_eq!(layout.page_of(Gpa(5 * GIB).gfn()), None);
        assert_eq!(layout.page_of(Gfn(u64::MAX)), None);
    }

    proptest! {
        #[test]
        fn regions_tile_the_file_and_avoid_the_hole(pages in 1..=MAX_MEMORY_BYTES / PAGE_BYTES) {
            let layout = RamLayout::new(pages * PAGE_BYTES).unwrap();
            let mut offset = 0;
            for region in layout.regions() {
                prop_assert_eq!(region.file_offset, offset);
                prop_assert!(region.len > 0);
                prop_assert!(region.end() <= HOLE_START || region.start >= HOLE_END);
                offset += region.len;
            }
            prop_assert_eq!(offset, layout.total_bytes());
            prop_assert_eq!(u64::from(layout.all_pages().pages()), pages);
        }

        #[test]
        fn frames_and_pages_map_one_to_one(pages in 1..3 * 1024 * 1024_u32, pick: u32) {
            let layout = RamLayout::new(u64::from(pages) * PAGE_BYTES).unwrap();
            let page = PageIndex(pick % pages);
            prop_assert_eq!(layout.page_of(layout.gfn_of(page)), Some(page));
        }

        #[test]
        fn guest_ranges_have_every_page_once(pages in 786_400..786_500_u32, first in 786_380..786_400_u32, len in 1..90_u32) {
            let layout = RamLayout::new(u64::from(pages) * PAGE_BYTES).unwrap();
            let run = PageRun::new(PageIndex(first), len).unwrap();
            let Some(run) = run.intersect(layout.all_pages()) else { return Ok(()) };
            let frames = layout.guest_ranges(run).flat_map(|(gpa, bytes)| {
                (gpa.0..gpa.0 + bytes).step_by(PAGE_SIZE).map(|gpa| Gpa(gpa).gfn())
            });
            let expected: Vec<_> = run.iter().map(|page| layout.gfn_of(page)).collect();
            prop_assert_eq!(frames.collect::<Vec<_>>(), expected);
        }

        #[test]
        fn random_frames_never_panic(bytes in 1..64_u64, gfn: u64) {
            let layout = RamLayout::new(bytes * PAGE_BYTES).unwrap();
            prop_assert_eq!(layout.page_of(Gfn(gfn)).is_some(), gfn < bytes);
        }
    }
}

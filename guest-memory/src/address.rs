//! Guest addresses, frame numbers and all page arithmetic. Nothing else in this crate shifts or
//! masks an address.

use std::fmt;

/// The size of a guest page, in bytes.
pub const PAGE_BYTES: u64 = 1 << PAGE_SHIFT;
/// The size of a guest page as an array length.
pub const PAGE_SIZE: usize = PAGE_BYTES as usize;
const PAGE_SHIFT: u32 = 12;

/// The bytes of one page.
pub type PageBytes = [u8; PAGE_SIZE];

/// A guest physical address, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Gpa(pub u64);

/// A guest frame number: a guest physical address divided by [`PAGE_BYTES`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Gfn(pub u64);

impl Gpa {
    /// The frame that holds this address.
    #[must_use]
    pub const fn gfn(self) -> Gfn {
        Gfn(self.0 >> PAGE_SHIFT)
    }

    /// How far into its frame this address is, in bytes.
    #[must_use]
    pub const fn offset_in_page(self) -> usize {
        (self.0 % PAGE_BYTES) as usize
    }
}

impl Gfn {
    /// The address of the frame's first byte; `None` when it does not fit in 64 bits.
    #[must_use]
    pub const fn gpa(self) -> Option<Gpa> {
        match self.0.checked_mul(PAGE_BYTES) {
            Some(address) => Some(Gpa(address)),
            None => None,
        }
    }
}

impl fmt::Display for Gpa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::Display for Gfn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// Whether `bytes` is a whole number of pages.
pub(crate) const fn is_page_multiple(bytes: u64) -> bool {
    bytes.is_multiple_of(PAGE_BYTES)
}

/// How many whole pages `bytes` holds; `None` when there are more than 32 bits can count.
pub(crate) fn pages_in(bytes: u64) -> Option<u32> {
    u32::try_from(bytes >> PAGE_SHIFT).ok()
}

/// One page of guest RAM, counted in the order of the RAM file: the hole below 4 GiB has none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct PageIndex(pub(crate) u32);

impl PageIndex {
    /// The page that holds this byte of the RAM file; `None` beyond what an index can count.
    pub(crate) fn containing(file_offset: u64) -> Option<Self> {
        pages_in(file_offset).map(Self)
    }

    /// Where the page begins in the RAM file, in bytes.
    pub(crate) const fn file_offset(self) -> u64 {
        (self.0 as u64) << PAGE_SHIFT
    }
}

/// Pages that follow one another in the RAM file. Never empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PageRun {
    first: PageIndex,
    pages: u32,
}

impl PageRun {
    /// The run of `pages` pages from `first`; `None` when it is empty or its end overflows.
    pub(crate) fn new(first: PageIndex, pages: u32) -> Option<Self> {
        first.0.checked_add(pages)?;
        (pages > 0).then_some(Self { first, pages })
    }

    /// A single page.
    pub(crate) const fn single(page: PageIndex) -> Self {
        Self { first: page, pages: 1 }
    }

    /// The block of `block_pages` pages (a power of two) that holds `page`, aligned to its size.
    pub(crate) fn aligned_block(page: PageIndex, block_pages: u32) -> Self {
        let first = PageIndex(page.0 & !(block_pages - 1));
        let pages = block_pages.min(u32::MAX - first.0);
        Self { first, pages }
    }

    /// The pages of this run that are in `other`, too.
    pub(crate) fn intersect(self, other: Self) -> Option<Self> {
        let first = self.first.max(other.first);
        let end = self.end().min(other.end());
        Self::new(first, end.0.checked_sub(first.0)?)
    }

    /// The first `pages` pages of the run; `None` when that is none of them.
    pub(crate) fn prefix(self, pages: u32) -> Option<Self> {
        Self::new(self.first, pages.min(self.pages))
    }

    /// What is left without the first `pages` pages.
    pub(crate) fn suffix(self, pages: u32) -> Option<Self> {
        let left = self.pages.checked_sub(pages)?;
        Self::new(PageIndex(self.first.0 + pages), left)
    }

    /// The first page.
    pub(crate) const fn first(self) -> PageIndex {
        self.first
    }

    /// One past the last page.
    pub(crate) const fn end(self) -> PageIndex {
        PageIndex(self.first.0 + self.pages)
    }

    /// The number of pages.
    pub(crate) const fn pages(self) -> u32 {
        self.pages
    }

    /// The length in bytes.
    pub(crate) const fn byte_len(self) -> u64 {
        (self.pages as u64) << PAGE_SHIFT
    }

    /// Every page in turn.
    pub(crate) fn iter(self) -> impl DoubleEndedIterator<Item = PageIndex> {
        (self.first.0..self.end().0).map(PageIndex)
    }
}

/// Sorted pages, each once, as runs.
pub(crate) fn runs(pages: &[PageIndex]) -> impl Iterator<Item = PageRun> + '_ {
    pages.chunk_by(|a, b| a.0 + 1 == b.0).filter_map(|run| PageRun::new(run[0], run.len() as u32))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn run(first: u32, pages: u32) -> Option<PageRun> {
        PageRun::new(PageIndex(first), pages)
    }

    #[test]
    fn addresses_and_frames_agree() {
        assert_eq!(Gpa(0x1234_5678).gfn(), Gfn(0x12345));
        assert_eq!(Gpa(0x1234_5678).offset_in_page(), 0x678);
        assert_eq!(Gfn(0x12345).gpa(), Some(Gpa(0x1234_5000)));
        assert_eq!(Gfn(u64::MAX).gpa(), None);
        assert_eq!(PageIndex::containing(0x2fff), Some(PageIndex(2)));
        assert_eq!(PageIndex::containing(u64::MAX), None);
    }

    #[test]
    fn runs_are_never_empty_and_never_overflow() {
        assert_eq!(run(3, 0), None);
        assert_eq!(run(u32::MAX, 1), None);
        let five = run(10, 5).unwrap();
        assert_eq!(five.prefix(2), run(10, 2));
        assert_eq!(five.prefix(9), run(10, 5));
        assert_eq!(five.suffix(2), run(12, 3));
        assert_eq!(five.suffix(5), None);
        assert_eq!(five.suffix(6), None);
        assert_eq!(five.byte_len(), 5 * PAGE_BYTES);
    }

    proptest! {
        #[test]
        fn a_block_holds_its_page_and_is_aligned(page in 0..u32::MAX, shift in 0_u32..10) {
            let block = PageRun::aligned_block(PageIndex(page), 1 << shift);
            prop_assert!(block.first().0 <= page && page < block.end().0);
            prop_assert_eq!(block.first().0 % (1 << shift), 0);
        }

        #[test]
        fn intersections_are_the_common_pages(a in 0..40_u32, n in 1..40_u32, b in 0..40_u32, m in 1..40_u32) {
            let (left, right) = (run(a, n).unwrap(), run(b, m).unwrap());
            let expected: Vec<_> = left.iter().filter(|page| right.iter().any(|p| p == *page)).collect();
            let found: Vec<_> = left.intersect(right).into_iter().flat_map(PageRun::iter).collect();
            prop_assert_eq!(found, expected);
        }
    }
}

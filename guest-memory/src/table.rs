//! The state of every page of RAM: one atomic word each, and the checksum of its stored bytes, in
//! memory that is there only where it was written.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::address::{PageIndex, PageRun};
use crate::sys::ZeroedWords;
use crate::word::{PageState, PageWord, Taken};

/// What the table takes for each page that was touched, in bytes: its word, and the checksum.
pub(crate) const BYTES_PER_PAGE: u64 = 16;

/// All pages' words. An untouched page costs nothing, so that a large guest which touches as much as
/// a small one costs as much.
pub(crate) struct PageTable {
    words: ZeroedWords,
    checksums: ZeroedWords,
}

/// A word that edges are taken of, atomically. The table has the processor's; the models of loom have
/// theirs.
pub(crate) trait WordCell {
    /// The word now.
    fn load(&self) -> u64;
    /// Puts `new` in the place of `current`; the word that was there instead, if it was another.
    fn replace(&self, current: u64, new: u64) -> Result<(), u64>;
}

impl WordCell for AtomicU64 {
    fn load(&self) -> u64 {
        AtomicU64::load(self, Ordering::Acquire)
    }

    // Acquire and release: who takes a page over sees what its last owner did with it.
    fn replace(&self, current: u64, new: u64) -> Result<(), u64> {
        self.compare_exchange_weak(current, new, Ordering::AcqRel, Ordering::Acquire).map(drop)
    }
}

/// Follows an edge of one word and hands its verdict on; the edge may be tried several times. A word
/// that does not change is not written, so that its memory stays untouched.
pub(crate) fn edge<V>(cell: &impl WordCell, mut edge: impl FnMut(&mut PageWord) -> V) -> V {
    let mut current = cell.load();
    loop {
        let mut word = PageWord::from_bits(current);
        let verdict = edge(&mut word);
        if word.bits() == current {
            return verdict;
        }
        match cell.replace(current, word.bits()) {
            Ok(()) => return verdict,
            Err(found) => current = found,
        }
    }
}

impl PageTable {
    /// A table of `pages` untouched pages.
    pub(crate) fn new(pages: u32) -> io::Result<Self> {
        let words = || ZeroedWords::new(pages as usize);
        Ok(Self { words: words()?, checksums: words()? })
    }

    /// The word of a page of RAM as it is now.
    pub(crate) fn word(&self, page: PageIndex) -> PageWord {
        PageWord::from_bits(WordCell::load(self.cell(page)))
    }

    /// Where a page is in its life.
    pub(crate) fn state(&self, page: PageIndex) -> PageState {
        self.word(page).state()
    }

    /// Follows an edge of one page's word, see [`edge`].
    pub(crate) fn edge<V>(&self, page: PageIndex, taken: impl FnMut(&mut PageWord) -> V) -> V {
        edge(self.cell(page), taken)
    }

    /// The checksum of the page's slot. Only the page's owner, and in Storing who stores it, asks.
    pub(crate) fn checksum(&self, page: PageIndex) -> u64 {
        self.checksums.cells()[page.0 as usize].load(Ordering::Acquire)
    }

    /// Keeps the checksum of the page's slot; for the page's owner.
    pub(crate) fn set_checksum(&self, page: PageIndex, checksum: u64) {
        self.checksums.cells()[page.0 as usize].store(checksum, Ordering::Release);
    }

    /// Takes the untouched pages around the untouched `page`, which the caller owns, as far as they
    /// follow one another within `bounds`; all of the run are the caller's then.
    pub(crate) fn claim_zeros_around(&self, page: PageIndex, bounds: PageRun) -> PageRun {
        let claim = |page: &PageIndex| self.edge(*page, PageWord::claim_zero) == Taken::Yes;
        let before = bounds.iter().rev().skip_while(|p| *p >= page);
        let after = bounds.iter().skip_while(|p| *p <= page);
        let first = before.take_while(claim).last().unwrap_or(page);
        let last = after.take_while(claim).last().unwrap_or(page);
        PageRun::new(first, last.0 - first.0 + 1).unwrap_or(PageRun::single(page))
    }

    /// Takes the untouched pages at the beginning of `run`, at most `max_pages`.
    pub(crate) fn claim_zero_prefix(&self, run: PageRun, max_pages: u32) -> Option<PageRun> {
        let claim = |page: &PageIndex| self.edge(*page, PageWord::claim_zero) == Taken::Yes;
        let within = run.prefix(max_pages)?;
        within.prefix(within.iter().take_while(claim).count() as u32)
    }

    /// The cell of a page's word.
    pub(crate) fn cell(&self, page: PageIndex) -> &AtomicU64 {
        &self.words.cells()[page.0 as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn fault_around_takes_the_untouched_neighbours(touched in prop::collection::btree_set(0..64_u32, 0..20), page in 0..64_u32) {
            prop_assume!(!touched.contains(&page));
            let table = PageTable::new(64).unwrap();
            for page in touched.iter().chain([&page]) {
                prop_assert_eq!(table.edge(PageIndex(*page), PageWord::claim_zero), Taken::Yes);
            }
            let bounds = PageRun::aligned_block(PageIndex(page), 16);
            let run = table.claim_zeros_around(PageIndex(page), bounds);
            prop_assert_eq!(run.intersect(bounds), Some(run));
            prop_assert!(run.iter().any(|p| p.0 == page));
            prop_assert!(run.iter().all(|p| !touched.contains(&p.0)));
            prop_assert!(run.iter().all(|p| table.state(p) == PageState::Installing));
            // It cannot be longer: what follows on both sides is touched or outside the block.
            let outside = |p: u32| p < bounds.first().0 || p >= bounds.end().0 || touched.contains(&p);
            prop_assert!(outside(run.first().0.wrapping_sub(1)) && outside(run.end().0));
        }
    }

    #[test]
    fn edges_of_many_threads_are_each_taken_once() {
        let table = PageTable::new(1).unwrap();
        let taken = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4)
                .map(|_| scope.spawn(|| table.edge(PageIndex(0), PageWord::claim_zero)))
                .collect();
            threads.into_iter().map(|t| t.join().unwrap()).collect::<Vec<_>>()
        });
        assert_eq!(taken.iter().filter(|t| **t == Taken::Yes).count(), 1);
    }
}

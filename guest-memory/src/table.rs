//! The state of every page of RAM: one word each, in memory that is there only where it was written.

use std::io;

use crate::address::{PageIndex, PageRun};
use crate::state::{PageState, PageWord};
use crate::sys::ZeroedWords;

/// All pages' words. An untouched page costs nothing, so that a large guest which touches as much as
/// a small one costs as much.
pub(crate) struct PageTable {
    words: ZeroedWords,
}

impl PageTable {
    /// A table of `pages` untouched pages.
    pub(crate) fn new(pages: u32) -> io::Result<Self> {
        Ok(Self { words: ZeroedWords::new(pages as usize)? })
    }

    /// The state of a page of RAM.
    pub(crate) fn state(&self, page: PageIndex) -> PageState {
        self.word(page).state()
    }

    /// Follows an edge of one page's word and hands its verdict on. A word that does not change is
    /// not written, so that its memory stays untouched.
    pub(crate) fn edge<V>(&mut self, page: PageIndex, edge: impl FnOnce(&mut PageWord) -> V) -> V {
        let mut word = self.word(page);
        let verdict = edge(&mut word);
        if word != self.word(page) {
            self.words[page.0 as usize] = word.bits();
        }
        verdict
    }

    /// The longest run of untouched pages around the untouched `page` within `bounds`.
    pub(crate) fn zero_run_around(&self, page: PageIndex, bounds: PageRun) -> PageRun {
        let is_zero = |page: &PageIndex| self.state(*page) == PageState::Zero;
        let before = bounds.iter().rev().skip_while(|p| *p >= page);
        let after = bounds.iter().skip_while(|p| *p <= page);
        let first = before.take_while(is_zero).last().unwrap_or(page);
        let last = after.take_while(is_zero).last().unwrap_or(page);
        PageRun::new(first, last.0 - first.0 + 1).unwrap_or(PageRun::single(page))
    }

    /// The longest run of untouched pages at the beginning of `run`, of at most `max_pages`.
    pub(crate) fn zero_prefix(&self, run: PageRun, max_pages: u32) -> Option<PageRun> {
        let is_zero = |page: &PageIndex| self.state(*page) == PageState::Zero;
        let within = run.prefix(max_pages)?;
        within.prefix(within.iter().take_while(is_zero).count() as u32)
    }

    fn word(&self, page: PageIndex) -> PageWord {
        PageWord::from_bits(self.words[page.0 as usize])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::OnInstalled;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn fault_around_takes_the_untouched_neighbours(touched in prop::collection::btree_set(0..64_u32, 0..20), page in 0..64_u32) {
            prop_assume!(!touched.contains(&page));
            let mut table = PageTable::new(64).unwrap();
            for page in &touched {
                prop_assert_eq!(table.edge(PageIndex(*page), PageWord::installed), OnInstalled::First);
            }
            let bounds = PageRun::aligned_block(PageIndex(page), 16);
            let run = table.zero_run_around(PageIndex(page), bounds);
            prop_assert_eq!(run.intersect(bounds), Some(run));
            prop_assert!(run.iter().any(|p| p.0 == page));
            prop_assert!(run.iter().all(|p| !touched.contains(&p.0)));
            // It cannot be longer: what follows on both sides is touched or outside the block.
            let outside = |p: u32| p < bounds.first().0 || p >= bounds.end().0 || touched.contains(&p);
            prop_assert!(outside(run.first().0.wrapping_sub(1)) && outside(run.end().0));
        }
    }
}

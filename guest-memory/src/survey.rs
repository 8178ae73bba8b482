//! In which states the pages of RAM are, part by part: a look at the table that takes nothing and changes
//! nothing.

use crate::address::{PageIndex, PageRun};
use crate::stores::Slot;
use crate::table::PageTable;
use crate::word::{PageState, PageWord};

/// The most pages that one survey looks at: of more, a sample. A page of the store costs some 50 ns.
const MAX_LOOKS: u32 = 1 << 18;
/// A sample is of runs of so many pages: their words share cache lines and pages of the table.
const RUN_PAGES: u32 = 64;

/// How many pages are in which state. Each page that was looked at is in one of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct PageCounts {
    /// The guest can access them.
    pub mapped: u32,
    /// Likewise, and they are not to leave.
    pub pinned: u32,
    /// In memory, and the guest has to fault on them.
    pub idle: u32,
    /// In the store, which has them at hand (compressed in memory, or all one word).
    pub at_hand: u32,
    /// In the store, which needs time for them.
    pub stored: u32,
    /// Never touched.
    pub absent: u32,
    /// On their way in or out.
    pub under_way: u32,
    /// Their bytes are lost.
    pub lost: u32,
}

impl PageCounts {
    fn count(&mut self, word: PageWord, at_hand: impl FnOnce(Slot) -> bool) {
        use PageState as S;
        let of = match word.state() {
            S::Zero => &mut self.absent,
            S::Mapped if word.pins() > 0 => &mut self.pinned,
            S::Mapped => &mut self.mapped,
            S::Idle => &mut self.idle,
            S::Installing | S::Unmapping | S::Storing | S::Dropping | S::Fetching => {
                &mut self.under_way
            }
            S::Stored if word.slot().is_some_and(at_hand) => &mut self.at_hand,
            S::Stored => &mut self.stored,
            S::Failed => &mut self.lost,
        };
        *of += 1;
    }
}

/// One of the equal parts of RAM that a survey divides it into.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct SurveyCell {
    /// How many pages it has.
    pub pages: u32,
    /// How many of them were looked at.
    pub looked_at: u32,
    /// The states of these.
    #[serde(flatten)]
    pub counts: PageCounts,
}

/// RAM from its first page to its last; the hole below 4 GiB is no part of it.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Survey {
    /// How many pages RAM has.
    pub pages: u32,
    /// Not every page was looked at: the counts are of runs of pages, evenly spread.
    pub sampled: bool,
    /// The parts, by rising page.
    pub cells: Vec<SurveyCell>,
}

/// Looks at RAM in this many parts, or as many as it has pages. `at_hand` must not wait.
pub(crate) fn survey(
    table: &PageTable,
    all: PageRun,
    cells: u32,
    at_hand: impl Fn(Slot) -> bool,
) -> Survey {
    let (pages, cells) = (all.pages(), cells.clamp(1, all.pages()));
    let most = (MAX_LOOKS / cells).max(RUN_PAGES);
    let bound = |cell: u32| (u64::from(cell) * u64::from(pages) / u64::from(cells)) as u32;
    let cells = (0..cells).filter_map(|cell| {
        let run = all.suffix(bound(cell))?.prefix(bound(cell + 1) - bound(cell))?;
        let mut counts = PageCounts::default();
        let mut looked_at = 0;
        for page in sample(run, most) {
            counts.count(table.word(page), &at_hand);
            looked_at += 1;
        }
        Some(SurveyCell { pages: run.pages(), looked_at, counts })
    });
    let cells: Vec<_> = cells.collect();
    Survey { pages, sampled: cells.iter().any(|cell| cell.looked_at < cell.pages), cells }
}

/// The pages of a run, or `most` of them or a few less, in runs that are evenly spread.
fn sample(run: PageRun, most: u32) -> impl Iterator<Item = PageIndex> {
    let (runs, length) = match run.pages() <= most {
        true => (1, run.pages()),
        false => (most / RUN_PAGES, RUN_PAGES),
    };
    let start = move |part: u32| u64::from(part) * u64::from(run.pages()) / u64::from(runs);
    let parts = (0..runs).filter_map(move |part| run.suffix(start(part) as u32)?.prefix(length));
    parts.flat_map(PageRun::iter)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::word::{OnFault, OnPin, OnSettled, OnStored, OnUnmapped, Taken};
    use proptest::prelude::*;

    fn all(pages: u32) -> PageRun {
        PageRun::new(PageIndex(0), pages).unwrap()
    }

    fn map(table: &PageTable, page: u32) {
        assert_eq!(table.edge(PageIndex(page), PageWord::claim_zero), Taken::Yes);
        let OnSettled { .. } = table.edge(PageIndex(page), PageWord::installed);
    }

    fn unmap(table: &PageTable, page: u32) {
        assert_eq!(table.edge(PageIndex(page), PageWord::begin_unmap), Taken::Yes);
        assert_eq!(table.edge(PageIndex(page), |w| w.unmapped(false)), OnUnmapped::Idle);
    }

    /// Leaves the page Dropping.
    fn store(table: &PageTable, page: u32, slot: u32) {
        let generation = table.edge(PageIndex(page), PageWord::begin_store).unwrap();
        let stored = table.edge(PageIndex(page), |w| w.stored(generation, Slot(slot)));
        assert_eq!(stored, OnStored::Drop { older: None });
    }

    #[test]
    fn every_state_is_counted_as_what_it_means() {
        let table = PageTable::new(10).unwrap();
        for page in 0..8 {
            map(&table, page);
        }
        assert_eq!(table.edge(PageIndex(1), PageWord::pin), OnPin::Pinned);
        for page in 2..8 {
            unmap(&table, page);
        }
        for page in 3..8 {
            store(&table, page, page);
        }
        for page in 4..8 {
            let _ = table.edge(PageIndex(page), PageWord::dropped);
        }
        // 6 is being fetched; 7 was, and is lost.
        for page in [6, 7] {
            let fault = table.edge(PageIndex(page), |w| w.fault(|_| false));
            assert!(matches!(fault, OnFault::StartFetch(..)));
        }
        let _ = table.edge(PageIndex(7), PageWord::failed);
        let survey = survey(&table, all(10), 1, |slot| slot == Slot(4));
        let counts = PageCounts {
            mapped: 1,
            pinned: 1,
            idle: 1,
            at_hand: 1,
            stored: 1,
            absent: 2,
            under_way: 2,
            lost: 1,
        };
        let cell = SurveyCell { pages: 10, looked_at: 10, counts };
        assert_eq!(survey, Survey { pages: 10, sampled: false, cells: vec![cell] });
    }

    #[test]
    fn a_large_table_is_sampled_evenly_and_stays_untouched() {
        let pages = 16 << 20;
        let table = PageTable::new(pages).unwrap();
        // The second half of RAM.
        for page in (pages / 2..pages).step_by(64) {
            map(&table, page);
        }
        for cells in [1, 2, 64, 1024] {
            let survey = survey(&table, all(pages), cells, |_| false);
            assert!(survey.sampled);
            let looked: u32 = survey.cells.iter().map(|cell| cell.looked_at).sum();
            assert!((MAX_LOOKS / 2..=MAX_LOOKS).contains(&looked), "{looked} of {cells} cells");
            let mapped = |cells: &[SurveyCell]| cells.iter().map(|c| c.counts.mapped).sum::<u32>();
            if cells > 1 {
                let (low, high) = survey.cells.split_at(cells as usize / 2);
                assert_eq!(mapped(low), 0);
                assert_eq!(mapped(high), looked / 2 / 64);
            }
        }
    }

    proptest! {
        #[test]
        fn cells_are_equal_parts_of_all_pages(pages in 1..2000_u32, cells in 0..1100_u32, touched in prop::collection::btree_set(0..2000_u32, 0..50)) {
            let table = PageTable::new(pages).unwrap();
            let touched: Vec<u32> = touched.into_iter().filter(|page| *page < pages).collect();
            for page in &touched {
                map(&table, *page);
            }
            let survey = survey(&table, all(pages), cells, |_| false);
            prop_assert_eq!(survey.cells.len() as u32, cells.clamp(1, pages));
            prop_assert_eq!(survey.cells.iter().map(|cell| cell.pages).sum::<u32>(), pages);
            let sizes: Vec<u32> = survey.cells.iter().map(|cell| cell.pages).collect();
            prop_assert!(sizes.iter().max().unwrap() - sizes.iter().min().unwrap() <= 1);
            prop_assert_eq!(survey.cells.iter().map(|c| c.counts.mapped as usize).sum::<usize>(), touched.len());
            prop_assert!(survey.cells.iter().all(|c| c.looked_at == c.pages && !survey.sampled));
        }

        #[test]
        fn a_sample_is_of_different_pages_of_the_run(first in 0..5000_u32, pages in 1..100_000_u32, most in RUN_PAGES..5000) {
            let run = PageRun::new(PageIndex(first), pages).unwrap();
            let sampled: Vec<PageIndex> = sample(run, most).collect();
            prop_assert!(sampled.windows(2).all(|pair| pair[0] < pair[1]));
            prop_assert!(sampled.iter().all(|page| (first..first + pages).contains(&page.0)));
            let least = pages.min(most / RUN_PAGES * RUN_PAGES);
            prop_assert!(sampled.len() as u32 >= least && sampled.len() as u32 <= most.max(1));
        }
    }
}

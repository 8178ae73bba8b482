//! Pages that left together come back together: candidates for prefetch.

use super::word::Ghost;
use super::{PageIndex, Policy};

/// The most candidates of one call.
const MAX_NEIGHBOURS: usize = 8;
/// How far a neighbour may be, in pages to either side.
const REACH: u32 = 8;
/// Batch numbers come again; two evictions of one batch are not further apart than this.
const MAX_BATCH_EVICTIONS: u32 = 1 << 16;

impl Policy {
    /// Appends the pages close to the evicted `page` that were evicted in its batch and are still
    /// out, nearest first; at most 8. To be asked before `page` is reported as entered, which
    /// forgets its batch.
    pub(crate) fn prefetch_neighbours(&self, page: PageIndex, pages: &mut Vec<PageIndex>) {
        let Some(ghost) = self.lists.word(page).as_ghost() else {
            return;
        };
        let behind = |distance| page.0.checked_add(distance);
        let before = |distance| page.0.checked_sub(distance);
        let near = (1..=REACH).flat_map(|distance| [behind(distance), before(distance)]);
        let candidates = near.flatten().map(PageIndex).filter(|near| {
            let other = self.lists.word(*near).as_ghost();
            other.is_some_and(|other| left_together(ghost, other))
        });
        pages.extend(candidates.take(MAX_NEIGHBOURS));
    }
}

fn left_together(a: Ghost, b: Ghost) -> bool {
    let apart = a.clock.wrapping_sub(b.clock);
    a.batch == b.batch && apart.min(apart.wrapping_neg()) < MAX_BATCH_EVICTIONS
}

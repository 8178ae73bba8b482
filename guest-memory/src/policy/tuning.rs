//! The policy's shares of the resident limit.
//!
//! Chosen on the traces of `hit_ratios`, mainly Zipf(1.0) in a quarter of the memory:
//!
//! | idle part | hit ratio | idle faults per access |
//! |-----------|-----------|------------------------|
//! | 20 %      | 0.836     | 0.035                  |
//! | 30 %      | 0.840     | 0.053                  |
//! | 40 %      | 0.842     | 0.076                  |
//!
//! S3-FIFO's own small queue has 10 %: 0.836, and only the working sets that change quickly gain by it
//! (0.858 instead of 0.854). A small queue that grows and shrinks with the refaults of its own
//! victims and those of main, as in ARC, won 0.01 there and lost as much to scans: it is not here.
//! A ghost window of 30 % gives 0.844, but scans in bursts then fall from 0.57 to 0.49.

/// Shares in percent, unless told otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tuning {
    /// Idle pages of both queues, of the resident limit: more of them see more and cost more faults.
    pub(crate) idle_percent: u32,
    /// The small queue, mapped and idle, of the resident limit: more of it adapts faster to new
    /// pages, and gives a scan more to flush.
    pub(crate) small_percent: u32,
    /// The mapped part of the small queue, of that queue: its pages beyond this are aged before
    /// those of main.
    pub(crate) small_mapped_percent: u32,
    /// A page that comes back after fewer evictions than this, of the resident limit, was evicted
    /// too early: it goes to main.
    pub(crate) ghost_percent: u32,
    /// Pages, not percent: how many may be aged for each page that comes in. One of them is evicted
    /// in the long run, the others may be touched: a bound for the idle faults.
    pub(crate) ageings_per_entry: u32,
}

impl Default for Tuning {
    fn default() -> Self {
        Self {
            idle_percent: 30,
            small_percent: 5,
            small_mapped_percent: 30,
            ghost_percent: 100,
            ageings_per_entry: 2,
        }
    }
}

impl Tuning {
    /// The idle pages: at least one, so that an eviction finds something.
    pub(super) fn idle(&self, capacity: u32) -> u32 {
        share(capacity, self.idle_percent).max(1)
    }

    /// The most pages to be mapped.
    pub(super) fn mapped(&self, capacity: u32) -> u32 {
        capacity.saturating_sub(self.idle(capacity))
    }

    /// The most pages in the small queue.
    pub(super) fn small(&self, capacity: u32) -> u32 {
        share(capacity, self.small_percent)
    }

    /// The most mapped pages in the small queue.
    pub(super) fn small_mapped(&self, capacity: u32) -> u32 {
        share(self.small(capacity), self.small_mapped_percent)
    }

    /// The window of recent evictions.
    pub(super) fn ghosts(&self, capacity: u32) -> u32 {
        share(capacity, self.ghost_percent)
    }
}

fn share(pages: u32, percent: u32) -> u32 {
    let share = u64::from(pages) * u64::from(percent) / 100;
    u32::try_from(share).unwrap_or(u32::MAX)
}

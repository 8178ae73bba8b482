//! The policy's shares of the resident limit.
//!
//! Chosen on the traces of `hit_ratios`. S3-FIFO itself has a small queue of 10 % and ghosts as many
//! as pages in the main queue. Here half of that small queue does as well or better on each trace,
//! and a larger idle part buys little: 20, 30 and 40 % gave hit ratios of 0.836, 0.840 and 0.842 on
//! Zipf(1.0) in a quarter of the memory, for 0.035, 0.053 and 0.077 idle faults per access. A small
//! queue that grew with the refaults of its own victims, as in ARC, was no better.

/// Shares in percent.
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
}

impl Default for Tuning {
    fn default() -> Self {
        Self { idle_percent: 30, small_percent: 5, small_mapped_percent: 30, ghost_percent: 100 }
    }
}

impl Tuning {
    /// The most pages to be mapped: there is always room for an idle one, so that an eviction finds
    /// something.
    pub(super) fn mapped(&self, capacity: u32) -> u32 {
        capacity.saturating_sub(share(capacity, self.idle_percent).max(1))
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

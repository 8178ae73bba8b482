//! The policy's shares of the resident limit.

/// Shares in percent of the resident limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tuning {
    /// Idle pages, of all queues.
    pub(crate) idle_percent: u32,
    /// The small queue, mapped and idle.
    pub(crate) small_percent: u32,
    /// The mapped part of the small queue: beyond it its pages are aged before those of main.
    pub(crate) mapped_small_percent: u32,
    /// A page that comes back after fewer evictions than this was evicted too early.
    pub(crate) ghost_percent: u32,
    /// The most rounds that a heated page stays mapped without being looked at.
    pub(crate) max_skip: u8,
}

impl Default for Tuning {
    fn default() -> Self {
        Self {
            idle_percent: 20,
            small_percent: 10,
            mapped_small_percent: 3,
            ghost_percent: 100,
            max_skip: 3,
        }
    }
}

impl Tuning {
    /// The most pages to be mapped.
    pub(super) fn mapped(&self, capacity: u32) -> u32 {
        capacity - share(capacity, self.idle_percent)
    }

    /// The most pages in the small queue.
    pub(super) fn small(&self, capacity: u32) -> u32 {
        share(capacity, self.small_percent)
    }

    /// The most mapped pages in the small queue.
    pub(super) fn mapped_small(&self, capacity: u32) -> u32 {
        share(capacity, self.mapped_small_percent)
    }

    /// The window of recent evictions.
    pub(super) fn ghosts(&self, capacity: u32) -> u32 {
        let pages = u64::from(capacity) * u64::from(self.ghost_percent) / 100;
        u32::try_from(pages).unwrap_or(u32::MAX)
    }
}

/// At most `pages`.
fn share(pages: u32, percent: u32) -> u32 {
    (u64::from(pages) * u64::from(percent.min(100)) / 100) as u32
}

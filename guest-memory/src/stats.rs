//! What the pager counts.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::address::PAGE_BYTES;
use crate::stores::TierReport;

/// Declares the counters once: the atomics that the pager writes, and the snapshot that others read.
macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// A snapshot of the pager's counters.
        #[derive(Clone, Debug, Default, serde::Serialize)]
        pub struct PagerStats {
            /// Guest RAM, in bytes.
            pub total_bytes: u64,
            /// Guest RAM that is in memory now, in bytes: what the host keeps for the RAM file.
            pub resident_bytes: u64,
            /// The resident limit, in bytes.
            pub resident_limit_bytes: Option<u64>,
            /// Host memory that holds stored pages, in bytes; counts towards the limit.
            pub store_memory_bytes: u64,
            /// Evictions fail, and the limit may be exceeded for it.
            pub limit_exceeded: bool,
            /// Bytes of guest pages that are in the store only.
            pub stored_bytes: u64,
            /// Mapped pages, as far as a limit has the pager know.
            pub mapped_pages: u64,
            /// Idle pages, likewise.
            pub idle_pages: u64,
            /// Pages that came back so soon that they should not have been evicted.
            pub refaults: u64,
            /// What the pager keeps for each page that was touched or stored, in bytes; what the store
            /// keeps for its slots is in `tiers`.
            pub pager_bytes_per_page: u64,
            /// What each tier of the store did, the front one first.
            pub tiers: Vec<TierReport>,
            /// How long fetches took, from the worker's start to the bytes.
            pub fetch_latency: LatencyBuckets,
            $($(#[$doc])* pub $name: u64,)*
        }

        /// The counters behind [`PagerStats`]; see there.
        #[derive(Debug, Default)]
        pub(crate) struct Counters {
            pub(crate) stored_pages: Counter,
            pub(crate) fetch_latency: Latency,
            $(pub(crate) $name: Counter,)*
        }

        impl Counters {
            /// The snapshot, with what only the caller knows.
            pub(crate) fn snapshot(&self, total_bytes: u64, resident_bytes: u64) -> PagerStats {
                PagerStats {
                    total_bytes,
                    resident_bytes,
                    stored_bytes: self.stored_pages.get() * PAGE_BYTES,
                    fetch_latency: self.fetch_latency.snapshot(),
                    $($name: self.$name.get(),)*
                    ..PagerStats::default()
                }
            }
        }
    };
}

counters! {
    /// Pages that were ever installed, for whatever reason; each counts once.
    pages_touched,
    /// Pages that the loader had written before the start.
    pages_loaded,
    /// userfaultfd messages of the kind *missing* (no page in the RAM file).
    messages_missing,
    /// userfaultfd messages of the kind *minor* (a page in the RAM file, but not mapped).
    messages_minor,
    /// Messages for a page for which another message or fetch was under way already.
    messages_joined,
    /// Messages for a page that was mapped already.
    messages_duplicate,
    /// Faults answered with a zero page.
    zero_faults,
    /// Zero pages installed along with another page's fault.
    fault_around_pages,
    /// First passes that found the page in the RAM file.
    hits_idle,
    /// First passes that filled the page from a store that had it at hand.
    hits_stored,
    /// First passes that found another thread at the page.
    joined,
    /// First passes that left the page to a second one.
    retries,
    /// Pages of which only the mapping was missing: the host had taken it.
    remapped_pages,
    /// Pages fetched from the store by second passes.
    fetched_pages,
    /// Of these, pages that were fetched ahead of a fault.
    prefetched_pages,
    /// Pages taken out of the guest mapping.
    unmapped_pages,
    /// Pages moved to the store.
    evicted_pages,
    /// Of these, pages whose older copy in the store was still good.
    clean_pages,
    /// Pages that were used while they were written to the store.
    late_stores,
    /// Fetches under way now.
    outstanding,
    /// The most fetches that were under way at once.
    outstanding_max,
    /// Installations that the kernel put off (EAGAIN).
    install_retries,
    /// Tries to fill or map a page that the host had no memory for; each was made again.
    memory_waits,
    /// Markers put on pages.
    markers,
    /// Markers that the kernel refused.
    marker_errors,
    /// Reads of the store that failed; each was tried again.
    read_errors,
    /// Pages that the store did not take.
    write_errors,
    /// Slots that the store would not free.
    free_errors,
}

impl Counters {
    /// Fetches of so many pages began.
    pub(crate) fn fetches_began(&self, pages: u64) {
        self.outstanding.add(pages);
        self.outstanding_max.raise_to(self.outstanding.get());
    }
}

/// A counter that many threads write and everybody reads.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    // Relaxed everywhere: a counter orders nothing, and readers want a rough picture.
    pub(crate) fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    pub(crate) fn sub(&self, n: u64) {
        self.0.fetch_sub(n, Ordering::Relaxed);
    }

    pub(crate) fn raise_to(&self, n: u64) {
        self.0.fetch_max(n, Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Upper bounds of the buckets of a [`LatencyBuckets`], in microseconds; one more is without bound.
pub const LATENCY_BOUNDS_US: [u64; 12] =
    [10, 30, 100, 300, 1_000, 3_000, 10_000, 30_000, 100_000, 300_000, 1_000_000, 10_000_000];

/// How many of something took how long.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct LatencyBuckets {
    /// For each of [`LATENCY_BOUNDS_US`] how many took at most that and more than the one before; and
    /// how many took longer.
    pub counts: [u64; LATENCY_BOUNDS_US.len() + 1],
    /// All together, in microseconds.
    pub sum_us: u64,
}

/// The counters behind a [`LatencyBuckets`].
#[derive(Debug, Default)]
pub(crate) struct Latency {
    counts: [Counter; LATENCY_BOUNDS_US.len() + 1],
    sum_us: Counter,
}

impl Latency {
    pub(crate) fn record(&self, took: Duration) {
        let us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        let bucket = LATENCY_BOUNDS_US.partition_point(|bound| *bound < us);
        self.counts[bucket].add(1);
        self.sum_us.add(us);
    }

    pub(crate) fn snapshot(&self) -> LatencyBuckets {
        LatencyBuckets {
            counts: std::array::from_fn(|bucket| self.counts[bucket].get()),
            sum_us: self.sum_us.get(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn latencies_fall_into_their_buckets() {
        let latency = Latency::default();
        for us in [0, 10, 11, 20_000_000] {
            latency.record(Duration::from_micros(us));
        }
        let buckets = latency.snapshot();
        assert_eq!((buckets.counts[0], buckets.counts[1], buckets.counts[12]), (2, 1, 1));
        assert_eq!(buckets.sum_us, 20_000_021);
    }
}

//! Since when each fetch has been under way: a bounded list without a lock, one word a fetch.
//!
//! A fetch begins when its page is Fetching and its work is made, so that its wait for a worker counts;
//! it ends with the work, however often that was done again in between.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::stats::Counter;
use crate::sys::ZeroedWords;

/// Fetches that can be listed at once; any more are only counted.
const SLOTS: usize = 4096;
/// How many slots a fetch looks at for a free one.
const PROBES: u64 = 16;

/// Upper bounds of the ages of [`FetchAges`], in microseconds; one more is without bound.
pub const AGE_BOUNDS_US: [u64; 4] = [1_000, 10_000, 100_000, 1_000_000];

/// How long the fetches that are under way have been.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FetchAges {
    /// For each of [`AGE_BOUNDS_US`] how many are younger than that and not younger than the one before;
    /// and how many are older.
    pub counts: [u64; AGE_BOUNDS_US.len() + 1],
    /// Fetches of unknown age: there were too many at once.
    pub unknown: u64,
    /// The age of the oldest; zero without any.
    pub oldest: Duration,
}

/// The fetches that are under way.
pub(crate) struct Fetches {
    base: Instant,
    /// When each began, in nanoseconds since the base, and 1 more; 0: free.
    began: ZeroedWords,
    next: AtomicU64,
    unlisted: Counter,
}

/// A fetch that is under way, until this is dropped.
pub(crate) struct Begun {
    fetches: Arc<Fetches>,
    slot: Option<usize>,
}

impl Fetches {
    /// None yet.
    pub(crate) fn new() -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            base: Instant::now(),
            began: ZeroedWords::new(SLOTS)?,
            next: AtomicU64::new(0),
            unlisted: Counter::default(),
        }))
    }

    /// One begins.
    pub(crate) fn begin(self: &Arc<Self>) -> Begun {
        let began = self.nanos(Instant::now()) + 1;
        let from = self.next.fetch_add(1, Ordering::Relaxed);
        let slots = (0..PROBES).map(|probe| (from.wrapping_add(probe) % SLOTS as u64) as usize);
        let take = |slot: &usize| {
            let cell = &self.began.cells()[*slot];
            // The word stands for itself: it orders nothing else.
            cell.compare_exchange(0, began, Ordering::Relaxed, Ordering::Relaxed).is_ok()
        };
        let slot = slots.into_iter().find(take);
        if slot.is_none() {
            self.unlisted.add(1);
        }
        Begun { fetches: Arc::clone(self), slot }
    }

    /// How old they are.
    pub(crate) fn ages(&self, now: Instant) -> FetchAges {
        let now = self.nanos(now);
        let mut ages = FetchAges { unknown: self.unlisted.get(), ..FetchAges::default() };
        for cell in self.began.cells() {
            let Some(began) = cell.load(Ordering::Relaxed).checked_sub(1) else { continue };
            let age = Duration::from_nanos(now.saturating_sub(began));
            let bucket = AGE_BOUNDS_US.partition_point(|us| Duration::from_micros(*us) <= age);
            ages.counts[bucket] += 1;
            ages.oldest = ages.oldest.max(age);
        }
        ages
    }

    fn nanos(&self, at: Instant) -> u64 {
        u64::try_from(at.saturating_duration_since(self.base).as_nanos()).unwrap_or(u64::MAX - 1)
    }
}

impl Drop for Begun {
    fn drop(&mut self) {
        match self.slot {
            Some(slot) => self.fetches.began.cells()[slot].store(0, Ordering::Relaxed),
            None => self.fetches.unlisted.sub(1),
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn ages_fall_into_their_buckets_until_the_end_of_the_fetch() {
        let fetches = Fetches::new().unwrap();
        assert_eq!(fetches.ages(Instant::now()), FetchAges::default());
        let (first, second) = (fetches.begin(), fetches.begin());
        let began = fetches.began.cells()[0].load(Ordering::Relaxed) - 1;
        fetches.began.cells()[1].store(began + 1, Ordering::Relaxed);
        let at = |us: u64| {
            fetches.ages(fetches.base + Duration::from_nanos(began) + Duration::from_micros(us))
        };
        assert_eq!(at(0).counts, [2, 0, 0, 0, 0]);
        assert_eq!(at(999).counts, [2, 0, 0, 0, 0]);
        assert_eq!(at(2_000).counts, [0, 2, 0, 0, 0]);
        assert_eq!(at(20_000).counts, [0, 0, 2, 0, 0]);
        assert_eq!(at(200_000).counts, [0, 0, 0, 2, 0]);
        assert_eq!(at(2_000_000).counts, [0, 0, 0, 0, 2]);
        assert_eq!(at(2_000_000).oldest, Duration::from_secs(2));
        drop(first);
        assert_eq!(at(2_000).counts, [0, 1, 0, 0, 0]);
        drop(second);
        assert_eq!(at(2_000), FetchAges::default());
    }

    #[test]
    fn what_does_not_fit_is_counted_and_slots_are_used_again() {
        let fetches = Fetches::new().unwrap();
        for _ in 0..2 {
            let begun: Vec<_> = (0..SLOTS + 100).map(|_| fetches.begin()).collect();
            let ages = fetches.ages(Instant::now());
            assert_eq!(ages.counts.iter().sum::<u64>(), SLOTS as u64);
            assert_eq!(ages.unknown, 100);
            drop(begun);
            assert_eq!(fetches.ages(Instant::now()), FetchAges::default());
        }
    }

    #[test]
    fn many_threads_take_different_slots() {
        let fetches = Fetches::new().unwrap();
        let begun: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4)
                .map(|_| scope.spawn(|| (0..500).map(|_| fetches.begin()).collect::<Vec<_>>()))
                .collect();
            threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
        });
        let slots: std::collections::BTreeSet<_> = begun.iter().map(|begun| begun.slot).collect();
        assert_eq!(slots.len(), 2000);
        assert_eq!(fetches.ages(Instant::now()).counts.iter().sum::<u64>(), 2000);
    }
}

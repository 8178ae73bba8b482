//! What each tier counts: operations, errors and latencies.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::{Read, Write};

/// How one tier is doing.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
pub struct TierReport {
    /// The tier, as in the store's specification.
    pub name: String,
    /// Pages that it holds now.
    pub pages: u64,
    /// Bytes that it holds for them, wherever these are.
    pub stored_bytes: u64,
    /// Host memory that it takes for them, in bytes.
    pub memory_bytes: u64,
    /// Host memory for its tables, in bytes.
    pub metadata_bytes: u64,
    /// What it may hold, in bytes; `None` when it has no bound of its own.
    pub capacity_bytes: Option<u64>,
    /// Pages read in the first pass.
    pub hits: u64,
    /// Pages read in the second pass.
    pub reads: u64,
    /// Pages stored.
    pub writes: u64,
    /// Pages that moved on to the tier behind.
    pub demotions: u64,
    /// Reads that failed.
    pub read_errors: u64,
    /// Writes that failed.
    pub write_errors: u64,
    /// How long reads took, batches as a whole.
    pub read_latency: LatencyReport,
    /// How long writes took, batches as a whole.
    pub write_latency: LatencyReport,
    /// What else there is to say: how the medium is used, and what became of it.
    pub notes: Vec<String>,
}

/// Latencies, in microseconds. Quantiles are upper bounds, at most an eighth too large.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize)]
pub struct LatencyReport {
    /// How many were measured.
    pub count: u64,
    /// Half of them took no longer.
    pub p50_us: f64,
    /// 99 of 100 took no longer.
    pub p99_us: f64,
    /// The longest.
    pub max_us: f64,
}

/// A number that many threads change. It orders nothing.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    pub(crate) fn sub(&self, n: u64) {
        self.0.fetch_sub(n, Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// One tier's counters. Everybody writes them; readers get a rough picture.
#[derive(Debug)]
pub(crate) struct Meter {
    pub(crate) pages: Counter,
    pub(crate) hits: Counter,
    reads: Counter,
    writes: Counter,
    read_errors: Counter,
    write_errors: Counter,
    read_latency: Latency,
    write_latency: Latency,
    expected_read_ns: AtomicU64,
}

impl Meter {
    /// No operations yet; reads are expected to take `expected_read`.
    pub(crate) fn new(expected_read: Duration) -> Self {
        Self {
            pages: Counter::default(),
            hits: Counter::default(),
            reads: Counter::default(),
            writes: Counter::default(),
            read_errors: Counter::default(),
            write_errors: Counter::default(),
            read_latency: Latency::default(),
            write_latency: Latency::default(),
            expected_read_ns: AtomicU64::new(nanoseconds(expected_read)),
        }
    }

    /// Counts a batch of reads that began at `start`.
    pub(crate) fn count_reads(&self, start: Instant, reads: &[Read<'_>]) {
        let failed = reads.iter().filter(|read| read.result.is_err()).count();
        self.read_errors.add(failed as u64);
        self.reads.add((reads.len() - failed) as u64);
        // How long an error takes says nothing about the next read.
        if failed < reads.len() {
            let took = nanoseconds(start.elapsed());
            self.read_latency.add(took);
            let old = self.expected_read_ns.load(Ordering::Relaxed);
            let new = old - old / 8 + took / 8;
            self.expected_read_ns.store(new, Ordering::Relaxed);
        }
    }

    /// Counts a batch of writes that began at `start`; those that succeeded are pages held.
    pub(crate) fn count_writes(&self, start: Instant, writes: &[Write<'_>]) {
        let failed = writes.iter().filter(|write| write.result.is_err()).count();
        let stored = (writes.len() - failed) as u64;
        self.write_errors.add(failed as u64);
        self.writes.add(stored);
        self.pages.add(stored);
        if stored > 0 {
            self.write_latency.add(nanoseconds(start.elapsed()));
        }
    }

    /// The running estimate.
    pub(crate) fn expected_read(&self) -> Duration {
        Duration::from_nanos(self.expected_read_ns.load(Ordering::Relaxed))
    }

    /// The counters; what only the tier itself knows is left empty.
    pub(crate) fn report(&self, name: String) -> TierReport {
        TierReport {
            name,
            pages: self.pages.get(),
            hits: self.hits.get(),
            reads: self.reads.get(),
            writes: self.writes.get(),
            read_errors: self.read_errors.get(),
            write_errors: self.write_errors.get(),
            read_latency: self.read_latency.report(),
            write_latency: self.write_latency.report(),
            ..TierReport::default()
        }
    }
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// Buckets per power of two.
const STEPS: u64 = 8;
/// Enough for latencies up to 2^36 ns, about a minute; longer ones count as that.
const BUCKETS: usize = 34 * STEPS as usize;

/// A histogram whose buckets are an eighth of a power of two wide.
#[derive(Debug)]
struct Latency {
    buckets: Box<[AtomicU64; BUCKETS]>,
    max_ns: AtomicU64,
}

impl Default for Latency {
    fn default() -> Self {
        Self {
            buckets: Box::new([const { AtomicU64::new(0) }; BUCKETS]),
            max_ns: AtomicU64::new(0),
        }
    }
}

impl Latency {
    fn add(&self, ns: u64) {
        self.buckets[bucket(ns)].fetch_add(1, Ordering::Relaxed);
        self.max_ns.fetch_max(ns, Ordering::Relaxed);
    }

    fn report(&self) -> LatencyReport {
        let counts: Vec<u64> =
            self.buckets.iter().map(|bucket| bucket.load(Ordering::Relaxed)).collect();
        let count: u64 = counts.iter().sum();
        let max_ns = self.max_ns.load(Ordering::Relaxed);
        let quantile = |percent: u64| {
            let mut rank = (count * percent).div_ceil(100);
            let at = counts.iter().position(|n| {
                rank = rank.saturating_sub(*n);
                rank == 0
            });
            upper_bound(at.unwrap_or(0)).min(max_ns) as f64 / 1000.0
        };
        LatencyReport {
            count,
            p50_us: quantile(50),
            p99_us: quantile(99),
            max_us: max_ns as f64 / 1000.0,
        }
    }
}

/// The bucket of a latency. Below [`STEPS`] each value has its own.
fn bucket(ns: u64) -> usize {
    if ns < STEPS {
        return ns as usize;
    }
    let log = u64::from(ns.ilog2());
    let step = (ns >> (log - 3)) % STEPS;
    (((log - 2) * STEPS + step) as usize).min(BUCKETS - 1)
}

/// The largest latency of a bucket.
fn upper_bound(bucket: usize) -> u64 {
    let (row, step) = (bucket as u64 / STEPS, bucket as u64 % STEPS);
    match row {
        0 => step,
        _ => ((STEPS + step + 1) << (row - 1)) - 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_bucket_is_an_eighth_wide(ns in 0..60_000_000_000_u64) {
            let bound = upper_bound(bucket(ns));
            prop_assert!(bound >= ns && bound - ns <= ns / 8, "{ns} -> {bound}");
            prop_assert!(bucket(ns) == 0 || upper_bound(bucket(ns) - 1) < ns);
        }

        #[test]
        fn quantiles_are_those_of_the_sorted_values(values in prop::collection::vec(0..10_000_000_u64, 1..100)) {
            let latency = Latency::default();
            values.iter().for_each(|ns| latency.add(*ns));
            let report = latency.report();
            let mut sorted = values.clone();
            sorted.sort_unstable();
            for (percent, found) in [(50, report.p50_us), (99, report.p99_us)] {
                let exact = sorted[(sorted.len() * percent).div_ceil(100) - 1] as f64 / 1000.0;
                prop_assert!(found >= exact && found <= exact * 1.125, "{percent}: {found} for {exact}");
            }
            prop_assert_eq!(report.max_us, sorted[sorted.len() - 1] as f64 / 1000.0);
            prop_assert_eq!(report.count, values.len() as u64);
        }
    }

    #[test]
    fn the_estimate_follows() {
        let meter = Meter::new(Duration::from_millis(8));
        assert_eq!(meter.expected_read(), Duration::from_millis(8));
        let mut page = [0; crate::PAGE_SIZE];
        let mut read = Read::new(super::super::Slot(0), &mut page);
        read.result = Ok(());
        for _ in 0..100 {
            meter.count_reads(Instant::now(), std::slice::from_ref(&read));
        }
        assert!(meter.expected_read() < Duration::from_micros(100));
        assert_eq!(meter.report("x".into()).reads, 100);
    }
}

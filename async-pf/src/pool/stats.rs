//! What the pool counts.

use std::time::Duration;

use super::Class;

/// Buckets of the histograms of waiting times.
pub const WAIT_BUCKETS: usize = 24;

/// How many jobs waited how long for a worker.
///
/// Bucket 0 counts those that waited for less than 1 us, bucket `n` those for less than 2^n us but
/// not less than half of that; the last one, from 4.2 s on, has no upper end.
pub type Waited = [u64; WAIT_BUCKETS];

/// A snapshot of the pool.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PoolStats {
    /// Jobs that wait, by class; those with a delay are among them.
    pub depth: [usize; Class::COUNT],
    /// Jobs that wait for their time.
    pub delayed: usize,
    /// Jobs that run, by class.
    pub running: [usize; Class::COUNT],
    /// Jobs that run, by medium.
    pub running_by_medium: Vec<usize>,
    /// Workers that exist.
    pub workers: usize,
    /// Workers without a job.
    pub workers_idle: usize,
    /// The most workers that existed at once.
    pub workers_peak: usize,
    /// Workers that were ever started.
    pub workers_started: u64,
    /// Workers that the host gave no thread for.
    pub workers_refused: u64,
    /// Jobs that ran to their end, by class; those that panicked are among them.
    pub executed: [u64; Class::COUNT],
    /// Jobs that panicked.
    pub panicked: u64,
    /// Jobs that were not taken, by class.
    pub rejected: [u64; Class::COUNT],
    /// Jobs that were moved to an earlier class.
    pub promoted: u64,
    /// How long jobs that are over had waited for a worker, by class (the one in which they began).
    pub waited: [Waited; Class::COUNT],
    /// The sum of these waits in microseconds, by class.
    pub waited_us: [u64; Class::COUNT],
}

/// The queue's counters.
#[derive(Clone, Debug, Default)]
pub(super) struct Tally {
    pub(super) executed: [u64; Class::COUNT],
    pub(super) panicked: u64,
    pub(super) rejected: [u64; Class::COUNT],
    pub(super) promoted: u64,
    pub(super) waited: [Waited; Class::COUNT],
    pub(super) waited_us: [u64; Class::COUNT],
}

impl Tally {
    /// Jobs that are over.
    pub(super) fn ended_jobs(&self) -> u64 {
        self.executed.iter().sum()
    }

    /// A job is over that had waited that long.
    pub(super) fn ended(&mut self, class: Class, waited: Duration, panicked: bool) {
        let us = u64::try_from(waited.as_micros()).unwrap_or(u64::MAX);
        self.waited[class.index()][bucket(us)] += 1;
        let sum_us = &mut self.waited_us[class.index()];
        *sum_us = sum_us.saturating_add(us);
        self.executed[class.index()] += 1;
        self.panicked += u64::from(panicked);
    }
}

/// The bucket for a waiting time.
fn bucket(us: u64) -> usize {
    ((u64::BITS - us.leading_zeros()) as usize).min(WAIT_BUCKETS - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_powers_of_two() {
        let cases = [(0, 0), (1, 1), (2, 2), (3, 2), (4, 3), (4_194_303, 22), (4_194_304, 23)];
        for (us, expected) in cases {
            assert_eq!(bucket(us), expected, "{us} us");
        }
        assert_eq!(bucket(u64::MAX), 23);
    }

    #[test]
    fn waits_are_counted_and_added_up_by_class() {
        let mut tally = Tally::default();
        for waited in [Duration::from_nanos(999), Duration::from_micros(7), Duration::MAX] {
            tally.ended(Class::Prefetch, waited, false);
        }
        let waits = &tally.waited[Class::Prefetch.index()];
        assert_eq!((waits[0], waits[3], waits[23]), (1, 1, 1));
        assert_eq!(tally.waited_us, [0, u64::MAX, 0]);
        assert_eq!(tally.ended_jobs(), 3);
    }
}

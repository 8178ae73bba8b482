//! The worker pool of async-pf as the pager's workers.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use async_pf::pool::Waited;
use async_pf::{Class, Key, Lane, Medium, Pool, PoolConfig, PoolStats, Ticket};
use guest_memory::{Work, WorkClass, Workers};
use serde::Serialize;

/// Threads at most. Each waits for one page, or writes one batch.
const WORKERS_MAX: usize = 64;
/// The store, and everything else that takes time (room in memory, the host's swap).
const MEDIA: u8 = 2;
const STORE: Medium = Medium(0);
const HOST: Medium = Medium(1);
/// How long the end of a run waits for workers.
const DRAIN_LIMIT: Duration = Duration::from_secs(1);

/// The pool.
pub(crate) struct Crew(Pool<Work>);

impl Crew {
    /// A pool without threads yet: they come with the first work.
    pub(crate) fn new() -> io::Result<Arc<Self>> {
        let config = PoolConfig::sized(WORKERS_MAX, MEDIA);
        Ok(Arc::new(Self(Pool::new(config, Arc::new(Work::run))?)))
    }

    /// What it does.
    pub(crate) fn stats(&self) -> PoolStats {
        self.0.stats()
    }

    /// Ends it; after the pager's shutdown, which ends all waits.
    pub(crate) fn close(&self) {
        // What was not begun is dropped, and puts its pages back.
        drop(self.0.close(DRAIN_LIMIT));
    }
}

impl Workers for Crew {
    fn submit(&self, work: Work, after: Duration) -> Result<(), Work> {
        let class = match work.class() {
            WorkClass::Fault => Class::Fault,
            WorkClass::Prefetch => Class::Prefetch,
            WorkClass::WriteBack => Class::WriteBack,
        };
        let medium = if work.needs_store() { STORE } else { HOST };
        let ticket = Ticket::new(class, Lane(work.lane()), medium).with_key(Key(work.key()));
        let submitted = if after.is_zero() {
            self.0.submit(ticket, work)
        } else {
            self.0.submit_after(after, ticket, work)
        };
        submitted.map_err(|rejected| rejected.job)
    }

    fn promote(&self, key: u64) {
        // Not waiting any more, it is as early as it can be.
        let _ = self.0.promote(Key(key), Class::Fault, Lane(0));
    }
}

/// What the workers did, by class: faults, prefetch, write-back.
#[derive(Clone, Debug, Default, Serialize)]
pub struct WorkerStats {
    /// Threads that exist.
    pub workers: usize,
    /// The most threads that existed at once.
    pub workers_peak: usize,
    /// Pieces of work that wait.
    pub queued: [usize; Class::COUNT],
    /// Pieces of work that were done.
    pub done: [u64; Class::COUNT],
    /// Pieces of work that were not taken because too much waited.
    pub rejected: [u64; Class::COUNT],
    /// Prefetches that became faults before they began.
    pub promoted: u64,
    /// How many of these that were done had waited how long for a worker: bucket 0 less than 1 us, bucket
    /// n less than 2^n us, the last one without end.
    pub waited: [Waited; Class::COUNT],
    /// The sums of these waits, in microseconds.
    pub waited_us: [u64; Class::COUNT],
}

impl From<PoolStats> for WorkerStats {
    fn from(stats: PoolStats) -> Self {
        Self {
            workers: stats.workers,
            workers_peak: stats.workers_peak,
            queued: stats.depth,
            done: stats.executed,
            rejected: stats.rejected,
            promoted: stats.promoted,
            waited: stats.waited,
            waited_us: stats.waited_us,
        }
    }
}

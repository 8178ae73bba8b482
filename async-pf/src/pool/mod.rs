//! The worker pool: the only place where anybody waits for a store.
//!
//! ```text
//!   submit(ticket, job)              +- Fault ------ lane 0: o o   lane 1: o   lane 7: o o o -+
//!   submit_after(delay, ..) -------> +- Prefetch --- lane 3: o                                +--> workers
//!   promote(key, ..)                 +- WriteBack -- lane 0: o o o o                         -+    0..64
//!                                      strict order of classes,
//!                                      turns between the lanes of a class,
//!                                      no more workers for a medium than its share
//! ```
//!
//! - Nothing here waits for a store: submitting takes a lock that is only ever held for the
//!   bookkeeping of a job, and a full queue is a verdict. No lock is held while a job runs.
//! - Between two jobs of a lane at most one job of each other lane of its class begins.
//! - A medium never has more than its share of the workers, and always some that no other medium
//!   can take, half of these for faults only: stores that are slow or dead stop nobody else.
//! - Workers come when a job would wait, and go when there was none for a while.
//! - [`Pool::close`] returns in bounded time, however dead a store is. Every job that was
//!   accepted is run or handed back, once.
//!
//! The queue (`queue.rs`, with `lines.rs` and `running.rs`) is pure and tested against a naive
//! model; `crew.rs` decides who does what under the lock; here and in `worker.rs` is what locks,
//! sleeps and starts threads, tested by loom's models: `tests/loom_pool.rs`.

mod config;
mod crew;
mod lines;
mod queue;
mod running;
mod slab;
mod stats;
mod ticket;
mod worker;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

pub use config::{
    ConfigError, FAULT_QUEUE_MAX, IDLE_TIMEOUT, MEDIA, MEDIUM_WORKERS_MIN, PREFETCH_QUEUE_MAX,
    PoolConfig, WORKER_STACK_BYTES, WORKERS_MAX, WRITE_BACK_QUEUE_MAX,
};
use crew::{Call, State};
pub use stats::{PoolStats, WAIT_BUCKETS, Waited};
pub use ticket::{Class, Key, Lane, Medium, Promoted, Rejected, Ticket, Why};
use worker::Post;

use crate::loom::{Clock, Condvar, Mutex, lock, thread, wait};

/// How long [`Pool::close`] waits, past its limit, for workers that only have to return.
const LEAVE_LIMIT: Duration = Duration::from_secs(1);

/// What becomes of a job.
type Run<J> = Arc<dyn Fn(J) + Send + Sync>;

/// A bounded pool of workers for jobs that may wait. Dropping it closes it without draining.
#[derive(Debug)]
pub struct Pool<J: Send + 'static> {
    shared: Arc<Shared<J>>,
}

/// How a pool was closed.
#[must_use]
#[derive(Debug, PartialEq, Eq)]
pub struct Report<J> {
    /// Jobs that did not begin, those with a delay first: whoever waits for them has to be told.
    pub handed_back: Vec<J>,
    /// Jobs that ended while the pool was closing.
    pub drained: u64,
    /// Workers that are still in a job. They leave when it ends, should it ever.
    pub left_behind: usize,
}

/// What pool and workers share.
struct Shared<J> {
    state: Mutex<State<J>>,
    /// A worker has left a closed pool.
    left: Condvar,
    run: Run<J>,
    clock: Clock,
    idle_timeout: Duration,
    name: String,
    stack_bytes: usize,
    /// Not under the pool's lock: starting a thread takes its time.
    hired: std::sync::Mutex<Vec<Hired>>,
}

/// A worker's thread.
struct Hired {
    handle: thread::JoinHandle<()>,
    ended: Arc<AtomicBool>,
}

impl<J: Send + 'static> Pool<J> {
    /// A pool that will run its jobs with `run`. It has no worker before it has a job.
    ///
    /// Fails (`InvalidInput`, a [`ConfigError`]) if the configuration makes no sense.
    pub fn new(config: PoolConfig, run: Run<J>) -> io::Result<Self> {
        config.check().map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
        let shared = Shared {
            state: Mutex::new(State::new(&config)),
            left: Condvar::new(),
            run,
            clock: Clock::start(),
            idle_timeout: config.idle_timeout,
            name: config.name,
            stack_bytes: config.stack_bytes,
            hired: std::sync::Mutex::default(),
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Has a job run as soon as there is a worker for it. Never waits.
    pub fn submit(&self, ticket: Ticket, job: J) -> Result<(), Rejected<J>> {
        self.accept(ticket, job, None)
    }

    /// Has a job run when `delay` is over and there is a worker for it; until then it counts as
    /// waiting. Never waits.
    pub fn submit_after(&self, delay: Duration, ticket: Ticket, job: J) -> Result<(), Rejected<J>> {
        self.accept(ticket, job, Some(delay))
    }

    /// Moves a job that waits to an earlier class, at the end of this lane: somebody now waits for
    /// what was a mere wish.
    pub fn promote(&self, key: Key, class: Class, lane: Lane) -> Promoted {
        let now = self.shared.clock.now();
        let mut state = lock(&self.shared.state);
        let promoted = state.queue.promote(key, class, lane);
        // There may be a worker for it in its new class.
        let calls = state.dispatch(now);
        drop(state);
        self.shared.perform(calls);
        promoted
    }

    /// Takes no more jobs, and ends. Jobs that wait are run while the limit is not over; those
    /// with a delay do not wait for it, but are handed back. Returns at the limit, or not much
    /// later, whatever the jobs do. Not to be called by a job: it would wait for itself.
    pub fn close(&self, drain_limit: Duration) -> Report<J> {
        let shared = &*self.shared;
        let deadline = shared.clock.now().saturating_add(drain_limit);
        let mut state = lock(&shared.state);
        let ended_before = state.queue.tally().ended_jobs();
        let mut handed_back = state.queue.close();
        state.idle_bells().iter().for_each(|bell| bell.notify_one());
        let mut now = shared.clock.now();
        while state.workers() > 0 && now < deadline {
            state = wait(&shared.state, state, &shared.left, deadline - now);
            now = shared.clock.now();
        }
        handed_back.extend(state.queue.drain());
        let deadline = now.saturating_add(LEAVE_LIMIT);
        while state.workers() > state.queue.running().total() && now < deadline {
            state = wait(&shared.state, state, &shared.left, deadline - now);
            now = shared.clock.now();
        }
        let drained = state.queue.tally().ended_jobs() - ended_before;
        let left_behind = state.workers();
        drop(state);
        shared.join_ended();
        Report { handed_back, drained, left_behind }
    }

    /// A snapshot.
    #[must_use]
    pub fn stats(&self) -> PoolStats {
        lock(&self.shared.state).stats()
    }

    fn accept(&self, ticket: Ticket, job: J, delay: Option<Duration>) -> Result<(), Rejected<J>> {
        let now = self.shared.clock.now();
        let mut state = lock(&self.shared.state);
        let id = match delay {
            None => state.queue.insert(now, ticket, job)?,
            Some(delay) => state.queue.insert_at(now.saturating_add(delay), ticket, job)?,
        };
        let calls = state.dispatch(now);
        drop(state);
        if self.shared.perform(calls) {
            return Ok(());
        }
        // No worker will ever look: the caller has to know. If another one did come up meanwhile,
        // the job is out of reach or will be seen.
        let mut state = lock(&self.shared.state);
        if state.workers() > 0 {
            return Ok(());
        }
        match state.queue.withdraw(id) {
            Some(job) => Err(Rejected { job, why: Why::NoThread }),
            None => Ok(()),
        }
    }
}

impl<J: Send + 'static> Drop for Pool<J> {
    fn drop(&mut self) {
        let Report { .. } = self.close(Duration::ZERO);
    }
}

impl<J: Send + 'static> Shared<J> {
    /// Does what was decided under the lock. False if the host gave no thread.
    fn perform(self: &Arc<Self>, calls: Vec<Call>) -> bool {
        let mut all = true;
        for call in calls {
            match call {
                Call::Ring(bell) => bell.notify_one(),
                Call::Hire(seat, bell) => all &= self.hire(seat, bell),
            }
        }
        all
    }

    /// Starts a worker. Without a thread its job waits for the next worker that has time.
    fn hire(self: &Arc<Self>, seat: u32, bell: Arc<Condvar>) -> bool {
        let ended = Arc::new(AtomicBool::new(false));
        let post = Post { seat, bell, ended: ended.clone() };
        let shared = self.clone();
        let thread = thread::Builder::new()
            .name(format!("{}-{seat}", self.name))
            .stack_size(self.stack_bytes)
            .spawn(move || worker::work(&shared, &post));
        match thread {
            Ok(handle) => {
                let mut hired = self.hired();
                hired.retain(|worker| !worker.ended.load(Ordering::Acquire));
                hired.push(Hired { handle, ended });
                true
            }
            Err(_) => {
                let mut state = lock(&self.state);
                let rings = state.refuse(seat, self.clock.now());
                drop(state);
                self.perform(rings);
                false
            }
        }
    }

    fn hired(&self) -> std::sync::MutexGuard<'_, Vec<Hired>> {
        self.hired.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Joins the workers that have nothing left to do.
    fn join_ended(&self) {
        let all = std::mem::take(&mut *self.hired());
        for worker in all {
            if worker.ended.load(Ordering::Acquire) {
                // A worker's panics are caught; there is nothing to learn from how it ended.
                let _ = worker.handle.join();
            }
        }
    }
}

impl<J> std::fmt::Debug for Shared<J> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("name", &self.name).finish_non_exhaustive()
    }
}

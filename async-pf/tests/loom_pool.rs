//! Models of the pool: every interleaving of two or three threads, up to a number of preemptions.
//!
//! ```text
//!   RUSTFLAGS="--cfg loom" CARGO_PROFILE_RELEASE_DEBUG_ASSERTIONS=true \
//!     cargo test -p async-pf --release --test loom_pool --target-dir target/loom
//! ```
//!
//! Time stands still in a model. A wait with a limit of zero is over at once, any other one only
//! by a bell: a lost wake-up is a deadlock, and loom reports it. `cargo xtask test` runs them, too.
#![cfg(loom)]

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use async_pf::{Class, Key, Lane, Medium, Pool, PoolConfig, Promoted, Report, Ticket};
use loom::sync::Notify;
use loom::thread;

/// Longer than any model: never over.
const EVER: Duration = Duration::from_secs(1);
/// Preemptions that a model tries.
const PREEMPTIONS: usize = 4;
/// The same for models with many threads.
const FEW_PREEMPTIONS: usize = 2;

/// How often each job ran or came back.
type Fates = Arc<[AtomicUsize; 3]>;

/// What a model has to hand.
struct Bench {
    pool: Pool<usize>,
    fates: Fates,
    /// Job 1 ran.
    ran: Notify,
}

fn model(config: PoolConfig, run: impl Fn(&Arc<Bench>) + Send + Sync + 'static) {
    bounded_model(PREEMPTIONS, config, run);
}

fn bounded_model(
    preemptions: usize,
    config: PoolConfig,
    run: impl Fn(&Arc<Bench>) + Send + Sync + 'static,
) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(move || {
        let bench = Arc::new_cyclic(|bench: &Weak<Bench>| {
            let bench = bench.clone();
            let job = move |job| bench.upgrade().unwrap().job(job);
            let pool = Pool::new(config.clone(), Arc::new(job)).unwrap();
            Bench { pool, fates: Fates::default(), ran: Notify::new() }
        });
        run(&bench);
    });
}

impl Bench {
    /// Jobs are numbers. 1 tells that it ran, 2 panics.
    fn job(&self, job: usize) {
        self.fates[job].fetch_add(1, Ordering::SeqCst);
        match job {
            1 => self.ran.notify(),
            2 => std::panic::resume_unwind(Box::new("on purpose")),
            _ => {}
        }
    }

    fn submit(&self, job: usize) {
        if let Err(rejected) = self.pool.submit(ticket(job), job) {
            self.fates[rejected.job].fetch_add(1, Ordering::SeqCst);
        }
    }

    fn wait_for_job_1(&self) {
        // loom wakes for no reason, too.
        while self.fates[1].load(Ordering::SeqCst) == 0 {
            self.ran.wait();
        }
    }

    /// Closes, and counts what comes back.
    fn close(&self, drain_limit: Duration) -> Report<usize> {
        let report = self.pool.close(drain_limit);
        for job in &report.handed_back {
            self.fates[*job].fetch_add(1, Ordering::SeqCst);
        }
        report
    }

    /// Closes, and checks that everything ran.
    fn drain(&self) {
        let report = self.close(EVER);
        assert_eq!((report.handed_back.len(), report.left_behind), (0, 0));
    }

    fn assert_fates(&self, expected: [usize; 3]) {
        let fates: Vec<_> = self.fates.iter().map(|fate| fate.load(Ordering::SeqCst)).collect();
        assert_eq!(fates, expected);
    }
}

/// A pool whose workers never end, or as soon as they can.
fn config(idle_timeout: Duration) -> PoolConfig {
    PoolConfig { idle_timeout, ..PoolConfig::sized(3, 1) }
}

fn ticket(job: usize) -> Ticket {
    Ticket::new(Class::Fault, Lane(0), Medium(0)).with_key(Key(job as u64))
}

/// Of these one runs at a time.
fn write_back(job: usize) -> Ticket {
    Ticket { class: Class::WriteBack, ..ticket(job) }
}

/// The second job comes while the first one's worker is on its way to sleep, and so does the end.
#[test]
fn no_wake_up_is_lost() {
    model(config(EVER), |bench| {
        bench.submit(0);
        bench.submit(1);
        bench.wait_for_job_1();
        bench.drain();
        bench.assert_fates([1, 1, 0]);
    });
}

#[test]
fn two_threads_submit() {
    model(config(EVER), |bench| {
        let other = bench.clone();
        let other = thread::spawn(move || other.submit(1));
        bench.submit(0);
        other.join().unwrap();
        bench.drain();
        bench.assert_fates([1, 1, 0]);
    });
}

/// A worker that ends because it had nothing to do, against the next job.
#[test]
fn a_worker_that_ends_takes_no_job_along() {
    model(config(Duration::ZERO), |bench| {
        bench.submit(0);
        bench.submit(1);
        bench.wait_for_job_1();
        bench.drain();
        bench.assert_fates([1, 1, 0]);
    });
}

/// Whoever comes first: the job runs, comes back, or is not taken.
#[test]
fn every_job_has_one_fate_when_the_pool_closes() {
    for drain_limit in [Duration::ZERO, EVER] {
        model(config(EVER), move |bench| {
            let other = bench.clone();
            let other = thread::spawn(move || other.submit(1));
            bench.submit(0);
            let _ = bench.close(drain_limit);
            other.join().unwrap();
            // For those that were still at it.
            bench.drain();
            bench.assert_fates([1, 1, 0]);
        });
    }
}

/// A panic, with more to do after it.
#[test]
fn a_panic_costs_no_worker() {
    model(config(EVER), |bench| {
        bench.submit(2);
        bench.submit(1);
        bench.drain();
        bench.assert_fates([0, 1, 1]);
        assert_eq!(bench.pool.stats().panicked, 1);
    });
}

/// A job that never is due and one that soon is: who keeps the time for the first one has to see
/// to the second one, too.
#[test]
fn delayed_jobs_are_kept_in_time() {
    for idle_timeout in [Duration::ZERO, EVER] {
        model(config(idle_timeout), |bench| {
            bench.pool.submit_after(EVER, ticket(2), 2).unwrap();
            bench.pool.submit_after(Duration::ZERO, ticket(1), 1).unwrap();
            bench.wait_for_job_1();
            let report = bench.close(EVER);
            assert_eq!((report.handed_back, report.left_behind), (vec![2], 0));
            bench.assert_fates([0, 1, 1]);
        });
    }
}

/// The same, but the timekeeper gets other work before.
#[test]
fn time_is_kept_when_the_timekeeper_has_a_job() {
    bounded_model(FEW_PREEMPTIONS, config(EVER), |bench| {
        bench.pool.submit_after(EVER, ticket(2), 2).unwrap();
        bench.submit(0);
        bench.pool.submit_after(Duration::ZERO, ticket(1), 1).unwrap();
        bench.wait_for_job_1();
        let report = bench.close(EVER);
        assert_eq!((report.handed_back, report.left_behind), (vec![2], 0));
        bench.assert_fates([1, 1, 1]);
    });
}

/// The timekeeper has nothing to keep time for, and then again.
#[test]
fn time_is_kept_again_after_a_rest() {
    model(config(EVER), |bench| {
        bench.pool.submit_after(Duration::ZERO, ticket(0), 0).unwrap();
        bench.pool.submit_after(Duration::ZERO, ticket(1), 1).unwrap();
        bench.wait_for_job_1();
        let _ = bench.close(EVER);
        bench.assert_fates([1, 1, 0]);
    });
}

/// The second job has to wait for the first one's end.
#[test]
fn a_job_that_had_to_wait_is_taken() {
    model(config(EVER), |bench| {
        bench.pool.submit(write_back(0), 0).unwrap();
        bench.pool.submit(write_back(1), 1).unwrap();
        bench.wait_for_job_1();
        bench.drain();
        bench.assert_fates([1, 1, 0]);
    });
}

/// It is promoted while the first one ends.
#[test]
fn a_promoted_job_runs_once() {
    model(config(EVER), |bench| {
        bench.pool.submit(write_back(0), 0).unwrap();
        bench.pool.submit(write_back(1), 1).unwrap();
        let promoted = bench.pool.promote(Key(1), Class::Fault, Lane(1));
        assert!(matches!(promoted, Promoted::Moved | Promoted::NotWaiting));
        bench.drain();
        bench.assert_fates([1, 1, 0]);
    });
}

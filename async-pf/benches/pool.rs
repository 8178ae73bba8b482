//! What submitting a job costs the thread that does it: `cargo bench -p async-pf`.
//!
//! ```text
//!   all busy    every worker has a job: submitting is bookkeeping under the lock, and no more
//!   contended   the same from two threads at once
//!   wakes       a worker sleeps, and is woken: one system call
//!   ran         from submitting to the job's first instruction, in a sleeping worker
//! ```

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::{Duration, Instant};

use async_pf::{Class, Lane, Medium, Pool, PoolConfig, Ticket};

/// Jobs of one round: fewer than may wait.
const JOBS: u32 = 4000;
/// Rounds: the median of them is told.
const ROUNDS: usize = 25;

#[derive(Clone, Copy)]
enum Job {
    Nothing,
    /// Waits until the round is over.
    Block,
    /// Notes how long ago it was submitted.
    Stamp(Instant),
}

struct Bench {
    pool: Pool<Job>,
    release: Arc<AtomicBool>,
    /// Nanoseconds from a submission to the start of its job; 0: not yet.
    took: Arc<AtomicU64>,
}

fn bench() -> Bench {
    let release = Arc::new(AtomicBool::new(false));
    let took = Arc::new(AtomicU64::new(0));
    let (released, noted) = (release.clone(), took.clone());
    let run = move |job| match job {
        Job::Nothing => {}
        Job::Block => {
            while !released.load(Ordering::Relaxed) {
                thread::sleep(Duration::from_millis(1));
            }
        }
        Job::Stamp(at) => noted.store(at.elapsed().as_nanos() as u64, Ordering::Release),
    };
    let config = PoolConfig::sized(4, 1);
    Bench { pool: Pool::new(config, Arc::new(run)).unwrap(), release, took }
}

/// Nanoseconds for each submission when nobody can run it, from that many threads.
fn all_busy(threads: u16) -> u64 {
    let Bench { pool, release, .. } = bench();
    let ticket = |lane| Ticket::new(Class::Fault, Lane(lane), Medium(0));
    for _ in 0..4 {
        pool.submit(ticket(0), Job::Block).unwrap();
    }
    let barrier = Barrier::new(threads.into());
    let each = JOBS / u32::from(threads);
    let submit = &|lane| {
        barrier.wait();
        let start = Instant::now();
        for _ in 0..each {
            pool.submit(ticket(lane), Job::Nothing).unwrap();
        }
        start.elapsed().as_nanos() as u64 / u64::from(each)
    };
    let slowest = thread::scope(|scope| {
        let all: Vec<_> = (0..threads).map(|lane| scope.spawn(move || submit(lane))).collect();
        all.into_iter().map(|thread| thread.join().unwrap()).max()
    });
    release.store(true, Ordering::Relaxed);
    let _ = pool.close(Duration::from_secs(10));
    slowest.unwrap()
}

/// Nanoseconds for a submission that wakes a worker, and from it to the start of the job.
fn wakes() -> (u64, u64) {
    let Bench { pool, took, .. } = bench();
    let ticket = Ticket::new(Class::Fault, Lane(0), Medium(0));
    let mut all: Vec<_> = (0..200)
        .map(|_| {
            // Asleep, not only idle.
            thread::sleep(Duration::from_micros(300));
            took.store(0, Ordering::Release);
            let start = Instant::now();
            pool.submit(ticket, Job::Stamp(start)).unwrap();
            let submitted = start.elapsed().as_nanos() as u64;
            while took.load(Ordering::Acquire) == 0 {
                thread::yield_now();
            }
            (submitted, took.load(Ordering::Acquire))
        })
        .collect();
    let mut median = |by: fn(&(u64, u64)) -> u64| {
        all.sort_unstable_by_key(by);
        by(&all[all.len() / 2])
    };
    (median(|round| round.0), median(|round| round.1))
}

fn median(measure: impl Fn() -> u64) -> u64 {
    let mut all: Vec<_> = (0..ROUNDS).map(|_| measure()).collect();
    all.sort_unstable();
    println!("    (best {} ns, worst {} ns)", all[0], all[ROUNDS - 1]);
    all[ROUNDS / 2]
}

fn main() {
    println!("all busy   {:>7} ns a job", median(|| all_busy(1)));
    println!("contended  {:>7} ns a job, two threads", median(|| all_busy(2)));
    let (wakes, ran) = wakes();
    println!("wakes      {wakes:>7} ns");
    println!("ran        {ran:>7} ns");
}

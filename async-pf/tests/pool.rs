//! The pool with real threads.
#![cfg(not(loom))]

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use async_pf::{
    Class, Key, Lane, Medium, Pool, PoolConfig, Promoted, Rejected, Report, Ticket, Why,
};

/// Far longer than anything here takes.
const LONG: Duration = Duration::from_secs(60);

type Job = Box<dyn FnOnce() + Send>;

fn pool(config: PoolConfig) -> Pool<Job> {
    Pool::new(config, Arc::new(|job: Job| job())).unwrap()
}

fn ticket(class: Class, medium: u8) -> Ticket {
    Ticket::new(class, Lane(0), Medium(medium))
}

/// A job that waits for its gate to open, and the gate.
fn gated() -> (Job, mpsc::Sender<()>) {
    let (gate, opened) = mpsc::channel::<()>();
    (Box::new(move || assert!(opened.recv().is_err())), gate)
}

/// Waits until it is true.
fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < LONG, "{what}");
        thread::sleep(Duration::from_micros(200));
    }
}

#[test]
fn workers_come_with_jobs_and_go_without() {
    let config = PoolConfig { idle_timeout: Duration::from_millis(20), ..PoolConfig::sized(8, 1) };
    let pool = pool(config);
    assert_eq!(pool.stats().workers_started, 0);
    let gates: Vec<_> = (0..3)
        .map(|_| {
            let (job, gate) = gated();
            pool.submit(ticket(Class::Fault, 0), job).unwrap();
            gate
        })
        .collect();
    assert_eq!(pool.stats().workers, 3);
    drop(gates);
    eventually("idle workers end", || pool.stats().workers == 0);
    let stats = pool.stats();
    assert_eq!((stats.workers_peak, stats.workers_started, stats.executed), (3, 3, [3, 0, 0]));
}

#[test]
fn a_dead_store_stops_no_other() {
    let config = PoolConfig::sized(16, 4);
    let share = config.medium_workers_max;
    let pool = pool(config);
    let mut gates = Vec::new();
    for medium in 0..3 {
        for _ in 0..40 {
            let (job, gate) = gated();
            pool.submit(ticket(Class::Fault, medium), job).unwrap();
            gates.push(gate);
        }
    }
    assert_eq!(pool.stats().running_by_medium[0], share);
    // Three dead stores, and the fourth one works.
    let (done, wait) = mpsc::channel();
    for class in Class::ALL {
        let done = done.clone();
        pool.submit(ticket(class, 3), Box::new(move || done.send(class).unwrap())).unwrap();
    }
    let mut ran: Vec<_> = (0..3).map(|_| wait.recv_timeout(LONG).unwrap()).collect();
    ran.sort();
    assert_eq!(ran, Class::ALL);
    drop(gates);
    assert_eq!(pool.close(LONG).left_behind, 0);
}

#[test]
fn write_back_and_prefetch_leave_workers_to_faults() {
    let pool = pool(PoolConfig::sized(8, 1));
    let mut gates = Vec::new();
    for class in [Class::WriteBack, Class::Prefetch] {
        for _ in 0..20 {
            let (job, gate) = gated();
            pool.submit(ticket(class, 0), job).unwrap();
            gates.push(gate);
        }
    }
    assert_eq!(pool.stats().running, [0, 2, 1]);
    let (done, wait) = mpsc::channel();
    pool.submit(ticket(Class::Fault, 0), Box::new(move || done.send(()).unwrap())).unwrap();
    wait.recv_timeout(LONG).unwrap();
    drop(gates);
}

#[test]
fn full_is_a_verdict() {
    let config = PoolConfig { queue_max: [2, 2, 2], ..PoolConfig::sized(4, 1) };
    let pool = pool(config);
    let gates: Vec<_> = (0..6)
        .map(|_| {
            let (job, gate) = gated();
            pool.submit(ticket(Class::Fault, 0), job).unwrap();
            gate
        })
        .collect();
    let refused = pool.submit(ticket(Class::Fault, 0), Box::new(|| ())).unwrap_err();
    assert_eq!(refused.why, Why::Full);
    let refused = pool.submit(ticket(Class::Fault, 1), Box::new(|| ())).unwrap_err();
    assert_eq!(refused.why, Why::NoSuchMedium);
    assert_eq!(pool.stats().depth, [2, 0, 0]);
    drop(gates);
    let report = pool.close(LONG);
    assert_eq!((report.handed_back.len(), report.left_behind), (0, 0));
    let refused = pool.submit(ticket(Class::Fault, 0), Box::new(|| ())).unwrap_err();
    assert_eq!(refused.why, Why::Closed);
}

#[test]
fn a_promoted_prefetch_overtakes() {
    let pool = pool(PoolConfig::sized(4, 1));
    let order = Arc::new(Mutex::new(Vec::new()));
    let note = |name: &'static str| -> Job {
        let order = order.clone();
        Box::new(move || order.lock().unwrap().push(name))
    };
    let gates: Vec<_> = (0..4)
        .map(|_| {
            let (job, gate) = gated();
            pool.submit(ticket(Class::Fault, 0), job).unwrap();
            gate
        })
        .collect();
    pool.submit(ticket(Class::Prefetch, 0), note("first")).unwrap();
    pool.submit(ticket(Class::Prefetch, 0).with_key(Key(7)), note("second")).unwrap();
    assert_eq!(pool.promote(Key(7), Class::Fault, Lane(1)), Promoted::Moved);
    assert_eq!(pool.promote(Key(7), Class::Fault, Lane(1)), Promoted::Already);
    assert_eq!(pool.promote(Key(8), Class::Fault, Lane(1)), Promoted::NotWaiting);
    // One worker only, so that the order is seen.
    let mut gates = gates.into_iter();
    drop(gates.next());
    eventually("both run", || order.lock().unwrap().len() == 2);
    assert_eq!(*order.lock().unwrap(), ["second", "first"]);
}

#[test]
fn delayed_jobs_run_in_time_and_need_no_free_worker() {
    let pool = pool(PoolConfig::sized(8, 1));
    let (done, wait) = mpsc::channel();
    let start = Instant::now();
    for delay_ms in [60, 20, 40_u64] {
        let done = done.clone();
        let job = Box::new(move || done.send((delay_ms, Instant::now())).unwrap());
        let delay = Duration::from_millis(delay_ms);
        pool.submit_after(delay, ticket(Class::Fault, 0), job).unwrap();
    }
    assert_eq!((pool.stats().delayed, pool.stats().workers), (3, 1));
    // The timekeeper gets a job that takes for ever: another one keeps the time.
    let (job, _gate) = gated();
    pool.submit(ticket(Class::Fault, 0), job).unwrap();
    for expected in [20, 40, 60] {
        let (delay_ms, at) = wait.recv_timeout(LONG).unwrap();
        assert_eq!(delay_ms, expected);
        assert!(at - start >= Duration::from_millis(delay_ms));
    }
}

/// A store that fails now and then: there is one delayed job at a time, with rests in between.
#[test]
fn a_delayed_job_is_in_time_after_others_were() {
    let pool = pool(PoolConfig { idle_timeout: 10 * LONG, ..PoolConfig::sized(8, 1) });
    for _ in 0..5 {
        let (done, wait) = mpsc::channel();
        let job = Box::new(move || done.send(()).unwrap());
        pool.submit_after(Duration::from_millis(5), ticket(Class::Fault, 0), job).unwrap();
        wait.recv_timeout(LONG).unwrap();
        eventually("it rests", || pool.stats().running == [0; 3]);
    }
}

/// With its message and backtrace, on a worker's small stack.
#[test]
fn a_panic_is_counted_and_the_worker_goes_on() {
    let pool = pool(PoolConfig::sized(3, 1));
    let (done, wait) = mpsc::channel();
    pool.submit(ticket(Class::Fault, 0), Box::new(|| panic!("on purpose"))).unwrap();
    pool.submit(ticket(Class::Fault, 0), Box::new(move || done.send(()).unwrap())).unwrap();
    wait.recv_timeout(LONG).unwrap();
    assert_eq!((pool.close(LONG).left_behind, pool.stats().panicked), (0, 1));
}

#[test]
fn close_returns_with_a_dead_store() {
    let pool = pool(PoolConfig::sized(6, 2));
    let mut gates = Vec::new();
    for _ in 0..10 {
        let (job, gate) = gated();
        pool.submit(ticket(Class::Fault, 0), job).unwrap();
        gates.push(gate);
    }
    pool.submit_after(LONG, ticket(Class::Fault, 1), Box::new(|| ())).unwrap();
    let stuck = pool.stats().running_by_medium[0];
    let start = Instant::now();
    let report = pool.close(Duration::from_millis(50));
    assert!(start.elapsed() >= Duration::from_millis(50));
    assert!(start.elapsed() < Duration::from_secs(5));
    assert_eq!((report.handed_back.len(), report.left_behind), (11 - stuck, stuck));
    // Again: nothing is handed back twice. And once more when the store lives again.
    assert_eq!(pool.close(Duration::ZERO).handed_back.len(), 0);
    drop(gates);
    let Report { handed_back, left_behind, .. } = pool.close(LONG);
    assert_eq!((handed_back.len(), left_behind), (0, 0));
}

#[test]
fn a_host_without_threads_is_told() {
    // No stack can be that large, so no thread can be had.
    let pool = pool(PoolConfig { stack_bytes: 1 << 46, ..PoolConfig::sized(4, 1) });
    let refused = pool.submit(ticket(Class::Fault, 0), Box::new(|| ())).unwrap_err();
    assert_eq!(refused.why, Why::NoThread);
    let refused = pool.submit_after(LONG, ticket(Class::Fault, 0), Box::new(|| ())).unwrap_err();
    assert_eq!(refused.why, Why::NoThread);
    let stats = pool.stats();
    assert_eq!((stats.depth, stats.workers, stats.workers_refused), ([0; 3], 0, 2));
}

/// What happened to each job of the stress test: 1 for run, 1000 for handed back or rejected.
type Fates = Arc<Vec<AtomicU64>>;

#[test]
fn every_job_of_many_is_run_or_handed_back_once() {
    const JOBS: usize = 100_000;
    const THREADS: usize = 4;
    /// Every so many jobs one panics.
    const PANIC_EVERY: usize = 1000;
    let fates: Fates = Arc::new((0..JOBS).map(|_| AtomicU64::new(0)).collect());
    let seen = fates.clone();
    let busy = Arc::new(AtomicUsize::new(0));
    let run = move |job: usize| {
        assert!(busy.fetch_add(1, Ordering::SeqCst) < 16);
        seen[job].fetch_add(1, Ordering::SeqCst);
        if job.is_multiple_of(64) {
            thread::sleep(Duration::from_micros(50));
        }
        busy.fetch_sub(1, Ordering::SeqCst);
        // Without a message for each of them on standard error.
        if job.is_multiple_of(PANIC_EVERY) {
            std::panic::resume_unwind(Box::new("on purpose"));
        }
    };
    let config =
        PoolConfig { idle_timeout: Duration::from_micros(300), ..PoolConfig::sized(16, 3) };
    let pool = Arc::new(Pool::new(config, Arc::new(run)).unwrap());
    let submit = |first: usize| {
        let (pool, fates) = (pool.clone(), fates.clone());
        move || {
            for job in (first..JOBS).step_by(THREADS) {
                let class = Class::ALL[job % 7 % 3];
                let ticket = Ticket::new(class, Lane((job % 11) as u16), Medium((job % 3) as u8))
                    .with_key(Key(job as u64));
                let submit = || match job % 13 {
                    0 => pool.submit_after(Duration::from_micros(200), ticket, job),
                    _ => pool.submit(ticket, job),
                };
                let mut outcome = submit();
                while matches!(outcome, Err(Rejected { why: Why::Full, .. })) {
                    thread::yield_now();
                    outcome = submit();
                }
                if let Err(Rejected { job, .. }) = outcome {
                    fates[job].fetch_add(1000, Ordering::SeqCst);
                }
                if job.is_multiple_of(5) {
                    let _ = pool.promote(Key(job as u64), Class::Fault, Lane(3));
                }
            }
        }
    };
    let threads: Vec<_> = (0..THREADS).map(|first| thread::spawn(submit(first))).collect();
    // In the middle, by the count of jobs that were done.
    eventually("half is done", || pool.stats().executed.iter().sum::<u64>() as usize > JOBS / 2);
    let report = pool.close(Duration::from_millis(2));
    for job in report.handed_back {
        fates[job].fetch_add(1000, Ordering::SeqCst);
    }
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    assert_eq!(pool.close(LONG).left_behind, 0);
    let stats = pool.stats();
    let fates: Vec<u64> = fates.iter().map(|fate| fate.load(Ordering::SeqCst)).collect();
    let wrong: Vec<_> =
        fates.iter().enumerate().filter(|(_, fate)| ![1, 1000].contains(fate)).collect();
    assert_eq!(wrong, []);
    let run = fates.iter().filter(|fate| **fate == 1).count() as u64;
    assert_eq!((stats.executed.iter().sum::<u64>(), stats.running), (run, [0; 3]));
    assert_eq!(stats.waited.iter().flatten().sum::<u64>(), run);
    assert!(stats.panicked > 0 && stats.workers_peak <= 16, "{stats:?}");
    println!("{run} run, {} panicked, {} workers", stats.panicked, stats.workers_started);
}

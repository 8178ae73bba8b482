//! The instrument against known truth: stalls that are as long as they were made.

use std::thread;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hdrhistogram::Histogram;
use hdrhistogram::serialization::Deserializer;
use nowait_tests::guest::Guest;
use nowait_tests::running::Running;
use nowait_wire::agent::{Cause, HostStalls, Kind, Report, Request, RunResult, Workload};

use crate::Test;

pub(crate) const TESTS: &[Test] = &[
    ("a_stall_is_as_long_as_the_store_takes", delays),
    ("a_pause_of_the_vcpus_shows_in_the_overrun_beat_by_beat", pause),
    ("a_guest_without_paging_has_no_stall", no_paging),
];

/// Each page is one stall of one thread.
const PAGES: u32 = 40;
/// How far a median may be off, in percent of the delay, beside what a miss takes without any.
const TOLERANCE_PERCENT: f64 = 2.0;
/// How long an emulated machine may take to wake up, in microseconds.
const SLOW_US: f64 = 1000.0;
/// How long the vCPUs are paused.
const PAUSE: Duration = Duration::from_millis(50);
const LIMIT: Duration = Duration::from_secs(120);

fn histogram(text: &str) -> Histogram<u64> {
    let bytes = STANDARD.decode(text).expect("base64");
    Deserializer::new().deserialize(&mut bytes.as_slice()).expect("a histogram")
}

/// The stalls of this cause.
fn stalls(seen: &HostStalls, cause: Cause) -> Option<Histogram<u64>> {
    let of_cause = seen.causes.iter().find(|stalls| stalls.cause == cause);
    of_cause.map(|stalls| histogram(&stalls.us_hdr))
}

/// What one guest gave, in microseconds.
#[derive(Debug)]
struct Found {
    /// The median of the stalls for I/O.
    stall: f64,
    /// What the pager's workers found the store to take, on average.
    store_mean: f64,
    /// The median of the accesses, as the guest saw them.
    access: f64,
}

fn found(delay: Duration) -> Found {
    let store = format!("delay={}ms", delay.as_millis());
    let workload = Workload {
        kind: Kind::User,
        threads: 1,
        duration_ms: 30_000,
        pages: PAGES,
        ..Workload::IDLE
    };
    let end = Guest::linux()
        .args(["--apf", "off", "--no-prefetch", "--store", &store])
        .request(Request::Run(workload))
        .run();
    end.expect_code(0);
    let results = end.results();
    assert_eq!((results[0].data_errors, results[0].pages_touched), (0, u64::from(PAGES)));
    let seen = end.host_stalls();
    assert!(seen[0].visible && seen[0].marked, "{seen:?}");
    let waited = stalls(seen[0], Cause::Waited).expect("stalls for I/O");
    // Beside them the guest may meet a page or two of its own.
    assert!((u64::from(PAGES)..u64::from(PAGES) + 8).contains(&waited.len()), "{}", waited.len());
    let accesses = histogram(&results[0].access_us_hdr);
    assert_eq!(accesses.len(), u64::from(PAGES));
    let median = |histogram: &Histogram<u64>| histogram.value_at_quantile(0.5) as f64;
    let fetched = end.number("/pager/fetched_pages") as f64;
    let found = Found {
        stall: median(&waited),
        store_mean: end.number("/pager/fetch_latency/sum_us") as f64 / fetched,
        access: median(&accesses),
    };
    println!("{delay:?}: {found:.0?}");
    found
}

fn delays() {
    let none = found(Duration::ZERO);
    for ms in [5, 20, 100] {
        let delay_us = Duration::from_millis(ms).as_micros() as f64;
        let Found { stall, store_mean, access } = found(Duration::from_millis(ms));
        assert!(store_mean >= delay_us);
        let part = TOLERANCE_PERCENT / 100.0;
        let range = if is_emulated() {
            // A sleep takes up to a millisecond longer than asked for there, and what wakes up from it is slow:
            // the truth lies between what the workers found the store to take and what the guest saw.
            store_mean * (1.0 - part)..=access.min(store_mean * (1.0 + part) + none.stall + SLOW_US)
        } else {
            delay_us * (1.0 - part)..=delay_us * (1.0 + part) + none.stall
        };
        assert!(range.contains(&stall), "{stall} us is not in {range:?}");
    }
}

fn is_emulated() -> bool {
    std::env::var("NOWAIT_ACCEL").is_ok_and(|accel| accel == "nested")
}

/// What the agent found of its heartbeat, and what the host saw.
fn of(reports: &[Report]) -> (&RunResult, &HostStalls) {
    let result = reports.iter().find_map(|report| match report {
        Report::Result(result) => Some(result),
        _ => None,
    });
    let seen = reports.iter().find_map(|report| match report {
        Report::Host(seen) => Some(seen),
        _ => None,
    });
    result.zip(seen).expect("a result and what the host saw of it")
}

fn pause() {
    let workload = Workload { duration_ms: 6000, ..Workload::IDLE };
    let run = Running::start(&["--apf", "off"], &[Request::Run(workload)]);
    // The agent is up, and its run has begun.
    run.wait_until("nowait_uptime_seconds", |uptime| uptime > Some(3.5));
    run.tell("POST /pause", "");
    run.wait_until("nowait_vcpus_paused", |vcpus| vcpus == Some(1.0));
    let paused = Instant::now();
    thread::sleep(PAUSE);
    let least = paused.elapsed();
    run.tell("POST /resume", "");
    let (end, reports) = run.finish(LIMIT);
    end.expect_code(0);
    let (result, seen) = of(&reports);
    let overruns = histogram(&result.heartbeats[0].overrun_us_hdr);
    let longest = Duration::from_micros(overruns.max());
    println!("paused for {least:?} at least: the latest heartbeat {longest:?}");
    // The first deadline of the pause may be a period after its start.
    assert!(longest + Duration::from_millis(2) >= least, "{longest:?}");
    // Each heartbeat that was lost in it counts, with its own overrun.
    let period_us = u64::from(result.workload.heartbeat_us);
    let lost = overruns.count_between(5 * period_us, overruns.max());
    let due = least.as_micros() as u64 / period_us - 6;
    assert!(lost >= due, "{lost} of {due} late heartbeats");
    assert_eq!(overruns.len(), result.heartbeats[0].deadlines);
    assert!(overruns.len().abs_diff(result.elapsed_us / period_us) <= 1);
    // It shows where it was, and was no stall for a page.
    let slices = &result.heartbeats[0].slices_us;
    let is_late = |slice: &u64| u128::from(*slice) * 10 > least.as_micros() * 9;
    // A pause that was longer than asked for may reach over more than one.
    let late = slices.iter().filter(|slice| is_late(slice)).count();
    assert!((1..=3).contains(&late), "{slices:?}");
    assert_eq!(stalls(seen, Cause::Waited).map(|stalls| stalls.len()), None);
}

fn no_paging() {
    let workload = Workload { duration_ms: 1000, ..Workload::IDLE };
    let end =
        Guest::linux().args(["--apf", "off", "--populate"]).request(Request::Run(workload)).run();
    end.expect_code(0);
    let seen = end.host_stalls();
    assert!(seen[0].visible && seen[0].marked);
    assert_eq!(seen[0].causes, []);
    assert!(seen[0].vcpus.iter().all(|vcpu| vcpu.total_us == 0), "{seen:?}");
}

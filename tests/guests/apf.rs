//! Async page faults with real Linux guests, in all modes: no page holds anything but what was written
//! to it, no task waits for ever, and the guest kernel has nothing to complain about.

use std::thread;
use std::time::{Duration, Instant};

use nowait_tests::guest::{End, GUEST_LIMIT, Guest};
use nowait_tests::running::Running;
use nowait_wire::agent::{Access, Kind, Pressure, Report, Request, Workload};

use crate::Test;

pub(crate) const TESTS: &[Test] = &[
    ("every_mode_with_every_workload_on_1_vcpu", on_one),
    ("every_mode_with_every_workload_on_2_vcpus", on_two),
    ("every_mode_with_every_workload_on_4_vcpus", on_four),
    ("sixteen_vcpus_are_told", sixteen),
    ("a_page_that_is_expected_soon_is_waited_for", threshold),
    ("evicting_everything_again_and_again_with_1_vcpu", evict_all_on_one),
    ("evicting_everything_again_and_again_with_2_vcpus", evict_all_on_two),
    ("evicting_everything_again_and_again_with_4_vcpus", evict_all_on_four),
    ("a_processor_that_goes_off_and_on_is_told_again", hotplug),
    ("pause_and_resume_with_hundreds_of_pages_outstanding", paused),
    ("a_pause_and_the_end_do_not_wait_for_a_store_that_hangs", hangs),
];

/// What a guest kernel that is not well says.
pub(crate) const COMPLAINTS: [&str; 6] =
    ["Host injected", "blocked for more than", "BUG:", "WARNING:", "Oops", "self-detected stall"];
/// A task that waits so long for a page is lost; it ends the guest.
pub(crate) const HUNG_TASK: &str = "echo 20 > /proc/sys/kernel/hung_task_timeout_secs && \
    echo 1 > /proc/sys/kernel/hung_task_panic";

fn run(kind: Kind, threads: u32, pages: u32) -> Request {
    let duration_ms = 400;
    Request::Run(Workload { kind, threads, duration_ms, pages, ..Workload::IDLE })
}

fn check(end: &End, runs: usize) {
    end.expect_code(0);
    for complaint in COMPLAINTS {
        assert!(!end.stdout.contains(complaint), "{}", end.stdout);
    }
    let results = end.results();
    assert_eq!(results.len(), runs);
    for result in results {
        assert_eq!(result.data_errors, 0, "{result:?}");
        assert!(result.pages_touched > 0, "{result:?}");
    }
}

/// By mode of the guest: user, kernel.
pub(crate) fn by_mode(end: &End, what: &str) -> [u64; 2] {
    [0, 1].map(|mode| end.number(&format!("/async_pf/{what}/{mode}")))
}

/// Everything that was announced was announced twice, and nothing is left.
fn check_books(end: &End) {
    let notified: u64 = by_mode(end, "notified").iter().sum();
    let number = |name: &str| end.number(&format!("/async_pf/{name}"));
    let ready = number("ready_sent") - number("wake_alls");
    assert_eq!(notified, ready + number("cancelled"), "{:#?}", end.json);
    assert_eq!(number("ready_sent"), number("ready_acknowledged"));
    assert_eq!(number("outstanding"), 0);
}

fn every_mode(cpus: &str) {
    for apf in ["off", "host", "kernel", "user"] {
        let mut guest = Guest::linux()
            .args(["--apf", apf, "--cpus", cpus, "--store", "delay=5ms", "--no-prefetch"])
            .exec(HUNG_TASK);
        for (kind, threads) in [(Kind::User, 1), (Kind::User, 8), (Kind::Copy, 1), (Kind::Copy, 8)]
        {
            guest = guest.request(run(kind, threads, 300));
        }
        let end = guest.run();
        check(&end, 4);
        if apf == "user" {
            check_books(&end);
            // Linux takes them in user mode only; its kernel is halted.
            let [user, kernel] = by_mode(&end, "notified");
            assert!(user > 0 && kernel == 0, "{user} and {kernel}");
            assert!(by_mode(&end, "halted")[1] > 0, "{:#?}", end.json);
            // A KVM that refuses is asked once by each vCPU.
            let ahead = end.number("/async_pf/costs/ahead/count");
            let can = end.json.as_ref().is_some_and(|json| !json["pages_mapped_ahead"].is_null());
            assert!(2 * ahead > user || !can, "{:#?}", end.json);
        }
    }
}

fn on_one() {
    every_mode("1");
}

fn on_two() {
    every_mode("2");
}

fn on_four() {
    every_mode("4");
}

fn sixteen() {
    let end = Guest::linux()
        .args(["--apf", "user", "--cpus", "16", "--store", "delay=5ms"])
        .exec(HUNG_TASK)
        .request(Request::Run(Workload {
            kind: Kind::User,
            threads: 32,
            duration_ms: 400,
            pages: 800,
            heartbeat_us: 20_000,
            ..Workload::IDLE
        }))
        .limit(2 * GUEST_LIMIT)
        .run();
    check(&end, 1);
    check_books(&end);
    assert!(by_mode(&end, "notified")[0] > 0, "{:#?}", end.json);
    assert_eq!(end.number("/async_pf/wake_alls"), 16);
}

fn threshold() {
    let guest = |threshold| {
        let end = Guest::linux()
            .args(["--apf", "user", "--apf-threshold", threshold, "--store", "delay=2ms"])
            .request(run(Kind::User, 8, 300))
            .run();
        check(&end, 1);
        check_books(&end);
        end
    };
    let waits = guest("1s");
    assert_eq!(by_mode(&waits, "notified"), [0, 0]);
    assert!(by_mode(&waits, "avoided")[0] > 10, "{:#?}", waits.json);
    let tells = guest("0us");
    assert!(by_mode(&tells, "notified")[0] > 10, "{:#?}", tells.json);
}

/// Touches of the same pages, over and over.
fn endless(kind: Kind, duration_ms: u32) -> Request {
    let pressure = Pressure::Limit { access: Access::Random, seed: 3 };
    let (threads, pages) = (4, 1500);
    Request::Run(Workload { kind, threads, duration_ms, pages, pressure, ..Workload::IDLE })
}

pub(crate) fn exec(command: &str) -> Request {
    Request::Exec { command: command.into() }
}

/// The reports of a guest that was asked for its kernel's messages last, and nobody complained.
pub(crate) fn check_reports(reports: &[Report], runs: usize) {
    let mut results = 0;
    let mut messages = "";
    for report in reports {
        match report {
            Report::Result(result) => {
                assert_eq!(result.data_errors, 0, "{result:?}");
                // A thread that is lost touches none.
                let threads = u64::from(result.workload.threads);
                assert!(result.pages_touched >= threads, "{result:?}");
                results += 1;
            }
            Report::Exec { output, .. } => messages = output,
            Report::Error { message } => panic!("the agent reports: {message}"),
            Report::Hello { .. } | Report::Host(_) => {}
        }
    }
    assert_eq!(results, runs);
    for complaint in COMPLAINTS {
        assert!(!messages.contains(complaint), "{messages}");
    }
}

/// How often everything is evicted.
const EVICTIONS: u32 = 12;

fn evict_all(apf: &str, cpus: &str) {
    let mut running = Running::start(
        &["--apf", apf, "--cpus", cpus, "--store", "delay=1ms"],
        &[
            exec(HUNG_TASK),
            endless(Kind::User, 3000),
            endless(Kind::Copy, 3000),
            exec("dmesg | tail -n 60"),
        ],
    );
    let mut evictions = 0;
    // Not for ever: what a guest of an emulated machine needs to get on takes a second to come back.
    while !running.has_ended() && evictions < EVICTIONS {
        evictions += u32::from(running.try_tell("POST /evict", ""));
        thread::sleep(Duration::from_millis(600));
    }
    let (end, reports) = running.finish(GUEST_LIMIT);
    end.expect_code(0);
    check_reports(&reports, 2);
    println!("--apf {apf} --cpus {cpus}: {evictions} times everything");
    assert!(evictions > 3, "{evictions}");
}

fn evict_all_on_one() {
    evict_all("user", "1");
    evict_all("off", "1");
}

fn evict_all_on_two() {
    evict_all("user", "2");
}

fn evict_all_on_four() {
    evict_all("user", "4");
}

fn hotplug() {
    let cpu1 = |on: u8| format!("echo {on} > /sys/devices/system/cpu/cpu1/online");
    let mut guest = Guest::linux()
        .args(["--apf", "user", "--cpus", "2", "--store", "delay=5ms", "--no-prefetch"])
        .exec(HUNG_TASK);
    for _ in 0..3 {
        guest = guest.exec(&cpu1(0)).request(run(Kind::User, 4, 200)).exec(&cpu1(1)).request(run(
            Kind::User,
            16,
            400,
        ));
    }
    let end = guest.run();
    check(&end, 6);
    check_books(&end);
    // Its INITs came while the protocol was off, by Linux's own hand; each time on again wakes all.
    assert_eq!(end.number("/async_pf/wake_alls"), 2 + 3);
    assert!(by_mode(&end, "notified")[0] > 300, "{:#?}", end.json);
}

fn paused() {
    let touch = Workload {
        kind: Kind::User,
        threads: 200,
        duration_ms: 3000,
        pages: 1200,
        ..Workload::IDLE
    };
    let running = Running::start(
        &["--apf", "user", "--cpus", "4", "--store", "delay=1s", "--no-prefetch"],
        &[exec(HUNG_TASK), Request::Run(touch), exec("dmesg | tail -n 60")],
    );
    // A worker each has 64 of them; the others wait for one.
    running.wait_until("nowait_async_pf_outstanding", |pages| pages >= Some(150.0));
    for pause in [10, 300, 1500, 10] {
        running.tell("POST /pause", "");
        running.wait_until("nowait_vcpus_paused", |vcpus| vcpus == Some(4.0));
        thread::sleep(Duration::from_millis(pause));
        running.tell("POST /resume", "");
        thread::sleep(Duration::from_millis(200));
    }
    let (end, reports) = running.finish(Duration::from_secs(60));
    end.expect_code(0);
    check_reports(&reports, 1);
}

fn hangs() {
    let touch = Workload {
        kind: Kind::Copy,
        threads: 100,
        duration_ms: 60_000,
        pages: 400,
        ..Workload::IDLE
    };
    let running = Running::start(
        &["--apf", "user", "--cpus", "2", "--store", "delay=60s", "--no-prefetch"],
        &[Request::Run(touch)],
    );
    running.wait_until("nowait_async_pf_outstanding", |pages| pages >= Some(2.0));
    running.tell("POST /pause", "");
    running.wait_until("nowait_vcpus_paused", |vcpus| vcpus == Some(2.0));
    let asked = Instant::now();
    let said = running.end();
    println!("the end took {:?}", asked.elapsed());
    assert!(asked.elapsed() < Duration::from_secs(10), "{said}");
}

//! Chaos: guests of random shape under random limits, delays, failures, pauses and evictions. Whatever
//! happens, every byte is right, no task is lost, and the guest comes to its end. The seed is printed:
//! `NOWAIT_CHAOS_SEED` repeats a run, `NOWAIT_CHAOS_GUEST` one guest of it, again and again;
//! `NOWAIT_CHAOS_SECONDS` makes it longer.

use std::thread;
use std::time::{Duration, Instant};

use fastrand::Rng;
use nowait_tests::running::Running;
use nowait_wire::agent::{Access, Kind, Pressure, Request, Workload};

use crate::Test;
use crate::apf::{HUNG_TASK, check_reports, exec};

pub(crate) const TESTS: &[Test] = &[("anything_at_any_time", chaos)];

/// How long, unless said otherwise.
const SECONDS: u64 = 60;
/// How long one guest is disturbed, and what it may take to its end after that.
const CHAOS_LIMIT: Duration = Duration::from_secs(60);
const CALM_LIMIT: Duration = Duration::from_secs(180);

fn from_environment(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

fn chaos() {
    let seed = from_environment("NOWAIT_CHAOS_SEED").unwrap_or_else(|| Rng::new().u64(..));
    let seconds = from_environment("NOWAIT_CHAOS_SECONDS").unwrap_or(SECONDS);
    println!("NOWAIT_CHAOS_SEED={seed}");
    let mut random = Rng::with_seed(seed);
    let until = Instant::now() + Duration::from_secs(seconds);
    let mut guests = 0;
    while Instant::now() < until {
        // Each has its own, so that one guest can be repeated alone.
        let seed = from_environment("NOWAIT_CHAOS_GUEST").unwrap_or_else(|| random.u64(..));
        println!("guest {guests}: NOWAIT_CHAOS_GUEST={seed}");
        guest(&mut Rng::with_seed(seed));
        guests += 1;
    }
}

fn pick<T: Copy>(random: &mut Rng, from: &[T]) -> T {
    from[random.usize(..from.len())]
}

fn store(random: &mut Rng) -> String {
    let mut tiers = Vec::new();
    if random.bool() {
        tiers.push(pick(random, &["lz4=2M", "lz4=6M"]).to_owned());
    }
    if random.u8(..3) == 0 {
        let what = pick(random, &["read", "write"]);
        let kind = if what == "read" && random.bool() { ",kind=corrupt" } else { "" };
        tiers.push(format!("fail={what}:rate=0.02{kind},seed={}", random.u32(..)));
    }
    // A guest that has to fetch its own kernel, page by page, gets on at the pace of the store.
    let delays = ["delay=200us", "delay=1ms", "delay=uniform:100us..4ms", "delay=3ms"];
    tiers.push(pick(random, &delays).to_owned());
    tiers.push("memory".to_owned());
    tiers.join("+")
}

fn workload(random: &mut Rng) -> Request {
    let access = pick(random, &[Access::Random, Access::Zipf, Access::Sequential, Access::Phases]);
    let kind = pick(random, &[Kind::User, Kind::Copy]);
    Request::Run(Workload {
        kind,
        threads: random.u32(1..=24),
        duration_ms: random.u32(500..2500),
        pages: random.u32(500..3000),
        heartbeat_us: 10_000,
        pressure: Pressure::Limit { access, seed: random.u64(..) },
        compute: random.u32(..2),
        compressible_percent: random.u8(..=100),
        write_percent: if kind == Kind::User { random.u8(..=100) } else { 0 },
        ..Workload::IDLE
    })
}

fn guest(random: &mut Rng) {
    // Ours mostly; what KVM does on its own is not what is tried here.
    let apf = pick(random, &["user", "user", "user", "off"]);
    let (cpus, store) = (pick(random, &["1", "1", "2", "3", "4"]), store(random));
    let mut args = vec!["--apf", apf, "--cpus", cpus, "--store", &store, "--memory", "96M"];
    if random.bool() {
        args.extend(["--resident-limit", pick(random, &["16M", "20M", "40M"])]);
    }
    if apf == "user" && random.bool() {
        args.extend(["--apf-threshold", pick(random, &["0us", "1ms", "10ms"])]);
    }
    println!("{}", args.join(" "));
    let runs = random.usize(1..=3);
    let mut requests = vec![exec(HUNG_TASK)];
    requests.extend((0..runs).map(|_| workload(random)));
    requests.push(exec("dmesg | tail -n 60"));
    let began = Instant::now();
    let mut running = Running::start(&args, &requests);
    while !running.has_ended() {
        if began.elapsed() > CHAOS_LIMIT {
            // A guest that fetches its own kernel page by page gets nowhere: now it is left alone.
            running.try_tell("PUT /limit", "none");
            break;
        }
        thread::sleep(Duration::from_millis(random.u64(1..400)));
        match random.u8(..8) {
            0 | 1 => drop(running.try_tell("POST /evict", "")),
            2 | 3 => {
                let limit = pick(random, &["16M", "20M", "24M", "48M", "none"]);
                running.try_tell("PUT /limit", limit);
            }
            4 | 5 => {
                running.try_tell("POST /pause", "");
                thread::sleep(Duration::from_millis(random.u64(..200)));
                running.try_tell("POST /resume", "");
            }
            _ => {}
        }
    }
    let (end, reports) = running.finish(CALM_LIMIT);
    end.expect_code(0);
    check_reports(&reports, runs);
}

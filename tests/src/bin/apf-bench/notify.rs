//! The heartbeat beside faulting threads, and a load of mostly hits.

use anyhow::Result;
use nowait_tests::figures::{Figure, Report, Series};
use nowait_tests::stats::{median, median_estimate, median_of_ratios};
use nowait_wire::agent::{Access, Kind, Pressure, Workload};

use super::Args;
use super::run::{MODES, Rounds};

/// How long a slow page takes.
const SLOW: &str = "delay=20ms";
const SLOW_MS: u32 = 20;
const THREADS: u32 = 8;
/// The rows of one boot. The first is a warm-up: what runs for the first time is slow in an emulated machine,
/// which translates it then, and late heartbeats would be of that.
const IDLE: usize = 1;
const USER: usize = 2;
const COPY: usize = 3;
const WARM_UP_MS: u32 = 400;

/// As many pages as the threads can bring in, and some more: each is touched once.
fn pages(duration_ms: u32) -> u32 {
    THREADS * (duration_ms / SLOW_MS + 1) * 5 / 4
}

pub(crate) fn run(args: &Args, report: &mut Report) -> Result<()> {
    let Args { runs, duration_ms, .. } = *args;
    let row = |kind, duration_ms| Workload {
        kind,
        threads: THREADS,
        duration_ms,
        pages: pages(duration_ms),
        ..Workload::IDLE
    };
    let idle = Workload { duration_ms, ..Workload::IDLE };
    let workloads = [
        row(Kind::User, WARM_UP_MS),
        idle,
        row(Kind::User, duration_ms),
        row(Kind::Copy, duration_ms),
    ];
    // Prefetch brings neighbours, which says nothing about telling the guest.
    let store = ["--store", SLOW, "--no-prefetch"];
    let rounds = Rounds::run("20 ms a page", runs, &MODES, &store, &workloads)?;
    let p50 = |mode, row| rounds.values(mode, row, |row| row.p50_us);
    let p99 = |mode, row| rounds.values(mode, row, |row| row.p99_us);
    let pages = |mode| rounds.values(mode, USER, |row| row.pages_per_s);
    let ratio = |a: Vec<f64>, b: Vec<f64>| median_of_ratios(&a, &b);
    let figures = [
        ("apf.user_p99_over_idle", ratio(p99("user", USER), p99("user", IDLE)), Some(3.0)),
        ("apf.user_p99_over_kernel", ratio(p99("user", USER), p99("kernel", USER)), Some(1.0)),
        ("apf.copy_p99_over_host", ratio(p99("user", COPY), p99("host", COPY)), Some(1.0)),
        ("apf.copy_p99_over_kernel", ratio(p99("user", COPY), p99("kernel", COPY)), Some(1.0)),
        ("apf.copy_p99_over_idle", ratio(p99("user", COPY), p99("user", IDLE)), None),
    ];
    for (name, estimate, bar) in figures {
        report.figures.push(match bar {
            Some(bar) => Figure::at_most(name, estimate, "ratio", bar),
            None => Figure::information(name, estimate, "ratio"),
        });
    }
    let off = ratio(p50("off", USER), p50("off", IDLE));
    report.figures.extend([
        Figure::at_least(
            "apf.user_pages_over_kernel",
            ratio(pages("user"), pages("kernel")),
            "ratio",
            1.0,
        ),
        Figure::at_least("apf.off_p50_over_idle", off, "ratio", 50.0),
    ]);
    for (row, name) in [(IDLE, "idle"), (USER, "user, 8 threads"), (COPY, "copy, 8 threads")] {
        report.details.push((
            format!("{name}: heartbeats, at least"),
            rounds.beats(row) as f64,
            "in a mode",
        ));
        for mode in MODES {
            report.details.extend([
                (format!("{name}, --apf {mode}: p50"), median(&p50(mode, row)), "us"),
                (format!("{name}, --apf {mode}: p99"), median(&p99(mode, row)), "us"),
            ]);
            if row != IDLE {
                let pages = rounds.values(mode, row, |row| row.pages_per_s);
                report.details.push((format!("{name}, --apf {mode}"), median(&pages), "pages/s"));
            }
        }
    }
    report
        .series
        .push(Series { name: "no paging".into(), points: rounds.percentiles("user", IDLE)? });
    for mode in MODES {
        let name = format!("--apf {mode}");
        report.series.push(Series { name, points: rounds.percentiles(mode, USER)? });
        let lost = f64::from(rounds.lost(mode));
        report.details.push((format!("--apf {mode}: guests that did not end"), lost, "guests"));
    }
    notifications(args, report)
}

/// Page-ready interrupts, and what the parts of a notification cost.
fn notifications(args: &Args, report: &mut Report) -> Result<()> {
    let Args { runs, duration_ms, .. } = *args;
    let workload = |pages| Workload {
        kind: Kind::User,
        threads: THREADS,
        duration_ms,
        pages,
        ..Workload::IDLE
    };
    let slow = [workload(pages(duration_ms))];
    let store = ["--store", SLOW, "--no-prefetch"];
    let misses = Rounds::run("page-ready by misses", runs, &["user"], &store, &slow)?;
    let ready = |rounds: &Rounds| -> Vec<f64> {
        let sent = rounds.numbers("user", "/async_pf/ready_sent");
        let wake_alls = rounds.numbers("user", "/async_pf/wake_alls");
        sent.iter().zip(wake_alls).map(|(sent, wake_alls)| sent - wake_alls).collect()
    };
    let fetched = misses.numbers("user", "/pager/fetched_pages");
    report.figures.push(Figure::at_most(
        "apf.ready_per_page",
        median_of_ratios(&ready(&misses), &fetched),
        "interrupts",
        1.05,
    ));
    let hits = ["--evict-to", "idle"];
    let hits = Rounds::run("page-ready by hits", runs, &["user"], &hits, &[workload(2048)])?;
    report.figures.push(Figure::at_most(
        "apf.ready_by_hits",
        median_estimate(&ready(&hits)),
        "interrupts",
        0.0,
    ));
    for part in ["decision", "injection", "ready", "ack", "ahead"] {
        let cost = |what: &str| misses.numbers("user", &format!("/async_pf/costs/{part}/{what}"));
        let each = median_of_ratios(&cost("total_ns"), &cost("count"));
        report.figures.push(Figure::information(&format!("apf.cost_{part}"), each, "ns"));
    }
    let exit = misses.numbers("user", "/async_pf/exit_ns");
    report.figures.push(Figure::information("apf.cost_exit", median_estimate(&exit), "ns"));
    Ok(())
}

/// 90 of 100 faults hit the compressed tier, the others take 20 ms.
pub(crate) fn mixed(args: &Args, report: &mut Report) -> Result<()> {
    let Args { runs, duration_ms, .. } = *args;
    const MODES: [&str; 2] = ["kernel", "user"];
    let workload = Workload {
        kind: Kind::User,
        threads: THREADS,
        duration_ms,
        pages: 10_240,
        pressure: Pressure::Limit { access: Access::Random, seed: 1 },
        warm_up_ms: WARM_UP_MS,
        compute: 1,
        compressible_percent: 90,
        ..Workload::IDLE
    };
    let args = ["--memory", "96M", "--resident-limit", "32M", "--no-prefetch", "--store"];
    let args = [&args[..], &["lz4=12M+delay=20ms+memory"]].concat();
    let rounds = Rounds::run("mixed", runs, &MODES, &args, &[workload])?;
    let pages = |mode| rounds.values(mode, 0, |row| row.pages_per_s);
    let units = |mode| rounds.values(mode, 0, |row| row.units_per_s);
    let ratio = |a: Vec<f64>, b: Vec<f64>| median_of_ratios(&a, &b);
    report.figures.extend([
        Figure::at_least(
            "apf.mixed_pages_over_kernel",
            ratio(pages("user"), pages("kernel")),
            "ratio",
            1.3,
        ),
        Figure::information(
            "apf.mixed_units_over_kernel",
            ratio(units("user"), units("kernel")),
            "ratio",
        ),
    ]);
    for mode in MODES {
        let share = rounds.hit_percent(mode);
        report.details.extend([
            (format!("mixed, --apf {mode}"), median(&pages(mode)), "pages/s"),
            (format!("mixed, --apf {mode}: computing"), median(&units(mode)), "units/s"),
            (
                format!("mixed, --apf {mode}: faults that hit the compressed tier"),
                median(&share),
                "%",
            ),
        ]);
    }
    Ok(())
}

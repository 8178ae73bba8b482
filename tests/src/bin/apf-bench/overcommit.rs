//! A guest with four times as much memory in use as may be resident: what it gets done, of both kinds; and what its
//! computing tasks get done where nothing pages, which no way of handling faults can exceed.

use anyhow::Result;
use nowait_tests::figures::{Figure, Report};
use nowait_tests::stats::{Estimate, median, median_of_ratios};
use nowait_wire::agent::{Access, Kind, Pressure, Workload};

use super::Args;
use super::run::{MODES, Rounds, Row};

const THREADS: u32 = 8;
const WARM_UP_MS: u32 = 400;
/// 56 MiB, which with 8 MiB of the guest's own are four times the limit.
const PAGES: u32 = 14_336;
const GUEST: [&str; 5] = ["--memory", "96M", "--resident-limit", "16M", "--no-prefetch"];
/// From this latency on the bars hold, in milliseconds.
const BARRED_FROM_MS: u32 = 5;

/// The runs of a boot: before the first one the guest has the most memory to give.
const PAGING: usize = 0;
const COMPUTING: usize = 1;

/// A number of a run.
type Number = fn(&Row) -> f64;
/// What `host` of a report begins with in the emulated machine, which has one CPU.
const ACCEL_NESTED: &str = "nested";
/// The two kinds of work.
const KINDS: [(&str, Number); 2] =
    [("pages", |row| row.pages_per_s), ("units", |row| row.units_per_s)];

pub(crate) fn run(args: &Args, report: &mut Report) -> Result<()> {
    for latency_ms in &args.latency_ms {
        for cpus in &args.cpus {
            at(args, *latency_ms, *cpus, report)?;
        }
    }
    Ok(())
}

fn workload(duration_ms: u32, cpus: u32, compressible_percent: u8) -> Workload {
    Workload {
        kind: Kind::User,
        threads: THREADS,
        duration_ms,
        pages: PAGES,
        pressure: Pressure::Limit { access: Access::Random, seed: 1 },
        warm_up_ms: WARM_UP_MS,
        compute: cpus,
        compressible_percent,
        ..Workload::IDLE
    }
}

/// The computing tasks alone.
fn computing(duration_ms: u32, cpus: u32) -> Workload {
    Workload { duration_ms, compute: cpus, ..Workload::IDLE }
}

fn at(args: &Args, latency_ms: u32, cpus: u32, report: &mut Report) -> Result<()> {
    let cpus_text = cpus.to_string();
    let guest = [&GUEST[..], &["--cpus", &cpus_text, "--store"]].concat();
    let name = |what: &str| format!("apf.overcommit_{latency_ms}ms_{cpus}cpu_{what}");
    let barred = latency_ms >= BARRED_FROM_MS;
    let mut push = |what: String, estimate: Estimate, bar: f64| {
        report.figures.push(if barred {
            Figure::at_least(&name(&what), estimate, "ratio", bar)
        } else {
            Figure::information(&name(&what), estimate, "ratio")
        });
    };

    let store = format!("delay={latency_ms}ms+memory");
    let misses = Rounds::run(
        &format!("{latency_ms} ms, {cpus} vCPUs, misses"),
        args.runs,
        &MODES,
        &[&guest[..], &[&store]].concat(),
        &[workload(args.duration_ms, cpus, 0), computing(args.duration_ms, cpus)],
    )?;
    for (kind, number) in KINDS {
        let of = |mode| misses.values(mode, PAGING, number);
        push(format!("{kind}_over_off"), median_of_ratios(&of("user"), &of("off")), 1.9);
        push(format!("{kind}_over_kernel"), median_of_ratios(&of("user"), &of("kernel")), 0.98);
    }

    let most = |mode| misses.values(mode, COMPUTING, |row| row.units_per_s);
    let ceiling =
        median_of_ratios(&most("off"), &misses.values("off", PAGING, |row| row.units_per_s));
    let store = format!("lz4=12M+delay={latency_ms}ms+memory");
    let hits = Rounds::run(
        &format!("{latency_ms} ms, {cpus} vCPUs, 70 % hits"),
        args.runs,
        &["kernel", "user"],
        &[&guest[..], &[&store]].concat(),
        &[workload(args.duration_ms, cpus, 70)],
    )?;
    for (kind, number) in KINDS {
        let of = |mode| hits.values(mode, PAGING, number);
        let ratio = median_of_ratios(&of("user"), &of("kernel"));
        push(format!("{kind}_over_kernel_70_hits"), ratio, 1.1);
    }
    let what = name("units_without_paging_over_off");
    report.figures.push(Figure::information(&what, ceiling, "ratio"));
    for (kind, number) in KINDS {
        let unit = if kind == "pages" { "pages/s" } else { "units/s" };
        for mode in MODES {
            let value = median(&misses.values(mode, PAGING, number));
            report.details.push((format!("{latency_ms} ms, {cpus} vCPUs, {mode}"), value, unit));
        }
        for mode in ["kernel", "user"] {
            let value = median(&hits.values(mode, PAGING, number));
            let what = format!("{latency_ms} ms, {cpus} vCPUs, 70 % hits, {mode}");
            report.details.push((what, value, unit));
        }
    }
    let what = format!("{latency_ms} ms, {cpus} vCPUs: faults that hit the compressed tier");
    report.details.push((what, median(&hits.hit_percent("user")), "%"));
    if !report.host.starts_with(ACCEL_NESTED) {
        return Ok(());
    }
    // On one CPU, and where no vCPU waits: what is not computed went into pages.
    let alone: Vec<f64> = MODES.iter().flat_map(|mode| most(mode)).collect();
    let alone = median(&alone);
    report.details.push((
        format!("{latency_ms} ms, {cpus} vCPUs, without paging"),
        alone,
        "units/s",
    ));
    for mode in MODES.into_iter().filter(|mode| *mode != "off") {
        let of = |number| median(&misses.values(mode, PAGING, number));
        let (pages, units) = (of(|row| row.pages_per_s), of(|row| row.units_per_s));
        let each_us = (1.0 - units / alone) / pages * 1e6;
        let what =
            format!("{latency_ms} ms, {cpus} vCPUs, {mode}: time not computed, for each page");
        report.details.push((what, each_us, "us"));
    }
    Ok(())
}

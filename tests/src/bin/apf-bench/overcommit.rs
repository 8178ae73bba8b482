//! A guest with four times as much memory in use as may be resident: what it gets done, of both kinds.

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

/// A number of a run.
type Number = fn(&Row) -> f64;
/// The two kinds of work.
const KINDS: [(&str, Number); 2] =
    [("pages", |row| row.pages_per_s), ("units", |row| row.units_per_s)];

pub(crate) fn run(args: &Args, report: &mut Report) -> Result<()> {
    for latency_ms in &args.latency_ms {
        for cpus in [1, 4] {
            at(args, *latency_ms, cpus, report)?;
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
        &[workload(args.duration_ms, cpus, 0)],
    )?;
    for (kind, number) in KINDS {
        let of = |mode| misses.values(mode, 0, number);
        push(format!("{kind}_over_off"), median_of_ratios(&of("user"), &of("off")), 1.9);
        push(format!("{kind}_over_kernel"), median_of_ratios(&of("user"), &of("kernel")), 0.98);
    }

    let store = format!("lz4=12M+delay={latency_ms}ms+memory");
    let hits = Rounds::run(
        &format!("{latency_ms} ms, {cpus} vCPUs, 70 % hits"),
        args.runs,
        &["kernel", "user"],
        &[&guest[..], &[&store]].concat(),
        &[workload(args.duration_ms, cpus, 70)],
    )?;
    for (kind, number) in KINDS {
        let of = |mode| hits.values(mode, 0, number);
        let ratio = median_of_ratios(&of("user"), &of("kernel"));
        push(format!("{kind}_over_kernel_70_hits"), ratio, 1.1);
    }
    for (kind, number) in KINDS {
        let unit = if kind == "pages" { "pages/s" } else { "units/s" };
        for mode in MODES {
            let value = median(&misses.values(mode, 0, number));
            report.details.push((format!("{latency_ms} ms, {cpus} vCPUs, {mode}"), value, unit));
        }
        for mode in ["kernel", "user"] {
            let value = median(&hits.values(mode, 0, number));
            let what = format!("{latency_ms} ms, {cpus} vCPUs, 70 % hits, {mode}");
            report.details.push((what, value, unit));
        }
    }
    let what = format!("{latency_ms} ms, {cpus} vCPUs: faults that hit the compressed tier");
    report.details.push((what, median(&hits.hit_percent("user")), "%"));
    Ok(())
}

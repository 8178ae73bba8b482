//! How fast a guest boots, and what the VMM costs: nowait beside QEMU's microvm, interleaved, on the
//! same kernel and initramfs. `cargo xtask bench boot` runs it, in the emulated machine where there is
//! no other; times there are emulated, so that only ratios count.
//!
//! A boot leaves the machine in another state than it found, which is faster or slower for whoever
//! comes next. So within a round the order is random, and before each boot free memory is scrubbed
//! (`scrub.rs`): both start alike.
#![forbid(unsafe_code)]

mod measure;
mod scrub;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;
use nowait_tests::figures::{Figure, Report, SCHEMA};
use nowait_tests::stats::{
    Estimate, SplitMix64, median, median_estimate, median_of_ratios, median_ratio,
};

use measure::{Boot, Footprint};

/// Boot benchmark of nowait beside QEMU's microvm
#[derive(Debug, Parser)]
struct Args {
    /// Interleaved runs of nowait and microvm that count; one more before them warms the caches, and
    /// in every third (of more than 60, in about 20 of them) the other configurations run too
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u32).range(15..=300))]
    runs: u32,
    /// Write the figures to FILE
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Seed of the order within the rounds
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// One round in this many has all configurations, at least,
const OTHERS_EVERY: u32 = 3;
/// and about so many in all are enough for them.
const OTHERS_ROUNDS: u32 = 20;
/// At most this part of the time of QEMU's microvm.
const TIME_BAR: f64 = 0.8;
/// Anonymous memory and mapped files of the VMM, without guest RAM, in MiB.
const FOOTPRINT_BAR_MIB: f64 = 5.0;
/// The same with 4 GiB of guest RAM, over that with 128 MiB.
const FOOTPRINT_GROWTH_BAR: f64 = 1.1;
/// Guest pages touched for each page of RAM added.
const TOUCHED_GROWTH_BAR: f64 = 0.02;
/// The two guests of the footprint, in MiB.
const SMALL_MIB: u64 = 128;
const LARGE_MIB: u64 = 4096;

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("boot-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<()> {
    let boots = Boot::all();
    let mut times = vec![Vec::new(); boots.len()];
    let (mut small, mut large) = (Vec::new(), Vec::new());
    let mut order = SplitMix64(args.seed);
    let others_every = (args.runs / OTHERS_ROUNDS).max(OTHERS_EVERY);
    for round in 0..=args.runs {
        eprintln!(
            "boot-bench: round {round} of {}{}",
            args.runs,
            if round == 0 { " (warm-up)" } else { "" }
        );
        let with_others = round % others_every == 0;
        let now = |boot: &Boot| with_others || matches!(*boot, Boot::NOWAIT | Boot::Microvm);
        let mut this_round: Vec<_> =
            boots.iter().zip(&mut times).filter(|(boot, _)| now(boot)).collect();
        order.shuffle(&mut this_round);
        for (boot, times) in this_round {
            scrub::free_memory().context("scrubbing free memory")?;
            let seconds = boot.time().with_context(|| format!("booting {}", boot.name()))?;
            if round > 0 {
                times.push((round, seconds.as_secs_f64() * 1e3));
            }
        }
        if round > 0 && with_others {
            small.push(Footprint::of_guest(SMALL_MIB).context("the small guest")?);
            large.push(Footprint::of_guest(LARGE_MIB).context("the large guest")?);
        }
    }
    let report = Report {
        series: Vec::new(),
        schema: SCHEMA,
        command: format!("cargo xtask bench boot -- --runs {} --seed {}", args.runs, args.seed),
        host: measure::host(),
        figures: [time_figures(&times), footprint_figures(&small, &large)].concat(),
        details: details(&boots, &times, &small, &large),
    };
    print!("{}", report.table());
    if let Some(path) = &args.json {
        report.write(path).with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(())
}

/// The times of one configuration in milliseconds, each with its round.
type Times = Vec<(u32, f64)>;

fn time_figures(times: &[Times]) -> Vec<Figure> {
    let of = |boot: Boot| &times[Boot::all().iter().position(|b| *b == boot).expect("listed")];
    // Only rounds in which both ran.
    let ratio = |a: Boot, b: Boot| {
        let pairs = of(a).iter().filter_map(|(round, a)| {
            of(b).iter().find(|(other, _)| other == round).map(|(_, b)| (*a, *b))
        });
        let (a, b): (Vec<_>, Vec<_>) = pairs.unzip();
        median_of_ratios(&a, &b)
    };
    vec![
        Figure::at_most(
            "boot.time_over_microvm",
            ratio(Boot::NOWAIT, Boot::Microvm),
            "ratio",
            TIME_BAR,
        ),
        Figure::information(
            "boot.time_over_populated",
            ratio(Boot::NOWAIT, Boot::NowaitPopulated),
            "ratio",
        ),
        Figure::information(
            "boot.populated_over_microvm",
            ratio(Boot::NowaitPopulated, Boot::Microvm),
            "ratio",
        ),
    ]
}

fn footprint_figures(small: &[Footprint], large: &[Footprint]) -> Vec<Figure> {
    let mib = |prints: &[Footprint]| prints.iter().map(Footprint::mib).collect::<Vec<_>>();
    let touched =
        |prints: &[Footprint]| prints.iter().map(|p| p.pages_touched as f64).collect::<Vec<_>>();
    let added_pages = ((LARGE_MIB - SMALL_MIB) << 20) as f64 / 4096.0;
    let growth: Vec<f64> =
        touched(large).iter().zip(touched(small)).map(|(l, s)| (l - s) / added_pages).collect();
    vec![
        Figure::at_most("boot.vmm_memory", median_estimate(&mib(small)), "MiB", FOOTPRINT_BAR_MIB),
        Figure::at_most(
            "boot.vmm_memory_4g_over_128m",
            median_ratio(&mib(large), &mib(small)),
            "ratio",
            FOOTPRINT_GROWTH_BAR,
        ),
        Figure::at_most(
            "boot.pages_touched_per_page_added",
            median_estimate(&growth),
            "ratio",
            TOUCHED_GROWTH_BAR,
        ),
        Figure::information("boot.pages_touched", exact(median(&touched(small))), "pages"),
    ]
}

fn exact(value: f64) -> Estimate {
    Estimate { value, low: value, high: value }
}

fn details(
    boots: &[Boot],
    times: &[Times],
    small: &[Footprint],
    large: &[Footprint],
) -> Vec<(String, f64, &'static str)> {
    let mut details: Vec<_> = boots
        .iter()
        .zip(times)
        .map(|(boot, times)| {
            let times: Vec<_> = times.iter().map(|(_, ms)| *ms).collect();
            (format!("{}: exec to the agent's first line", boot.name()), median(&times), "ms")
        })
        .collect();
    for (mib, prints) in [(SMALL_MIB, small), (LARGE_MIB, large)] {
        let of = |pick: fn(&Footprint) -> u64| {
            median(&prints.iter().map(|p| pick(p) as f64).collect::<Vec<_>>())
        };
        details.push((format!("anonymous memory with {mib} MiB"), of(|p| p.anon_kib), "KiB"));
        details.push((format!("mapped files with {mib} MiB"), of(|p| p.file_kib), "KiB"));
        details.push((format!("pages touched with {mib} MiB"), of(|p| p.pages_touched), "pages"));
    }
    details
}

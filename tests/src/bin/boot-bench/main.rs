//! How fast a guest boots, and what the VMM costs: nowait beside QEMU's microvm, interleaved, on the
//! same kernel and initramfs. `cargo xtask bench boot` runs it, in the emulated machine where there is
//! no other; times there are emulated, so that only ratios count.
#![forbid(unsafe_code)]

mod measure;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;
use nowait_tests::figures::{Figure, Report, SCHEMA};
use nowait_tests::stats::{Estimate, median, median_estimate, median_ratio};

use measure::{Boot, Footprint};

/// Boot benchmark of nowait beside QEMU's microvm
#[derive(Debug, Parser)]
struct Args {
    /// Interleaved runs that count; one more before them warms the caches
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u32).range(5..=99))]
    runs: u32,
    /// Write the figures to FILE
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

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
    for round in 0..=args.runs {
        eprintln!(
            "boot-bench: round {round} of {}{}",
            args.runs,
            if round == 0 { " (warm-up)" } else { "" }
        );
        for (boot, times) in boots.iter().zip(&mut times) {
            let seconds = boot.time().with_context(|| format!("booting {}", boot.name()))?;
            if round > 0 {
                times.push(seconds.as_secs_f64() * 1e3);
            }
        }
        if round > 0 {
            small.push(Footprint::of_guest(SMALL_MIB).context("the small guest")?);
            large.push(Footprint::of_guest(LARGE_MIB).context("the large guest")?);
        }
    }
    let report = Report {
        schema: SCHEMA,
        command: format!("cargo xtask bench boot --runs {}", args.runs),
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

fn time_figures(times: &[Vec<f64>]) -> Vec<Figure> {
    let of = |boot: Boot| &times[Boot::all().iter().position(|b| *b == boot).expect("listed")];
    let nowait = of(Boot::NOWAIT);
    vec![
        Figure::at_most(
            "boot.time_over_microvm",
            median_ratio(nowait, of(Boot::Microvm)),
            "ratio",
            TIME_BAR,
        ),
        Figure::information(
            "boot.time_over_populated",
            median_ratio(nowait, of(Boot::NowaitPopulated)),
            "ratio",
        ),
        Figure::information(
            "boot.populated_over_microvm",
            median_ratio(of(Boot::NowaitPopulated), of(Boot::Microvm)),
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
    times: &[Vec<f64>],
    small: &[Footprint],
    large: &[Footprint],
) -> Vec<(String, f64, &'static str)> {
    let mut details: Vec<_> = boots
        .iter()
        .zip(times)
        .map(|(boot, times)| {
            (format!("{}: exec to the agent's first line", boot.name()), median(times), "ms")
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

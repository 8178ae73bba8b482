//! What a fault on a page that is at hand costs a guest: through a marker, and through an event of
//! userfaultfd, of the same pages in the same rounds. The guest part of `cargo xtask bench pager`, on the
//! host's KVM or in the emulated machine.
//!
//! And a guest's touches are written down, for the eviction policy to be measured on (`trace`).
//!
//! One thread of the guest touches pages that are out of the guest mapping and still in memory
//! (`--evict-to idle`); the time of a touch is that of the fault, as the guest sees it.
#![forbid(unsafe_code)]

mod trace;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use nowait_tests::figures::{Figure, Report, SCHEMA};
use nowait_tests::guest::Guest;
use nowait_tests::stats::{median, median_of_ratios};
use nowait_wire::agent::Kind;

/// What a hit costs in a guest
#[derive(Debug, Parser)]
struct Args {
    /// Interleaved rounds; a boot for each way of handling faults
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u32).range(5..=99))]
    runs: u32,
    /// Write the figures to FILE
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Record the pages that a guest with a Zipf workload touches, and write their numbers to FILE
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
}

/// Pages of one run; each is touched once.
const PAGES: u32 = 2048;
/// Runs of one boot; the first warms up.
const RUNS_PER_BOOT: usize = 4;
/// A hit through a marker over the same through an event.
const BAR: f64 = 0.85;
/// The ways: the first by markers, the others by events.
const MODES: [&str; 3] = ["off", "host", "kernel"];

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("hit-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<()> {
    if let Some(path) = &args.trace {
        eprintln!("hit-bench: recording a guest's touches");
        trace::record(path).context("recording a trace")?;
    }
    let mut times: [Vec<f64>; MODES.len()] = Default::default();
    for round in 0..args.runs {
        eprintln!("hit-bench: round {} of {}", round + 1, args.runs);
        // Not always the same one first.
        for turn in 0..MODES.len() {
            let mode = (turn + round as usize) % MODES.len();
            let us = hit_us(MODES[mode]).with_context(|| format!("--apf {}", MODES[mode]))?;
            times[mode].push(us);
        }
    }
    let [markers, host, kernel] = &times;
    let over = |events| median_of_ratios(markers, events);
    let report = Report {
        series: Vec::new(),
        schema: SCHEMA,
        command: format!("hit-bench --runs {}", args.runs),
        host: std::env::var("NOWAIT_ACCEL").unwrap_or_else(|_| "kvm".into()),
        figures: vec![
            Figure::at_most("pager.hit_marker_over_event_host", over(host), "ratio", BAR),
            Figure::at_most("pager.hit_marker_over_event_kernel", over(kernel), "ratio", BAR),
        ],
        details: MODES
            .iter()
            .zip(&times)
            .map(|(mode, times)| {
                (format!("a hit as the guest sees it, --apf {mode}"), median(times), "us")
            })
            .collect(),
    };
    print!("{}", report.table());
    if let Some(path) = &args.json {
        report.write(path).with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(())
}

/// Microseconds for a touch, the median of the runs of one boot.
fn hit_us(apf: &str) -> Result<f64> {
    let mut guest = Guest::linux().args(["--apf", apf, "--evict-to", "idle", "--console", "none"]);
    for _ in 0..RUNS_PER_BOOT {
        guest = guest.workload(Kind::User, 1, PAGES);
    }
    let end = guest.run();
    end.expect_code(0);
    let results = end.results();
    ensure!(results.len() == RUNS_PER_BOOT, "{} of {RUNS_PER_BOOT} runs", results.len());
    ensure!(results.iter().all(|result| result.data_errors == 0), "data errors: {results:?}");
    ensure!(end.number("/pager/evicted_pages") == 0, "pages left memory");
    let touched =
        |result: &&nowait_wire::agent::RunResult| result.pages_touched == u64::from(PAGES);
    ensure!(results.iter().all(touched), "not all pages were touched: {results:?}");
    let us = results[1..].iter().map(|result| result.elapsed_us as f64 / f64::from(PAGES));
    Ok(median(&us.collect::<Vec<_>>()))
}

//! Async page faults in all four modes, side by side: what the heartbeat beside faulting threads sees, what
//! the guest gets done, and what telling the guest costs. `cargo xtask bench apf`, on the host's KVM or in
//! the emulated machine.
#![forbid(unsafe_code)]

mod notify;
mod overcommit;
mod preemption;
mod run;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, ValueEnum};
use nowait_tests::figures::{Report, SCHEMA, table};

/// Async page faults: off, host, kernel and user side by side
#[derive(Debug, Parser)]
struct Args {
    /// Interleaved rounds; a boot for each mode
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(5..=99))]
    runs: u32,
    /// How long each run of a guest lasts, in milliseconds; 2000 make 10,000 heartbeats in 5 rounds
    #[arg(long, default_value_t = 2100, value_parser = clap::value_parser!(u32).range(100..=60_000))]
    duration_ms: u32,
    /// Only these parts
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        default_value = "notify,mixed,preemption,overcommit"
    )]
    part: Vec<Part>,
    /// Latencies of the store for the part "overcommit", in milliseconds
    #[arg(long, value_delimiter = ',', default_value = "1,5,20")]
    latency_ms: Vec<u32>,
    /// Numbers of vCPUs for the part "overcommit"
    #[arg(long, value_delimiter = ',', default_value = "1,4", value_parser = clap::value_parser!(u32).range(1..=32))]
    cpus: Vec<u32>,
    /// Write the figures to FILE
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Parts of the benchmark.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// The heartbeat beside pages that take 20 ms, and what telling the guest costs
    Notify,
    /// 90 % of the faults at hand
    Mixed,
    /// Pages that the guest's kernel writes to, by how preemptible that is
    Preemption,
    /// Four times as much memory in use as may be resident
    Overcommit,
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("apf-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<()> {
    let mut report = Report {
        schema: SCHEMA,
        command: command(args),
        host: host(),
        figures: Vec::new(),
        details: Vec::new(),
        series: Vec::new(),
    };
    for part in &args.part {
        let known = report.figures.len();
        match part {
            Part::Notify => notify::run(args, &mut report)?,
            Part::Mixed => notify::mixed(args, &mut report)?,
            Part::Preemption => preemption::run(args, &mut report)?,
            Part::Overcommit => overcommit::run(args, &mut report)?,
        }
        // It takes an hour in all: each part is there as soon as it is known.
        eprint!("{}", table(&report.figures[known..]));
        if let Some(path) = &args.json {
            report.write(path).with_context(|| format!("writing {}", path.display()))?;
        }
    }
    print!("{}", report.table());
    Ok(())
}

/// What runs the guests, and by which clock if it is not the usual one.
fn host() -> String {
    let accel = std::env::var("NOWAIT_ACCEL").unwrap_or_else(|_| "kvm".into());
    match std::env::var("NOWAIT_CLOCK") {
        Ok(clock) => format!("{accel}, its clock counts {clock}"),
        Err(_) => accel,
    }
}

/// The command line that makes these numbers.
fn command(args: &Args) -> String {
    let Args { runs, duration_ms, part, latency_ms, cpus, .. } = args;
    let parts: Vec<_> = part.iter().map(|part| format!("{part:?}").to_lowercase()).collect();
    let parts = parts.join(",");
    let mut line = format!("apf-bench --runs {runs} --duration-ms {duration_ms} --part {parts}");
    if part.contains(&Part::Overcommit) {
        let list =
            |numbers: &[u32]| numbers.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
        line += &format!(" --latency-ms {} --cpus {}", list(latency_ms), list(cpus));
    }
    line
}

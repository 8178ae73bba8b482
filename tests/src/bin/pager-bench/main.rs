//! What the pager costs over a bare userfaultfd loop, and what a slow page costs the others. Runs on any
//! host with userfaultfd: threads that touch guest RAM play the vCPUs. `cargo xtask bench pager` runs it.
//!
//! Everything that is compared runs in the same round, in random order; a figure is a ratio of medians
//! over the rounds.

mod compressed;
mod depth;
mod eviction;
mod faulting;
mod machine;
mod memory;
mod overhead;
mod probe;
mod rates;
mod servers;
mod slow;
mod uffd;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use nowait_tests::figures::{Figure, Report, SCHEMA};

use probe::Samples;

/// Benchmark of the pager: rates of faults, slow pages beside fast ones, stores, eviction
#[derive(Debug, Parser)]
struct Args {
    /// Rounds that count; one more before them warms up
    #[arg(long, default_value_t = 9, value_parser = clap::value_parser!(u32).range(5..=99))]
    runs: u32,
    /// Write the figures to FILE
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Seed of the order within the rounds
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Only probes with TEXT in their name
    #[arg(long, value_name = "TEXT", default_value = "")]
    only: String,
    /// Page numbers recorded in a guest, for the eviction policy, instead of a generated trace
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Add the figures of another report, one measured in a guest
    #[arg(long, value_name = "FILE")]
    with: Vec<PathBuf>,
    /// Where stores have their files
    #[arg(long, value_name = "DIR", default_value_os_t = std::env::temp_dir())]
    directory: PathBuf,
}

impl Args {
    /// The command that gives the same report.
    fn command(&self) -> String {
        let mut words =
            format!("cargo xtask bench pager -- --runs {} --seed {}", self.runs, self.seed);
        if !self.only.is_empty() {
            words.push_str(&format!(" --only '{}'", self.only));
        }
        // Files by their names alone: where they were says nothing elsewhere.
        let mut file = |option: &str, path: &Path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            words.push_str(&format!(" {option} {name}"));
        };
        self.trace.iter().for_each(|path| file("--trace", path));
        self.with.iter().for_each(|path| file("--with", path));
        words
    }
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("pager-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<()> {
    let trace = args.trace.as_deref().map(|path| {
        eviction::read(path).with_context(|| format!("reading the trace {}", path.display()))
    });
    let mut probes = [
        rates::probes(),
        slow::probes(),
        compressed::probes(),
        depth::probes(&args.directory),
        eviction::probes(trace.transpose()?),
        overhead::probes(),
    ]
    .into_iter()
    .flatten()
    .collect::<Vec<_>>();
    probes.retain(|probe| probe.name.contains(&args.only));
    let others = args.with.iter().map(|path| figures_of(path)).collect::<Result<Vec<_>>>()?;
    let mut samples = Samples::default();
    let mut random = fastrand::Rng::with_seed(args.seed);
    for round in 0..=args.runs {
        let warm_up = if round == 0 { " (warm-up)" } else { "" };
        eprintln!("pager-bench: round {round} of {}{warm_up}", args.runs);
        samples.round(&probes, &mut random, round)?;
    }
    let report = Report {
        series: Vec::new(),
        schema: SCHEMA,
        command: args.command(),
        host: host(),
        figures: [
            rates::figures(&samples),
            slow::figures(&samples),
            compressed::figures(&samples),
            depth::figures(&samples),
            eviction::figures(&samples),
            overhead::figures(&samples),
            others.concat(),
        ]
        .concat(),
        details: samples.details(&probes),
    };
    print!("{}", report.table());
    if let Some(path) = &args.json {
        report.write(path).with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(())
}

/// The figures of a report that was written before.
fn figures_of(path: &Path) -> Result<Vec<Figure>> {
    #[derive(serde::Deserialize)]
    struct Figures {
        schema: String,
        figures: Vec<Figure>,
    }
    let read = || -> Result<Figures> { Ok(serde_json::from_slice(&std::fs::read(path)?)?) };
    let report = read().with_context(|| format!("reading the report {}", path.display()))?;
    ensure!(report.schema == SCHEMA, "{} is no {SCHEMA} report", path.display());
    Ok(report.figures)
}

/// The kernel and the number of CPUs.
fn host() -> String {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let cpus = std::thread::available_parallelism().map_or(0, usize::from);
    format!("Linux {}, {cpus} CPUs", release.trim())
}

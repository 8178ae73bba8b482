//! nowait beside QEMU on the same guest, under the same limit and with the same slow medium: what the
//! guest's heartbeat sees, and what the guest gets done. `cargo xtask bench peers`, on the host's KVM or
//! in the emulated machine. docs/comparison.md says what is compared and what that does not show.
#![forbid(unsafe_code)]

mod channel;
mod medium;
mod peer;
mod qemu;
mod rounds;
mod setting;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::Parser;
use nowait_tests::cgroup;
use nowait_tests::figures::{Figure, Report, SCHEMA};
use nowait_tests::stats::{median, median_of_ratios};

use medium::{Server, Swap};
use peer::{Outcome, Peer};
use rounds::Rounds;
use setting::Setting;

/// Stalls and work of nowait beside QEMU
#[derive(Debug, Parser)]
struct Args {
    /// Interleaved rounds, a boot for each peer; fewer than 5 are for trying it out
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=99))]
    runs: u32,
    /// How long the measured run of a guest lasts, in milliseconds
    #[arg(long, default_value_t = 2000, value_parser = clap::value_parser!(u32).range(100..=60_000))]
    duration_ms: u32,
    /// How long the medium takes for a read, in milliseconds
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    read_ms: u32,
    /// The host's vm.page-cluster: it reads 2^N pages ahead of a fault from its swap
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=6))]
    page_cluster: u32,
    /// Have the host back no memory by huge pages meanwhile
    #[arg(long)]
    no_huge_pages: bool,
    /// Write the figures to FILE
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("peers-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<()> {
    if let Some(why) = cgroup::missing() {
        bail!("{why}");
    }
    let cluster = args.page_cluster.to_string();
    let mut settings = vec![Setting::change(setting::PAGE_CLUSTER, &cluster)?];
    if args.no_huge_pages {
        settings.push(Setting::change(setting::HUGE_PAGES, "never")?);
    }
    let host = host();
    let swap = Swap::on(args.read_ms).context("swap on a slow medium")?;
    let server = Server::start(args.read_ms).context("the store's server")?;
    let rounds = Rounds::run(args.runs, args.duration_ms, &server.socket())?;
    drop((swap, settings));
    let report = Report {
        schema: SCHEMA,
        command: format!(
            "cargo xtask bench peers -- --runs {} --duration-ms {} --read-ms {} --page-cluster {}{}",
            args.runs,
            args.duration_ms,
            args.read_ms,
            args.page_cluster,
            if args.no_huge_pages { " --no-huge-pages" } else { "" }
        ),
        host,
        figures: figures(&rounds),
        details: details(&rounds),
        series: Vec::new(),
    };
    print!("{}", report.table());
    if let Some(path) = &args.json {
        report.write(path).with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(())
}

/// A number of one boot.
type Number = fn(&Outcome) -> f64;

const P50: Number = |outcome| outcome.loaded.p50_us;
const P99: Number = |outcome| outcome.loaded.p99_us;
const PAGES: Number = |outcome| outcome.loaded.pages_per_s;
const UNITS: Number = |outcome| outcome.loaded.units_per_s;

fn figures(rounds: &Rounds) -> Vec<Figure> {
    let ratio = |name: String, number: Number, over: Peer, under: Peer| {
        let estimate =
            median_of_ratios(&rounds.values(over, number), &rounds.values(under, number));
        Figure::information(&name, estimate, "ratio")
    };
    let others = || Peer::ALL.into_iter().filter(|peer| *peer != Peer::USER);
    let mut figures = Vec::new();
    for (what, number) in [("p50", P50), ("p99", P99)] {
        figures.extend(others().map(|peer| {
            ratio(format!("peers.{what}_{}_over_user", peer.key()), number, peer, Peer::USER)
        }));
    }
    for (what, number) in [("pages", PAGES), ("units", UNITS)] {
        figures.extend(others().map(|peer| {
            ratio(format!("peers.{what}_user_over_{}", peer.key()), number, Peer::USER, peer)
        }));
    }
    figures
}

fn details(rounds: &Rounds) -> Vec<(String, f64, &'static str)> {
    let numbers: [(&str, Number, &'static str); 8] = [
        ("overrun without paging, p50", |outcome| outcome.idle.p50_us, "us"),
        ("overrun without paging, p99", |outcome| outcome.idle.p99_us, "us"),
        ("overrun, p50", P50, "us"),
        ("overrun, p99", P99, "us"),
        ("pages touched", PAGES, "pages/s"),
        ("computing", UNITS, "units/s"),
        ("pages read from the medium", |outcome| outcome.fetched_per_s, "pages/s"),
        ("guest RAM in memory at the end", |outcome| outcome.resident_mib, "MiB"),
    ];
    let mut details = Vec::new();
    for peer in Peer::ALL {
        for (what, number, unit) in numbers {
            details.push((
                format!("{}: {what}", peer.name()),
                median(&rounds.values(peer, number)),
                unit,
            ));
        }
        if matches!(peer, Peer::Qemu | Peer::QemuWithout) {
            let huge = median(&rounds.values(peer, |outcome| outcome.huge_mib));
            details.push((format!("{}: of it in huge pages", peer.name()), huge, "MiB"));
            let own = median(&rounds.values(peer, |outcome| outcome.own_mib));
            details.push((format!("{}: its own memory, on top", peer.name()), own, "MiB"));
        }
        let lost = f64::from(rounds.lost(peer));
        details.push((format!("{}: guests that did not end", peer.name()), lost, "guests"));
    }
    details
}

/// The kernel that the VMMs run on, whether it is emulated, and whether it backs memory by huge pages.
fn host() -> String {
    let read = |file| setting::current(file).unwrap_or_else(|_| "unknown".into());
    let release = read("/proc/sys/kernel/osrelease");
    let accel = std::env::var("NOWAIT_ACCEL").unwrap_or_else(|_| "kvm".into());
    let huge = read(setting::HUGE_PAGES);
    format!("Linux {release} ({accel}; transparent huge pages: {huge})")
}

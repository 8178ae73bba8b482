//! What `nowait stall` is asked to measure, and the boots and runs that this comes to.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use guest_memory::{PAGE_SIZE, StoreSpec};
use nowait_wire::agent::{Access, Kind, Pressure, Request, Workload};

use super::StallError;
use crate::kvm::cpuid::Apf;
use crate::size;

/// The heartbeat's period, in microseconds.
pub(super) const HEARTBEAT_US: u32 = 1000;
/// The shortest and the longest run, in milliseconds.
const DURATION_MS: std::ops::RangeInclusive<u128> = 10..=600_000;
/// Pages beyond those that the store can bring in during a run, in percent, and a few more.
const SLACK_PERCENT: u64 = 25;
const SLACK_PAGES: u64 = 64;
/// The share of guest memory that the evicted pages of one run may take.
const MEMORY_SHARE: u64 = 4;
/// The buffer of a run under a resident limit, in percent of the limit. The guest's kernel and the
/// store's own memory need room, too, so between a third and a half of the buffer fits.
const LIMIT_PERCENT: u64 = 150;
/// Seeds the order in which a run under a limit touches its pages.
const ACCESS_SEED: u64 = 1;
/// The largest number of pages that the guest agent takes.
const MAX_PAGES: u64 = 65_536;
/// What a boot may take before its first run, and each run beyond three times its duration. An
/// emulated machine needs most of it.
const BOOT_TIME: Duration = Duration::from_secs(60);
const TIME_PER_RUN: Duration = Duration::from_secs(15);

/// Measure how long a guest's processors stall under paging, and print a table.
///
/// Each guest boots once for every combination of --cpus and --apf, and makes these runs: idle, then
/// pages touched from user mode, then pages that read(2) writes into, both with each number of
/// --threads. Beside them a heartbeat on every vCPU measures by how much it wakes up late.
///
/// Without --resident-limit the guest asks for its pages to be evicted before each run and touches each
/// of them once. With it the guest asks for nothing: its threads touch random pages of a buffer that is
/// 1.5 times the limit, and what does not fit leaves and comes back.
#[derive(Args, Clone, Debug)]
pub struct StallArgs {
    /// Guest kernel (built by `cargo xtask images`, or any that runs the agent)
    #[arg(long, value_name = "FILE")]
    pub kernel: PathBuf,
    /// Initial RAM disk with the guest agent as its init
    #[arg(long, value_name = "FILE")]
    pub initrd: PathBuf,
    /// Numbers of processors, each 1 to 32
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_value = "1,2",
        value_parser = clap::value_parser!(u32).range(1..=crate::spec::MAX_CPUS))]
    pub cpus: Vec<u32>,
    /// Who handles async page faults
    #[arg(
        long,
        value_name = "APF,…",
        value_enum,
        value_delimiter = ',',
        default_value = "off,host,kernel,user"
    )]
    pub apf: Vec<Apf>,
    /// Guest RAM
    #[arg(long, value_name = "SIZE", default_value = "128M")]
    pub memory: String,
    /// How much of guest RAM may be in memory, compressed pages included: a size of at least 4M
    #[arg(long, value_name = "SIZE")]
    pub resident_limit: Option<String>,
    /// Where evicted pages go: "memory", or "delay=20ms" for a store that takes that long to read a page
    #[arg(long, value_name = "STORE", default_value = "delay=20ms")]
    pub store: StoreSpec,
    /// How long each run lasts: a number with ms or s
    #[arg(long, value_name = "TIME", default_value = "2s", value_parser = duration)]
    pub duration: Duration,
    /// Numbers of threads that touch evicted pages, each 1 to 64
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_value = "1,8",
        value_parser = clap::value_parser!(u32).range(1..=64))]
    pub threads: Vec<u32>,
    /// Write all results to FILE as JSON ("-" is standard output; the table then goes to standard error)
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Give one boot with all its runs up after this many seconds [default: by --duration]
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub timeout: Option<u64>,
}

fn duration(text: &str) -> Result<Duration, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit_ms = match &text[digits.len()..] {
        "ms" => Some(1),
        "s" => Some(1000),
        _ => None,
    };
    let number = digits.parse::<u64>().ok().filter(|_| !digits.starts_with('+'));
    number
        .zip(unit_ms)
        .and_then(|(number, unit_ms)| number.checked_mul(unit_ms))
        .map(Duration::from_millis)
        .filter(|duration| DURATION_MS.contains(&duration.as_millis()))
        .ok_or_else(|| "give a time from 10ms to 600s".to_owned())
}

/// One boot of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Boot {
    pub(super) vcpus: u32,
    pub(super) apf: Apf,
}

/// All that is to be done.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) boots: Vec<Boot>,
    /// The runs of every boot, in their order.
    pub(super) workloads: Vec<Workload>,
    /// The longest that one boot with its runs may take.
    pub(super) timeout: Duration,
}

impl Plan {
    pub(super) fn new(args: &StallArgs) -> Result<Self, StallError> {
        let memory_bytes = size::parse(&args.memory).map_err(StallError::Memory)?;
        let limit_bytes = args.resident_limit.as_deref().map(size::parse).transpose();
        let limit_bytes = limit_bytes.map_err(StallError::ResidentLimit)?;
        let boots = args
            .cpus
            .iter()
            .flat_map(|&vcpus| args.apf.iter().map(move |&apf| Boot { vcpus, apf }))
            .collect();
        let workload = |kind, threads| Workload {
            kind,
            threads,
            duration_ms: args.duration.as_millis() as u32,
            pages: match limit_bytes {
                None => pages(threads, args.duration, &args.store, memory_bytes),
                Some(limit_bytes) => pages_under_limit(threads, limit_bytes),
            },
            heartbeat_us: HEARTBEAT_US,
            pressure: match limit_bytes {
                None => Pressure::Evict,
                Some(_) => Pressure::Limit { access: Access::Random, seed: ACCESS_SEED },
            },
            ..Workload::IDLE
        };
        let workloads: Vec<Workload> = std::iter::once(workload(Kind::Idle, 0))
            .chain(args.threads.iter().map(|&threads| workload(Kind::User, threads)))
            .chain(args.threads.iter().map(|&threads| workload(Kind::Copy, threads)))
            .collect();
        let by_duration = BOOT_TIME + (TIME_PER_RUN + 3 * args.duration) * workloads.len() as u32;
        let timeout = args.timeout.map_or(by_duration, Duration::from_secs);
        Ok(Self { boots, workloads, timeout })
    }

    /// The requests of one boot, as `nowait run --requests` reads them.
    pub(super) fn requests(&self) -> Result<Vec<u8>, StallError> {
        let mut lines = Vec::new();
        for request in self.workloads.iter().cloned().map(Request::Run).chain([Request::PowerOff]) {
            let line = nowait_wire::agent::encode_line(&request).map_err(StallError::Request)?;
            lines.extend(line);
        }
        Ok(lines)
    }
}

/// How many pages a run evicts: as many as its threads can bring in while it lasts, and some more, so
/// that it does not end early.
fn pages(threads: u32, duration: Duration, store: &StoreSpec, memory_bytes: u64) -> u32 {
    let most = (memory_bytes / MEMORY_SHARE / PAGE_SIZE as u64).clamp(1, MAX_PAGES);
    let delay_us = store.mean_delay().as_micros() as u64;
    let pages = match (threads, delay_us) {
        (0, _) => 0,
        (_, 0) => most,
        _ => {
            let fetched = u64::from(threads) * (duration.as_micros() as u64 / delay_us + 1);
            (fetched + fetched * SLACK_PERCENT / 100 + SLACK_PAGES).min(most)
        }
    };
    pages as u32
}

/// How many pages the buffer of a run under a limit has.
fn pages_under_limit(threads: u32, limit_bytes: u64) -> u32 {
    match threads {
        0 => 0,
        _ => {
            let bytes = limit_bytes.saturating_mul(LIMIT_PERCENT) / 100;
            (bytes / PAGE_SIZE as u64).clamp(1, MAX_PAGES) as u32
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        stall: StallArgs,
    }

    pub(in crate::stall) fn parse(more: &[&str]) -> Result<StallArgs, clap::Error> {
        let args = ["stall", "--kernel", "k", "--initrd", "i"].iter().chain(more);
        Cli::try_parse_from(args).map(|cli| cli.stall)
    }

    #[test]
    fn without_options_it_is_the_table_of_the_readme() {
        let plan = Plan::new(&parse(&[]).unwrap()).unwrap();
        let boots: Vec<_> = plan.boots.iter().map(|boot| (boot.vcpus, boot.apf)).collect();
        let modes = [Apf::Off, Apf::Host, Apf::Kernel, Apf::User];
        let expected = [1, 2].map(|vcpus| modes.map(|apf| (vcpus, apf))).concat();
        assert_eq!(boots, expected);
        let runs: Vec<_> = plan.workloads.iter().map(|w| (w.kind, w.threads, w.pages)).collect();
        let expected = [
            (Kind::Idle, 0, 0),
            (Kind::User, 1, 190),
            (Kind::User, 8, 1074),
            (Kind::Copy, 1, 190),
            (Kind::Copy, 8, 1074),
        ];
        assert_eq!(runs, expected);
        let lines = String::from_utf8(plan.requests().unwrap()).unwrap();
        assert_eq!(lines.lines().count(), 6);
        assert!(lines.ends_with("{\"request\":\"power_off\"}\n"));
    }

    #[test]
    fn wrong_options_are_refused_by_name() {
        for bad in [
            ["--cpus", "0"],
            ["--cpus", "1,33"],
            ["--threads", "0"],
            ["--threads", "65"],
            ["--apf", "none"],
            ["--store", "disk"],
            ["--duration", "2"],
            ["--duration", "0s"],
            ["--duration", "601s"],
            ["--duration", "+5s"],
            ["--duration", "99999999999999999999s"],
            ["--timeout", "0"],
        ] {
            let error = parse(&bad).unwrap_err().to_string();
            assert!(error.contains(bad[0]), "{error}");
        }
        let plan = Plan::new(&parse(&["--memory", "lots"]).unwrap());
        assert!(matches!(plan, Err(StallError::Memory(_))));
        let plan = Plan::new(&parse(&["--resident-limit", "half"]).unwrap());
        assert!(matches!(plan, Err(StallError::ResidentLimit(_))));
    }

    #[test]
    fn under_a_limit_the_buffer_is_larger_than_it_and_nobody_evicts() {
        let plan = Plan::new(&parse(&["--resident-limit", "24M"]).unwrap()).unwrap();
        assert_eq!(plan.workloads[0].pages, 0);
        for workload in &plan.workloads[1..] {
            assert_eq!(workload.pages, 36 * 256);
            assert!(matches!(workload.pressure, Pressure::Limit { .. }));
        }
        assert_eq!(pages_under_limit(1, 1 << 40), 65_536);
        assert_eq!(pages_under_limit(1, 1), 1);
    }

    #[test]
    fn pages_suffice_for_the_run_and_fit_into_the_guest() {
        let (run, memory) = (Duration::from_secs(2), 128 << 20);
        let store = |ms| StoreSpec::delay(Duration::from_millis(ms));
        assert!(pages(8, run, &store(20), memory) > 8 * 100);
        assert_eq!(pages(64, run, &store(1), memory), 8192);
        assert_eq!(pages(1, run, &StoreSpec::memory(), memory), 8192);
        assert_eq!(pages(1, run, &store(0), 1 << 40), 65_536);
        assert_eq!(pages(1, run, &StoreSpec::memory(), 0), 1);
        assert_eq!(pages(0, run, &StoreSpec::memory(), memory), 0);
    }
}

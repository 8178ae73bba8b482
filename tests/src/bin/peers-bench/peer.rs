//! Who is compared, and one boot of each: the same guest, the same runs, the same limit.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nowait_tests::guest::Guest;
use nowait_tests::row::Row;
use nowait_wire::agent::{Access, Kind, Pressure, Request, RunResult, Workload};

use crate::medium;
use crate::qemu::Qemu;

/// Guest RAM.
pub(crate) const MEMORY_MIB: u64 = 80;
/// How much of it may be in memory.
const LIMIT_MIB: u64 = 24;
/// The buffer that the threads touch: 32 MiB, of which about half has room beside the guest's own.
const PAGES: u32 = 8192;
const THREADS: u32 = 8;
/// How long the threads run each time before it counts; the first time they fill the buffer.
const WARM_UP_MS: u32 = 400;
/// The kernel command line of QEMU's guests: what nowait makes of `--cmdline quiet` and its requests.
pub(crate) const CMDLINE: &str = "console=ttyS0 panic=-1 swiotlb=noforce quiet nowait.agent=serve";
/// Runs of one boot: the first without paging, the last one counts.
const RUNS: usize = 5;
/// What one boot may take on a busy machine.
const LIMIT: Duration = Duration::from_secs(400);

/// A VMM and a way to wait for pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Peer {
    /// nowait with this `--apf`.
    Nowait(&'static str),
    /// QEMU, and KVM's async page faults as a guest gets them by default.
    Qemu,
    /// QEMU, and the guest does not get them.
    QemuWithout,
}

/// What one boot gave.
pub(crate) struct Outcome {
    /// Without paging.
    pub(crate) idle: Row,
    /// The run that counts.
    pub(crate) loaded: Row,
    /// Pages read from the medium in that run, a second.
    pub(crate) fetched_per_s: f64,
    /// How much of guest RAM was in memory behind it.
    pub(crate) resident_mib: f64,
    /// Of it in huge pages, with QEMU.
    pub(crate) huge_mib: f64,
    /// Memory of the VMM's own that came on top; 0 where the limit counts guest RAM only.
    pub(crate) own_mib: f64,
}

impl Peer {
    /// What the others are compared with.
    pub(crate) const USER: Self = Self::Nowait("user");
    /// All of them.
    pub(crate) const ALL: [Self; 6] = [
        Self::Qemu,
        Self::QemuWithout,
        Self::Nowait("off"),
        Self::Nowait("host"),
        Self::Nowait("kernel"),
        Self::USER,
    ];

    /// Its name for readers.
    pub(crate) fn name(self) -> String {
        match self {
            Self::Nowait(apf) => format!("nowait --apf {apf}"),
            Self::Qemu => "QEMU".into(),
            Self::QemuWithout => "QEMU without async page faults".into(),
        }
    }

    /// Its name in figures.
    pub(crate) fn key(self) -> &'static str {
        match self {
            Self::Nowait(apf) => apf,
            Self::Qemu => "qemu",
            Self::QemuWithout => "qemu_without_apf",
        }
    }

    /// Boots a guest and makes the runs; nowait's pages go to the server at `store`.
    pub(crate) fn boot(self, duration_ms: u32, store: &Path) -> Result<Outcome> {
        let runs = workloads(duration_ms);
        let outcome = match self {
            Self::Nowait(apf) => nowait(apf, &runs, store),
            Self::Qemu => qemu(true, &runs),
            Self::QemuWithout => qemu(false, &runs),
        };
        outcome.with_context(|| self.name())
    }
}

/// The heartbeat alone; the buffer filled, and touched until things have settled; what counts.
fn workloads(duration_ms: u32) -> [Workload; RUNS] {
    let touching = |duration_ms, seed| Workload {
        kind: Kind::User,
        threads: THREADS,
        duration_ms,
        pages: PAGES,
        pressure: Pressure::Limit { access: Access::Random, seed },
        compute: 1,
        compressible_percent: 0,
        ..Workload::IDLE
    };
    [
        Workload::IDLE,
        touching(WARM_UP_MS, 1),
        touching(WARM_UP_MS, 2),
        touching(WARM_UP_MS, 3),
        touching(duration_ms, 4),
    ]
}

/// How much of never-touched RAM nowait makes at a fault. With its default the buffer is filled slowly
/// under a limit that is hardly larger: pages are made, evicted unused, and made again. Nothing that is
/// measured touches such RAM.
const FAULT_AROUND: &str = "64K";

fn nowait(apf: &str, runs: &[Workload], store: &Path) -> Result<Outcome> {
    let memory = format!("{MEMORY_MIB}M");
    let limit = format!("{LIMIT_MIB}M");
    let store = format!("nbd+unix:///?socket={}", store.display());
    let guest = Guest::linux()
        .limit(LIMIT)
        .args(["--apf", apf, "--memory", &memory, "--resident-limit", &limit, "--store", &store])
        .args(["--no-prefetch", "--fault-around", FAULT_AROUND])
        .args(["--cmdline", "quiet", "--console", "none"]);
    let requests = runs.iter().map(|run| Request::Run(run.clone()));
    let end = requests.fold(guest, Guest::request).try_run().map_err(anyhow::Error::msg)?;
    ensure!(end.code() == 0, "exit code {}: {}", end.code(), end.stderr);
    let results: Vec<RunResult> = end.results().into_iter().cloned().collect();
    let seen = end.host_stalls();
    let seen = seen.last().context("what the host saw of the run")?;
    outcome(&results, seen.tiers.fetched, end.number("/pager/resident_bytes"))
}

fn qemu(async_page_faults: bool, runs: &[Workload]) -> Result<Outcome> {
    let mut qemu = Qemu::start(async_page_faults, Instant::now() + LIMIT)?;
    let mut results = Vec::new();
    let mut fetched = 0;
    for run in runs {
        // Anew before each run: the ones before have shown what of its own memory QEMU needs.
        qemu.limit(LIMIT_MIB << 20)?;
        let before = medium::pages_read()?;
        let result = qemu.agent.run(run);
        results.push(result.with_context(|| format!("its console: {}", qemu.console()))?);
        fetched = medium::pages_read()? - before;
    }
    let (ram, own) = (qemu.ram()?, qemu.own_bytes()?);
    qemu.end()?;
    let outcome = outcome(&results, fetched, ram.bytes)?;
    Ok(Outcome { huge_mib: mib(ram.huge_bytes), own_mib: mib(own), ..outcome })
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// What the runs gave; `fetched` pages came from the medium in the last one.
fn outcome(results: &[RunResult], fetched: u64, resident_bytes: u64) -> Result<Outcome> {
    ensure!(results.len() == RUNS, "{} of {RUNS} runs", results.len());
    let (idle, loaded) = (&results[0], &results[RUNS - 1]);
    let seconds = loaded.elapsed_us as f64 / 1e6;
    Ok(Outcome {
        idle: Row::of(idle)?,
        loaded: Row::of(loaded)?,
        fetched_per_s: fetched as f64 / seconds,
        resident_mib: mib(resident_bytes),
        huge_mib: 0.0,
        own_mib: 0.0,
    })
}

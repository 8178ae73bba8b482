//! What `nowait stall` is asked to measure, and the boots and runs that this comes to.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use guest_memory::{PAGE_SIZE, StoreSpec};
use nowait_wire::agent::{Kind, Pressure, Request, Workload};

use super::StallError;
use super::baseline::Tolerance;
use super::gate::Gate;
use super::scenario::{Checked, MAX_PAGES, PRESETS, Scenario, ScenarioError, Via, parse_time};
use crate::kvm::cpuid::Apf;
use crate::operand;

/// Pages beyond those that the store can bring in during a run, in percent, and a few more.
const SLACK_PERCENT: u64 = 25;
const SLACK_PAGES: u64 = 64;
/// The share of guest memory that the evicted pages of one run may take.
const MEMORY_SHARE: u64 = 4;
/// What a boot may take before its first run, and each run beyond three times its duration. An
/// emulated machine needs most of it.
const BOOT_TIME: Duration = Duration::from_secs(60);
const TIME_PER_RUN: Duration = Duration::from_secs(15);
/// The longest run without paging beside a command, which may take minutes.
const IDLE_BESIDE_COMMAND_MS: u32 = 10_000;
/// The longest scenario file.
const SCENARIO_BYTES: u64 = 64 * 1024;
/// The scenario without any, which the options change.
const DEFAULT: &str = "name = \"default\"\ncpus = [1, 2]\n";

/// Measure how long a guest's processors stall under paging, and print a table.
///
/// Each guest boots once a round for every number of processors and every mode, modes taking turns, and
/// makes these runs: idle, then pages touched from user mode, then pages that read(2) writes into, both with
/// each number of threads. Beside them a heartbeat on every vCPU measures by how much it wakes up late.
///
/// Without a resident limit the guest asks for its pages to be evicted before each run and touches each
/// of them once. With it the guest asks for nothing: its threads touch pages of a buffer that is larger
/// than the limit, and what does not fit leaves and comes back.
///
/// A COMMAND behind `--` takes the place of these threads: `/bin/sh -c` runs it in the guest, from an
/// initramfs that has it beside our agent. It needs a --resident-limit, or it pages nothing; --duration is
/// the most time that it gets.
#[derive(Args, Clone, Debug)]
pub struct StallArgs {
    /// Guest kernel (built by `cargo xtask images`, or any that runs the agent)
    #[arg(long, value_name = "FILE")]
    pub kernel: PathBuf,
    /// Initial RAM disk with the guest agent as its init
    #[arg(long, value_name = "FILE")]
    pub initrd: PathBuf,
    /// What to measure: a TOML file, or quick, overcommit, snapshot-like, mixed, worst; the options below
    /// change it
    #[arg(long, value_name = "PRESET|FILE")]
    pub scenario: Option<String>,
    /// Numbers of processors, each 1 to 32 [default: the scenario's, without one 1 and 2]
    #[arg(long, value_name = "N,…", value_delimiter = ',',
        value_parser = clap::value_parser!(u32).range(1..=crate::spec::MAX_CPUS))]
    pub cpus: Option<Vec<u32>>,
    /// Who handles async page faults; the first one is what the others are compared with, unless the scenario
    /// names another
    #[arg(long, value_name = "APF,…", value_enum, value_delimiter = ',')]
    pub apf: Option<Vec<Apf>>,
    /// Guest RAM
    #[arg(long, value_name = "SIZE")]
    pub memory: Option<String>,
    /// How much of guest RAM may be in memory, compressed pages included: a size of at least 4M, or a share
    /// of guest RAM
    #[arg(long, value_name = "SIZE|N%")]
    pub resident_limit: Option<String>,
    /// Where evicted pages go, as `nowait run --store` takes it: "delay=20ms+memory" takes that long to read a
    /// page
    #[arg(long, value_name = "STORE")]
    pub store: Option<StoreSpec>,
    /// How long each run lasts, a COMMAND at most: a number with ms or s, up to 600s [default: 2s]
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub duration: Option<String>,
    /// Numbers of threads that touch evicted pages, each 1 to 64
    #[arg(long, value_name = "N,…", value_delimiter = ',',
        value_parser = clap::value_parser!(u32).range(1..=64))]
    pub threads: Option<Vec<u32>>,
    /// How often each mode has its turn; with 5 and more, intervals mean something
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=99))]
    pub rounds: Option<u32>,
    /// Seeds the order in which pages are touched
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
    /// Write all results to FILE as JSON ("-" is standard output; the table then goes to standard error)
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Write one self-contained page with plots to FILE
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
    /// Write the summary to FILE as Markdown, for a pull request's comment
    #[arg(long, value_name = "FILE")]
    pub markdown: Option<PathBuf>,
    /// Write runs and gates to FILE as JUnit XML
    #[arg(long, value_name = "FILE")]
    pub junit: Option<PathBuf>,
    /// Write all overruns to FILE as an HdrHistogram interval log
    #[arg(long, value_name = "FILE")]
    pub hlog: Option<PathBuf>,
    /// Fail (exit code 3) if this holds, for example 'user.overrun.p99 > 2ms' or
    /// 'user.work < 1.5 * off.work'; may be given more than once
    #[arg(long, value_name = "EXPRESSION")]
    pub fail_if: Vec<Gate>,
    /// Fail (exit code 3) if something is worse by more than the --tolerance than in this result of an earlier
    /// `--json`, with the same scenario
    #[arg(long, value_name = "FILE", requires = "tolerance")]
    pub baseline: Option<PathBuf>,
    /// By how much it may be worse
    #[arg(long, value_name = "N%", requires = "baseline")]
    pub tolerance: Option<Tolerance>,
    /// Check all operands but kernel and initrd, and end (for `cargo xtask demo`, before it builds these)
    #[arg(long, hide = true)]
    pub check: bool,
    /// Give one boot with all its runs up after this many seconds [default: by --duration]
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub timeout: Option<u64>,
    /// A command to run in the guest in the place of the touching threads
    #[arg(last = true, value_name = "COMMAND")]
    pub command: Vec<String>,
}

fn duration(text: &str) -> Result<String, String> {
    let range = Duration::from_millis(10)..=Duration::from_secs(600);
    match parse_time(text) {
        Some(time) if range.contains(&time) => Ok(text.to_owned()),
        _ => Err("give a time from 10ms to 600s".to_owned()),
    }
}

impl StallArgs {
    /// The scenario, with what the options change.
    fn scenario(&self) -> Result<(Scenario, Checked), ScenarioError> {
        let (name, text) = self.scenario_text()?;
        let mut scenario = Scenario::parse(&name, &text)?;
        let Self { cpus, apf, memory, resident_limit, duration, threads, rounds, seed, .. } = self;
        fn set<T: Clone>(to: &mut T, from: &Option<T>) {
            if let Some(value) = from {
                to.clone_from(value);
            }
        }
        set(&mut scenario.cpus, cpus);
        set(&mut scenario.modes, apf);
        set(&mut scenario.memory, memory);
        set(&mut scenario.duration, duration);
        set(&mut scenario.threads, threads);
        set(&mut scenario.rounds, rounds);
        set(&mut scenario.seed, seed);
        if resident_limit.is_some() {
            scenario.resident_limit.clone_from(resident_limit);
        }
        if let Some(store) = &self.store {
            scenario.store = store.to_string();
        }
        // Without some of the modes the baseline may be none of them.
        if apf.is_some() && scenario.baseline.is_some_and(|mode| !scenario.modes.contains(&mode)) {
            scenario.baseline = None;
        }
        let checked =
            scenario.check().map_err(|error| error.by_option(&self.changes()).at(&name, &text))?;
        Ok((scenario, checked))
    }

    /// The keys of a scenario that options change, each with its option and the value.
    fn changes(&self) -> Vec<(&'static str, &'static str, String)> {
        fn list<T: ToString>(values: &Option<Vec<T>>) -> Option<String> {
            let texts = values.as_ref()?.iter().map(ToString::to_string);
            Some(texts.collect::<Vec<_>>().join(","))
        }
        let changes = [
            ("cpus", "--cpus", list(&self.cpus)),
            ("modes", "--apf", list(&self.apf)),
            ("memory", "--memory", self.memory.clone()),
            ("resident_limit", "--resident-limit", self.resident_limit.clone()),
            ("store", "--store", self.store.as_ref().map(ToString::to_string)),
            ("duration", "--duration", self.duration.clone()),
            ("threads", "--threads", list(&self.threads)),
            ("rounds", "--rounds", self.rounds.map(|rounds| rounds.to_string())),
            ("seed", "--seed", self.seed.map(|seed| seed.to_string())),
        ];
        let given = changes.into_iter();
        given.filter_map(|(key, option, value)| Some((key, option, value?))).collect()
    }

    /// The scenario's file, if it is none of the presets.
    pub(super) fn scenario_file(&self) -> Option<PathBuf> {
        let name = self.scenario.as_deref().filter(|name| Scenario::preset(name).is_none())?;
        Some(PathBuf::from(name))
    }

    fn scenario_text(&self) -> Result<(String, String), ScenarioError> {
        let Some(name) = &self.scenario else {
            return Ok(("the options".to_owned(), DEFAULT.to_owned()));
        };
        if let Some(text) = Scenario::preset(name) {
            return Ok((format!("preset {name}"), text.to_owned()));
        }
        let text = operand::read_text(Path::new(name), SCENARIO_BYTES).map_err(|source| {
            let presets = PRESETS.map(|(name, _)| name).join(", ");
            ScenarioError::Unreadable { name: name.clone(), presets, source }
        })?;
        Ok((name.clone(), text))
    }
}

/// One boot of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Boot {
    /// From 1.
    pub(super) round: u32,
    pub(super) vcpus: u32,
    pub(super) apf: Apf,
}

/// All that is to be done.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) scenario: Scenario,
    pub(super) checked: Checked,
    pub(super) boots: Vec<Boot>,
    /// The longest that one boot with its runs may take.
    pub(super) timeout: Duration,
    command: String,
}

impl Plan {
    /// The guest's command, if that is what is measured.
    pub(super) fn command(&self) -> &str {
        &self.command
    }

    pub(super) fn new(args: &StallArgs) -> Result<Self, StallError> {
        let (scenario, checked) = args.scenario()?;
        if args.threads.is_some() && !args.command.is_empty() {
            let message = "the command takes the place of the threads: leave it out".to_owned();
            return Err(ScenarioError::Option { option: "--threads", message }.into());
        }
        let mut boots = Vec::new();
        for round in 0..scenario.rounds {
            for &vcpus in &scenario.cpus {
                // Another one begins each time: what drifts is nobody's.
                let mut modes = scenario.modes.clone();
                modes.rotate_left(round as usize % scenario.modes.len());
                boots.extend(modes.into_iter().map(|apf| Boot { round: round + 1, vcpus, apf }));
            }
        }
        let mut plan = Self {
            scenario,
            checked,
            boots,
            timeout: Duration::ZERO,
            command: args.command.join(" "),
        };
        let runs = plan.workloads(1).len() as u32;
        let each = TIME_PER_RUN + 3 * plan.checked.duration + plan.checked.warm_up;
        plan.timeout = args.timeout.map_or(BOOT_TIME + each * runs, Duration::from_secs);
        Ok(plan)
    }

    /// The runs of a boot, in their order.
    pub(super) fn workloads(&self, vcpus: u32) -> Vec<Workload> {
        let (scenario, checked) = (&self.scenario, &self.checked);
        let base = Workload {
            duration_ms: checked.duration.as_millis() as u32,
            heartbeat_us: checked.heartbeat_us,
            compute: scenario.compute_per_cpu * vcpus,
            ..Workload::IDLE
        };
        if !self.command.is_empty() {
            let command = self.command.clone();
            let idle_ms = base.duration_ms.min(IDLE_BESIDE_COMMAND_MS);
            let idle = Workload { duration_ms: idle_ms, ..base.clone() };
            return vec![idle, Workload { kind: Kind::Command, command, ..base }];
        }
        let touching = |kind, threads| Workload {
            kind,
            threads,
            warm_up_ms: checked.warm_up.as_millis() as u32,
            pages: checked.pages.unwrap_or_else(|| {
                pages(threads, checked.duration, &checked.store, checked.memory_bytes)
            }),
            pressure: match checked.limit_bytes {
                None => Pressure::Evict,
                Some(_) => Pressure::Limit { access: scenario.access, seed: scenario.seed },
            },
            compressible_percent: scenario.compressible_percent,
            write_percent: if kind == Kind::User { scenario.write_percent } else { 0 },
            ..base.clone()
        };
        let kinds = scenario.via.iter().map(|via| match via {
            Via::User => Kind::User,
            Via::Copy => Kind::Copy,
        });
        let runs = kinds
            .flat_map(|kind| scenario.threads.iter().map(move |&threads| touching(kind, threads)));
        std::iter::once(base.clone()).chain(runs).collect()
    }

    /// The number of all runs.
    pub(super) fn runs(&self) -> usize {
        self.boots.iter().map(|boot| self.workloads(boot.vcpus).len()).sum()
    }

    /// The requests of one boot, as `nowait run --requests` reads them.
    pub(super) fn requests(&self, boot: Boot) -> Result<Vec<u8>, StallError> {
        let mut lines = Vec::new();
        let runs = self.workloads(boot.vcpus).into_iter().map(Request::Run);
        for request in runs.chain([Request::PowerOff]) {
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

    fn plan(more: &[&str]) -> Result<Plan, StallError> {
        Plan::new(&parse(more).unwrap())
    }

    #[test]
    fn without_options_all_modes_have_one_boot() {
        let plan = plan(&[]).unwrap();
        let boots: Vec<_> = plan.boots.iter().map(|boot| (boot.vcpus, boot.apf)).collect();
        let modes = [Apf::Off, Apf::Host, Apf::Kernel, Apf::User];
        let expected = [1, 2].map(|vcpus| modes.map(|apf| (vcpus, apf))).concat();
        assert_eq!(boots, expected);
        let workloads = plan.workloads(2);
        let runs: Vec<_> = workloads.iter().map(|w| (w.kind, w.threads, w.pages)).collect();
        let expected = [
            (Kind::Idle, 0, 0),
            (Kind::User, 1, 190),
            (Kind::User, 8, 1074),
            (Kind::Copy, 1, 190),
            (Kind::Copy, 8, 1074),
        ];
        assert_eq!(runs, expected);
        let lines = String::from_utf8(plan.requests(plan.boots[0]).unwrap()).unwrap();
        assert_eq!((lines.lines().count(), plan.runs()), (6, 40));
        assert!(lines.ends_with("{\"request\":\"power_off\"}\n"));
    }

    #[test]
    fn modes_take_turns_and_another_begins_each_time() {
        let plan = plan(&["--rounds", "3", "--cpus", "1", "--apf", "off,user"]).unwrap();
        let boots: Vec<_> = plan.boots.iter().map(|boot| (boot.round, boot.apf)).collect();
        let (off, user) = (Apf::Off, Apf::User);
        assert_eq!(boots, [(1, off), (1, user), (2, user), (2, off), (3, off), (3, user)]);
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
            ["--rounds", "0"],
            ["--fail-if", "user.overrun.p99"],
            ["--baseline", "old.json"],
            ["--tolerance", "10%"],
        ] {
            let error = parse(&bad).unwrap_err().to_string();
            assert!(error.contains(bad[0]), "{error}");
        }
        for (bad, name) in [
            (["--memory", "lots"], "--memory: 'lots'"),
            (["--memory", "0"], "--memory: 0: a guest needs"),
            (["--resident-limit", "half"], "--resident-limit: 'half'"),
            (["--resident-limit", "2G"], "--resident-limit: 2 GiB is more than"),
            (["--scenario", "fastest"], "quick, overcommit"),
        ] {
            let error = plan(&bad).unwrap_err();
            assert_eq!(error.exit_code(), crate::exit::OPERAND);
            assert!(error.to_string().contains(name), "{error}");
        }
    }

    #[test]
    fn what_does_not_fit_an_option_is_named_with_both() {
        let error = plan(&["--scenario", "quick", "--memory", "64M"]).unwrap_err();
        let error = error.to_string();
        assert!(error.starts_with("--scenario: preset quick, line "), "{error}");
        assert!(error.contains(": buffer: ") && error.ends_with("(with --memory 64M)"), "{error}");
    }

    #[test]
    fn threads_beside_a_command_are_refused() {
        let error = plan(&["--threads", "8", "--", "make"]).unwrap_err().to_string();
        assert!(error.starts_with("--threads: the command takes"), "{error}");
    }

    #[test]
    fn options_change_the_scenario() {
        let plan = plan(&[
            "--scenario",
            "overcommit",
            "--cpus",
            "2",
            "--apf",
            "kernel,user",
            "--rounds",
            "1",
            "--duration",
            "500ms",
            "--resident-limit",
            "20M",
            "--seed",
            "9",
            "--memory",
            "100M",
        ])
        .unwrap();
        let Plan { scenario, checked, .. } = &plan;
        assert_eq!((scenario.name.as_str(), scenario.rounds), ("overcommit", 1));
        // `off` was the baseline, and is none of the modes.
        assert_eq!((scenario.baseline, checked.baseline), (None, Apf::Kernel));
        assert_eq!(checked.limit_bytes, Some(20 << 20));
        let [idle, work] = &plan.workloads(2)[..] else { panic!() };
        assert_eq!((idle.kind, idle.compute, work.compute), (Kind::Idle, 2, 2));
        assert_eq!((work.threads, work.warm_up_ms, work.duration_ms), (8, 300, 500));
        assert!(matches!(work.pressure, Pressure::Limit { seed: 9, .. }));
        assert_eq!(work.pages, 56 * 256);
    }

    #[test]
    fn a_command_takes_the_place_of_the_threads() {
        let plan = plan(&["--", "sort", "/data"]).unwrap();
        let [idle, command] = &plan.workloads(1)[..] else { panic!() };
        assert_eq!((idle.kind, idle.duration_ms), (Kind::Idle, command.duration_ms));
        assert_eq!((command.kind, command.command.as_str()), (Kind::Command, "sort /data"));
        let plan = super::tests::plan(&["--duration", "600s", "--", "sort", "/data"]).unwrap();
        let [idle, command] = &plan.workloads(1)[..] else { panic!() };
        assert_eq!((idle.duration_ms, command.duration_ms), (10_000, 600_000));
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

//! The result as JSON, schema `nowait.stall/1`: fields are only ever added.

use nowait_wire::agent::{Heartbeat, Kind, Pressure, RunResult, Workload};
use serde::Serialize;

use super::StallArgs;
use super::overrun::{self, HistogramError, Overruns, Summary};
use super::plan::{Boot, Plan};
use crate::kvm::cpuid::Apf;
use crate::size;

/// The name and version of the schema.
pub const SCHEMA: &str = "nowait.stall/1";
/// The environment variable by which the nested machine says that it is one.
pub const ACCEL_VARIABLE: &str = "NOWAIT_ACCEL";
/// Its value there.
pub const ACCEL_NESTED: &str = "nested";

/// Everything that one `nowait stall` found.
#[derive(Clone, Debug, Serialize)]
pub struct Document {
    /// [`SCHEMA`].
    pub schema: &'static str,
    /// Where it ran.
    pub host: Host,
    /// What was asked for.
    pub config: Config,
    /// Whether every run that was asked for is there and measured all it had to.
    pub complete: bool,
    /// One entry for each run, in the order in which they were made.
    pub runs: Vec<Run>,
    /// Why runs are missing.
    pub failures: Vec<Failure>,
}

/// Where it ran.
#[derive(Clone, Debug, Serialize)]
pub struct Host {
    /// The host kernel's release.
    pub kernel: String,
    /// `kvm`: hardware; `nested`: an emulated machine, whose times mean nothing but in proportion.
    pub accel: &'static str,
}

/// What was asked for.
#[derive(Clone, Debug, Serialize)]
pub struct Config {
    /// The guest kernel's file.
    pub kernel: String,
    /// Guest RAM, as it was given.
    pub memory: String,
    /// How much of guest RAM might be in memory, as it was given; `None`: the guest asked for its pages
    /// to be evicted before each run.
    pub resident_limit: Option<String>,
    /// Where evicted pages go.
    pub store: String,
    /// How long each run was to last, in milliseconds.
    pub duration_ms: u64,
    /// The heartbeat's period, in microseconds.
    pub heartbeat_us: u32,
}

/// One run.
#[derive(Clone, Debug, Serialize)]
pub struct Run {
    /// Who handled async page faults.
    pub apf: Apf,
    /// What the threads did.
    pub workload: Kind,
    /// How many there were.
    pub threads: u32,
    /// The guest's processors.
    pub vcpus: u32,
    /// By how much the heartbeats of all vCPUs woke up late.
    pub overrun_us: Summary,
    /// Pages touched in a second.
    pub pages_per_s: f64,
    /// Touches of a page that did not hold what it had to.
    pub data_errors: u64,
    /// Whether the run measured all it had to.
    pub complete: bool,
    /// Why it did not.
    pub problem: Option<String>,
    /// How long the run lasted, in microseconds of the guest's clock.
    pub elapsed_us: u64,
    /// Pages of the buffer that the threads touched.
    pub pages: u32,
    /// Touches: without a resident limit at most one for each page.
    pub pages_touched: u64,
    /// All overruns merged: an HdrHistogram in its V2 encoding, as base64.
    pub overrun_us_hdr: String,
    /// Those of each vCPU.
    pub heartbeats: Vec<Heartbeat>,
}

/// Why runs of one boot are missing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Failure {
    /// Who handled async page faults.
    pub apf: Apf,
    /// The guest's processors.
    pub vcpus: u32,
    /// Why, in one line.
    pub message: String,
}

impl Failure {
    pub(super) fn new(boot: Boot, message: String) -> Self {
        Self { apf: boot.apf, vcpus: boot.vcpus, message }
    }
}

impl Document {
    pub(super) fn new(args: &StallArgs) -> Self {
        // Read as a file: `uname -r` without the call.
        let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        let nested = std::env::var(ACCEL_VARIABLE).is_ok_and(|value| value == ACCEL_NESTED);
        Self {
            schema: SCHEMA,
            host: Host {
                kernel: kernel.trim().to_owned(),
                accel: if nested { ACCEL_NESTED } else { "kvm" },
            },
            config: Config {
                kernel: args.kernel.display().to_string(),
                memory: args.memory.clone(),
                resident_limit: args.resident_limit.clone(),
                store: args.store.to_string(),
                duration_ms: args.duration.as_millis() as u64,
                heartbeat_us: super::plan::HEARTBEAT_US,
            },
            complete: false,
            runs: Vec::new(),
            failures: Vec::new(),
        }
    }

    /// Judges whether everything that was planned is there.
    pub(super) fn judge(&mut self, plan: &Plan) {
        self.complete = self.failures.is_empty()
            && self.runs.len() == plan.boots.len() * plan.workloads.len()
            && self.runs.iter().all(|run| run.complete);
    }

    /// Pages with wrong bytes in all runs.
    #[must_use]
    pub fn data_errors(&self) -> u64 {
        self.runs.iter().fold(0, |sum, run| sum.saturating_add(run.data_errors))
    }
}

impl Run {
    /// Sums one result of the guest agent up.
    ///
    /// # Errors
    /// When its histograms do not decode.
    pub(super) fn new(boot: Boot, result: RunResult) -> Result<Self, HistogramError> {
        let mut merged = overrun::empty()?;
        let mut each = Vec::new();
        for heartbeat in &result.heartbeats {
            let overruns = overrun::decode(&heartbeat.overrun_us_hdr)?;
            merged.add(&overruns).map_err(|error| HistogramError::Library(error.to_string()))?;
            each.push((heartbeat, overruns));
        }
        let problem = problem(boot, &result, &each);
        let workload = result.workload;
        Ok(Self {
            apf: boot.apf,
            workload: workload.kind,
            threads: workload.threads,
            vcpus: boot.vcpus,
            overrun_us: Summary::new(&merged),
            pages_per_s: match result.elapsed_us {
                0 => 0.0,
                elapsed_us => result.pages_touched as f64 * 1e6 / elapsed_us as f64,
            },
            data_errors: result.data_errors,
            complete: problem.is_none(),
            problem,
            elapsed_us: result.elapsed_us,
            pages: workload.pages,
            pages_touched: result.pages_touched,
            overrun_us_hdr: overrun::encode(&merged)?,
            heartbeats: result.heartbeats,
        })
    }
}

/// What a result lacks, if anything.
fn problem(boot: Boot, result: &RunResult, each: &[(&Heartbeat, Overruns)]) -> Option<String> {
    let Workload { kind, pages, heartbeat_us, duration_ms, pressure, .. } = result.workload;
    let mut cpus: Vec<u32> = each.iter().map(|(heartbeat, _)| heartbeat.cpu).collect();
    cpus.sort_unstable();
    if !cpus.iter().copied().eq(0..boot.vcpus) {
        let heartbeats = size::count(each.len() as u64, "heartbeat");
        return Some(format!("{heartbeats} of {}", size::count(boot.vcpus.into(), "vCPU")));
    }
    // Both ends of the run fall between deadlines.
    let due = result.elapsed_us / u64::from(heartbeat_us).max(1);
    for (heartbeat, overruns) in each {
        let Heartbeat { cpu, deadlines, .. } = heartbeat;
        if *deadlines != overruns.len() || deadlines.abs_diff(due) > 1 {
            let samples = overruns.len();
            return Some(format!(
                "vCPU {cpu}: {samples} samples of {deadlines} deadlines where {due} were due"
            ));
        }
    }
    let once = pressure == Pressure::Evict;
    let exhausted = once && kind != Kind::Idle && result.pages_touched >= u64::from(pages);
    let too_many = once && result.pages_touched > u64::from(pages);
    if kind != Kind::Idle && (result.pages_touched == 0 || too_many) {
        return Some(format!("{} of {pages} pages touched", result.pages_touched));
    }
    let asked_us = u64::from(duration_ms) * 1000;
    if result.elapsed_us < asked_us && !exhausted {
        return Some(format!("it lasted {} us of {asked_us} us", result.elapsed_us));
    }
    None
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use serde_json::Value;

    pub(in crate::stall) const BOOT: Boot = Boot { vcpus: 2, apf: Apf::Host };

    /// A result of 10 ms in which the beats of CPU n were late by n ms.
    pub(in crate::stall) fn result(workload: &Workload, cpus: u32) -> RunResult {
        let heartbeats = (0..cpus).map(|cpu| {
            let mut overruns = overrun::empty().unwrap();
            overruns.record_n(1000 * u64::from(cpu), 10).unwrap();
            let overrun_us_hdr = overrun::encode(&overruns).unwrap();
            Heartbeat { cpu, deadlines: 10, overrun_us_hdr }
        });
        RunResult {
            workload: workload.clone(),
            elapsed_us: 10_500,
            pages_touched: if workload.kind == Kind::Idle { 0 } else { 21 },
            data_errors: 0,
            compute_units: 0,
            heartbeats: heartbeats.collect(),
        }
    }

    pub(in crate::stall) fn workload(kind: Kind) -> Workload {
        let threads = u32::from(kind != Kind::Idle);
        let (pages, pressure) = (100 * threads, Pressure::Evict);
        Workload { kind, threads, duration_ms: 10, pages, pressure, ..Workload::IDLE }
    }

    #[test]
    fn the_schema_has_the_fields_that_others_rely_on() {
        let args = super::super::plan::tests::parse(&[]).unwrap();
        let mut document = Document::new(&args);
        for kind in [Kind::Idle, Kind::User, Kind::Copy] {
            document.runs.push(Run::new(BOOT, result(&workload(kind), 2)).unwrap());
        }
        let value: Value = serde_json::to_value(&document).unwrap();
        assert_eq!(value["schema"], "nowait.stall/1");
        assert!(value["host"]["kernel"].as_str().unwrap().contains('.'));
        let accel = value["host"]["accel"].as_str().unwrap();
        assert!(["kvm", "nested"].contains(&accel));
        assert_eq!(value["complete"], false);
        for (run, name) in value["runs"].as_array().unwrap().iter().zip(["idle", "user", "copy"]) {
            assert_eq!(run["workload"], name);
            assert_eq!(run["apf"], "host");
            assert_eq!(run["vcpus"], 2);
            assert_eq!(run["threads"], u64::from(name != "idle"));
            assert_eq!(run["data_errors"], 0);
            assert_eq!(run["overrun_us"]["count"], 20);
            assert_eq!(run["overrun_us"]["p50"], 0);
            for field in ["p90", "p99", "max"] {
                assert_eq!(run["overrun_us"][field], 1000, "{field}");
            }
            let rate = run["pages_per_s"].as_f64().unwrap();
            assert_eq!(rate, if name == "idle" { 0.0 } else { 2000.0 });
        }
    }

    #[test]
    fn a_run_that_lacks_something_says_so() {
        let good = result(&workload(Kind::User), 2);
        let judge = |change: fn(&mut RunResult)| {
            let mut result = good.clone();
            change(&mut result);
            let run = Run::new(BOOT, result).unwrap();
            assert_eq!(run.complete, run.problem.is_none());
            run.problem
        };
        assert_eq!(judge(|_| ()), None);
        assert_eq!(judge(|r| (r.elapsed_us, r.pages_touched) = (9_900, 100)), None);
        let bad: [fn(&mut RunResult); 7] = [
            |r| drop(r.heartbeats.pop()),
            |r| r.heartbeats[1].cpu = 0,
            |r| r.heartbeats[0].deadlines = 9,
            |r| r.elapsed_us = 20_000,
            |r| r.elapsed_us = 9_900,
            |r| r.pages_touched = 0,
            |r| r.pages_touched = 101,
        ];
        for change in bad {
            assert!(judge(change).is_some());
        }
    }

    #[test]
    fn under_a_limit_pages_are_touched_many_times_and_the_time_runs_out() {
        let mut result = result(&workload(Kind::User), 2);
        let access = nowait_wire::agent::Access::Random;
        result.workload.pressure = Pressure::Limit { access, seed: 1 };
        result.pages_touched = 101;
        assert_eq!(Run::new(BOOT, result.clone()).unwrap().problem, None);
        result.elapsed_us = 9_900;
        assert!(Run::new(BOOT, result).unwrap().problem.is_some());
    }

    #[test]
    fn it_is_complete_only_with_every_run() {
        let args = super::super::plan::tests::parse(&["--cpus", "2", "--apf", "host"]).unwrap();
        let plan = Plan::new(&args).unwrap();
        let mut document = Document::new(&args);
        for _ in 0..5 {
            document.judge(&plan);
            assert!(!document.complete);
            document.runs.push(Run::new(BOOT, result(&workload(Kind::User), 2)).unwrap());
        }
        document.judge(&plan);
        assert!(document.complete);
        document.failures.push(Failure::new(BOOT, "x".into()));
        document.judge(&plan);
        assert!(!document.complete);
    }
}

//! The result as JSON, schema `nowait.stall/1`: fields are only ever added.

use nowait_wire::agent::{
    Cause, Heartbeat, HostStalls, Kind, Pressure, RunResult, SLICES, TierCounts, VcpuStalls,
    Workload,
};
use serde::{Deserialize, Deserializer, Serialize};

use super::gate::GateResult;
use super::overrun::{self, HistogramError, Overruns, Summary};
use super::plan::{Boot, Plan};
use super::scenario::Scenario;
use super::summary::{self, Group};
use super::{StallArgs, warnings};
use crate::kvm::cpuid::Apf;
use crate::size;

/// The name and version of the schema.
pub const SCHEMA: &str = "nowait.stall/1";
/// The environment variable by which the nested machine says that it is one.
pub const ACCEL_VARIABLE: &str = "NOWAIT_ACCEL";
/// Its value there.
pub const ACCEL_NESTED: &str = "nested";
/// What a result has in its place on any other machine.
const ACCEL_KVM: &str = "kvm";

/// One of a few texts. (A name of its own: serde would borrow a plain `&str`.)
type Fixed = &'static str;

/// Everything that one `nowait stall` found.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Document {
    /// [`SCHEMA`].
    #[serde(deserialize_with = "schema")]
    pub schema: Fixed,
    /// Where it ran.
    pub host: Host,
    /// What was asked for.
    pub config: Config,
    /// Whether every run that was asked for is there and measured all it had to. Otherwise this is a
    /// partial result.
    pub complete: bool,
    /// What to keep in mind when reading it.
    pub warnings: Vec<String>,
    /// The medians over the rounds, by workload and mode.
    pub summary: Vec<Group>,
    /// What became of `--fail-if` and `--baseline`.
    pub gates: Vec<GateResult>,
    /// One entry for each run, in the order in which they were made.
    pub runs: Vec<Run>,
    /// Why runs are missing.
    pub failures: Vec<Failure>,
}

/// Where it ran.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Host {
    /// The host kernel's release.
    pub kernel: String,
    /// `kvm`: hardware; `nested`: an emulated machine, whose times mean nothing but in proportion.
    #[serde(deserialize_with = "accel")]
    pub accel: Fixed,
}

/// What was asked for.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Config {
    /// The guest kernel's file.
    pub kernel: String,
    /// All of what was measured.
    pub scenario: Scenario,
    /// The guest command that took the place of the scenario's threads.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub command: String,
    /// The mode that the others are compared with.
    pub baseline: Apf,
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
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Run {
    /// Which turn of its mode this was, from 1.
    pub round: u32,
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
    /// The same by vCPU, as the kernel's demand_paging_test (tools/testing/selftests/kvm) has its rates.
    #[serde(default)]
    pub pages_per_s_per_vcpu: f64,
    /// Units of work in a second of the computing tasks, if there were some.
    pub units_per_s: Option<f64>,
    /// From an access to its completion, of all touches.
    pub access_us: Option<Summary>,
    /// The vCPUs' stalls, as the host saw them.
    pub stall: Stall,
    /// The command's exit status, and the first part of its output.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub command: Option<CommandEnd>,
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
    /// How long each slice of the time lines is, in microseconds.
    pub slice_us: u64,
    /// All overruns merged: an HdrHistogram in its V2 encoding, as base64.
    pub overrun_us_hdr: String,
    /// All accesses: the same.
    pub access_us_hdr: String,
    /// The overruns of each vCPU.
    pub heartbeats: Vec<Heartbeat>,
}

/// The stalls of a run's vCPUs, as the host saw them: docs/measurement.md has the definition.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Stall {
    /// Whether the host sees them: with `host` and `kernel` they stay inside KVM.
    pub visible: bool,
    /// How long they were.
    pub us: Option<Summary>,
    /// All of them, in microseconds.
    pub total_us: u64,
    /// The share of the vCPUs' time.
    pub share: Option<f64>,
    /// By cause; causes that did not occur are left out.
    pub causes: Vec<CauseOfStalls>,
    /// By vCPU, with a time line.
    pub vcpus: Vec<VcpuStalls>,
    /// Where pages came from meanwhile.
    pub tiers: TierCounts,
}

/// The stalls of one cause.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CauseOfStalls {
    /// Why the vCPU did not run.
    pub cause: Cause,
    /// All together, in microseconds.
    pub total_us: u64,
    /// How long they were.
    pub us: Summary,
    /// The same: an HdrHistogram in its V2 encoding, as base64.
    pub us_hdr: String,
}

/// How a guest's command ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommandEnd {
    /// Its exit status, or 128 and the signal.
    pub status: i32,
    /// The first part of its output.
    pub output: String,
}

/// Why runs of one boot are missing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// Which turn of its mode this was, from 1.
    pub round: u32,
    /// Who handled async page faults.
    pub apf: Apf,
    /// The guest's processors.
    pub vcpus: u32,
    /// Why, in one line.
    pub message: String,
}

/// What runs the guests, as far as whoever started us says.
pub(super) fn accel_of_now() -> &'static str {
    let nested = std::env::var(ACCEL_VARIABLE).is_ok_and(|value| value == ACCEL_NESTED);
    if nested { ACCEL_NESTED } else { ACCEL_KVM }
}

/// What a guest said, for a line of ours: not endless, and without control characters.
fn one_line(text: &str) -> String {
    const CHARS: usize = 400;
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(CHARS).collect()
}

impl Failure {
    pub(super) fn new(boot: Boot, message: String) -> Self {
        Self { round: boot.round, apf: boot.apf, vcpus: boot.vcpus, message: one_line(&message) }
    }
}

impl Document {
    pub(super) fn new(args: &StallArgs, plan: &Plan) -> Self {
        // Read as a file: `uname -r` without the call.
        let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        let (scenario, checked) = (&plan.scenario, &plan.checked);
        Self {
            schema: SCHEMA,
            host: Host { kernel: kernel.trim().to_owned(), accel: accel_of_now() },
            config: Config {
                kernel: args.kernel.display().to_string(),
                scenario: scenario.clone(),
                command: args.command.join(" "),
                baseline: checked.baseline,
                memory: scenario.memory.clone(),
                resident_limit: scenario.resident_limit.clone(),
                store: checked.store.to_string(),
                duration_ms: checked.duration.as_millis() as u64,
                heartbeat_us: checked.heartbeat_us,
            },
            complete: false,
            warnings: Vec::new(),
            summary: Vec::new(),
            gates: Vec::new(),
            runs: Vec::new(),
            failures: Vec::new(),
        }
    }

    /// Judges whether everything that was planned is there, and sums it up.
    pub(super) fn judge(&mut self, plan: &Plan) {
        self.complete = self.failures.is_empty()
            && self.runs.len() == plan.runs()
            && self.runs.iter().all(|run| run.complete);
        self.summary = summary::summarise(&self.runs, self.config.baseline);
        self.warnings = warnings::of(self);
    }

    /// Whether this ran in an emulated machine.
    pub(super) fn is_nested(&self) -> bool {
        self.host.accel == ACCEL_NESTED
    }

    /// Pages with wrong bytes in all runs.
    #[must_use]
    pub fn data_errors(&self) -> u64 {
        self.runs.iter().fold(0, |sum, run| sum.saturating_add(run.data_errors))
    }
}

impl Run {
    /// Sums one result of the guest agent up, and what the host saw of it.
    ///
    /// # Errors
    /// When its histograms do not decode.
    pub(super) fn new(
        boot: Boot,
        result: RunResult,
        host: HostStalls,
    ) -> Result<Self, HistogramError> {
        let mut merged = overrun::empty()?;
        let mut each = Vec::new();
        // Those of more vCPUs than there are would only cost memory.
        for heartbeat in result.heartbeats.iter().take(boot.vcpus as usize + 1) {
            let overruns = overrun::decode(&heartbeat.overrun_us_hdr)?;
            merged.add(&overruns).map_err(|error| HistogramError::Library(error.to_string()))?;
            each.push((heartbeat, overruns));
        }
        let problem = problem(boot, &result, &each).map(|problem| one_line(&problem));
        let stall = Stall::new(boot, host)?;
        let accesses = match result.access_us_hdr.as_str() {
            "" => None,
            text => Some(overrun::decode_accesses(text)?),
        };
        let workload = result.workload;
        let per_second = |count: u64| match result.elapsed_us {
            0 => 0.0,
            elapsed_us => count as f64 * 1e6 / elapsed_us as f64,
        };
        Ok(Self {
            round: boot.round,
            apf: boot.apf,
            workload: workload.kind,
            threads: workload.threads,
            vcpus: boot.vcpus,
            overrun_us: Summary::new(&merged),
            pages_per_s: per_second(result.pages_touched),
            pages_per_s_per_vcpu: per_second(result.pages_touched) / f64::from(boot.vcpus.max(1)),
            units_per_s: (workload.compute > 0).then(|| per_second(result.compute_units)),
            access_us: accesses.as_ref().filter(|all| !all.is_empty()).map(Summary::new),
            stall,
            command: result.status.map(|status| CommandEnd { status, output: result.output }),
            data_errors: result.data_errors,
            complete: problem.is_none(),
            problem,
            elapsed_us: result.elapsed_us,
            pages: workload.pages,
            pages_touched: result.pages_touched,
            slice_us: u64::from(workload.duration_ms) * 1000 / SLICES as u64,
            overrun_us_hdr: overrun::encode(&merged)?,
            access_us_hdr: result.access_us_hdr,
            heartbeats: result.heartbeats,
        })
    }
}

impl Stall {
    fn new(boot: Boot, host: HostStalls) -> Result<Self, HistogramError> {
        let mut all = overrun::empty()?;
        let (mut causes, mut total_us) = (Vec::new(), 0_u64);
        for stalls in host.causes {
            let histogram = overrun::decode(&stalls.us_hdr)?;
            all.add(&histogram).map_err(|error| HistogramError::Library(error.to_string()))?;
            total_us = total_us.saturating_add(stalls.total_us);
            causes.push(CauseOfStalls {
                cause: stalls.cause,
                total_us: stalls.total_us,
                us: Summary::new(&histogram),
                us_hdr: stalls.us_hdr,
            });
        }
        let time_us = host.elapsed_us as f64 * f64::from(boot.vcpus);
        Ok(Self {
            visible: host.visible,
            us: (!all.is_empty()).then(|| Summary::new(&all)),
            total_us,
            share: (host.visible && host.marked && time_us > 0.0)
                .then(|| total_us as f64 / time_us),
            causes,
            vcpus: host.vcpus,
            tiers: host.tiers,
        })
    }
}

fn schema<'de, D: Deserializer<'de>>(from: D) -> Result<Fixed, D::Error> {
    one_of(from, &[SCHEMA])
}

fn accel<'de, D: Deserializer<'de>>(from: D) -> Result<Fixed, D::Error> {
    one_of(from, &[ACCEL_KVM, ACCEL_NESTED])
}

fn one_of<'de, D: Deserializer<'de>>(from: D, known: &[Fixed]) -> Result<Fixed, D::Error> {
    let text = String::deserialize(from)?;
    known
        .iter()
        .copied()
        .find(|name| *name == text)
        .ok_or_else(|| serde::de::Error::custom(format!("'{text}' is not {}", known.join(" or "))))
}

/// What a result lacks, if anything.
fn problem(boot: Boot, result: &RunResult, each: &[(&Heartbeat, Overruns)]) -> Option<String> {
    let Workload { kind, pages, heartbeat_us, duration_ms, pressure, .. } = result.workload;
    let mut cpus: Vec<u32> = each.iter().map(|(heartbeat, _)| heartbeat.cpu).collect();
    cpus.sort_unstable();
    if !cpus.iter().copied().eq(0..boot.vcpus) {
        let heartbeats = size::count(result.heartbeats.len() as u64, "heartbeat");
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
    if each.iter().any(|(_, overruns)| overruns.is_empty()) {
        return Some(format!("no heartbeat was due in its {} us", result.elapsed_us));
    }
    if kind == Kind::Command {
        return match (&result.status, &result.output) {
            (Some(0), _) => None,
            (Some(status), output) => {
                let last = output.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("");
                Some(format!("the command ended with status {status}: {last}"))
            }
            (None, _) => Some("the command's end is not in it".to_owned()),
        };
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
    use nowait_wire::agent::CauseStalls;
    use serde_json::Value;

    pub(in crate::stall) const BOOT: Boot = Boot { round: 1, vcpus: 2, apf: Apf::Host };

    /// A host that saw nothing.
    pub(in crate::stall) fn host() -> HostStalls {
        HostStalls::default()
    }

    /// The plan that some options make, and an empty document of it.
    pub(in crate::stall) fn planned(options: &[&str]) -> (Plan, Document) {
        let args = super::super::plan::tests::parse(options).unwrap();
        let plan = Plan::new(&args).unwrap();
        let document = Document::new(&args, &plan);
        (plan, document)
    }

    /// A result of 10 ms in which the beats of CPU n were late by n ms.
    pub(in crate::stall) fn result(workload: &Workload, cpus: u32) -> RunResult {
        let heartbeats = (0..cpus).map(|cpu| {
            let mut overruns = overrun::empty().unwrap();
            overruns.record_n(1000 * u64::from(cpu), 10).unwrap();
            let overrun_us_hdr = overrun::encode(&overruns).unwrap();
            let slices_us = vec![1000 * u64::from(cpu); SLICES];
            Heartbeat { cpu, deadlines: 10, overrun_us_hdr, slices_us }
        });
        RunResult {
            workload: workload.clone(),
            elapsed_us: 10_500,
            pages_touched: if workload.threads == 0 { 0 } else { 21 },
            data_errors: 0,
            compute_units: 0,
            access_us_hdr: String::new(),
            status: None,
            output: String::new(),
            heartbeats: heartbeats.collect(),
        }
    }

    pub(in crate::stall) fn workload(kind: Kind) -> Workload {
        let threads = u32::from(matches!(kind, Kind::User | Kind::Copy));
        let (pages, pressure) = (100 * threads, Pressure::Evict);
        Workload { kind, threads, duration_ms: 10, pages, pressure, ..Workload::IDLE }
    }

    #[test]
    fn the_schema_has_the_fields_that_others_rely_on() {
        let (_, mut document) = planned(&[]);
        for kind in [Kind::Idle, Kind::User, Kind::Copy] {
            document.runs.push(Run::new(BOOT, result(&workload(kind), 2), host()).unwrap());
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
            let by_vcpu = run["pages_per_s_per_vcpu"].as_f64().unwrap();
            assert_eq!(by_vcpu, rate / 2.0);
        }
    }

    #[test]
    fn a_run_that_lacks_something_says_so() {
        let good = result(&workload(Kind::User), 2);
        let judge = |change: fn(&mut RunResult)| {
            let mut result = good.clone();
            change(&mut result);
            let run = Run::new(BOOT, result, host()).unwrap();
            assert_eq!(run.complete, run.problem.is_none());
            run.problem
        };
        assert_eq!(judge(|_| ()), None);
        assert_eq!(judge(|r| (r.elapsed_us, r.pages_touched) = (9_900, 100)), None);
        let bad: [fn(&mut RunResult); 9] = [
            |r| drop(r.heartbeats.pop()),
            |r| r.heartbeats[1].cpu = 0,
            |r| r.heartbeats[0].deadlines = 9,
            |r| r.elapsed_us = 20_000,
            |r| r.elapsed_us = 9_900,
            |r| r.pages_touched = 0,
            |r| r.pages_touched = 101,
            |r| r.heartbeats.extend(vec![r.heartbeats[0].clone(); 100]),
            |r| {
                let none = overrun::encode(&overrun::empty().unwrap()).unwrap();
                r.workload.heartbeat_us = 1_000_000;
                let all = r.heartbeats.iter_mut();
                all.for_each(|h| (h.deadlines, h.overrun_us_hdr) = (0, none.clone()));
            },
        ];
        for change in bad {
            assert!(judge(change).is_some());
        }
    }

    #[test]
    fn what_a_guest_said_is_one_line_without_control_characters() {
        let said = format!("a\u{1b}]52;c;x\u{7}\ngate passed\r{}", "y".repeat(10_000));
        let message = Failure::new(BOOT, said).message;
        assert!(message.starts_with("a ]52;c;x  gate passed y"), "{message}");
        assert_eq!(message.chars().count(), 400);
    }

    #[test]
    fn under_a_limit_pages_are_touched_many_times_and_the_time_runs_out() {
        let mut result = result(&workload(Kind::User), 2);
        let access = nowait_wire::agent::Access::Random;
        result.workload.pressure = Pressure::Limit { access, seed: 1 };
        result.pages_touched = 101;
        assert_eq!(Run::new(BOOT, result.clone(), host()).unwrap().problem, None);
        result.elapsed_us = 9_900;
        assert!(Run::new(BOOT, result, host()).unwrap().problem.is_some());
    }

    #[test]
    fn stalls_are_summed_up_by_cause_and_shared_out_over_the_vcpus() {
        let mut histogram = overrun::empty().unwrap();
        histogram.record_n(1000, 4).unwrap();
        let us_hdr = overrun::encode(&histogram).unwrap();
        let cause = |cause| CauseStalls { cause, total_us: 4000, us_hdr: us_hdr.clone() };
        let host = HostStalls {
            visible: true,
            marked: true,
            elapsed_us: 10_000,
            causes: vec![cause(Cause::Resident), cause(Cause::Waited)],
            ..HostStalls::default()
        };
        let run = Run::new(BOOT, result(&workload(Kind::User), 2), host.clone()).unwrap();
        assert_eq!(run.stall.us.unwrap().count, 8);
        assert_eq!((run.stall.total_us, run.stall.share), (8000, Some(0.4)));
        let hidden = HostStalls { visible: false, ..host.clone() };
        let run = Run::new(BOOT, result(&workload(Kind::User), 2), hidden).unwrap();
        assert_eq!(run.stall.share, None);
        let broken = CauseStalls { us_hdr: "AAAA".into(), ..cause(Cause::Told) };
        let broken = HostStalls { causes: vec![broken], ..host };
        assert!(Run::new(BOOT, result(&workload(Kind::User), 2), broken).is_err());
    }

    #[test]
    fn a_command_has_to_end_well() {
        let mut result = result(&Workload { pages: 0, ..workload(Kind::Command) }, 2);
        let run = |result: &RunResult| Run::new(BOOT, result.clone(), host()).unwrap();
        assert!(!run(&result).complete);
        (result.status, result.output) = (Some(0), "fine\n".into());
        let good = run(&result);
        assert_eq!(good.command, Some(CommandEnd { status: 0, output: "fine\n".into() }));
        assert!(good.complete);
        (result.status, result.output) = (Some(139), "one\ntwo\n\n".into());
        let problem = run(&result).problem.unwrap();
        assert_eq!(problem, "the command ended with status 139: two");
    }

    #[test]
    fn it_is_complete_only_with_every_run() {
        let (plan, mut document) = planned(&["--cpus", "2", "--apf", "host"]);
        for _ in 0..5 {
            document.judge(&plan);
            assert!(!document.complete);
            document.runs.push(Run::new(BOOT, result(&workload(Kind::User), 2), host()).unwrap());
        }
        document.judge(&plan);
        assert!(document.complete);
        document.failures.push(Failure::new(BOOT, "x".into()));
        document.judge(&plan);
        assert!(!document.complete);
    }
}

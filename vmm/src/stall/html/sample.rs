//! The result that the browser's test shows, `tests/browser/sample.json`: made up, but of the form and about the
//! size of real ones. Each vCPU is simulated: its stalls, and a heartbeat that runs between them.

use std::fs;
use std::path::{Path, PathBuf};

use nowait_wire::agent::{
    Cause, CauseStalls, Heartbeat, HostStalls, Kind, RunResult, SLICES, TierCounts, VcpuStalls,
    Workload,
};

use super::super::document::{Document, Run};
use super::super::plan::{self, Boot, Plan};
use super::super::scenario::Scenario;
use super::super::{Gate, overrun, report};
use crate::kvm::cpuid::Apf;
use crate::stats::SplitMix64;

/// Setting this writes the sample anew.
const WRITE: &str = "NOWAIT_WRITE_SAMPLE";
const SCENARIO: &str = "name = \"sample\"
about = \"Made-up numbers of the form that real ones have.\"
cpus = [2]
memory = \"160M\"
resident_limit = \"40M\"
store = \"lz4=8M+delay=20ms+memory\"
baseline = \"off\"
rounds = 3
threads = [8]
compute_per_cpu = 1
duration = \"1s\"
";

fn path() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/browser/sample.json")
}

/// The time line of one vCPU: stalls in their order, start and length in microseconds.
fn stalls(random: &mut SplitMix64, apf: Apf, kind: Kind) -> Vec<(Cause, u64, u64)> {
    let (mut all, mut now) = (Vec::new(), 0);
    while kind != Kind::Idle && now < 1_000_000 {
        let chance = random.below(100);
        // A kernel that is in read(2) cannot run another task.
        let told = apf == Apf::User && (kind == Kind::User || chance >= 75);
        let (cause, length) = match (chance, apf) {
            (0..30, _) => (Cause::AtHand, 30 + random.below(60)),
            (30..38, _) => (Cause::Resident, 12 + random.below(20)),
            (38..42, _) => (Cause::Joined, 15 + random.below(400)),
            (_, Apf::User) if told => (Cause::Told, 40 + random.below(70)),
            (_, Apf::User) => (Cause::Halted, 18_000 + random.below(4_000)),
            (_, Apf::Off) => (Cause::Waited, 19_500 + random.below(2_500)),
            (92.., Apf::Host) => (Cause::Waited, 19_500 + random.below(2_500)),
            (_, Apf::Host) => (Cause::Told, 200 + random.below(900)),
            (_, Apf::Kernel) => (Cause::Told, 100 + random.below(400)),
        };
        all.push((cause, now, length as u64));
        now += length as u64 + 300 + random.below(2_500) as u64;
    }
    all
}

/// What a heartbeat with these stalls in its way finds.
fn heartbeat(random: &mut SplitMix64, cpu: u32, stalls: &[(Cause, u64, u64)]) -> Heartbeat {
    let (mut overruns, mut slices_us) = (overrun::empty().unwrap(), vec![0; SLICES]);
    for deadline in (1..=1000_u64).map(|beat| beat * 1000) {
        // Artificial halts let the timer's interrupt through.
        let late = stalls.iter().find(|(cause, start, length)| {
            *cause != Cause::Halted && (*start..start + length).contains(&deadline)
        });
        // In steps, so that the histogram is short.
        let noise = 5 * (6 + random.below(30) + random.below(6) * random.below(10)) as u64;
        let late =
            noise + late.map_or(0, |(_, start, length)| (start + length - deadline) / 100 * 100);
        overruns.record(late).unwrap();
        let slice = (deadline as usize / 10_000).min(SLICES - 1);
        slices_us[slice] = late.max(slices_us[slice]);
    }
    let overrun_us_hdr = overrun::encode(&overruns).unwrap();
    Heartbeat { cpu, deadlines: 1000, overrun_us_hdr, slices_us }
}

fn seen(each: &[Vec<(Cause, u64, u64)>], apf: Apf) -> HostStalls {
    let all = || each.iter().flatten();
    let fetched = all().filter(|(_, _, length)| *length > 15_000).count() as u64 + 40;
    let tiers =
        TierCounts { zero: 12, resident: 90, at_hand: 310, fetched, prefetched: fetched / 3 };
    let visible = matches!(apf, Apf::Off | Apf::User);
    let mut host =
        HostStalls { visible, marked: true, elapsed_us: 1_000_500, tiers, ..HostStalls::default() };
    if !visible {
        return host;
    }
    for cause in Cause::ALL {
        let mut histogram = overrun::empty().unwrap();
        let of = || all().filter(move |(of, ..)| *of == cause).map(|(.., length)| *length);
        of().for_each(|length| histogram.record(length / 10 * 10).unwrap());
        if !histogram.is_empty() {
            let us_hdr = overrun::encode(&histogram).unwrap();
            host.causes.push(CauseStalls { cause, total_us: of().sum(), us_hdr });
        }
    }
    host.vcpus = each
        .iter()
        .map(|stalls| {
            let mut slices_us = vec![0; SLICES];
            for us in stalls.iter().flat_map(|(_, start, length)| *start..start + length) {
                if let Some(slice) = slices_us.get_mut(us as usize / 10_000) {
                    *slice += 1;
                }
            }
            let total_us = stalls.iter().map(|(.., length)| length).sum();
            VcpuStalls { count: stalls.len() as u64, total_us, slices_us }
        })
        .collect();
    host
}

fn run(random: &mut SplitMix64, boot: Boot, workload: Workload) -> Run {
    let each: Vec<_> = (0..boot.vcpus).map(|_| stalls(random, boot.apf, workload.kind)).collect();
    let heartbeats = each.iter().enumerate();
    let heartbeats =
        heartbeats.map(|(cpu, stalls)| heartbeat(random, cpu as u32, stalls)).collect();
    let speed = match (workload.kind, boot.apf) {
        (Kind::Idle, _) => 0,
        (_, Apf::Off) => 500,
        (_, Apf::Host) => 900,
        _ => 1500 + random.below(200) as u64,
    };
    let mut accesses =
        hdrhistogram::Histogram::new_with_bounds(1, nowait_wire::agent::MAX_OVERRUN_US, 2).unwrap();
    for _ in 0..speed {
        let us = match random.below(10) {
            0..5 => 5 + random.below(10),
            5..8 => 40 + 10 * random.below(8),
            _ => 20_000 + 500 * random.below(10),
        };
        accesses.record(us as u64).unwrap();
    }
    let access_us_hdr =
        if speed == 0 { String::new() } else { overrun::encode(&accesses).unwrap() };
    let result = RunResult {
        elapsed_us: 1_000_400,
        pages_touched: speed,
        data_errors: 0,
        compute_units: 4 * speed + 900,
        access_us_hdr,
        status: None,
        output: String::new(),
        heartbeats,
        workload,
    };
    Run::new(boot, result, seen(&each, boot.apf)).unwrap()
}

fn sample() -> Document {
    let mut args = plan::tests::parse(&[]).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("sample.toml");
    fs::write(&file, SCENARIO).unwrap();
    args.scenario = Some(file.display().to_string());
    args.kernel = "vmlinux".into();
    let plan = Plan::new(&args).unwrap();
    let mut document = Document::new(&args, &plan);
    document.host.kernel = "6.12.0".into();
    let mut random = SplitMix64(7);
    for boot in &plan.boots {
        let workloads = plan.workloads(boot.vcpus);
        document.runs.extend(workloads.into_iter().map(|of| run(&mut random, *boot, of)));
    }
    document.judge(&plan);
    for gate in ["user.overrun.p99 > 2ms", "user.work < 2 * off.work", "off.overrun.p50 > 5ms"] {
        let gate: Gate = gate.parse().unwrap();
        document.gates.push(gate.judge(&document.summary));
    }
    document
}

#[test]
fn the_sample_is_a_result() {
    assert!(Scenario::parse("sample", SCENARIO).is_ok());
    if std::env::var_os(WRITE).is_some() {
        let mut json = serde_json::to_vec(&sample()).unwrap();
        json.push(b'\n');
        fs::write(path(), json).unwrap();
    }
    let document = report::parse(&fs::read_to_string(path()).unwrap()).unwrap();
    assert!(document.complete);
    assert_eq!(document.runs.len(), 36);
    assert!(document.runs.iter().all(|run| run.problem.is_none()));
}

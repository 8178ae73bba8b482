//! What the rounds come to: for each workload and mode the medians with their intervals, and the ratios to
//! the baseline. Pure.

use nowait_wire::agent::Kind;
use serde::{Deserialize, Serialize};

use super::document::Run;
use super::overrun::Summary;
use crate::kvm::cpuid::Apf;
use crate::size;
pub(super) use crate::stats::Estimate;
use crate::stats::{median_estimate, median_of_ratios};

/// The runs of one workload with one number of processors.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Group {
    /// The guest's processors.
    pub vcpus: u32,
    /// What the threads did.
    pub workload: Kind,
    /// How many there were.
    pub threads: u32,
    /// Each mode that has complete runs.
    pub modes: Vec<ModeSummary>,
}

/// The complete runs of one mode in a [`Group`]: medians over the rounds with their bootstrap 95 %
/// intervals.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModeSummary {
    /// The mode.
    pub apf: Apf,
    /// How many runs there were.
    pub rounds: u32,
    /// Wake-up overruns, in microseconds.
    pub overrun_us: Quantiles,
    /// vCPU stalls, in microseconds; none where the host does not see them, or there were none.
    pub stall_us: Option<Quantiles>,
    /// The share of the vCPUs' time in which they were stalled.
    pub stall_share: Option<Estimate>,
    /// From an access to its completion, in microseconds.
    pub access_us: Option<Quantiles>,
    /// Touches of pages per second, of all vCPUs.
    pub pages_per_s: Estimate,
    /// Units of the computing tasks per second.
    pub units_per_s: Option<Estimate>,
    /// How long the guest's command took, in microseconds; none beside threads.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub elapsed_us: Option<Estimate>,
    /// Over the baseline, round by round; none for the baseline itself.
    pub over_baseline: Option<Ratios>,
}

/// Quantiles of a distribution: of each the median over the rounds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Quantiles {
    /// Half are at most this.
    pub p50: Estimate,
    /// Nine of ten.
    pub p90: Estimate,
    /// 99 of 100.
    pub p99: Estimate,
    /// The longest.
    pub max: Estimate,
}

/// A mode over the baseline.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ratios {
    /// Of the overrun's median.
    pub overrun_p50: Estimate,
    /// Of the overrun's 99th percentile.
    pub overrun_p99: Estimate,
    /// Of the touches per second.
    pub pages_per_s: Option<Estimate>,
    /// Of the computing tasks' work.
    pub units_per_s: Option<Estimate>,
    /// Of the time of the guest's command.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub elapsed: Option<Estimate>,
}

impl Group {
    /// How to call it in a line.
    pub(super) fn name(&self) -> String {
        let vcpus = size::count(self.vcpus.into(), "vCPU");
        let workload = workload_name(self.workload);
        match self.threads {
            0 => format!("{vcpus}, {workload}"),
            threads => format!("{vcpus}, {workload}, {}", size::count(threads.into(), "thread")),
        }
    }

    /// The same of another result?
    pub(super) fn is_like(&self, other: &Self) -> bool {
        (self.vcpus, self.workload, self.threads) == (other.vcpus, other.workload, other.threads)
    }
}

/// A workload's name in tables.
pub(super) fn workload_name(kind: Kind) -> &'static str {
    match kind {
        Kind::Idle => "idle",
        Kind::User => "user",
        Kind::Copy => "copy",
        Kind::Command => "command",
    }
}

/// Sums complete runs up; groups and modes in the order of their first runs.
pub(super) fn summarise(runs: &[Run], baseline: Apf) -> Vec<Group> {
    let complete: Vec<&Run> = runs.iter().filter(|run| run.complete).collect();
    let key = |run: &Run| (run.vcpus, run.workload, run.threads);
    let mut groups: Vec<Group> = Vec::new();
    for first in &complete {
        let (vcpus, workload, threads) = key(first);
        if groups.iter().any(|group| (group.vcpus, group.workload, group.threads) == key(first)) {
            continue;
        }
        let of_group: Vec<&Run> =
            complete.iter().copied().filter(|run| key(run) == key(first)).collect();
        let mut modes: Vec<ModeSummary> = Vec::new();
        for apf in of_group.iter().map(|run| run.apf) {
            if modes.iter().all(|mode| mode.apf != apf) {
                modes.push(mode(&of_group, apf, baseline));
            }
        }
        groups.push(Group { vcpus, workload, threads, modes });
    }
    groups
}

fn mode(group: &[&Run], apf: Apf, baseline: Apf) -> ModeSummary {
    let runs: Vec<&Run> = group.iter().copied().filter(|run| run.apf == apf).collect();
    let estimate = |value: &dyn Fn(&Run) -> f64| {
        median_estimate(&runs.iter().map(|run| value(run)).collect::<Vec<_>>())
    };
    // Only when every run has it.
    let optional = |value: &dyn Fn(&Run) -> Option<f64>| {
        let values: Option<Vec<f64>> = runs.iter().map(|run| value(run)).collect();
        values.map(|values| median_estimate(&values))
    };
    let quantiles = |summary: &dyn Fn(&Run) -> Option<Summary>| {
        Some(Quantiles {
            p50: optional(&|run| Some(summary(run)?.p50 as f64))?,
            p90: optional(&|run| Some(summary(run)?.p90 as f64))?,
            p99: optional(&|run| Some(summary(run)?.p99 as f64))?,
            max: optional(&|run| Some(summary(run)?.max as f64))?,
        })
    };
    let overrun = |value: fn(&Summary) -> u64| estimate(&|run| value(&run.overrun_us) as f64);
    ModeSummary {
        apf,
        rounds: runs.len() as u32,
        overrun_us: Quantiles {
            p50: overrun(|summary| summary.p50),
            p90: overrun(|summary| summary.p90),
            p99: overrun(|summary| summary.p99),
            max: overrun(|summary| summary.max),
        },
        stall_us: quantiles(&|run| run.stall.us.filter(|_| run.stall.visible)),
        stall_share: optional(&|run| run.stall.share),
        access_us: quantiles(&|run| run.access_us),
        pages_per_s: estimate(&|run| run.pages_per_s),
        units_per_s: optional(&|run| run.units_per_s),
        elapsed_us: optional(&elapsed_us),
        over_baseline: if apf == baseline { None } else { ratios(group, apf, baseline) },
    }
}

fn elapsed_us(run: &Run) -> Option<f64> {
    (run.workload == Kind::Command).then_some(run.elapsed_us as f64)
}

/// Rounds that both have.
fn ratios(group: &[&Run], apf: Apf, baseline: Apf) -> Option<Ratios> {
    let of = |mode: Apf, round: u32| {
        group.iter().copied().find(|run| run.apf == mode && run.round == round)
    };
    let pairs: Vec<(&Run, &Run)> = group
        .iter()
        .filter(|run| run.apf == apf)
        .filter_map(|run| Some((*run, of(baseline, run.round)?)))
        .collect();
    let ratio = |value: &dyn Fn(&Run) -> Option<f64>| {
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for (a, b) in &pairs {
            ours.push(value(a)?);
            theirs.push(value(b)?);
        }
        (!ours.is_empty() && theirs.iter().all(|value| *value > 0.0))
            .then(|| median_of_ratios(&ours, &theirs))
    };
    // No overrun at all counts as one of a microsecond.
    let overrun =
        |value: fn(&Summary) -> u64| ratio(&|run: &Run| Some(value(&run.overrun_us).max(1) as f64));
    Some(Ratios {
        overrun_p50: overrun(|summary| summary.p50)?,
        overrun_p99: overrun(|summary| summary.p99)?,
        pages_per_s: ratio(&|run| Some(run.pages_per_s)),
        units_per_s: ratio(&|run| run.units_per_s),
        elapsed: ratio(&elapsed_us),
    })
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::document::tests::{BOOT, host, result, workload};
    use super::super::plan::Boot;
    use super::*;

    fn exactly(value: f64) -> Estimate {
        Estimate { value, low: value, high: value }
    }

    pub(in crate::stall) fn mode(apf: Apf, p50: f64, pages_per_s: f64) -> ModeSummary {
        let quantiles = Quantiles {
            p50: exactly(p50),
            p90: exactly(5.0 * p50),
            p99: exactly(10.0 * p50),
            max: exactly(20.0 * p50),
        };
        ModeSummary {
            apf,
            rounds: 1,
            overrun_us: quantiles,
            stall_us: Some(quantiles),
            stall_share: Some(exactly(0.1)),
            access_us: Some(quantiles),
            pages_per_s: exactly(pages_per_s),
            units_per_s: Some(exactly(pages_per_s)),
            elapsed_us: None,
            over_baseline: None,
        }
    }

    pub(in crate::stall) fn group(workload: Kind, modes: Vec<ModeSummary>) -> Group {
        let threads = if workload == Kind::Idle { 0 } else { 8 };
        Group { vcpus: 2, workload, threads, modes }
    }

    fn run(round: u32, apf: Apf, kind: Kind, pages_per_s: f64) -> Run {
        let boot = Boot { round, apf, ..BOOT };
        let mut run = Run::new(boot, result(&workload(kind), 2), host()).unwrap();
        run.pages_per_s = pages_per_s;
        (run.overrun_us.p50, run.overrun_us.p99) = (100 * u64::from(round), 0);
        run
    }

    #[test]
    fn medians_over_the_rounds_and_ratios_round_by_round() {
        let mut runs = Vec::new();
        // Each round is slower than the one before; within a round `user` does twice as much.
        for round in 1..=5 {
            let speed = 1000.0 / f64::from(round);
            runs.push(run(round, Apf::Off, Kind::User, speed));
            runs.push(run(round, Apf::User, Kind::User, 2.0 * speed));
            runs.push(run(round, Apf::User, Kind::Idle, 0.0));
        }
        runs[0].complete = false;
        let groups = summarise(&runs, Apf::Off);
        assert_eq!(groups.len(), 2);
        let [user, off] = &groups[0].modes[..] else { panic!("{groups:?}") };
        assert_eq!((off.apf, off.rounds, user.apf, user.rounds), (Apf::Off, 4, Apf::User, 5));
        assert!((user.pages_per_s.value - 2000.0 / 3.0).abs() < 1e-9);
        assert!(user.pages_per_s.low < user.pages_per_s.high);
        assert_eq!(off.over_baseline, None);
        let ratios = user.over_baseline.unwrap();
        assert_eq!(ratios.pages_per_s, Some(exactly(2.0)));
        assert_eq!((ratios.overrun_p50, ratios.overrun_p99), (exactly(1.0), exactly(1.0)));
        // Nothing to compare with, and no work.
        assert_eq!(groups[1].modes[0].over_baseline, None);
        assert_eq!(user.units_per_s, None);
        assert_eq!(groups[0].name(), "2 vCPUs, user, 1 thread");
        assert_eq!(groups[1].name(), "2 vCPUs, idle");
    }

    #[test]
    fn it_comes_back_from_json() {
        let groups = vec![group(Kind::Copy, vec![mode(Apf::Host, 1.0, 2.0)])];
        let json = serde_json::to_string(&groups).unwrap();
        assert_eq!(serde_json::from_str::<Vec<Group>>(&json).unwrap(), groups);
    }
}

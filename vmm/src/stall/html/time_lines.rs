//! Time lines: what each slice of a run had, for each vCPU and mode; thinned when there are many.

use serde::Serialize;

use super::super::document::{Document, Run};
use super::curves;

/// The most numbers that time lines put into a page, at about five bytes each.
const NUMBERS: usize = 120_000;

/// The time lines of one group in one round.
#[derive(Clone, Debug, Serialize)]
pub(super) struct TimeLine {
    /// The group's index.
    pub(super) group: usize,
    /// The round, from 1.
    pub(super) round: u32,
    /// Each mode that has a run.
    pub(super) modes: Vec<Mode>,
}

/// One run.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Mode {
    /// Who handled async page faults.
    pub(super) name: String,
    /// How long each slice is, in microseconds, after thinning.
    pub(super) slice_us: u64,
    /// The worst overrun of each slice in microseconds, by vCPU.
    pub(super) overrun_us: Vec<Vec<u64>>,
    /// For how long the vCPU was stalled in each slice, in microseconds, by vCPU; none where the host does not
    /// see it.
    pub(super) stall_us: Option<Vec<Vec<u64>>>,
}

/// All time lines, and how many slices were merged into one.
pub(super) fn all(document: &Document) -> (Vec<TimeLine>, usize) {
    let numbers: usize = document.runs.iter().filter(|run| run.complete).map(numbers).sum();
    let thin = numbers.div_ceil(NUMBERS).max(1);
    let mut lines = Vec::new();
    for (index, group) in document.summary.iter().enumerate() {
        let modes: Vec<(u32, Mode)> = group
            .modes
            .iter()
            .flat_map(|mode| curves::runs(document, group, mode.apf))
            .map(|run| (run.round, Mode::new(run, thin)))
            .collect();
        let mut rounds: Vec<u32> = modes.iter().map(|(round, _)| *round).collect();
        rounds.sort_unstable();
        rounds.dedup();
        lines.extend(rounds.into_iter().map(|round| TimeLine {
            group: index,
            round,
            modes:
                modes.iter().filter(|(of, _)| *of == round).map(|(_, mode)| mode.clone()).collect(),
        }));
    }
    (lines, thin)
}

fn numbers(run: &Run) -> usize {
    let overruns = run.heartbeats.iter().map(|heartbeat| heartbeat.slices_us.len());
    let stalls = run.stall.vcpus.iter().map(|vcpu| vcpu.slices_us.len());
    overruns.chain(stalls).sum()
}

impl Mode {
    fn new(run: &Run, thin: usize) -> Self {
        // A run that ended early has nothing in the slices behind its end.
        let slices = run.elapsed_us.div_ceil(run.slice_us.max(1));
        let slices = usize::try_from(slices).unwrap_or(usize::MAX);
        let cut = |of: &[u64], merge: fn(&[u64]) -> u64| -> Vec<u64> {
            of[..slices.min(of.len())].chunks(thin).map(merge).collect()
        };
        let worst = |slices: &[u64]| slices.iter().copied().max().unwrap_or_default();
        let sum = |slices: &[u64]| slices.iter().fold(0, |sum: u64, us| sum.saturating_add(*us));
        let mut heartbeats: Vec<_> = run.heartbeats.iter().collect();
        heartbeats.sort_by_key(|heartbeat| heartbeat.cpu);
        let overruns = heartbeats.into_iter().map(|heartbeat| cut(&heartbeat.slices_us, worst));
        let stalls = run.stall.vcpus.iter().map(|vcpu| cut(&vcpu.slices_us, sum));
        Self {
            name: run.apf.to_string(),
            slice_us: run.slice_us.saturating_mul(thin as u64),
            overrun_us: overruns.collect(),
            stall_us: run.stall.visible.then(|| stalls.collect()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::document::tests::{BOOT, host, planned, result, workload};
    use super::super::super::plan::Boot;
    use super::*;
    use crate::kvm::cpuid::Apf;
    use nowait_wire::agent::{HostStalls, Kind, SLICES, VcpuStalls};

    fn run(round: u32, apf: Apf) -> Run {
        let vcpus = vec![VcpuStalls { slices_us: vec![7; SLICES], ..VcpuStalls::default() }; 2];
        let host = HostStalls { visible: apf == Apf::Off, vcpus, ..host() };
        Run::new(Boot { round, apf, ..BOOT }, result(&workload(Kind::User), 2), host).unwrap()
    }

    #[test]
    fn each_round_has_its_modes_and_hidden_stalls_are_none() {
        let (plan, mut document) = planned(&[]);
        for round in 1..=2 {
            document.runs.extend([Apf::Off, Apf::Host].map(|apf| run(round, apf)));
        }
        // It ended after half of its time.
        document.runs[0].elapsed_us = 5_000;
        document.judge(&plan);
        let (lines, thin) = all(&document);
        assert_eq!((lines.len(), thin), (2, 1));
        let [off, hidden] = &lines[0].modes[..] else { panic!("{lines:?}") };
        assert_eq!((off.name.as_str(), off.slice_us), ("off", 100));
        assert_eq!(off.overrun_us, [vec![0; 50], vec![1000; 50]]);
        assert_eq!(off.stall_us, Some(vec![vec![7; 50]; 2]));
        assert_eq!((hidden.overrun_us[0].len(), &hidden.stall_us), (SLICES, &None));
    }

    #[test]
    fn many_runs_are_thinned_and_keep_their_worst() {
        let (plan, mut document) = planned(&[]);
        let one = run(1, Apf::Off);
        document.runs = (1..=500).map(|round| Run { round, ..one.clone() }).collect();
        document.runs[0].heartbeats[1].slices_us[1] = 90_000;
        document.judge(&plan);
        let (lines, thin) = all(&document);
        assert_eq!(thin, 2);
        let first = &lines[0].modes[0];
        assert_eq!((first.slice_us, first.overrun_us[1].len()), (200, SLICES / 2));
        assert_eq!(first.overrun_us[1][..2], [90_000, 1000]);
        assert_eq!(first.stall_us.as_ref().unwrap()[0][0], 14);
    }
}

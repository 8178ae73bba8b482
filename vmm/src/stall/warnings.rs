//! What to keep in mind when reading a result. Pure.

use nowait_wire::agent::Kind;

use super::document::Document;
use super::summary::{Estimate, Group};

/// Idle rows whose 99th percentiles differ by more than this factor between boots make the machine noisy.
const NOISY: f64 = 3.0;
/// A run that lasts so many times as long as asked was kept from ending in time.
const STARVED: f64 = 1.5;
/// From this share of stalled time on, an idle guest pages.
const PAGES: f64 = 0.001;
/// Rounds from which an interval means something.
const ENOUGH_ROUNDS: u32 = 5;

/// The warnings of a result that has been summed up.
pub(super) fn of(document: &Document) -> Vec<String> {
    let mut warnings = Vec::new();
    if document.is_nested() {
        warnings.push(
            "measured in an emulated machine: compare rows with each other, never with hardware"
                .to_owned(),
        );
    }
    if !document.complete {
        warnings.push("partial: runs are missing or incomplete".to_owned());
    }
    if document.config.resident_limit.is_none() && !document.config.command.is_empty() {
        warnings.push(
            "no resident limit: the command's pages stay in memory (--resident-limit SIZE)"
                .to_owned(),
        );
    }
    let rounds = document.config.scenario.rounds;
    if rounds < ENOUGH_ROUNDS {
        let turns = match rounds {
            1 => "one boot of each mode".to_owned(),
            rounds => format!("{rounds} boots of each mode"),
        };
        warnings
            .push(format!("{turns}: differences are hints (--rounds 5 and more gives intervals)"));
    }
    if let Some(factor) = noise(&document.summary).filter(|factor| *factor > NOISY) {
        warnings.push(format!(
            "noisy: beside an idle guest the heartbeat's p99 differs {factor:.1} times between boots"
        ));
    }
    if rounds < ENOUGH_ROUNDS && document.gates.iter().any(|gate| !gate.passed) {
        warnings.push("a gate that failed on so few boots may be noise".to_owned());
    }
    if let Some(times) = starved(document) {
        warnings.push(format!(
            "starved: a run lasted {times:.1} times as long as asked: the machine had other things to do"
        ));
    }
    let undecided = document.summary.iter().flat_map(undecided).collect::<Vec<_>>();
    if rounds >= ENOUGH_ROUNDS && !undecided.is_empty() {
        warnings.push(format!(
            "too noisy to tell from the baseline (1 lies in the interval): {}",
            undecided.join("; ")
        ));
    }
    warnings
}

/// How much the idle rows' 99th percentiles differ, at most: between rounds (their intervals), and between modes,
/// which are the same to a guest that pages nothing.
fn noise(groups: &[Group]) -> Option<f64> {
    let over = |high: f64, low: f64| high.max(1.0) / low.max(1.0);
    let idle = groups.iter().filter(|group| group.workload == Kind::Idle);
    let factors = idle.flat_map(|group| {
        let p99 = || group.modes.iter().map(|mode| mode.overrun_us.p99);
        let each = p99().map(move |p99| over(p99.high, p99.low));
        // Under a limit even an idle guest may lose pages, and then each mode is late in its own way.
        let pages =
            group.modes.iter().any(|mode| mode.stall_share.is_some_and(|s| s.value > PAGES));
        let high = p99().map(|p99| p99.high).max_by(f64::total_cmp);
        let low = p99().map(|p99| p99.low).min_by(f64::total_cmp);
        each.chain(high.zip(low).filter(|_| !pages).map(|(high, low)| over(high, low)))
    });
    factors.max_by(f64::total_cmp)
}

/// How many times as long as asked the longest run was, if that is too long. A command takes as long as it takes.
fn starved(document: &Document) -> Option<f64> {
    let asked_us = document.config.duration_ms as f64 * 1000.0;
    let timed = document.runs.iter().filter(|run| run.workload != Kind::Command);
    let times = timed.map(|run| run.elapsed_us as f64 / asked_us).max_by(f64::total_cmp);
    times.filter(|times| *times > STARVED)
}

/// Modes whose pages per second cannot be told from the baseline's.
fn undecided(group: &Group) -> Vec<String> {
    let straddles = |estimate: Estimate| estimate.low < 1.0 && estimate.high > 1.0;
    group
        .modes
        .iter()
        .filter(|_| group.workload != Kind::Idle)
        .filter(|mode| {
            mode.over_baseline.and_then(|ratios| ratios.pages_per_s).is_some_and(straddles)
        })
        .map(|mode| format!("{}, {}", group.name(), mode.apf))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::document::Run;
    use super::super::document::tests::{BOOT, host, planned, result, workload};
    use super::super::summary::Ratios;
    use super::super::summary::tests::{group, mode};
    use super::*;
    use crate::kvm::cpuid::Apf;

    #[test]
    fn little_noisy_partial_and_emulated_results_say_so() {
        let (_, mut document) = planned(&[]);
        document.host.accel = "kvm";
        let words = |document: &Document| of(document).join("\n");
        assert!(words(&document).contains("partial") && words(&document).contains("one boot"));
        document.complete = true;
        document.config.scenario.rounds = 5;
        assert_eq!(words(&document), "");
        let run = Run::new(BOOT, result(&workload(Kind::User), 2), host()).unwrap();
        document.runs.push(Run { elapsed_us: 1600 * document.config.duration_ms, ..run });
        assert!(words(&document).contains("lasted 1.6 times"), "{}", words(&document));
        document.runs.clear();
        document.config.resident_limit = None;
        document.config.command = "make".to_owned();
        assert!(words(&document).contains("no resident limit"));
        document.config.command.clear();
        document.host.accel = super::super::ACCEL_NESTED;
        assert!(words(&document).contains("emulated"));
        let mut idle = mode(Apf::Off, 10.0, 0.0);
        idle.overrun_us.p99 = Estimate { value: 200.0, low: 100.0, high: 350.0 };
        document.summary = vec![group(Kind::Idle, vec![idle])];
        assert!(words(&document).contains("differs 3.5 times"), "{}", words(&document));
        let mut other = mode(Apf::User, 10.0, 0.0);
        other.overrun_us.p99 = Estimate { value: 40.0, low: 40.0, high: 40.0 };
        document.summary[0].modes.push(other);
        assert!(words(&document).contains("differs 3.5 times"), "{}", words(&document));
        // Of a guest that pages nothing the modes are the same, too.
        document.summary[0].modes.iter_mut().for_each(|mode| mode.stall_share = None);
        assert!(words(&document).contains("differs 8.8 times"), "{}", words(&document));
        let mut user = mode(Apf::User, 10.0, 5.0);
        let about_one = Estimate { value: 1.01, low: 0.9, high: 1.1 };
        user.over_baseline = Some(Ratios {
            overrun_p50: about_one,
            overrun_p99: about_one,
            pages_per_s: Some(about_one),
            units_per_s: None,
            elapsed: None,
        });
        document.summary = vec![group(Kind::User, vec![user])];
        assert!(
            words(&document).contains("2 vCPUs, user, 8 threads, user"),
            "{}",
            words(&document)
        );
    }
}

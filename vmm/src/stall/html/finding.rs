//! What a plot says, in a sentence that is computed from the data.

use nowait_wire::agent::Kind;

use super::super::document::Document;
use super::super::summary::{Group, ModeSummary, Quantiles};
use super::curves::Quantity;
use super::units;
use crate::size;

/// Modes within this factor of each other are told as alike.
const ALIKE: f64 = 1.1;

/// The group that the first plot shows: the one under pressure with the most threads, then by user mode, then
/// with the most processors. By size, not by what came out, so that it is not the one that looks best.
pub(super) fn headline(groups: &[Group]) -> usize {
    let rank = |group: &Group| {
        let kind = match group.workload {
            Kind::User => 3,
            Kind::Copy => 2,
            Kind::Command => 1,
            Kind::Idle => 0,
        };
        (group.workload != Kind::Idle, group.threads, kind, group.vcpus)
    };
    let best = groups.iter().enumerate().max_by_key(|(_, group)| rank(group));
    best.map_or(0, |(index, _)| index)
}

/// What a group is called on the page, where `user` is only the name of a mode.
pub(super) fn name(group: &Group) -> String {
    let vcpus = size::count(group.vcpus.into(), "vCPU");
    let threads = size::count(group.threads.into(), "thread");
    match group.workload {
        Kind::Idle => format!("{vcpus}, idle"),
        Kind::User => format!("{vcpus}, {threads} in user mode"),
        Kind::Copy => format!("{vcpus}, {threads} in read(2)"),
        Kind::Command => format!("{vcpus}, the command"),
    }
}

/// What got done meanwhile: a mode that is never late because nothing is done looks no better for it.
pub(super) fn progress(group: &Group) -> Option<String> {
    if !matches!(group.workload, Kind::User | Kind::Copy) {
        return None;
    }
    let mut modes: Vec<(String, f64)> =
        group.modes.iter().map(|mode| (mode.apf.to_string(), mode.pages_per_s.value)).collect();
    modes.sort_by(|a, b| b.1.total_cmp(&a.1));
    let rates: Vec<String> = modes
        .into_iter()
        .map(|(name, rate)| format!("{} ({name})", units::count(rate.round() as u64)))
        .collect();
    (!rates.is_empty())
        .then(|| format!("Meanwhile they touch {} pages per second.", rates.join(", ")))
}

/// What the guest does in a group, as the beginning of a sentence.
fn beside(group: &Group) -> String {
    let vcpus = size::count(group.vcpus.into(), "vCPU");
    let threads = size::count(group.threads.into(), "thread");
    match group.workload {
        Kind::Idle => format!("With an idle guest, on {vcpus},"),
        Kind::User => format!("With {threads} in user mode, on {vcpus},"),
        Kind::Copy => format!("With {threads} in read(2), on {vcpus},"),
        Kind::Command => format!("Beside the command, on {vcpus},"),
    }
}

/// The sentence; the medians over the rounds, as the table has them.
pub(super) fn sentence(group: &Group, quantity: Quantity) -> String {
    let of = |mode: &ModeSummary| match quantity {
        Quantity::Overrun => Some(mode.overrun_us),
        Quantity::Stall => mode.stall_us,
        Quantity::Access => mode.access_us,
    };
    let (what, none) = match quantity {
        Quantity::Overrun => ("the heartbeat is late by", "no heartbeat was measured"),
        Quantity::Stall => ("a vCPU stall lasts", "the host saw no vCPU stall"),
        Quantity::Access => ("an access takes", "no access was measured"),
    };
    let modes: Vec<(String, Quantiles)> =
        group.modes.iter().filter_map(|mode| Some((mode.apf.to_string(), of(mode)?))).collect();
    let begin = beside(group);
    if modes.is_empty() {
        return format!("{begin} {none}");
    }
    let at = |value: fn(&Quantiles) -> f64| {
        let mut values: Vec<(String, f64)> =
            modes.iter().map(|(name, quantiles)| (name.clone(), value(quantiles))).collect();
        values.sort_by(|a, b| a.1.total_cmp(&b.1));
        values
    };
    let (median, tail) = (at(|quantiles| quantiles.p50.value), at(|quantiles| quantiles.p99.value));
    match (are_alike(&median), are_alike(&tail)) {
        // Where the medians say nothing, the tails may.
        (true, false) => format!("{begin} {what} {} at the 99th percentile", list(&tail)),
        _ => format!("{begin} {what} {} at the median", list(&median)),
    }
}

/// Whether sorted values differ by little.
fn are_alike(values: &[(String, f64)]) -> bool {
    match values {
        [(_, least), .., (_, most)] => most.max(1.0) <= least.max(1.0) * ALIKE,
        _ => true,
    }
}

/// Sorted values with their modes; one for all when they are alike.
fn list(values: &[(String, f64)]) -> String {
    match values {
        [_, .., (_, most)] if are_alike(values) => {
            format!("about {} in every mode", units::time(*most))
        }
        values => {
            let shown: Vec<_> = values.iter().map(|(name, us)| (name, units::time(*us))).collect();
            let same = shown.chunk_by(|a, b| a.1 == b.1);
            let parts = same.map(|same| {
                let names: Vec<&str> = same.iter().map(|(name, _)| name.as_str()).collect();
                format!("{} ({})", same[0].1, names.join(", "))
            });
            // The first says what the names are.
            parts.collect::<Vec<_>>().join(", ").replacen('(', "(mode ", 1)
        }
    }
}

/// What the page is of, in a line.
pub(super) fn subtitle(document: &Document) -> String {
    let config = &document.config;
    let pages = match &config.resident_limit {
        Some(limit) => format!("at most {limit} of {} guest RAM in memory", config.memory),
        None => "pages evicted before each run".to_owned(),
    };
    let rounds = size::count(config.scenario.rounds.into(), "round");
    format!("{pages}, store {}, {rounds}", config.store)
}

#[cfg(test)]
mod tests {
    use super::super::super::summary::tests::{group, mode};
    use super::*;
    use crate::kvm::cpuid::Apf;

    #[test]
    fn a_sentence_names_each_mode_the_smallest_first() {
        let of = |modes| group(Kind::User, modes);
        let sentence = |group: &Group, quantity| sentence(group, quantity).replace('\u{a0}', " ");
        let apart = of(vec![
            mode(Apf::Off, 10_000.0, 1.0),
            mode(Apf::Kernel, 300.1, 1.0),
            mode(Apf::User, 300.0, 1.0),
        ]);
        assert_eq!(
            sentence(&apart, Quantity::Overrun),
            "With 8 threads in user mode, on 2 vCPUs, the heartbeat is late by 300 µs (mode user, kernel), \
             10 ms (off) at the median"
        );
        let mut alike = of(vec![mode(Apf::Off, 100.0, 1.0), mode(Apf::User, 101.0, 1.0)]);
        assert!(
            sentence(&alike, Quantity::Access)
                .ends_with("an access takes about 101 µs in every mode at the median")
        );
        alike.modes[0].overrun_us.p99.value = 20_000.0;
        assert!(
            sentence(&alike, Quantity::Overrun)
                .ends_with("late by 1.01 ms (mode user), 20 ms (off) at the 99th percentile")
        );
        alike.modes.iter_mut().for_each(|mode| mode.stall_us = None);
        assert!(sentence(&alike, Quantity::Stall).ends_with("the host saw no vCPU stall"));
        assert_eq!(
            progress(&alike).unwrap(),
            "Meanwhile they touch 1 (off), 1 (user) pages per second."
        );
        assert!(progress(&group(Kind::Idle, vec![])).is_none());
        assert_eq!(name(&alike), "2 vCPUs, 8 threads in user mode");
        let single = of(vec![mode(Apf::Host, 5.0, 1.0)]);
        assert!(
            sentence(&single, Quantity::Stall).ends_with("lasts 5 µs (mode host) at the median")
        );
    }

    #[test]
    fn the_headline_is_the_heaviest_group() {
        let heavy = |threads| Group { threads, ..group(Kind::User, vec![]) };
        let groups = [heavy(1), group(Kind::Copy, vec![]), heavy(8), group(Kind::Idle, vec![])];
        assert_eq!(headline(&groups), 2);
        assert_eq!(headline(&groups[3..]), 0);
        assert_eq!(headline(&[]), 0);
    }
}

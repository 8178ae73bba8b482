//! Which runs of a scenario a partial result lacks, where nothing else says so: it ended before they were made. Pure.

use std::fmt;

use super::document::{Document, Failure};
use super::scenario::Scenario;
use crate::size;

/// How many runs each boot has.
fn per_boot(document: &Document) -> usize {
    let Scenario { via, threads, .. } = &document.config.scenario;
    1 + if document.config.command.is_empty() { via.len() * threads.len() } else { 1 }
}

/// How many runs the scenario comes to.
pub(super) fn planned(document: &Document) -> usize {
    let Scenario { cpus, modes, rounds, .. } = &document.config.scenario;
    cpus.len() * modes.len() * *rounds as usize * per_boot(document)
}

impl fmt::Display for Failure {
    /// Which boot, and why.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let vcpus = size::count(self.vcpus.into(), "vCPU");
        write!(f, "{} with {vcpus}: {}", self.apf, self.message)
    }
}

/// A line for each boot of a mode that lacks runs and did not fail.
pub(super) fn lines(document: &Document) -> Vec<String> {
    let scenario = &document.config.scenario;
    let planned = per_boot(document);
    let mut lines = Vec::new();
    for round in 1..=scenario.rounds {
        for &vcpus in &scenario.cpus {
            for &apf in &scenario.modes {
                let failed = |failure: &Failure| {
                    (failure.round, failure.vcpus, failure.apf) == (round, vcpus, apf)
                };
                let made = document.runs.iter();
                let made = made
                    .filter(|run| (run.round, run.vcpus, run.apf) == (round, vcpus, apf))
                    .count();
                if made < planned && !document.failures.iter().any(failed) {
                    let of = size::count(planned as u64, "run");
                    let vcpus = size::count(vcpus.into(), "vCPU");
                    let missing = planned - made;
                    lines.push(format!(
                        "{apf} with {vcpus}, round {round}: {missing} of {of} not made"
                    ));
                }
            }
        }
    }
    lines
}

/// The first few of these, and one for all others.
pub(super) fn few(document: &Document, most: usize) -> Vec<String> {
    let mut lines = lines(document);
    if lines.len() > most {
        let more = size::count((lines.len() - most) as u64, "boot");
        lines.truncate(most);
        lines.push(format!("runs of {more} more"));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::super::document::Failure;
    use super::super::document::Run;
    use super::super::document::tests::{BOOT, host, planned, result, workload};
    use super::*;
    use nowait_wire::agent::Kind;

    #[test]
    fn what_was_not_made_is_told_once() {
        let (_, mut document) = planned(&["--cpus", "2", "--apf", "host,user", "--rounds", "2"]);
        assert_eq!(lines(&document).len(), 4);
        document.runs.push(Run::new(BOOT, result(&workload(Kind::Idle), 2), host()).unwrap());
        let planned = per_boot(&document);
        let first =
            format!("host with 2 vCPUs, round 1: {} of {planned} runs not made", planned - 1);
        assert_eq!(lines(&document)[0], first);
        document.failures.push(Failure::new(BOOT, "it panicked".into()));
        assert_eq!(
            lines(&document)[0],
            format!("user with 2 vCPUs, round 1: {planned} of {planned} runs not made")
        );
        assert_eq!(few(&document, 1)[1], "runs of 2 boots more");
    }
}

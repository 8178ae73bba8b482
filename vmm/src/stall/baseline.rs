//! An earlier result that a new one must not fall behind (`--baseline`). Pure.

use std::str::FromStr;

use nowait_wire::agent::Kind;
use serde::Deserialize;

use super::SCHEMA;
use super::gate::{self, GateResult};
use super::scenario::Scenario;
use super::summary::{Estimate, Group, ModeSummary};

/// Rounds from which the intervals of the medians mean something.
const ROUNDS_FOR_INTERVALS: u32 = 5;

/// By how much a result may be worse than its baseline: a share of it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tolerance(f64);

impl FromStr for Tolerance {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let percent = text.strip_suffix('%').and_then(|number| gate::number(number).ok());
        percent
            .filter(|percent| *percent <= 1000.0)
            .map(|percent| Self(percent / 100.0))
            .ok_or_else(|| "give a share, for example 10%".to_owned())
    }
}

/// What is read of an earlier result.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Earlier {
    schema: String,
    config: EarlierConfig,
    #[serde(default)]
    host: EarlierHost,
    #[serde(default = "yes")]
    complete: bool,
    summary: Vec<Group>,
}

#[derive(Clone, Debug, Deserialize)]
struct EarlierConfig {
    scenario: Scenario,
    #[serde(default)]
    command: String,
}

#[derive(Clone, Debug, Default, Deserialize)]
struct EarlierHost {
    #[serde(default)]
    accel: Option<String>,
}

fn yes() -> bool {
    true
}

/// What a result has to be of, to be compared with.
pub(super) struct Now<'a> {
    pub(super) scenario: &'a Scenario,
    /// The guest's command, if that is what is measured.
    pub(super) command: &'a str,
    /// What runs the guests.
    pub(super) accel: &'a str,
}

/// Why an earlier result is no baseline.
#[derive(Debug, thiserror::Error)]
pub enum BaselineError {
    /// It cannot be read.
    #[error("cannot read it: {0}")]
    Unreadable(#[from] crate::operand::OperandError),
    /// It is no result, or of another version.
    #[error("it is no {expected} result with a summary: {why}", expected = SCHEMA)]
    Schema {
        /// What is wrong with it.
        why: String,
    },
    /// It is a result of something else.
    #[error("it measured another scenario ('{theirs}'{what}): a baseline has the same one")]
    Scenario {
        /// Its name.
        theirs: String,
        /// What differs.
        what: String,
    },
    /// It is a result of another guest command, or of none.
    #[error("it measured {theirs}, this measures {ours}: a baseline has the same command")]
    Command {
        /// Its command.
        theirs: String,
        /// That of now.
        ours: String,
    },
    /// It was measured where times are others.
    #[error(
        "it was measured with {theirs}, this is {ours}: a baseline comes from the same kind of machine"
    )]
    Accel {
        /// What ran its guests.
        theirs: String,
        /// What runs them now.
        ours: String,
    },
    /// Runs are missing in it.
    #[error("it is partial: a baseline has all of its runs")]
    Partial,
}

impl Earlier {
    /// Reads what `--json` wrote.
    ///
    /// # Errors
    /// When it is something else, partial, or of another scenario, command or kind of machine; how often
    /// modes had their turn may differ.
    pub(super) fn parse(text: &str, now: &Now<'_>) -> Result<Self, BaselineError> {
        let scenario = now.scenario;
        let schema = |why: String| BaselineError::Schema { why };
        let value: serde_json::Value =
            serde_json::from_str(text).map_err(|error| schema(error.to_string()))?;
        match value.get("schema").and_then(serde_json::Value::as_str) {
            Some(SCHEMA) => {}
            Some(other) => return Err(schema(format!("its schema is {other}"))),
            None => return Err(schema("it has no schema".into())),
        }
        let earlier: Self =
            serde_json::from_value(value).map_err(|error| schema(error.to_string()))?;
        debug_assert_eq!(earlier.schema, SCHEMA);
        let theirs = &earlier.config.scenario;
        let alike =
            Scenario { rounds: scenario.rounds, about: scenario.about.clone(), ..theirs.clone() };
        if alike == *scenario {
            return earlier.comparable(now);
        }
        let json = |scenario: &Scenario| serde_json::to_value(scenario).unwrap_or_default();
        let (ours, alike) = (json(scenario), json(&alike));
        let keys = ours.as_object().into_iter().chain(alike.as_object()).flat_map(|map| map.keys());
        let mut differ: Vec<&str> =
            keys.filter(|key| ours.get(*key) != alike.get(*key)).map(String::as_str).collect();
        differ.sort_unstable();
        differ.dedup();
        let what = format!("; differing: {}", differ.join(", "));
        Err(BaselineError::Scenario { theirs: theirs.name.clone(), what })
    }

    fn comparable(self, now: &Now<'_>) -> Result<Self, BaselineError> {
        let of = |command: &str| match command {
            "" => "the scenario's threads".to_owned(),
            command => format!("'{command}'"),
        };
        let (theirs, ours) = (of(&self.config.command), of(now.command));
        if theirs != ours {
            return Err(BaselineError::Command { theirs, ours });
        }
        if let Some(theirs) = self.host.accel.as_ref().filter(|accel| *accel != now.accel) {
            let (theirs, ours) = (theirs.clone(), now.accel.to_owned());
            return Err(BaselineError::Accel { theirs, ours });
        }
        if self.complete { Ok(self) } else { Err(BaselineError::Partial) }
    }

    /// Looks whether something is worse by more than the tolerance. Idle rows are of the machine, not of paging.
    pub(super) fn judge(&self, now: &[Group], Tolerance(tolerance): Tolerance) -> GateResult {
        let gate = format!("no worse than the baseline by {:.0} %", tolerance * 100.0);
        let mut result = GateResult { gate, passed: true, failures: Vec::new(), compared: 0 };
        for group in now.iter().filter(|group| group.workload != Kind::Idle) {
            let Some(before) = self.summary.iter().find(|before| before.is_like(group)) else {
                continue;
            };
            for mode in &group.modes {
                let Some(before) = before.modes.iter().find(|before| before.apf == mode.apf) else {
                    continue;
                };
                let of = |what: &str| format!("{}, {}: {what}", group.name(), mode.apf);
                for (what, before, now, more_is_worse) in pairs(before, mode) {
                    result.compared += 1;
                    if is_worse(before, now, more_is_worse, tolerance, mode.rounds) {
                        let (before, now) = (before.value, now.value);
                        result.failures.push(of(&format!("{what} {now:.1}, was {before:.1}")));
                    }
                }
            }
        }
        if result.compared == 0 {
            result.failures.push("nothing of it is in this result".into());
        }
        result.passed = result.failures.is_empty();
        result
    }
}

/// What is compared with a baseline: name, before, now, and whether more is worse.
fn pairs(before: &ModeSummary, now: &ModeSummary) -> Vec<(&'static str, Estimate, Estimate, bool)> {
    let mut pairs = vec![
        ("overrun p50 (us)", before.overrun_us.p50, now.overrun_us.p50, true),
        ("overrun p99 (us)", before.overrun_us.p99, now.overrun_us.p99, true),
    ];
    match (before.elapsed_us, now.elapsed_us) {
        (Some(before), Some(now)) => pairs.push(("time (us)", before, now, true)),
        _ => pairs.push(("pages/s", before.pages_per_s, now.pages_per_s, false)),
    }
    if let (Some(before), Some(now)) = (before.units_per_s, now.units_per_s) {
        pairs.push(("work/s", before, now, false));
    }
    pairs
}

/// With enough rounds all of the interval has to be beyond the tolerance.
fn is_worse(
    before: Estimate,
    now: Estimate,
    more_is_worse: bool,
    tolerance: f64,
    rounds: u32,
) -> bool {
    let sure = rounds >= ROUNDS_FOR_INTERVALS;
    if more_is_worse {
        let now = if sure { now.low } else { now.value };
        now > before.value * (1.0 + tolerance)
    } else {
        let now = if sure { now.high } else { now.value };
        now < before.value / (1.0 + tolerance)
    }
}

#[cfg(test)]
mod tests {
    use super::super::gate::tests::groups;
    use super::super::summary::tests::mode;
    use super::*;
    use crate::kvm::cpuid::Apf;

    #[test]
    fn a_baseline_is_of_the_same_scenario_and_nothing_may_be_worse() {
        let scenario = Scenario::parse("s", "name = \"x\"").unwrap();
        let document = |schema: &str, scenario: &Scenario| {
            serde_json::json!({ "schema": schema, "config": { "scenario": scenario }, "summary": groups() })
                .to_string()
        };
        let now = Now { scenario: &scenario, command: "", accel: "kvm" };
        let good = Earlier::parse(&document("nowait.stall/1", &scenario), &now).unwrap();
        let tolerance: Tolerance = "10%".parse().unwrap();
        let result = good.judge(&groups(), tolerance);
        assert!(result.passed && result.compared == 8, "{result:?}");
        let mut worse = groups();
        worse[1].modes[1] = mode(Apf::User, 280.0, 85.0);
        let result = good.judge(&worse, tolerance);
        assert_eq!(result.failures.len(), 4, "{result:?}");
        assert_eq!(
            result.failures[0],
            "2 vCPUs, user, 8 threads, user: overrun p50 (us) 280.0, was 250.0"
        );
        assert!(good.judge(&worse, "20%".parse().unwrap()).passed);
        assert!(!good.judge(&[], tolerance).passed);

        let error = |text: &str| Earlier::parse(text, &now).unwrap_err().to_string();
        assert!(error("{").contains("it is no nowait.stall/1 result"));
        assert!(
            error(&document("nowait.stall/9", &scenario)).contains("its schema is nowait.stall/9")
        );
        assert!(error("{\"schema\":\"nowait.stall/1\"}").contains("missing field"));
        let other = Scenario { seed: 2, ..scenario.clone() };
        assert!(error(&document("nowait.stall/1", &other)).contains("differing: seed"));
        let more_often = Scenario { rounds: 9, ..scenario.clone() };
        Earlier::parse(&document("nowait.stall/1", &more_often), &now).unwrap();

        let with = |key: &str, value: serde_json::Value| {
            let text = document("nowait.stall/1", &scenario);
            let mut all: serde_json::Value = serde_json::from_str(&text).unwrap();
            match key {
                "command" => all["config"]["command"] = value,
                key => all[key] = value,
            }
            error(&all.to_string())
        };
        assert!(with("command", "make A".into()).contains("measured 'make A', this measures the"));
        assert!(with("host", serde_json::json!({ "accel": "nested" })).contains("with nested"));
        assert!(with("complete", false.into()).contains("it is partial"));
    }

    #[test]
    fn a_command_may_not_take_longer() {
        let estimate = |value| Some(Estimate { value, low: value, high: value });
        let before = ModeSummary { elapsed_us: estimate(1e6), ..mode(Apf::User, 100.0, 0.0) };
        let now = ModeSummary { elapsed_us: estimate(2e6), ..before.clone() };
        let names: Vec<_> = pairs(&before, &now).iter().map(|(name, ..)| *name).collect();
        assert_eq!(names, ["overrun p50 (us)", "overrun p99 (us)", "time (us)", "work/s"]);
        let (_, before, now, more_is_worse) = pairs(&before, &now)[2];
        assert!(is_worse(before, now, more_is_worse, 0.5, 1));
    }

    #[test]
    fn with_enough_rounds_the_interval_decides() {
        let estimate = |low, value, high| Estimate { value, low, high };
        let (before, now) = (estimate(1.0, 100.0, 1000.0), estimate(105.0, 120.0, 130.0));
        assert!(is_worse(before, now, true, 0.1, 4));
        assert!(!is_worse(before, now, true, 0.1, 5));
        assert!(is_worse(before, estimate(111.0, 120.0, 130.0), true, 0.1, 5));
        assert!(is_worse(before, estimate(50.0, 80.0, 89.0), false, 0.1, 5));
        assert!(!is_worse(before, estimate(50.0, 80.0, 91.0), false, 0.1, 5));
    }

    #[test]
    fn tolerances() {
        for wrong in ["10", "%", "-1%", "x%", "5000%", "1e2%"] {
            assert!(wrong.parse::<Tolerance>().is_err(), "{wrong}");
        }
        assert_eq!("2.5%".parse(), Ok(Tolerance(0.025)));
    }
}

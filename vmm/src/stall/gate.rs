//! Gates: expressions that a result must not fulfil (`--fail-if`). Pure.
//!
//! ```text
//!   gate    = side ( "<" | "<=" | ">" | ">=" ) side
//!   side    = number [ "us" | "ms" | "s" | "%" ]  |  [ number "*" ] metric
//!   metric  = mode [ ".idle" ] "." quantity
//!   quantity = ( "overrun" | "stall" | "access" ) "." ( "p50" | "p90" | "p99" | "max" )
//!            | "stall.share" | "pages" | "work"
//! ```
//!
//! A gate is looked at for every number of processors, workload and number of threads under pressure, by the
//! medians over the rounds; `.idle` is the same guest without pressure.

use std::fmt;
use std::str::FromStr;

use nowait_wire::agent::Kind;
use serde::{Deserialize, Serialize};

use super::scenario::Scenario;
use super::summary::{Group, Quantiles};
use crate::kvm::cpuid::Apf;

/// Why an expression was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "'{expression}': {why}; write for example 'user.overrun.p99 > 2ms' or 'user.work < 1.5 * off.work'"
)]
pub struct GateError {
    expression: String,
    why: String,
}

/// One `--fail-if`.
#[derive(Clone, Debug, PartialEq)]
pub struct Gate {
    text: String,
    left: Side,
    comparison: Comparison,
    right: Side,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Comparison {
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Side {
    Literal(f64, Dimension),
    Metric { factor: f64, metric: Metric },
}

/// What a number measures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Dimension {
    /// In microseconds.
    Time,
    /// Of one.
    Share,
    /// Something per second.
    Rate,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Metric {
    apf: Apf,
    idle: bool,
    quantity: Quantity,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Quantity {
    Overrun(Quantile),
    Stall(Quantile),
    Access(Quantile),
    StallShare,
    Pages,
    Work,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Quantile {
    P50,
    P90,
    P99,
    Max,
}

/// What became of a gate.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GateResult {
    /// The gate, as it was given.
    pub gate: String,
    /// Whether it was passed.
    pub passed: bool,
    /// Where it was not: a line each.
    pub failures: Vec<String>,
    /// How many comparisons were made; none is a failure, too.
    pub compared: usize,
}

impl FromStr for Gate {
    type Err = GateError;

    fn from_str(text: &str) -> Result<Self, GateError> {
        let error = |why: String| GateError { expression: text.to_owned(), why };
        let at = text.find(['<', '>']).ok_or_else(|| error("there is no < or > in it".into()))?;
        let (left, rest) = text.split_at(at);
        let or_equal = rest[1..].starts_with('=');
        let comparison = match (&rest[..1], or_equal) {
            ("<", false) => Comparison::Less,
            ("<", true) => Comparison::LessOrEqual,
            (_, false) => Comparison::Greater,
            (_, true) => Comparison::GreaterOrEqual,
        };
        let right = &rest[1 + usize::from(or_equal)..];
        let (left, right) = (side(left).map_err(error)?, side(right).map_err(error)?);
        if left.dimension() != right.dimension() {
            let (left, right) = (left.dimension(), right.dimension());
            return Err(error(format!("it compares {left} with {right}")));
        }
        if let (Side::Literal(..), Side::Literal(..)) = (left, right) {
            return Err(error("neither side is measured".into()));
        }
        Ok(Self { text: text.trim().to_owned(), left, comparison, right })
    }
}

impl fmt::Display for Dimension {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Time => "a time",
            Self::Share => "a share (%)",
            Self::Rate => "a rate (a plain number)",
        })
    }
}

fn side(text: &str) -> Result<Side, String> {
    let text = text.trim();
    if let Some((factor, metric_text)) = text.split_once('*') {
        let factor = number(factor.trim())?;
        return Ok(Side::Metric { factor, metric: metric(metric_text.trim())? });
    }
    if !text.starts_with(|c: char| c.is_ascii_digit()) {
        return Ok(Side::Metric { factor: 1.0, metric: metric(text)? });
    }
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic() || c == '%').trim_end();
    let value = number(digits)?;
    match text[digits.len()..].trim() {
        "us" => Ok(Side::Literal(value, Dimension::Time)),
        "ms" => Ok(Side::Literal(value * 1e3, Dimension::Time)),
        "s" => Ok(Side::Literal(value * 1e6, Dimension::Time)),
        "%" => Ok(Side::Literal(value / 100.0, Dimension::Share)),
        "" => Ok(Side::Literal(value, Dimension::Rate)),
        unit => Err(format!("'{unit}' is not us, ms, s or %")),
    }
}

pub(super) fn number(text: &str) -> Result<f64, String> {
    let plain = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
    text.parse().ok().filter(|_| plain).ok_or_else(|| format!("'{text}' is not a number"))
}

fn metric(text: &str) -> Result<Metric, String> {
    let mut words = text.split('.').map(str::trim).peekable();
    let apf = match words.next().unwrap_or_default() {
        "off" => Apf::Off,
        "host" => Apf::Host,
        "kernel" => Apf::Kernel,
        "user" => Apf::User,
        other => return Err(format!("'{other}' is not off, host, kernel or user")),
    };
    let idle = words.next_if_eq(&"idle").is_some();
    let quantity = words.next().unwrap_or_default();
    let statistic = words.next();
    if words.next().is_some() {
        return Err(format!("'{text}' has too many parts"));
    }
    let quantile = || match statistic {
        Some("p50") => Ok(Quantile::P50),
        Some("p90") => Ok(Quantile::P90),
        Some("p99") => Ok(Quantile::P99),
        Some("max") => Ok(Quantile::Max),
        other => Err(format!("'{}' is not p50, p90, p99 or max", other.unwrap_or_default())),
    };
    let quantity = match (quantity, statistic) {
        ("stall", Some("share")) => Quantity::StallShare,
        ("overrun", _) => Quantity::Overrun(quantile()?),
        ("stall", _) => Quantity::Stall(quantile()?),
        ("access", _) => Quantity::Access(quantile()?),
        ("pages", None) => Quantity::Pages,
        ("work", None) => Quantity::Work,
        (other, _) => {
            let known = "overrun, stall, access, pages or work";
            return Err(format!("'{other}' is not {known}, or has a part too many"));
        }
    };
    Ok(Metric { apf, idle, quantity })
}

impl Side {
    fn dimension(&self) -> Dimension {
        match self {
            Self::Literal(_, dimension) => *dimension,
            Self::Metric { metric, .. } => match metric.quantity {
                Quantity::Overrun(_) | Quantity::Stall(_) | Quantity::Access(_) => Dimension::Time,
                Quantity::StallShare => Dimension::Share,
                Quantity::Pages | Quantity::Work => Dimension::Rate,
            },
        }
    }

    fn metric(&self) -> Option<Metric> {
        match self {
            Self::Literal(..) => None,
            Self::Metric { metric, .. } => Some(*metric),
        }
    }

    fn value(&self, groups: &[Group], of: &Group) -> Option<f64> {
        match self {
            Self::Literal(value, _) => Some(*value),
            Self::Metric { factor, metric } => Some(factor * metric.value(groups, of)?),
        }
    }
}

impl Metric {
    fn value(&self, groups: &[Group], of: &Group) -> Option<f64> {
        let idle = |group: &&Group| group.vcpus == of.vcpus && group.workload == Kind::Idle;
        let group = if self.idle { groups.iter().find(idle)? } else { of };
        let mode = group.modes.iter().find(|mode| mode.apf == self.apf)?;
        let of = |quantiles: &Quantiles, quantile| match quantile {
            Quantile::P50 => quantiles.p50.value,
            Quantile::P90 => quantiles.p90.value,
            Quantile::P99 => quantiles.p99.value,
            Quantile::Max => quantiles.max.value,
        };
        match self.quantity {
            Quantity::Overrun(quantile) => Some(of(&mode.overrun_us, quantile)),
            Quantity::Stall(quantile) => mode.stall_us.as_ref().map(|stall| of(stall, quantile)),
            Quantity::Access(quantile) => {
                mode.access_us.as_ref().map(|access| of(access, quantile))
            }
            Quantity::StallShare => mode.stall_share.map(|share| share.value),
            Quantity::Pages => Some(mode.pages_per_s.value),
            Quantity::Work => mode.units_per_s.map(|units| units.value),
        }
    }

    /// Why the scenario does not measure this, if it does not.
    fn refusal(&self, scenario: &Scenario, command: bool) -> Option<String> {
        let apf = self.apf;
        if !scenario.modes.contains(&apf) {
            return Some(format!("{apf} is none of the scenario's modes"));
        }
        match self.quantity {
            Quantity::Work if scenario.compute_per_cpu == 0 => {
                Some("the scenario has no computing task: set compute_per_cpu".into())
            }
            Quantity::Stall(_) | Quantity::StallShare if matches!(apf, Apf::Host | Apf::Kernel) => {
                Some(format!("with {apf} stalls stay inside KVM: use overrun"))
            }
            Quantity::Access(_) | Quantity::Pages if self.idle => {
                Some("an idle guest touches no pages".into())
            }
            Quantity::Access(_) | Quantity::Pages if command => {
                Some("a command's touches of pages are not seen".into())
            }
            _ => None,
        }
    }
}

impl Gate {
    /// Whether the scenario measures what the gate is about.
    ///
    /// # Errors
    /// When it does not.
    pub(super) fn check(&self, scenario: &Scenario, command: bool) -> Result<(), GateError> {
        let metrics = [self.left, self.right].into_iter().filter_map(|side| side.metric());
        match metrics.into_iter().find_map(|metric| metric.refusal(scenario, command)) {
            None => Ok(()),
            Some(why) => Err(GateError { expression: self.text.clone(), why }),
        }
    }

    /// Looks at all groups under pressure.
    pub(super) fn judge(&self, groups: &[Group]) -> GateResult {
        let mut result =
            GateResult { gate: self.text.clone(), passed: true, failures: Vec::new(), compared: 0 };
        for group in groups.iter().filter(|group| group.workload != Kind::Idle) {
            let sides = (self.left.value(groups, group), self.right.value(groups, group));
            let (Some(left), Some(right)) = sides else { continue };
            result.compared += 1;
            let holds = match self.comparison {
                Comparison::Less => left < right,
                Comparison::LessOrEqual => left <= right,
                Comparison::Greater => left > right,
                Comparison::GreaterOrEqual => left >= right,
            };
            if holds {
                let show = |value: f64| show(value, self.left.dimension());
                let (left, right) = (show(left), show(right));
                result.failures.push(format!("{}: {left} against {right}", group.name()));
            }
        }
        if result.compared == 0 {
            result.failures.push("nothing of it was measured".into());
        }
        result.passed = result.failures.is_empty();
        result
    }
}

fn show(value: f64, dimension: Dimension) -> String {
    match dimension {
        Dimension::Time if value >= 1000.0 => format!("{:.2} ms", value / 1000.0),
        Dimension::Time => format!("{value:.0} us"),
        Dimension::Share => format!("{:.2} %", value * 100.0),
        Dimension::Rate => format!("{value:.1}/s"),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::summary::tests::{group, mode};
    use super::*;
    use proptest::prelude::*;

    fn gate(text: &str) -> Gate {
        text.parse().unwrap_or_else(|error| panic!("{error}"))
    }

    pub(in crate::stall) fn groups() -> Vec<Group> {
        vec![
            group(Kind::Idle, vec![mode(Apf::Off, 100.0, 0.0), mode(Apf::User, 100.0, 0.0)]),
            group(Kind::User, vec![mode(Apf::Off, 20_000.0, 50.0), mode(Apf::User, 250.0, 100.0)]),
        ]
    }

    #[test]
    fn gates_hold_or_fail_by_the_medians() {
        for (text, fails) in [
            ("user.overrun.p99 > 2ms", true),
            ("user.overrun.p99 > 2500us", false),
            ("user.overrun.p99>=2500us", true),
            ("user.overrun.p50 > 3 * user.idle.overrun.p50", false),
            ("off.overrun.p50 > 3*user.idle.overrun.p50", true),
            ("user.pages < 1.5 * off.pages", false),
            ("user.pages < 2.5 * off.pages", true),
            ("user.work <= 3 * off.work", true),
            ("0.1s < off.overrun.max", true),
            ("user.stall.share > 5%", true),
            ("user.access.p90 > 1s", false),
        ] {
            let result = gate(text).judge(&groups());
            assert_eq!((result.passed, result.compared), (!fails, 1), "{text}: {result:?}");
        }
        let result = gate("user.overrun.p99 > 2ms").judge(&groups());
        assert_eq!(result.failures, ["2 vCPUs, user, 8 threads: 2.50 ms against 2.00 ms"]);
        let result = gate("kernel.pages < 1").judge(&groups());
        assert!(!result.passed && result.compared == 0);
    }

    #[test]
    fn what_does_not_parse_says_why() {
        for (text, why) in [
            ("", "no < or >"),
            ("user.overrun.p99", "no < or >"),
            ("user.overrun.p99 > ", "'' is not off"),
            ("user.overrun.p99 > 2", "it compares a time with a rate"),
            ("user.overrun.p99 > 2h", "'h' is not us"),
            ("user.overrun.p98 > 2ms", "'p98' is not p50"),
            ("user.overrun > 2ms", "'' is not p50"),
            ("user.speed > 2", "'speed' is not overrun"),
            ("fast.pages > 2", "'fast' is not off"),
            ("user.pages.p50 > 2", "'pages' is not"),
            ("user.pages > x * off.pages", "'x' is not a number"),
            ("user.pages > 2 * 3", "'3' is not off"),
            ("1 > 2", "neither side"),
            ("user.pages > 1e3 * off.pages", "'1e3' is not a number"),
            ("user.overrun.p99.x > 2ms", "too many parts"),
            ("user.stall.share > 5ms", "it compares a share (%) with a time"),
        ] {
            let error = text.parse::<Gate>().unwrap_err().to_string();
            assert!(error.contains(why), "{text}: {error}");
        }
    }

    #[test]
    fn what_the_scenario_does_not_measure_is_refused() {
        let scenario = |text: &str| Scenario::parse("s", &format!("name = \"x\"\n{text}")).unwrap();
        let refused = |text: &str, scenario: &Scenario, command| {
            gate(text).check(scenario, command).unwrap_err().to_string()
        };
        let plain = scenario("modes = [\"off\", \"kernel\"]");
        assert!(refused("user.pages < 1", &plain, false).contains("none of the scenario's modes"));
        assert!(refused("off.work < 1", &plain, false).contains("compute_per_cpu"));
        assert!(refused("kernel.stall.p99 > 1ms", &plain, false).contains("inside KVM"));
        assert!(refused("off.pages < 1", &plain, true).contains("command"));
        assert!(refused("off.pages < 0.5 * off.idle.pages", &plain, false).contains("idle guest"));
        assert!(refused("off.idle.access.p99 > 1ms", &plain, false).contains("idle guest"));
        gate("off.stall.p99 > 1ms").check(&plain, false).unwrap();
        gate("off.work < 1").check(&scenario("compute_per_cpu = 1"), false).unwrap();
    }

    proptest! {
        #[test]
        fn any_text_is_a_gate_or_an_error(text in "\\PC{0,40}", metric in "(user|off)\\.[a-z.0-9]{0,12}") {
            let _ = text.parse::<Gate>();
            let _ = format!("{metric} > {text}").parse::<Gate>();
        }
    }
}

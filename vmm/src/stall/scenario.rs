//! Scenarios: what `nowait stall` measures, as plain TOML files. Pure: text in, a checked scenario out.
//!
//! ```text
//!   preset or file --+--> Scenario --> options of the command line --> check --> Plan
//! ```

use std::ops::RangeInclusive;
use std::time::Duration;

use guest_memory::{MIN_RESIDENT_LIMIT_BYTES, PAGE_SIZE, StoreSpec};
use nowait_wire::agent::Access;
use serde::{Deserialize, Serialize};

use crate::kvm::cpuid::Apf;
use crate::size;
use crate::spec::memory_bytes;

/// The presets: name and text.
pub const PRESETS: [(&str, &str); 5] = [
    ("quick", include_str!("../../scenarios/quick.toml")),
    ("overcommit", include_str!("../../scenarios/overcommit.toml")),
    ("snapshot-like", include_str!("../../scenarios/snapshot-like.toml")),
    ("mixed", include_str!("../../scenarios/mixed.toml")),
    ("worst", include_str!("../../scenarios/worst.toml")),
];

/// Heartbeats in a run, at least: with none it would have no overrun.
const LEAST_HEARTBEATS: u32 = 10;
/// The shortest and the longest run.
const DURATION: RangeInclusive<Duration> = Duration::from_millis(10)..=Duration::from_secs(600);
/// The largest number of pages that the guest agent takes.
pub(super) const MAX_PAGES: u64 = 65_536;
/// What a guest needs beside the buffer.
const RESERVE_BYTES: u64 = 32 << 20;

/// What is measured. Times are a number with `us`, `ms` or `s`; sizes one with `K`, `M` or `G`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scenario {
    /// Its name.
    pub name: String,
    /// What it is for, in a sentence.
    #[serde(default)]
    pub about: String,
    /// Numbers of processors; a guest for each.
    #[serde(default = "one_cpu")]
    pub cpus: Vec<u32>,
    /// Guest RAM.
    #[serde(default = "memory")]
    pub memory: String,
    /// How much of guest RAM may be in memory: a size, or a share of it (`25%`). Without it the guest has
    /// its buffer evicted before each run, and touches each page once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resident_limit: Option<String>,
    /// Where evicted pages go.
    #[serde(default = "store")]
    pub store: String,
    /// Whether neighbours that were evicted together are fetched ahead.
    #[serde(default = "yes")]
    pub prefetch: bool,
    /// Who handles async page faults, side by side.
    #[serde(default = "modes")]
    pub modes: Vec<Apf>,
    /// The mode that the others are compared with; the first one by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub baseline: Option<Apf>,
    /// How often each mode has its turn.
    #[serde(default = "one")]
    pub rounds: u32,
    /// How pages are touched.
    #[serde(default = "via")]
    pub via: Vec<Via>,
    /// Numbers of threads that touch pages.
    #[serde(default = "threads")]
    pub threads: Vec<u32>,
    /// Which pages they touch how often, under a resident limit.
    #[serde(default = "access")]
    pub access: Access,
    /// How many of 100 touches from user mode write.
    #[serde(default)]
    pub write_percent: u8,
    /// Computing tasks beside them, for each processor.
    #[serde(default)]
    pub compute_per_cpu: u32,
    /// The pages that the threads share: a size, or a share of the limit (`150%`).
    #[serde(default = "buffer")]
    pub buffer: String,
    /// How many of 100 of these pages compress well.
    #[serde(default = "half")]
    pub compressible_percent: u8,
    /// How long each run lasts.
    #[serde(default = "duration")]
    pub duration: String,
    /// How long its threads run before that, unmeasured.
    #[serde(default = "zero_time")]
    pub warm_up: String,
    /// The heartbeat's period.
    #[serde(default = "heartbeat")]
    pub heartbeat: String,
    /// Seeds the order of the touches.
    #[serde(default = "seed")]
    pub seed: u64,
}

/// How pages are touched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Via {
    /// By instructions in user mode.
    User,
    /// By the guest's kernel: `read(2)` into them (`copy_to_user`).
    Copy,
}

fn one_cpu() -> Vec<u32> {
    vec![1]
}
fn memory() -> String {
    "128M".into()
}
fn store() -> String {
    "delay=20ms".into()
}
fn yes() -> bool {
    true
}
fn modes() -> Vec<Apf> {
    vec![Apf::Off, Apf::Host, Apf::Kernel, Apf::User]
}
fn one() -> u32 {
    1
}
fn via() -> Vec<Via> {
    vec![Via::User, Via::Copy]
}
fn threads() -> Vec<u32> {
    vec![1, 8]
}
fn access() -> Access {
    Access::Random
}
fn buffer() -> String {
    "150%".into()
}
fn half() -> u8 {
    50
}
fn duration() -> String {
    "2s".into()
}
fn zero_time() -> String {
    "0s".into()
}
fn heartbeat() -> String {
    "1ms".into()
}
fn seed() -> u64 {
    1
}

/// Why a scenario was refused: one line, with the line and the key of the file where there are some.
#[derive(Debug, thiserror::Error)]
pub enum ScenarioError {
    /// Not TOML, or not of a scenario's form.
    #[error("--scenario: {place}: {message}")]
    Malformed {
        /// File, or preset, and line.
        place: String,
        /// What is wrong.
        message: String,
    },
    /// A value that cannot be.
    #[error("--scenario: {key}: {message}")]
    Value {
        /// The key.
        key: &'static str,
        /// What is wrong, and what to do.
        message: String,
    },
    /// A value of the command line that cannot be.
    #[error("{option}: {message}")]
    Option {
        /// The option.
        option: &'static str,
        /// What is wrong, and what to do.
        message: String,
    },
    /// The file cannot be read.
    #[error("--scenario: cannot read the scenario '{name}': {source}; the presets are {presets}")]
    Unreadable {
        /// What was named.
        name: String,
        /// Their names.
        presets: String,
        /// Why.
        source: crate::operand::OperandError,
    },
}

impl ScenarioError {
    fn value(key: &'static str, message: impl Into<String>) -> Self {
        Self::Value { key, message: message.into() }
    }

    /// The same with the option that the value came from, if it came from one; `changes` are the keys that
    /// options changed, each with its option and the value.
    pub(super) fn by_option(self, changes: &[(&str, &'static str, String)]) -> Self {
        let Self::Value { key, message } = self else { return self };
        let with = |others: Vec<String>| match others.is_empty() {
            true => message.clone(),
            false => format!("{message} (with {})", others.join(" ")),
        };
        let all = |not: &str| {
            let others = changes.iter().filter(|(key, ..)| *key != not);
            others.map(|(_, option, value)| format!("{option} {value}")).collect()
        };
        match changes.iter().find(|(changed, ..)| *changed == key) {
            Some((_, option, _)) => Self::Option { option, message },
            None => Self::Value { key, message: with(all(key)) },
        }
    }

    /// The same with the place where `text` has the key, if it has.
    pub(super) fn at(self, file: &str, text: &str) -> Self {
        let Self::Value { key, message } = &self else { return self };
        let has_key = |line: &str| {
            let rest = line.trim_start().strip_prefix(*key);
            rest.is_some_and(|rest| rest.trim_start().starts_with('='))
        };
        match text.lines().position(has_key) {
            None => self,
            Some(index) => Self::Malformed {
                place: format!("{file}, line {}", index + 1),
                message: format!("{key}: {message}"),
            },
        }
    }
}

/// A scenario whose values have been checked and computed.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Checked {
    pub(super) memory_bytes: u64,
    pub(super) limit_bytes: Option<u64>,
    pub(super) store: StoreSpec,
    pub(super) baseline: Apf,
    pub(super) duration: Duration,
    pub(super) warm_up: Duration,
    pub(super) heartbeat_us: u32,
    /// The buffer under a limit.
    pub(super) pages: Option<u32>,
}

impl Scenario {
    /// Reads one; `file` is how to call it.
    ///
    /// # Errors
    /// [`ScenarioError::Malformed`], with line and key.
    pub fn parse(file: &str, text: &str) -> Result<Self, ScenarioError> {
        toml::from_str(text).map_err(|error| {
            let line = error.span().map(|span| 1 + text[..span.start].matches('\n').count());
            let line_text = line.and_then(|line| text.lines().nth(line - 1)).unwrap_or_default();
            let key = line_text.split_once('=').map(|(key, _)| key.trim());
            let mut message = error.message().split_whitespace().collect::<Vec<_>>().join(" ");
            if let Some(key) = key
                && !message.contains(key)
            {
                message = format!("{key}: {message}");
            }
            let place = line.map_or(file.to_owned(), |line| format!("{file}, line {line}"));
            ScenarioError::Malformed { place, message }
        })
    }

    /// The preset of this name.
    #[must_use]
    pub fn preset(name: &str) -> Option<&'static str> {
        PRESETS.iter().find(|(preset, _)| *preset == name).map(|(_, text)| *text)
    }

    /// Checks everything that can be told without a host.
    ///
    /// # Errors
    /// [`ScenarioError::Value`].
    pub(super) fn check(&self) -> Result<Checked, ScenarioError> {
        fn value(key: &'static str, message: impl Into<String>) -> ScenarioError {
            ScenarioError::value(key, message)
        }
        fn twice<T: PartialEq + std::fmt::Display>(
            key: &'static str,
            values: &[T],
        ) -> Result<(), ScenarioError> {
            let again =
                values.iter().enumerate().find(|(index, value)| values[..*index].contains(value));
            again.map_or(Ok(()), |(_, value)| {
                Err(ScenarioError::value(key, format!("{value} is named twice")))
            })
        }
        let each = |key, values: &[u32], range: RangeInclusive<u32>| {
            twice(key, values)?;
            let wrong = values.iter().find(|value| !range.contains(value));
            match (values.is_empty(), wrong) {
                (true, _) => Err(value(key, "give at least one")),
                (_, Some(wrong)) => {
                    let (start, end) = (range.start(), range.end());
                    Err(value(key, format!("{wrong} is not in {start} to {end}")))
                }
                _ => Ok(()),
            }
        };
        let max_cpus = u32::try_from(crate::spec::MAX_CPUS).unwrap_or(u32::MAX);
        each("cpus", &self.cpus, 1..=max_cpus)?;
        each("threads", &self.threads, 1..=64)?;
        each("rounds", &[self.rounds], 1..=99)?;
        each("compute_per_cpu", &[self.compute_per_cpu], 0..=8)?;
        each("write_percent", &[self.write_percent.into()], 0..=100)?;
        each("compressible_percent", &[self.compressible_percent.into()], 0..=100)?;
        if self.modes.is_empty() {
            return Err(value("modes", "give at least one of off, host, kernel, user"));
        }
        twice("modes", &self.modes)?;
        if self.via.is_empty() {
            return Err(value("via", "give at least one of user, copy"));
        }
        let baseline = self.baseline.unwrap_or(self.modes[0]);
        if !self.modes.contains(&baseline) {
            return Err(value("baseline", format!("{baseline} is none of the modes")));
        }
        let memory_bytes =
            memory_bytes(&self.memory).map_err(|error| value("memory", error.to_string()))?;
        let store: StoreSpec =
            self.store.parse().map_err(|error| value("store", format!("{error}")))?;
        let limit_bytes = self
            .resident_limit
            .as_deref()
            .map(|limit| share_or_size(limit, memory_bytes))
            .transpose()
            .map_err(|message| value("resident_limit", message))?;
        if let Some(limit) = limit_bytes {
            let show = |bytes: u64| size::show(bytes);
            if limit > memory_bytes {
                return Err(value(
                    "resident_limit",
                    format!(
                        "{} is more than the guest has ({}): nothing would ever leave memory",
                        show(limit),
                        show(memory_bytes)
                    ),
                ));
            }
            if limit < MIN_RESIDENT_LIMIT_BYTES {
                let least = show(MIN_RESIDENT_LIMIT_BYTES);
                return Err(value("resident_limit", format!("give at least {least}")));
            }
        }
        let time = |key, text: &str, range: RangeInclusive<Duration>| {
            parse_time(text).filter(|time| range.contains(time)).ok_or_else(|| {
                let (start, end) = (range.start(), range.end());
                value(key, format!("'{text}' is not a time from {start:?} to {end:?}"))
            })
        };
        let duration = time("duration", &self.duration, DURATION)?;
        let warm_up = time("warm_up", &self.warm_up, Duration::ZERO..=*DURATION.end())?;
        let beat = Duration::from_micros(100)..=Duration::from_secs(1);
        let heartbeat = time("heartbeat", &self.heartbeat, beat)?;
        if heartbeat * LEAST_HEARTBEATS > duration {
            let least = format!("at least {LEAST_HEARTBEATS} of them have to fit in a duration");
            return Err(value("heartbeat", format!("{heartbeat:?} in {duration:?}: {least}")));
        }
        if limit_bytes.is_none() {
            let only = |key, asked: bool| match asked {
                true => Err(value(key, "it needs a resident_limit")),
                false => Ok(()),
            };
            only("warm_up", !warm_up.is_zero())?;
            only("write_percent", self.write_percent > 0)?;
            only("access", self.access != Access::Random)?;
        }
        if self.write_percent > 0 && !self.via.contains(&Via::User) {
            return Err(value("write_percent", "it is for touches from user mode (via)"));
        }
        let pages = limit_bytes.map(|limit| self.pages(limit, memory_bytes)).transpose()?;
        let heartbeat_us = heartbeat.as_micros() as u32;
        Ok(Checked {
            memory_bytes,
            limit_bytes,
            store,
            baseline,
            duration,
            warm_up,
            heartbeat_us,
            pages,
        })
    }

    /// Pages of the buffer under a limit.
    fn pages(&self, limit_bytes: u64, memory_bytes: u64) -> Result<u32, ScenarioError> {
        let value = |message: String| ScenarioError::value("buffer", message);
        let bytes = share_or_size(&self.buffer, limit_bytes).map_err(value)?;
        if bytes.saturating_add(RESERVE_BYTES) > memory_bytes {
            return Err(value(format!(
                "{} and {} for the guest itself are more than it has ({})",
                size::show(bytes),
                size::show(RESERVE_BYTES),
                size::show(memory_bytes)
            )));
        }
        let pages = bytes / PAGE_SIZE as u64;
        match u32::try_from(pages) {
            Ok(pages @ 1..) if u64::from(pages) <= MAX_PAGES => Ok(pages),
            _ => Err(value(format!("{pages} pages are not in 1 to {MAX_PAGES}"))),
        }
    }
}

/// A size, or a share of `whole`.
fn share_or_size(text: &str, whole: u64) -> Result<u64, String> {
    match text.strip_suffix('%') {
        None => size::parse(text).map_err(|error| error.to_string()),
        Some(percent) => {
            let percent: u64 = percent
                .parse()
                .ok()
                .filter(|percent| (1..=10_000).contains(percent))
                .ok_or_else(|| format!("'{text}' is not a share from 1% to 10000%"))?;
            let pages = whole / PAGE_SIZE as u64;
            Ok(pages.saturating_mul(percent) / 100 * PAGE_SIZE as u64)
        }
    }
}

/// A time: a number with `us`, `ms` or `s`.
pub(super) fn parse_time(text: &str) -> Option<Duration> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let unit_us = match unit {
        "us" => 1,
        "ms" => 1000,
        "s" => 1_000_000,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(unit_us).map(Duration::from_micros)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(text: &str) -> Result<Scenario, ScenarioError> {
        Scenario::parse("s.toml", &format!("name = \"x\"\n{text}"))
    }

    fn refusal(text: &str) -> String {
        let text = format!("name = \"x\"\n{text}");
        match Scenario::parse("s.toml", &text) {
            Err(error) => error.to_string(),
            Ok(scenario) => scenario.check().unwrap_err().at("s.toml", &text).to_string(),
        }
    }

    #[test]
    fn every_preset_is_right_and_has_its_name() {
        for (name, text) in PRESETS {
            let scenario = Scenario::parse(name, text).unwrap();
            assert_eq!(scenario.name, name);
            assert!(!scenario.about.is_empty(), "{name}");
            scenario.check().unwrap_or_else(|error| panic!("{name}: {error}"));
            // It comes back as it was from what is written into the result.
            let json = serde_json::to_string(&scenario).unwrap();
            assert_eq!(serde_json::from_str::<Scenario>(&json).unwrap(), scenario);
        }
    }

    #[test]
    fn shares_and_sizes() {
        let scenario =
            parse("memory = \"200M\"\nresident_limit = \"25%\"\nbuffer = \"150%\"").unwrap();
        let checked = scenario.check().unwrap();
        assert_eq!(checked.limit_bytes, Some(50 << 20));
        assert_eq!(checked.pages, Some(75 * 256));
        let scenario = parse("resident_limit = \"64M\"\nbuffer = \"8M\"").unwrap();
        assert_eq!(scenario.check().unwrap().pages, Some(2048));
        assert_eq!(parse_time("1500us"), Some(Duration::from_micros(1500)));
        for wrong in ["", "1", "s", "1m", "-1s", "1 s", "99999999999999999999s", "1.5s"] {
            assert_eq!(parse_time(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn what_is_wrong_is_named_with_line_and_key() {
        for (text, expected) in [
            ("cpus = [", "s.toml, line 2: "),
            ("\ncolour = 1", "s.toml, line 3: unknown field `colour`"),
            ("cpus = \"two\"", "s.toml, line 2: cpus: invalid type"),
            (
                "modes = [\"off\", \"fast\"]",
                "s.toml, line 2: modes: unknown variant `fast`, expected one of `off`, `host`, `kernel`, `user`",
            ),
            ("seed = 2\ncpus = [33]", "s.toml, line 3: cpus: 33 is not in 1 to 32"),
            ("cpus = []", "s.toml, line 2: cpus: give at least one"),
            ("threads = [0]", "line 2: threads: 0 is not in 1 to 64"),
            ("rounds = 0", "line 2: rounds: 0"),
            ("modes = []", "line 2: modes: give"),
            ("cpus = [1, 2, 1]", "line 2: cpus: 1 is named twice"),
            ("modes = [\"off\", \"off\"]", "line 2: modes: off is named twice"),
            (
                "modes = [\"off\"]\nbaseline = \"user\"",
                "line 3: baseline: user is none of the modes",
            ),
            ("memory = \"lots\"", "line 2: memory: 'lots' is not a size"),
            ("memory = \"0\"", "line 2: memory: 0: a guest needs at least"),
            ("store = \"disk\"", "line 2: store: "),
            (
                "resident_limit = \"256M\"",
                "line 2: resident_limit: 256 MiB is more than the guest has (128 MiB)",
            ),
            ("resident_limit = \"1M\"", "line 2: resident_limit: give at least 4 MiB"),
            ("resident_limit = \"0%\"", "line 2: resident_limit: '0%' is not a share"),
            (
                "resident_limit = \"40M\"\nbuffer = \"120M\"",
                "line 3: buffer: 120 MiB and 32 MiB for the guest itself are more",
            ),
            ("duration = \"2\"", "line 2: duration: '2' is not a time from 10ms to 600s"),
            ("duration = \"1h\"", "line 2: duration"),
            ("heartbeat = \"1us\"", "line 2: heartbeat"),
            ("heartbeat = \"1s\"\nduration = \"5s\"", "line 2: heartbeat: 1s in"),
            ("warm_up = \"1s\"", "line 2: warm_up: it needs a resident_limit"),
            ("access = \"zipf\"", "line 2: access: it needs a resident_limit"),
            ("access = \"backwards\"", "line 2: access: unknown variant `backwards`"),
            (
                "resident_limit = \"40M\"\nvia = [\"copy\"]\nwrite_percent = 10",
                "line 4: write_percent",
            ),
            ("write_percent = 300", "line 2: write_percent"),
        ] {
            let said = refusal(text);
            assert!(said.contains(expected), "{text}: {said}");
            assert!(!said.contains('\n'), "{said}");
        }
        let nameless = Scenario::parse("s.toml", "cpus = [1]").unwrap_err().to_string();
        assert!(nameless.contains("missing field `name`"), "{nameless}");
    }

    proptest! {
        #[test]
        fn any_text_is_a_scenario_or_an_error_of_one_line(text in "\\PC*", line in 0..3_usize) {
            let text = format!("{}name = \"x\"\ncpus = [1]\n{text}", "\n".repeat(line));
            if let Err(error) = Scenario::parse("s", &text) {
                prop_assert!(!error.to_string().contains('\n'));
            }
        }
    }
}

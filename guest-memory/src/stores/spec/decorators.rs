//! `delay=…` and `fail=…`.

use std::fmt;
use std::time::Duration;

use super::parse::StoreSpecError;
use super::text::{self, BadTime, Time};

/// The longest delay, so that nobody waits for a guest that only seems to hang.
pub const MAX_DELAY: Duration = Duration::from_secs(60);
/// The widest lognormal distribution, in thousandths.
const MAX_SIGMA_MILLI: u32 = 5_000;

/// How much slower reads and writes get.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DelaySpec {
    /// Added to second-pass reads.
    pub read: Distribution,
    /// Added to writes.
    pub write: Option<Distribution>,
    /// Where the random numbers begin.
    pub seed: u64,
}

/// Times, whole microseconds up to [`MAX_DELAY`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Distribution {
    /// Always the same.
    Fixed(Duration),
    /// Evenly between two times.
    Uniform {
        /// The shortest.
        from: Duration,
        /// The longest.
        to: Duration,
    },
    /// Mostly around the median, now and then very long.
    Lognormal {
        /// Half of the times are shorter.
        median: Duration,
        /// The width: the standard deviation of the logarithm, in thousandths.
        sigma_milli: u32,
    },
}

impl DelaySpec {
    /// Reads last longer by the same time, writes do not.
    #[must_use]
    pub const fn fixed(delay: Duration) -> Self {
        Self { read: Distribution::Fixed(delay), write: None, seed: 0 }
    }

    /// What stands behind `delay=`.
    pub(super) fn parse(given: &str) -> Result<Self, StoreSpecError> {
        let mut parts = given.split(',').peekable();
        let read = distribution(parts.next().unwrap_or_default(), &mut parts)?;
        let mut delay = Self { read, write: None, seed: 0 };
        while let Some(part) = parts.next() {
            match part.split_once('=') {
                Some(("write", times)) if delay.write.is_none() => {
                    delay.write = Some(distribution(times, &mut parts)?);
                }
                Some(("seed", seed)) => delay.seed = parse_seed(seed)?,
                _ => return Err(StoreSpecError::Option { layer: "delay", given: part.to_owned() }),
            }
        }
        Ok(delay)
    }
}

impl Distribution {
    /// The average. Of a lognormal one that is longer than its median.
    #[must_use]
    pub fn mean(&self) -> Duration {
        match *self {
            Self::Fixed(delay) => delay,
            Self::Uniform { from, to } => (from + to) / 2,
            Self::Lognormal { median, sigma_milli } => {
                let sigma = f64::from(sigma_milli) / 1000.0;
                let mean = median.as_secs_f64() * (sigma * sigma / 2.0).exp();
                Duration::from_secs_f64(mean.min(MAX_DELAY.as_secs_f64()))
            }
        }
    }
}

/// Times at the beginning of a list; `sigma=` is an element of its own behind `lognormal:`.
fn distribution<'a>(
    given: &str,
    rest: &mut impl Iterator<Item = &'a str>,
) -> Result<Distribution, StoreSpecError> {
    let malformed = || StoreSpecError::Distribution(given.to_owned());
    match given.split_once(':') {
        None => Ok(Distribution::Fixed(time(given)?)),
        Some(("uniform", range)) => {
            let (from, to) = range.split_once("..").ok_or_else(malformed)?;
            let (from, to) = (time(from)?, time(to)?);
            if from > to {
                return Err(malformed());
            }
            Ok(Distribution::Uniform { from, to })
        }
        Some(("lognormal", median)) => {
            let median = time(median.strip_prefix("median=").ok_or_else(malformed)?)?;
            let sigma = rest.next().and_then(|part| part.strip_prefix("sigma="));
            let sigma_milli = sigma
                .and_then(|sigma| text::decimal(sigma, 3))
                .filter(|sigma| *sigma <= MAX_SIGMA_MILLI)
                .ok_or_else(malformed)?;
            Ok(Distribution::Lognormal { median, sigma_milli })
        }
        Some(_) => Err(malformed()),
    }
}

fn time(given: &str) -> Result<Duration, StoreSpecError> {
    text::time(given, MAX_DELAY).map_err(|error| match error {
        BadTime::Malformed => StoreSpecError::Duration(given.to_owned()),
        BadTime::TooLong => StoreSpecError::TooLong(given.to_owned()),
    })
}

fn parse_seed(given: &str) -> Result<u64, StoreSpecError> {
    text::number(given).ok_or_else(|| StoreSpecError::Seed(given.to_owned()))
}

/// Shows `,seed=N` unless it is 0.
fn show_seed(f: &mut fmt::Formatter<'_>, seed: u64) -> fmt::Result {
    if seed == 0 { Ok(()) } else { write!(f, ",seed={seed}") }
}

impl fmt::Display for DelaySpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "delay={}", self.read)?;
        if let Some(write) = self.write {
            write!(f, ",write={write}")?;
        }
        show_seed(f, self.seed)
    }
}

impl fmt::Display for Distribution {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Fixed(delay) => Time(delay).fmt(f),
            Self::Uniform { from, to } => write!(f, "uniform:{}..{}", Time(from), Time(to)),
            Self::Lognormal { median, sigma_milli } => {
                let sigma = text::show_decimal(sigma_milli, 3);
                write!(f, "lognormal:median={},sigma={sigma}", Time(median))
            }
        }
    }
}

/// Which operations fail, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FailSpec {
    /// Reads or writes.
    pub operation: Operation,
    /// Which of them.
    pub when: FailWhen,
    /// How they fail.
    pub kind: FailKind,
    /// Where the random numbers begin.
    pub seed: u64,
}

/// What a store is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Operation {
    /// A page back.
    Read,
    /// To keep a page.
    Write,
}

/// Which operations fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FailWhen {
    /// This one and no other, counted from 1.
    Nth(u64),
    /// Each with this chance.
    Rate {
        /// How many of a million.
        millionths: u32,
    },
}

/// How an operation fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FailKind {
    /// The medium does not answer.
    Transient,
    /// A write finds no room.
    Full,
    /// A read finds the page gone.
    Lost,
    /// A read succeeds with one bit that is wrong.
    Corrupt,
}

const KINDS: [(&str, FailKind); 4] = [
    ("transient", FailKind::Transient),
    ("full", FailKind::Full),
    ("lost", FailKind::Lost),
    ("corrupt", FailKind::Corrupt),
];

impl FailSpec {
    /// What stands behind `fail=`.
    pub(super) fn parse(given: &str) -> Result<Self, StoreSpecError> {
        let malformed = || StoreSpecError::Fail(given.to_owned());
        let mut parts = given.split(',');
        let rule = parts.next().and_then(|rule| rule.split_once(':'));
        let (operation, when) = rule.ok_or_else(malformed)?;
        let operation = match operation {
            "read" => Operation::Read,
            "write" => Operation::Write,
            _ => return Err(malformed()),
        };
        let when = parse_when(when).ok_or_else(malformed)?;
        let mut fail = Self { operation, when, kind: FailKind::Transient, seed: 0 };
        for part in parts {
            match part.split_once('=') {
                Some(("kind", name)) => {
                    let kind = KINDS.iter().find(|(known, _)| *known == name);
                    fail.kind = kind.ok_or_else(malformed)?.1;
                }
                Some(("seed", seed)) => fail.seed = parse_seed(seed)?,
                _ => return Err(StoreSpecError::Option { layer: "fail", given: part.to_owned() }),
            }
        }
        let fits = match fail.kind {
            FailKind::Transient => true,
            FailKind::Full => operation == Operation::Write,
            FailKind::Lost | FailKind::Corrupt => operation == Operation::Read,
        };
        if fits { Ok(fail) } else { Err(malformed()) }
    }
}

fn parse_when(given: &str) -> Option<FailWhen> {
    match given.split_once('=')? {
        ("nth", nth) => text::number(nth).filter(|nth| *nth > 0).map(FailWhen::Nth),
        ("rate", rate) => {
            let millionths = text::decimal(rate, 6).filter(|rate| *rate <= 1_000_000)?;
            Some(FailWhen::Rate { millionths })
        }
        _ => None,
    }
}

impl fmt::Display for FailSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let operation = match self.operation {
            Operation::Read => "read",
            Operation::Write => "write",
        };
        match self.when {
            FailWhen::Nth(nth) => write!(f, "fail={operation}:nth={nth}")?,
            FailWhen::Rate { millionths } => {
                write!(f, "fail={operation}:rate={}", text::show_decimal(millionths, 6))?;
            }
        }
        for (name, kind) in KINDS {
            if kind == self.kind && kind != FailKind::Transient {
                write!(f, ",kind={name}")?;
            }
        }
        show_seed(f, self.seed)
    }
}

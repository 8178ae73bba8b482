//! From which expected latency on a guest is told of a page: what telling it costs on this host.

use std::str::FromStr;
use std::time::Duration;

use guest_memory::StoreSpec;

use crate::probe;

/// What telling the guest costs beyond waiting, in exits to this process: the injection, ACK, and what the
/// guest does for two switches of tasks and an interrupt. `cargo xtask bench apf` measures the parts.
const EXITS: u32 = 8;
/// Used where an exit cannot be measured: on hardware an exit takes 1 to 2 us.
const FALLBACK: Duration = Duration::from_micros(16);
/// Used where no store is slow: everything is waited for.
const UNMEASURED: Duration = Duration::from_millis(1);
/// The largest threshold that can be given.
const MAX: Duration = Duration::from_secs(3600);

/// `--apf-threshold`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Threshold {
    /// Measured on this host.
    Auto,
    /// As given.
    Fixed(Duration),
}

/// A threshold in use.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Measured {
    /// A page that is expected sooner is waited for.
    pub(crate) threshold: Duration,
    /// What one exit takes, if that was measured.
    pub(crate) exit: Option<Duration>,
}

impl Threshold {
    /// The threshold for pages of `store`. With `Auto` this runs a guest of a few instructions for some
    /// milliseconds, unless the store is host memory.
    pub(crate) fn measure(self, store: &StoreSpec) -> Measured {
        match self {
            Self::Fixed(threshold) => Measured { threshold, exit: None },
            Self::Auto if *store == StoreSpec::default() => {
                Measured { threshold: UNMEASURED, exit: None }
            }
            Self::Auto => {
                let exit = probe::exit_cost();
                Measured { threshold: exit.map_or(FALLBACK, |cost| cost * EXITS), exit }
            }
        }
    }
}

/// Why a text is no threshold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("give \"auto\", or a whole number with us, ms or s, such as 50us")]
pub struct BadThreshold;

impl FromStr for Threshold {
    type Err = BadThreshold;

    fn from_str(text: &str) -> Result<Self, BadThreshold> {
        if text == "auto" {
            return Ok(Self::Auto);
        }
        let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let unit_us = match &text[digits.len()..] {
            "us" => 1,
            "ms" => 1000,
            "s" => 1_000_000,
            _ => return Err(BadThreshold),
        };
        let number =
            digits.bytes().all(|byte| byte.is_ascii_digit()).then(|| digits.parse::<u64>());
        let us = number.and_then(Result::ok).and_then(|number| number.checked_mul(unit_us));
        let threshold = us.map(Duration::from_micros).filter(|threshold| *threshold <= MAX);
        threshold.map(Self::Fixed).ok_or(BadThreshold)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thresholds_are_auto_or_a_time() {
        let fixed = |us| Ok(Threshold::Fixed(Duration::from_micros(us)));
        assert_eq!("auto".parse(), Ok(Threshold::Auto));
        assert_eq!("50us".parse(), fixed(50));
        assert_eq!("0us".parse(), fixed(0));
        assert_eq!("2ms".parse(), fixed(2000));
        assert_eq!("3600s".parse(), fixed(3_600_000_000));
        for bad in ["", "5", "us", "-5us", "+5us", "1.5ms", "5m", "3601s", "99999999999999999999s"]
        {
            assert_eq!(bad.parse::<Threshold>(), Err(BadThreshold), "{bad}");
        }
    }
}

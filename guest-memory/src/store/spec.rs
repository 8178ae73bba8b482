//! The store as the user names it: `memory`, or `delay=20ms`.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use super::{Delay, MemoryStore, Store, StoreError};

/// The longest delay, so that nobody waits for a guest that only seems to hang.
pub const MAX_DELAY: Duration = Duration::from_secs(60);

/// Which store to use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum StoreSpec {
    /// Host memory.
    #[default]
    Memory,
    /// Host memory, and every fetch lasts this long.
    Delay(Duration),
}

/// Why a text names no store.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreSpecError {
    /// Neither of the known stores.
    #[error("store \"{0}\" is unknown: use \"memory\" or \"delay=TIME\", for example delay=20ms")]
    Unknown(String),
    /// The delay is no duration.
    #[error(
        "store delay \"{0}\" is no duration: use a whole number and us, ms or s, for example 20ms"
    )]
    Duration(String),
    /// The delay is over [`MAX_DELAY`].
    #[error("store delay \"{0}\" is too long: at most {max} s", max = MAX_DELAY.as_secs())]
    TooLong(String),
}

impl StoreSpec {
    /// Sets the store up, empty.
    ///
    /// # Errors
    /// [`StoreError::Create`].
    pub fn open(self) -> Result<Box<dyn Store>, StoreError> {
        let memory = MemoryStore::new()?;
        Ok(match self {
            Self::Memory => Box::new(memory),
            Self::Delay(delay) => Box::new(Delay::new(memory, delay)),
        })
    }
}

impl FromStr for StoreSpec {
    type Err = StoreSpecError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == "memory" {
            return Ok(Self::Memory);
        }
        let delay =
            text.strip_prefix("delay=").ok_or_else(|| StoreSpecError::Unknown(text.to_owned()))?;
        let digits = delay.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let unit = match &delay[digits.len()..] {
            "us" => Duration::from_micros(1),
            "ms" => Duration::from_millis(1),
            "s" => Duration::from_secs(1),
            _ => return Err(StoreSpecError::Duration(delay.to_owned())),
        };
        if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(StoreSpecError::Duration(delay.to_owned()));
        }
        // Only digits are left: what does not parse is too large.
        let count = digits.parse::<u32>().ok();
        count
            .and_then(|count| unit.checked_mul(count))
            .filter(|delay| *delay <= MAX_DELAY)
            .map(Self::Delay)
            .ok_or_else(|| StoreSpecError::TooLong(delay.to_owned()))
    }
}

impl fmt::Display for StoreSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self::Delay(delay) = self else {
            return f.write_str("memory");
        };
        let us = delay.as_micros();
        match us {
            _ if us % 1_000_000 == 0 => write!(f, "delay={}s", us / 1_000_000),
            _ if us % 1_000 == 0 => write!(f, "delay={}ms", us / 1_000),
            _ => write!(f, "delay={us}us"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn stores_are_named() {
        assert_eq!("memory".parse(), Ok(StoreSpec::Memory));
        for (text, us) in
            [("delay=20ms", 20_000), ("delay=7us", 7), ("delay=60s", 60_000_000), ("delay=0ms", 0)]
        {
            let delay = Duration::from_micros(us);
            assert_eq!(text.parse(), Ok(StoreSpec::Delay(delay)), "{text}");
        }
    }

    #[test]
    fn errors_name_what_was_given() {
        use StoreSpecError::{Duration, TooLong, Unknown};
        let error = |text: &str| text.parse::<StoreSpec>().unwrap_err();
        assert_eq!(error("disk"), Unknown("disk".into()));
        assert_eq!(error(""), Unknown(String::new()));
        for bad in ["", "20", "ms", "-5ms", "+5ms", "1.5s", "5 ms", "5h", "5MS", "٣ms"] {
            assert_eq!(error(&format!("delay={bad}")), Duration(bad.into()));
        }
        for long in ["61s", "60001ms", "99999999999999999999s"] {
            assert_eq!(error(&format!("delay={long}")), TooLong(long.into()));
        }
        assert!(error("delay=5h").to_string().contains("\"5h\""));
    }

    proptest! {
        #[test]
        fn a_spec_comes_back_as_it_was(us in 0..=60_000_000_u64) {
            let spec = StoreSpec::Delay(Duration::from_micros(us));
            prop_assert_eq!(spec.to_string().parse(), Ok(spec));
        }

        #[test]
        fn any_text_gives_a_verdict(text in "(delay=)?.{0,12}") {
            let _ = text.parse::<StoreSpec>();
        }
    }
}

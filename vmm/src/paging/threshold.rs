//! From which expected latency on a guest is told of a page: what telling it costs on this host.

use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
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

/// The threshold that a guest runs with; it may change meanwhile.
#[derive(Debug)]
pub(crate) struct InUse {
    /// In nanoseconds.
    ns: AtomicU64,
    store: StoreSpec,
    state: Mutex<InUseState>,
}

#[derive(Debug)]
struct InUseState {
    /// What `auto` is here, once that is known.
    auto: Option<Measured>,
    /// `auto` was asked for last, and is being measured.
    measuring: bool,
}

/// How a change of the threshold stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub(crate) enum Changed {
    /// It is this from now on.
    Now(Duration),
    /// It has to be measured first, by [`InUse::measure`].
    Unmeasured,
}

impl InUse {
    /// This one, for pages of `store`. May run a guest, see [`Threshold::measure`].
    pub(crate) fn new(threshold: Threshold, store: &StoreSpec) -> Self {
        let measured = threshold.measure(store);
        let auto = (threshold == Threshold::Auto).then_some(measured);
        Self {
            ns: AtomicU64::new(nanos(measured.threshold)),
            store: store.clone(),
            state: Mutex::new(InUseState { auto, measuring: false }),
        }
    }

    /// A page that is expected sooner is waited for.
    pub(crate) fn get(&self) -> Duration {
        // Relaxed: it orders nothing, and a fault may have the one before.
        Duration::from_nanos(self.ns.load(Ordering::Relaxed))
    }

    /// What one exit takes, if that was measured.
    pub(crate) fn exit(&self) -> Option<Duration> {
        self.lock().auto.and_then(|auto| auto.exit)
    }

    /// Another one, at once if that needs no measurement. Never waits.
    pub(crate) fn set(&self, threshold: Threshold) -> Changed {
        let mut state = self.lock();
        let known = match threshold {
            Threshold::Fixed(threshold) => Some(threshold),
            Threshold::Auto => state.auto.map(|auto| auto.threshold),
        };
        state.measuring = known.is_none();
        known.map_or(Changed::Unmeasured, |threshold| {
            self.ns.store(nanos(threshold), Ordering::Relaxed);
            Changed::Now(threshold)
        })
    }

    /// Measures what `auto` is, and uses it unless another one was set meanwhile. Takes some milliseconds.
    pub(crate) fn measure(&self) {
        let auto = Threshold::Auto.measure(&self.store);
        let mut state = self.lock();
        state.auto = Some(auto);
        if std::mem::take(&mut state.measuring) {
            self.ns.store(nanos(auto.threshold), Ordering::Relaxed);
        }
    }

    /// Held for a moment only.
    fn lock(&self) -> MutexGuard<'_, InUseState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// Why a text is no threshold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("give \"auto\", or a whole number with us, ms or s, such as 50us, up to 3600s")]
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
    fn a_threshold_in_use_changes_and_the_last_wish_counts() {
        let fixed = |us| Threshold::Fixed(Duration::from_micros(us));
        let in_use = InUse::new(fixed(50), &StoreSpec::default());
        assert_eq!(in_use.get(), Duration::from_micros(50));
        assert_eq!(in_use.set(fixed(70)), Changed::Now(Duration::from_micros(70)));
        assert_eq!(in_use.set(Threshold::Auto), Changed::Unmeasured);
        assert_eq!(in_use.get(), Duration::from_micros(70));
        // Another wish while it is measured.
        let _ = in_use.set(fixed(90));
        in_use.measure();
        assert_eq!(in_use.get(), Duration::from_micros(90));
        assert_eq!(in_use.set(Threshold::Auto), Changed::Now(UNMEASURED));
        assert_eq!((in_use.get(), in_use.exit()), (UNMEASURED, None));
        let measured = InUse::new(Threshold::Auto, &StoreSpec::default());
        let _ = measured.set(fixed(1));
        assert_eq!(measured.set(Threshold::Auto), Changed::Now(UNMEASURED));
    }

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

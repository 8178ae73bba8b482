//! Numbers as the screen shows them: three digits and a unit, the same width whatever they are.

/// Seconds: `12.3 ms`.
pub(super) fn seconds(seconds: f64) -> String {
    let (value, unit) = match seconds {
        s if s <= 0.0 => return "0".to_owned(),
        s if s < 0.999_5e-3 => (s * 1e6, "us"),
        s if s < 0.999_5 => (s * 1e3, "ms"),
        s if s < 999.5 => (s, "s"),
        s if s < 3600.0 * 999.5 => (s / 3600.0, "h"),
        _ => return ">999 h".to_owned(),
    };
    format!("{} {unit}", three(value))
}

/// Bytes: `12.3M`, in powers of 1024.
pub(super) fn bytes(bytes: f64) -> String {
    scaled(bytes, 1024.0, ["", "K", "M", "G", "T", "P"])
}

/// A number of things, or of things a second: `12.3k`.
pub(super) fn count(count: f64) -> String {
    scaled(count, 1000.0, ["", "k", "M", "G", "T", "P"])
}

/// The same where there may be none yet.
pub(super) fn rate(rate: Option<f64>) -> String {
    rate.map_or_else(|| "-".to_owned(), count)
}

/// A share: `12.3`, in percent.
pub(super) fn percent(share: f64) -> String {
    match share * 100.0 {
        percent if percent <= 0.0 => "0".to_owned(),
        percent => three(percent.min(999.0)),
    }
}

/// Time since the start: `1:02:03`.
pub(super) fn clock(seconds: f64) -> String {
    let seconds = seconds as u64;
    format!("{}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60)
}

fn scaled(value: f64, base: f64, units: [&str; 6]) -> String {
    let mut value = value;
    for (at, unit) in units.into_iter().enumerate() {
        if value < 999.5 || at + 1 == units.len() {
            // What has no unit is whole, mostly.
            let whole = at == 0 && value.fract() == 0.0;
            return if whole { format!("{value:.0}") } else { three(value) + unit };
        }
        value /= base;
    }
    String::new()
}

/// Three digits.
fn three(value: f64) -> String {
    match value {
        v if v < 9.995 => format!("{v:.2}"),
        v if v < 99.95 => format!("{v:.1}"),
        v => format!("{v:.0}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn numbers_have_three_digits_and_a_unit() {
        for (value, text) in [
            (0.0, "0"),
            (7.0, "7"),
            (7.5, "7.50"),
            (999.4, "999"),
            (1234.0, "1.23k"),
            (1e18, "1000P"),
        ] {
            assert_eq!(count(value), text);
        }
        assert_eq!(bytes((64 << 20) as f64), "64.0M");
        assert_eq!(bytes(1000.0 * 1024.0), "0.98M");
        for (value, text) in [
            (0.0, "0"),
            (0.000_012_3, "12.3 us"),
            (0.25, "250 ms"),
            (61.0, "61.0 s"),
            (7200.0, "2.00 h"),
            (1e18, ">999 h"),
        ] {
            assert_eq!(seconds(value), text);
        }
        assert_eq!((percent(0.3512), percent(1e18)), ("35.1".into(), "999".into()));
        assert_eq!(clock(3723.9), "1:02:03");
        assert_eq!((rate(None), rate(Some(2.0))), ("-".into(), "2".into()));
    }

    proptest! {
        #[test]
        fn whatever_they_are_they_fit(value in 0.0..1e18_f64) {
            prop_assert!(count(value).len() <= 6, "{}", count(value));
            prop_assert!(bytes(value).len() <= 6, "{}", bytes(value));
            prop_assert!(seconds(value).len() <= 7, "{}", seconds(value));
            prop_assert!(percent(value).len() <= 4, "{}", percent(value));
        }
    }
}

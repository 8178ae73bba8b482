//! Numbers as people read them. Lines do not break between a number and its unit.

/// A time in microseconds with three digits and the unit that fits.
pub(super) fn time(us: f64) -> String {
    match us {
        us if us < 999.5 => format!("{}\u{a0}µs", digits(us)),
        us if us < 999_500.0 => format!("{}\u{a0}ms", digits(us / 1e3)),
        us => format!("{}\u{a0}s", digits(us / 1e6)),
    }
}

/// A share of one, in percent.
pub(super) fn percent(share: f64) -> String {
    match share * 100.0 {
        0.0 => "0\u{a0}%".to_owned(),
        percent if percent < 0.01 => "<\u{a0}0.01\u{a0}%".to_owned(),
        percent => format!("{}\u{a0}%", digits(percent)),
    }
}

/// Three digits, as far as they are behind the point.
pub(super) fn digits(value: f64) -> String {
    let decimals = match value.abs() {
        v if v == 0.0 || v >= 99.95 => 0,
        v if v >= 9.995 => 1,
        v if v >= 0.0995 => 2,
        v if v >= 0.00995 => 3,
        _ => 4,
    };
    let text = format!("{value:.decimals$}");
    if text.contains('.') {
        text.trim_end_matches('0').trim_end_matches('.').to_owned()
    } else {
        text
    }
}

/// A count with a thin space between thousands.
pub(super) fn count(number: u64) -> String {
    let text = number.to_string();
    let mut grouped = String::with_capacity(text.len() * 2);
    for (index, c) in text.chars().enumerate() {
        if index > 0 && (text.len() - index).is_multiple_of(3) {
            grouped.push('\u{202f}');
        }
        grouped.push(c);
    }
    grouped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_digits_and_a_unit() {
        for (us, text) in [
            (0.0, "0 µs"),
            (1.5, "1.5 µs"),
            (203.4, "203 µs"),
            (999.6, "1 ms"),
            (1234.0, "1.23 ms"),
            (20_480.0, "20.5 ms"),
            (60e6, "60 s"),
        ] {
            assert_eq!(time(us).replace('\u{a0}', " "), text);
        }
        assert_eq!(percent(0.1234), "12.3\u{a0}%");
        assert_eq!(percent(0.000_01), "<\u{a0}0.01\u{a0}%");
        assert_eq!(count(1_234_567), "1\u{202f}234\u{202f}567");
        assert_eq!([0.0173, 0.1734, 1.0].map(digits), ["0.017", "0.17", "1"]);
        assert_eq!(count(12), "12");
    }
}

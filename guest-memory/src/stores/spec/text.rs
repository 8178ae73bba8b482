//! Sizes, times, numbers and escapes as they stand in a store's specification.

use std::ffi::OsString;
use std::fmt;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;
use std::time::Duration;

/// Shows a size with the largest unit that divides it.
pub(crate) struct Size(pub(crate) u64);

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (shift, unit) in [(40, 'T'), (30, 'G'), (20, 'M'), (10, 'K')] {
            if self.0 != 0 && self.0.is_multiple_of(1 << shift) {
                return write!(f, "{}{unit}", self.0 >> shift);
            }
        }
        self.0.fmt(f)
    }
}

/// Shows `,size=SIZE`, or nothing.
pub(super) struct SizeOption(pub(super) Option<u64>);

impl fmt::Display for SizeOption {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.map_or(Ok(()), |bytes| write!(f, ",size={}", Size(bytes)))
    }
}

/// A size in bytes: a number, perhaps with K, M, G or T (powers of 1024).
pub(super) fn size(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match text[digits.len()..].to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return None,
    };
    number(digits)?.checked_mul(1 << shift)
}

/// A whole number: digits and nothing else, 64 bits at most.
pub(super) fn number(text: &str) -> Option<u64> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    digits.then(|| text.parse().ok())?
}

/// Why a text is no time.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum BadTime {
    Malformed,
    TooLong,
}

/// A time up to `max`: a whole number and us, ms or s.
pub(super) fn time(text: &str, max: Duration) -> Result<Duration, BadTime> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit_us = match &text[digits.len()..] {
        "us" => 1,
        "ms" => 1_000,
        "s" => 1_000_000,
        _ => return Err(BadTime::Malformed),
    };
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(BadTime::Malformed);
    }
    // Only digits are left: what does not parse is too large.
    let us = number(digits).and_then(|count| count.checked_mul(unit_us));
    us.map(Duration::from_micros).filter(|time| *time <= max).ok_or(BadTime::TooLong)
}

/// Shows a time of whole microseconds.
pub(super) struct Time(pub(super) Duration);

impl fmt::Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let us = self.0.as_micros();
        match us {
            _ if us.is_multiple_of(1_000_000) => write!(f, "{}s", us / 1_000_000),
            _ if us.is_multiple_of(1_000) => write!(f, "{}ms", us / 1_000),
            _ => write!(f, "{us}us"),
        }
    }
}

/// A decimal number in units of 10 to the power of minus `places`, which it must not be finer than.
pub(super) fn decimal(text: &str, places: usize) -> Option<u32> {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, "0"));
    if fraction.len() > places {
        return None;
    }
    let unit = 10_u64.pow(places as u32);
    let fraction = number(fraction)? * 10_u64.pow((places - fraction.len()) as u32);
    let value = number(whole)?.checked_mul(unit)?.checked_add(fraction)?;
    u32::try_from(value).ok()
}

/// Shows a decimal number that is given in units of 10 to the power of minus `places`.
pub(super) fn show_decimal(value: u32, places: usize) -> String {
    let unit = 10_u32.pow(places as u32);
    let text = format!("{}.{:0places$}", value / unit, value % unit);
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// Replaces `%XX` by the byte; `None` when a `%` is followed by anything else.
pub(super) fn unescape(text: &str) -> Option<OsString> {
    let digit = |byte: &u8| char::from(*byte).to_digit(16);
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'%' => (digit(&rest.next()?)? << 4 | digit(&rest.next()?)?) as u8,
            byte => byte,
        });
    }
    Some(OsString::from_vec(bytes))
}

/// Replaces what has a meaning of its own in a specification, and what cannot be read, by `%XX`.
pub(super) fn escape_path(path: &Path) -> String {
    let escape = |c: char| "%+,".contains(c) || c.is_control();
    let mut text = String::new();
    for chunk in path.as_os_str().as_bytes().utf8_chunks() {
        for c in chunk.valid().chars() {
            match c {
                c if escape(c) => push_escaped(&mut text, c.encode_utf8(&mut [0; 4]).as_bytes()),
                c => text.push(c),
            }
        }
        push_escaped(&mut text, chunk.invalid());
    }
    text
}

/// Replaces everything that is not plain in a URI by `%XX`.
pub(super) fn escape_uri(bytes: &[u8]) -> String {
    let mut text = String::new();
    for byte in bytes {
        match byte {
            byte if byte.is_ascii_alphanumeric() => text.push(char::from(*byte)),
            b'-' | b'.' | b'_' | b'~' | b'/' => text.push(char::from(*byte)),
            byte => push_escaped(&mut text, &[*byte]),
        }
    }
    text
}

fn push_escaped(text: &mut String, bytes: &[u8]) {
    bytes.iter().for_each(|byte| text.push_str(&format!("%{byte:02X}")));
}

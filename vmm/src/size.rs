//! Sizes as people write them: `128M`, `4GiB`, `65536`.

/// Why a size was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SizeError {
    /// It is not a number with an optional unit.
    #[error("'{0}' is not a size: write a number with K, M, G or T, for example 128M")]
    Malformed(String),
    /// It does not fit in 64 bits.
    #[error("'{0}' is more than 64 bits can count")]
    TooLarge(String),
}

/// Parses a size in bytes; K, M, G and T are powers of 1024, with or without `iB` or `B`.
///
/// # Errors
/// When the text is not a size, or too large for 64 bits.
pub fn parse(text: &str) -> Result<u64, SizeError> {
    let malformed = || SizeError::Malformed(text.to_owned());
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    if number.is_empty() {
        return Err(malformed());
    }
    let shift = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return Err(malformed()),
    };
    let number: u64 = number.parse().map_err(|_| SizeError::TooLarge(text.to_owned()))?;
    number.checked_mul(1 << shift).ok_or_else(|| SizeError::TooLarge(text.to_owned()))
}

/// Shows a size with the largest unit that divides it.
#[must_use]
pub fn show(bytes: u64) -> String {
    for (shift, unit) in [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")] {
        if bytes != 0 && bytes.is_multiple_of(1 << shift) {
            return format!("{} {unit}", bytes >> shift);
        }
    }
    format!("{bytes} bytes")
}

/// A number of things, with the plural's "s".
#[must_use]
pub fn count(number: u64, thing: &str) -> String {
    format!("{number} {thing}{}", if number == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_thing_has_no_plural() {
        assert_eq!([0, 1, 2].map(|n| count(n, "page")), ["0 pages", "1 page", "2 pages"]);
    }

    #[test]
    fn sizes_as_people_write_them() {
        assert_eq!(parse("128M"), Ok(128 << 20));
        assert_eq!(parse("4GiB"), Ok(4 << 30));
        assert_eq!(parse("1t"), Ok(1 << 40));
        assert_eq!(parse("64k"), Ok(65536));
        assert_eq!(parse("4096"), Ok(4096));
        for bad in ["", "M", "-1M", "1.5G", "12Q", "0x10", "1 G"] {
            assert_eq!(parse(bad), Err(SizeError::Malformed(bad.into())), "{bad}");
        }
        for large in ["99999999999999999999", "18446744073709551615K"] {
            assert_eq!(parse(large), Err(SizeError::TooLarge(large.into())));
        }
    }

    #[test]
    fn sizes_are_shown_in_their_largest_whole_unit() {
        assert_eq!(show(128 << 20), "128 MiB");
        assert_eq!(show((1 << 20) + 4096), "1028 KiB");
        assert_eq!(show(0), "0 bytes");
        assert_eq!(show(5), "5 bytes");
    }
}

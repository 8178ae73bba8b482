//! Overruns and other times: histograms of the agent and the VMM, decoded with distrust, merged and summed
//! up.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hdrhistogram::Histogram;
use hdrhistogram::serialization::{Deserializer, Serializer, V2Serializer};
use nowait_wire::agent::{ACCESS_DIGITS, MAX_OVERRUN_US, OVERRUN_DIGITS};
use serde::{Deserialize, Serialize};

/// The header of a histogram in its V2 encoding: cookie, length of the rest, offset, digits, lowest
/// value (u64), highest value (u64), ratio (f64); the others are u32, all big-endian.
const HEADER_BYTES: usize = 40;
const LENGTH_AT: std::ops::Range<usize> = 4..8;

/// Why a histogram was refused.
#[derive(Debug, thiserror::Error)]
pub enum HistogramError {
    /// Not base64.
    #[error("the histogram is no base64: {0}")]
    Base64(#[from] base64::DecodeError),
    /// Another range, precision or length.
    #[error(
        "the histogram's header is not that of 1 us to 60 s with the digits it has to have, in {0} bytes"
    )]
    Header(usize),
    /// The counts do not decode.
    #[error("the histogram does not decode: {0}")]
    Counts(String),
    /// The library refused what should always work.
    #[error("cannot handle a histogram: {0}")]
    Library(String),
}

/// Overruns in microseconds.
pub(super) type Overruns = Histogram<u64>;

/// No overruns.
pub(super) fn empty() -> Result<Overruns, HistogramError> {
    empty_of(OVERRUN_DIGITS)
}

fn empty_of(digits: u8) -> Result<Overruns, HistogramError> {
    Histogram::new_with_bounds(1, MAX_OVERRUN_US, digits)
        .map_err(|error| HistogramError::Library(error.to_string()))
}

/// Encodes overruns as the agent does: V2, in base64.
pub(super) fn encode(overruns: &Overruns) -> Result<String, HistogramError> {
    Ok(STANDARD.encode(to_bytes(overruns)?))
}

fn to_bytes(overruns: &Overruns) -> Result<Vec<u8>, HistogramError> {
    let mut bytes = Vec::new();
    V2Serializer::new()
        .serialize(overruns, &mut bytes)
        .map_err(|error| HistogramError::Library(error.to_string()))?;
    Ok(bytes)
}

/// Decodes what a guest sent. The header is checked first: a decoder that believes it would allocate
/// what it says.
pub(super) fn decode(text: &str) -> Result<Overruns, HistogramError> {
    decode_of(OVERRUN_DIGITS, text)
}

/// The same for a histogram of touches.
pub(super) fn decode_accesses(text: &str) -> Result<Overruns, HistogramError> {
    decode_of(ACCESS_DIGITS, text)
}

fn decode_of(digits: u8, text: &str) -> Result<Overruns, HistogramError> {
    let bytes = STANDARD.decode(text)?;
    let mut expected = to_bytes(&empty_of(digits)?)?;
    expected.truncate(HEADER_BYTES);
    let rest = bytes.len().checked_sub(HEADER_BYTES).and_then(|rest| u32::try_from(rest).ok());
    let rest = rest.ok_or(HistogramError::Header(bytes.len()))?;
    expected[LENGTH_AT].copy_from_slice(&rest.to_be_bytes());
    if bytes[..HEADER_BYTES] != expected {
        return Err(HistogramError::Header(bytes.len()));
    }
    Deserializer::new()
        .deserialize(&mut bytes.as_slice())
        .map_err(|error| HistogramError::Counts(error.to_string()))
}

/// The overruns of a run, or other times of it, in five numbers: microseconds, and how many there were.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Summary {
    /// Half of the overruns are at most this.
    pub p50: u64,
    /// Nine of ten.
    pub p90: u64,
    /// 99 of 100.
    pub p99: u64,
    /// The longest.
    pub max: u64,
    /// How many deadlines there were.
    pub count: u64,
}

impl Summary {
    pub(super) fn new(overruns: &Overruns) -> Self {
        Self {
            p50: overruns.value_at_quantile(0.5),
            p90: overruns.value_at_quantile(0.9),
            p99: overruns.value_at_quantile(0.99),
            max: overruns.max(),
            count: overruns.len(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn percentiles_are_those_of_the_sorted_list(
            mut values in prop::collection::vec(0..MAX_OVERRUN_US, 1..400),
        ) {
            // Half of them arrive in another histogram, through the encoding.
            let (mut merged, mut other) = (empty().unwrap(), empty().unwrap());
            for (index, &value) in values.iter().enumerate() {
                let into = if index % 2 == 0 { &mut merged } else { &mut other };
                into.record(value).unwrap();
            }
            merged.add(decode(&encode(&other).unwrap()).unwrap()).unwrap();
            values.sort_unstable();
            let summary = Summary::new(&merged);
            prop_assert_eq!(summary.count, values.len() as u64);
            let ranked = [(0.5, summary.p50), (0.9, summary.p90), (0.99, summary.p99)];
            for (quantile, found) in ranked {
                // The nearest rank, as the histogram has it.
                let rank = (quantile * values.len() as f64).ceil() as usize;
                let exact = values[rank.max(1) - 1];
                prop_assert!(merged.equivalent(found, exact), "{} for {}", found, exact);
            }
            prop_assert!(merged.equivalent(summary.max, values[values.len() - 1]));
        }

        #[test]
        fn garbage_is_an_error(bytes in prop::collection::vec(any::<u8>(), 0..200), header: bool) {
            let mut all = Vec::new();
            if header {
                all = to_bytes(&empty().unwrap()).unwrap();
                all.truncate(HEADER_BYTES);
                all[LENGTH_AT].copy_from_slice(&(bytes.len() as u32).to_be_bytes());
            }
            all.extend(bytes);
            let _ = decode(&STANDARD.encode(all));
        }
    }

    #[test]
    fn a_header_that_claims_more_is_refused() {
        let good = to_bytes(&empty().unwrap()).unwrap();
        for at in 0..HEADER_BYTES {
            let mut bad = good.clone();
            bad[at] ^= 0x80;
            let error = decode(&STANDARD.encode(bad)).unwrap_err();
            assert!(matches!(error, HistogramError::Header(_)), "byte {at}: {error}");
        }
        assert!(matches!(decode("AAAA"), Err(HistogramError::Header(3))));
        assert!(matches!(decode("no base64!"), Err(HistogramError::Base64(_))));
    }
}

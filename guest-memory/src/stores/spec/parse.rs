//! From text to [`StoreSpec`].

use std::path::PathBuf;
use std::str::FromStr;

use super::decorators::MAX_DELAY;
use super::text::{self, Size};
use super::{
    DelaySpec, FailSpec, FileSpec, LayerSpec, MAX_LZ4_BYTES, MIN_LZ4_BYTES, NbdSpec, StoreSpec,
};
use crate::address::PAGE_BYTES;

/// Why a text names no store.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreSpecError {
    /// None of the known layers.
    #[error(
        "store \"{0}\" is unknown: use memory, file=PATH, nbd://HOST/EXPORT, lz4=SIZE, delay=TIME \
         or fail=OP:WHEN, with + in between, for example lz4=32M+file=/var/tmp"
    )]
    Unknown(String),
    /// `raw` without a store, or not before all layers.
    #[error(
        "store \"{0}\": raw comes first and has a store behind it, for example raw+file=/var/tmp"
    )]
    Raw(String),
    /// Something stands behind a layer that has nothing behind it.
    #[error(
        "store \"{0}\" must be the last one: it keeps pages for good, and nothing comes behind it"
    )]
    NotLast(String),
    /// A second compressed tier.
    #[error("store \"{0}\" is one lz4 too many: one compressed tier is all that helps")]
    TwiceCompressed(String),
    /// A delay is no duration.
    #[error(
        "store delay \"{0}\" is no duration: use a whole number and us, ms or s, for example 20ms"
    )]
    Duration(String),
    /// A delay is over [`MAX_DELAY`].
    #[error("store delay \"{0}\" is too long: at most {max} s", max = MAX_DELAY.as_secs())]
    TooLong(String),
    /// Times that are neither fixed nor of a known distribution.
    #[error(
        "store delay \"{0}\" is no distribution: use 20ms, uniform:1ms..5ms or \
         lognormal:median=2ms,sigma=0.5 (sigma 0 to 5)"
    )]
    Distribution(String),
    /// A failure that cannot be.
    #[error(
        "store failure \"{0}\" is none: use read:nth=5, read:rate=0.01 or write:…, and \
         kind=transient, kind=full (write), kind=lost or kind=corrupt (read)"
    )]
    Fail(String),
    /// A seed is no number.
    #[error("store seed \"{0}\" is no whole number of at most 64 bits")]
    Seed(String),
    /// An option that the layer does not have, or has twice.
    #[error("store {layer} has no option \"{given}\", or only once; see the documentation")]
    Option {
        /// Which layer.
        layer: &'static str,
        /// What it was given.
        given: String,
    },
    /// A size is no size, or out of bounds.
    #[error("store {layer}: \"{given}\" is no size from {min} to {max}, such as 32M", min = Size(*min), max = Size(*max))]
    Size {
        /// Which layer.
        layer: &'static str,
        /// What it was given.
        given: String,
        /// The smallest, in bytes.
        min: u64,
        /// The largest, in bytes.
        max: u64,
    },
    /// A path is none.
    #[error(
        "store file \"{0}\" has no path: use file=PATH, in which + , and % are written %2B %2C %25"
    )]
    Path(String),
    /// An address is none.
    #[error("store address \"{given}\" does not work: {reason}")]
    Uri {
        /// What was given.
        given: String,
        /// What is wrong with it.
        reason: &'static str,
    },
}

impl FromStr for StoreSpec {
    type Err = StoreSpecError;

    fn from_str(given: &str) -> Result<Self, Self::Err> {
        let (raw, rest) = match given.strip_prefix("raw+") {
            Some(rest) => (true, rest),
            None => (false, given),
        };
        let mut layers: Vec<LayerSpec> = Vec::new();
        for part in split(rest) {
            if let Some(last) = layers.last().filter(|layer| layer.is_last()) {
                return Err(StoreSpecError::NotLast(last.to_string()));
            }
            if part == "raw" {
                return Err(StoreSpecError::Raw(given.to_owned()));
            }
            let layer = parse_layer(part)?;
            let lz4 = |layer: &LayerSpec| matches!(layer, LayerSpec::Lz4 { .. });
            if lz4(&layer) && layers.iter().any(lz4) {
                return Err(StoreSpecError::TwiceCompressed(part.to_owned()));
            }
            layers.push(layer);
        }
        if layers.last().is_some_and(LayerSpec::is_decorator) {
            layers.push(LayerSpec::Memory { size_bytes: None });
        }
        Ok(Self { raw, layers })
    }
}

/// The parts between the `+`, of which the one in `nbd+unix:` is none. There is at least one.
fn split(given: &str) -> Vec<&str> {
    let mut parts = Vec::new();
    let mut rest = given;
    loop {
        let from = if rest.starts_with("nbd+unix:") { "nbd+".len() } else { 0 };
        match rest[from..].find('+') {
            Some(at) => {
                parts.push(&rest[..from + at]);
                rest = &rest[from + at + 1..];
            }
            None => {
                parts.push(rest);
                return parts;
            }
        }
    }
}

fn parse_layer(given: &str) -> Result<LayerSpec, StoreSpecError> {
    if given.starts_with("nbd:") || given.starts_with("nbd+unix:") {
        return NbdSpec::parse(given).map(LayerSpec::Nbd);
    }
    match given.split_once('=') {
        None if given == "memory" => Ok(LayerSpec::Memory { size_bytes: None }),
        Some(("memory", bytes)) => {
            let size_bytes = size("memory", bytes, PAGE_BYTES, u64::MAX)?;
            Ok(LayerSpec::Memory { size_bytes: Some(size_bytes) })
        }
        Some(("lz4", bytes)) => {
            let budget_bytes = size("lz4", bytes, MIN_LZ4_BYTES, MAX_LZ4_BYTES)?;
            Ok(LayerSpec::Lz4 { budget_bytes })
        }
        Some(("delay", delay)) => DelaySpec::parse(delay).map(LayerSpec::Delay),
        Some(("fail", fail)) => FailSpec::parse(fail).map(LayerSpec::Fail),
        Some(("file", file)) => {
            let (path, size_bytes) = with_size(file, "file")?;
            let path = text::unescape(path).filter(|path| !path.is_empty());
            let path = path.ok_or_else(|| StoreSpecError::Path(given.to_owned()))?;
            Ok(LayerSpec::File(FileSpec { path: PathBuf::from(path), size_bytes }))
        }
        _ => Err(StoreSpecError::Unknown(given.to_owned())),
    }
}

/// Takes `,size=SIZE` from the end.
pub(super) fn with_size<'a>(
    given: &'a str,
    layer: &'static str,
) -> Result<(&'a str, Option<u64>), StoreSpecError> {
    let Some((front, option)) = given.split_once(',') else {
        return Ok((given, None));
    };
    let Some(bytes) = option.strip_prefix("size=") else {
        return Err(StoreSpecError::Option { layer, given: option.to_owned() });
    };
    Ok((front, Some(size(layer, bytes, PAGE_BYTES, u64::MAX)?)))
}

fn size(layer: &'static str, given: &str, min: u64, max: u64) -> Result<u64, StoreSpecError> {
    let bytes = text::size(given).filter(|bytes| (min..=max).contains(bytes));
    bytes.ok_or_else(|| StoreSpecError::Size { layer, given: given.to_owned(), min, max })
}

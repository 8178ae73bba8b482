//! The store as the user names it: layers from front to back, with `+` in between, see
//! [`StoreSpec::SYNTAX`].

mod decorators;
mod nbd;
mod parse;
#[cfg(test)]
mod tests;
mod text;

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

pub use decorators::{DelaySpec, Distribution, FailKind, FailSpec, FailWhen, MAX_DELAY, Operation};
pub use nbd::{NbdSpec, ServerAddress};
pub use parse::StoreSpecError;
pub(crate) use text::Size;

/// The smallest budget of the compressed tier, in bytes.
pub(crate) const MIN_LZ4_BYTES: u64 = 256 << 10;
/// The largest one.
pub(crate) const MAX_LZ4_BYTES: u64 = 256 << 30;

/// Which stores to use: one layer or more, of which only the last one keeps pages for good.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct StoreSpec {
    raw: bool,
    layers: Vec<LayerSpec>,
}

/// One layer of a store.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum LayerSpec {
    /// Host memory that stands for a medium with I/O.
    Memory {
        /// How much it may hold, in bytes; `None`: no bound.
        size_bytes: Option<u64>,
    },
    /// A file or block device.
    File(FileSpec),
    /// A network block device.
    Nbd(NbdSpec),
    /// Compressed pages in host memory.
    Lz4 {
        /// How much host memory they may take.
        budget_bytes: u64,
    },
    /// What is behind, slower.
    Delay(DelaySpec),
    /// What is behind, with failures.
    Fail(FailSpec),
}

/// Where a file store's pages go.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct FileSpec {
    /// A directory, a new or empty file, or a block device.
    pub path: PathBuf,
    /// How much it may hold, in bytes; `None`: as much as the medium has room for.
    pub size_bytes: Option<u64>,
}

impl Default for StoreSpec {
    fn default() -> Self {
        Self::memory()
    }
}

impl StoreSpec {
    /// What may be written, for a command's help.
    pub const SYNTAX: &str = "One layer or more from front to back, joined by +:

  memory[=SIZE]                        host memory that stands for a slow medium
  file=PATH[,size=SIZE]                a directory (an unnamed file in it), a new or empty file,
                                       or a block device
  nbd://HOST[:PORT][/EXPORT][,size=SIZE]
  nbd+unix:///[EXPORT]?socket=PATH[,size=SIZE]

  lz4=SIZE                             compressed in host memory, at most SIZE of it
  delay=TIMES[,write=TIMES][,seed=N]   slower; TIMES is 20ms, uniform:1ms..5ms or
                                       lognormal:median=2ms,sigma=0.5
  fail=OP:WHEN[,kind=KIND][,seed=N]    OP is read or write; WHEN is nth=N or rate=0.01;
                                       KIND is transient, full (write), lost or corrupt (read)
  raw                                  first of all: keep same-filled pages like any others

  lz4=32M+delay=200us+file=/var/tmp    compressed, then in a file that is slowed down
  delay=20ms                           the same as delay=20ms+memory

A SIZE is a number with K, M, G or T. In a PATH the characters +, , and % are written %2B, %2C
and %25.";

    /// Host memory.
    #[must_use]
    pub fn memory() -> Self {
        Self { raw: false, layers: vec![LayerSpec::Memory { size_bytes: None }] }
    }

    /// Host memory of which every read lasts this long, at most [`MAX_DELAY`].
    #[must_use]
    pub fn delay(delay: Duration) -> Self {
        let delay = DelaySpec::fixed(delay.min(MAX_DELAY));
        Self {
            raw: false,
            layers: vec![LayerSpec::Delay(delay), LayerSpec::Memory { size_bytes: None }],
        }
    }

    /// The layers, from front to back.
    #[must_use]
    pub fn layers(&self) -> &[LayerSpec] {
        &self.layers
    }

    /// Whether same-filled pages are kept like others.
    #[must_use]
    pub fn is_raw(&self) -> bool {
        self.raw
    }

    /// What the delays add to a read that is not at hand, on average.
    #[must_use]
    pub fn mean_delay(&self) -> Duration {
        let delays = self.layers.iter().map(|layer| match layer {
            LayerSpec::Delay(delay) => delay.read.mean(),
            _ => Duration::ZERO,
        });
        delays.fold(Duration::ZERO, Duration::saturating_add)
    }
}

impl LayerSpec {
    /// Whether it keeps pages for good and has nothing behind it.
    fn is_last(&self) -> bool {
        matches!(self, Self::Memory { .. } | Self::File(_) | Self::Nbd(_))
    }

    /// Whether it is nothing without a store behind it.
    fn is_decorator(&self) -> bool {
        matches!(self, Self::Delay(_) | Self::Fail(_))
    }
}

impl fmt::Display for StoreSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut separator = if self.raw { "raw+" } else { "" };
        let implied = match &*self.layers {
            [.., front, LayerSpec::Memory { size_bytes: None }] => front.is_decorator(),
            _ => false,
        };
        for layer in &self.layers[..self.layers.len() - usize::from(implied)] {
            write!(f, "{separator}{layer}")?;
            separator = "+";
        }
        Ok(())
    }
}

impl fmt::Display for LayerSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Memory { size_bytes: None } => f.write_str("memory"),
            Self::Memory { size_bytes: Some(bytes) } => write!(f, "memory={}", Size(*bytes)),
            Self::File(FileSpec { path, size_bytes }) => {
                write!(f, "file={}{}", text::escape_path(path), text::SizeOption(*size_bytes))
            }
            Self::Nbd(nbd) => nbd.fmt(f),
            Self::Lz4 { budget_bytes } => write!(f, "lz4={}", Size(*budget_bytes)),
            Self::Delay(delay) => delay.fmt(f),
            Self::Fail(fail) => fail.fmt(f),
        }
    }
}

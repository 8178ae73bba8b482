//! Where the bytes of evicted pages are. A store sees bytes and slots only: it never learns which
//! page it holds, it never installs one, and it keeps no checksums.
//!
//! ```text
//!   first pass                    second pass
//!   read_now, at_hand             read, write
//!       |                             |
//!   same-filled ....... a pattern, no bytes kept
//!       |
//!   lz4 (tiered) ...... compressed in host memory; the oldest pages move on
//!       |                             |
//!   delay, fail ....... in any place, for measurements and tests
//!                                     |
//!                     memory | file | nbd
//! ```
//!
//! [`open()`] builds the stack that a [`StoreSpec`] names.

mod delay;
mod error;
mod fail;
mod file;
mod memory;
mod meter;
mod nbd;
mod open;
mod same;
mod slots;
mod spec;
#[doc(hidden)]
pub mod testing;
mod tiered;

use std::fmt;
use std::time::Duration;

pub use error::{OpenError, StoreError, Trouble};
pub use file::FileError;
pub use meter::{LatencyReport, TierReport};
#[cfg(any(test, fuzzing))]
pub(crate) use nbd::fuzzing as nbd_fuzzing;
pub use nbd::{ConnectError, HandshakeError, NbdError};
pub use open::open;
pub use spec::{
    DelaySpec, Distribution, FailKind, FailSpec, FailWhen, FileSpec, LayerSpec, MAX_DELAY, NbdSpec,
    Operation, ServerAddress, StoreSpec, StoreSpecError,
};

use crate::address::PageBytes;
use crate::pass::{MayWait, NoWait};

/// The most pages of one [`Store::read`] or [`Store::write`].
pub const MAX_BATCH: usize = 64;
/// The most slots of one tier (8 TiB). Stores in front of it use the number's top bit for themselves.
pub(crate) const MAX_SLOTS: u32 = (1 << 31) - 1;

/// The name of one page's bytes in a store, never `u32::MAX`. Numbers are used again after
/// [`Store::free`]; pages of the same bytes may have the same slot, and then as many frees.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot(pub u32);

impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// One page to be read.
#[derive(Debug)]
pub struct Read<'a> {
    /// Where the page is.
    pub slot: Slot,
    /// Where its bytes go; without meaning unless `result` is `Ok`.
    pub page: &'a mut PageBytes,
    /// The store's answer; [`StoreError::Closed`] until there is one.
    pub result: Result<(), StoreError>,
}

impl<'a> Read<'a> {
    /// A read that is not yet answered.
    pub fn new(slot: Slot, page: &'a mut PageBytes) -> Self {
        Self { slot, page, result: Err(StoreError::Closed) }
    }
}

/// One page to be stored.
#[derive(Debug)]
pub struct Write<'a> {
    /// Its bytes.
    pub page: &'a PageBytes,
    /// The store's answer; [`StoreError::Closed`] until there is one.
    pub result: Result<Slot, StoreError>,
}

impl<'a> Write<'a> {
    /// A write that is not yet answered.
    pub fn new(page: &'a PageBytes) -> Self {
        Self { page, result: Err(StoreError::Closed) }
    }
}

/// Keeps pages.
pub trait Store: Send + Sync {
    /// Reads a page if it is at hand: never waits, does no I/O, and takes only locks that are never
    /// held across I/O. `Ok(false)`: not at hand, [`Store::read`] has it.
    ///
    /// # Errors
    /// When the slot holds no page or its bytes are lost.
    fn read_now(&self, pass: &NoWait, slot: Slot, page: &mut PageBytes)
    -> Result<bool, StoreError>;

    /// Whether [`Store::read_now`] would have the page. As cheap, and as little to be relied on: the
    /// page may move right after.
    fn at_hand(&self, slot: Slot) -> bool;

    /// Reads 1 to [`MAX_BATCH`] pages; each has its own result. They stay in the store.
    fn read(&self, pass: &MayWait, reads: &mut [Read<'_>]);

    /// Stores 1 to [`MAX_BATCH`] pages; each has its own result. On an error nothing is kept of it.
    fn write(&self, pass: &MayWait, writes: &mut [Write<'_>]);

    /// Forgets a page; its slot may be used again. Never waits for I/O.
    ///
    /// # Errors
    /// When the slot holds no page.
    fn free(&self, slot: Slot) -> Result<(), StoreError>;

    /// How long a read of a page that is not at hand will take, judged by the last ones.
    fn expected_read(&self) -> Duration;

    /// Host memory that holds stored pages now, in bytes: it counts towards the resident limit.
    fn memory_bytes(&self) -> u64;

    /// How each tier is doing, the front one first.
    fn report(&self) -> Vec<TierReport>;

    /// Ends every wait in the store, now and later, with [`StoreError::Closed`]. An operation that
    /// the kernel has begun and cannot break off is waited for by its caller all the same.
    fn close(&self);
}

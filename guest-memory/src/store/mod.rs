//! Where the bytes of evicted pages are. A store sees bytes and slots only: it never learns which
//! page it holds, and it never installs one.

mod delay;
mod memory;
mod spec;

use std::fmt;
use std::io;
use std::time::Duration;

pub use delay::Delay;
pub use memory::MemoryStore;
pub use spec::{MAX_DELAY, StoreSpec, StoreSpecError};

use crate::address::PageBytes;

/// The name of one page's bytes in a store. Numbers are used again after [`Store::free`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot(pub u32);

impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Why a store could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// All slots are taken.
    #[error("the store is full: all {slots} slots hold a page; use a larger store")]
    Full {
        /// How many slots there are.
        slots: u32,
    },
    /// The slot holds no page.
    #[error("slot {0} of the store holds no page")]
    Empty(Slot),
    /// The operating system refused.
    #[error("cannot {action} slot {slot} of the store: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// With which slot.
        slot: Slot,
        /// The operating system's answer.
        source: io::Error,
    },
    /// The store cannot be set up.
    #[error(
        "cannot create the store's memory file: {0}; raise the file limit (ulimit -n) or free memory"
    )]
    Create(#[source] io::Error),
}

/// Keeps pages.
pub trait Store: Send {
    /// Puts a page away and says where.
    ///
    /// # Errors
    /// When the store is full or its medium fails; then it keeps nothing.
    fn write(&mut self, page: &PageBytes) -> Result<Slot, StoreError>;

    /// Reads a page that is in the store; it stays there.
    ///
    /// # Errors
    /// When the slot holds no page or the medium fails; then `page` has no meaning.
    fn read(&mut self, slot: Slot, page: &mut PageBytes) -> Result<(), StoreError>;

    /// Forgets a page; its slot may be used again.
    ///
    /// # Errors
    /// When the slot holds no page or the medium fails.
    fn free(&mut self, slot: Slot) -> Result<(), StoreError>;

    /// How long a fetch lasts before its bytes may be read. The pager waits for many fetches at once.
    fn latency(&self) -> Duration {
        Duration::ZERO
    }
}

//! What can go wrong in the pager.

use std::io;

use super::{MAX_FAULT_AROUND_BYTES, MIN_RESIDENT_LIMIT_BYTES};
use crate::address::{Gfn, PAGE_BYTES};
use crate::stores::{Slot, StoreError};
use crate::sys::UserfaultError;

/// Why the pager could not start, or not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum PagerError {
    /// The configured fault-around is no size of a block.
    #[error(
        "fault-around of {0} bytes: use a power of two from {PAGE_BYTES} (none) to \
         {MAX_FAULT_AROUND_BYTES}"
    )]
    FaultAround(u64),
    /// The resident limit is under [`MIN_RESIDENT_LIMIT_BYTES`].
    #[error(
        "a resident limit of {0} bytes is too small: give at least {MIN_RESIDENT_LIMIT_BYTES} bytes"
    )]
    LimitTooSmall(u64),
    /// userfaultfd cannot be used.
    #[error(transparent)]
    Userfault(#[from] UserfaultError),
    /// The store cannot be set up.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A system call that concerns no single page.
    #[error("the pager cannot {action}: {source}")]
    System {
        /// What it was for.
        action: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// A system call on guest pages.
    #[error("the pager cannot {action} {pages} page(s) from guest frame {gfn}: {source}")]
    Pages {
        /// What it was for.
        action: &'static str,
        /// The first page.
        gfn: Gfn,
        /// How many pages.
        pages: u32,
        /// What the kernel said.
        source: io::Error,
    },
    /// The host's memory has lost a page.
    #[error(
        "guest frame {gfn} is lost: a memory error of the host, or of its swap ({source}); its kernel log \
         says more"
    )]
    Memory {
        /// The page.
        gfn: Gfn,
        /// What the kernel said.
        source: io::Error,
    },
    /// A page cannot be had back from the store: the guest cannot go on.
    #[error("guest frame {gfn} is lost: {source}")]
    Fetch {
        /// The page.
        gfn: Gfn,
        /// What the store said.
        source: StoreError,
    },
    /// A page came back from the store with other bytes than it left with.
    #[error(
        "guest frame {gfn} is lost (check the store's medium): its bytes in slot {slot} do not have the \
         checksum that they were stored with"
    )]
    Checksum {
        /// The page.
        gfn: Gfn,
        /// Where it was.
        slot: Slot,
    },
    /// A page cannot be moved to the store; it stays in memory.
    #[error("cannot evict guest frame {gfn} ({done} pages were done before): {source}")]
    Evict {
        /// The page.
        gfn: Gfn,
        /// How many of the listed pages are out of memory.
        done: u32,
        /// What the store said.
        source: StoreError,
    },
    /// A frame outside guest RAM; nothing was done.
    #[error("guest frame {0} is not in guest RAM")]
    OutOfRange(Gfn),
    /// Bytes that do not lie in one page.
    #[error("{len} bytes at offset {offset} do not fit in a page of {PAGE_BYTES} bytes")]
    BeyondPage {
        /// Where they begin.
        offset: usize,
        /// How many they are.
        len: usize,
    },
    /// A page that was lost before, see [`PagerError::Fetch`].
    #[error("guest frame {0} was lost when its fetch failed")]
    Lost(Gfn),
    /// A bound was reached.
    #[error("the pager has too much under way (at most {limit} {what}); try again later")]
    Busy {
        /// What there is too much of.
        what: &'static str,
        /// The bound.
        limit: usize,
    },
    /// More than a pin may have.
    #[error("{bytes} bytes of guest RAM are too many for one pin: ask for less at once")]
    PinTooLarge {
        /// How many.
        bytes: u64,
    },
    /// Somebody interrupted the wait.
    #[error("the wait for guest frame {0} was interrupted")]
    Interrupted(Gfn),
    /// The store did not answer in time.
    #[error("guest frame {0} did not come in time: the store does not answer")]
    TimedOut(Gfn),
    /// The pager was shut down or has failed.
    #[error("the pager has stopped")]
    Stopped,
    /// A bug in the pager.
    #[error("the pager thread panicked; this is a bug in nowait")]
    Panicked,
}

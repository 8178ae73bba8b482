//! What can go wrong in the pager.

use std::io;

use super::MAX_FAULT_AROUND_BYTES;
use crate::address::{Gfn, PAGE_BYTES};
use crate::store::StoreError;
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
    /// A page cannot be had back from the store: the guest cannot go on.
    #[error("guest frame {gfn} is lost: {source}")]
    Fetch {
        /// The page.
        gfn: Gfn,
        /// What the store said.
        source: StoreError,
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
    /// The pager was shut down or has failed.
    #[error("the pager has stopped")]
    Stopped,
    /// A bug in the pager.
    #[error("the pager thread panicked; this is a bug in nowait")]
    Panicked,
}

//! Why stores fail, and what the pager can make of it.

use std::io;

use super::{FileError, NbdError, Slot};

/// Why a store could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// All slots are taken.
    #[error(
        "the {tier} store is full: all of its {capacity_bytes} bytes are taken; give it more room, \
         or put a larger store behind it"
    )]
    Full {
        /// The tier.
        tier: &'static str,
        /// What it can hold.
        capacity_bytes: u64,
    },
    /// There would be slots, but the medium has no room for them.
    #[error(
        "the {tier} store's medium has no space left: {source}; free some space on it, or bound \
         the store with size=SIZE"
    )]
    NoSpace {
        /// The tier.
        tier: &'static str,
        /// The system's answer.
        source: io::Error,
    },
    /// The page does not get smaller, and there is no other tier.
    #[error(
        "the page does not compress and there is no tier behind lz4 to take it; add one, for \
         example lz4=32M+file=/var/tmp"
    )]
    Incompressible,
    /// The slot holds no page.
    #[error("slot {0} of the store holds no page")]
    Empty(Slot),
    /// The medium does not answer, or not as it should; it may later.
    #[error("cannot {action} the {tier} store: {source}")]
    Unavailable {
        /// The tier.
        tier: &'static str,
        /// What was tried: "read" or "write".
        action: &'static str,
        /// What came of it.
        source: io::Error,
    },
    /// The bytes are not what was stored, and will not be.
    #[error("the page in slot {slot} of the {tier} store is lost: {reason}")]
    Lost {
        /// The tier.
        tier: &'static str,
        /// Where the page should be.
        slot: Slot,
        /// What was found instead.
        reason: &'static str,
    },
    /// The store was closed.
    #[error("the store is closed")]
    Closed,
    /// The store cannot be set up.
    #[error(transparent)]
    Open(Box<OpenError>),
}

impl From<OpenError> for StoreError {
    fn from(error: OpenError) -> Self {
        Self::Open(Box::new(error))
    }
}

/// What a [`StoreError`] asks its caller to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Trouble {
    /// Try again later; nothing is lost.
    Transient,
    /// Store nothing more until pages were freed.
    Full,
    /// Keep this page in memory; others may well be stored.
    Unwanted,
    /// The page's bytes are gone, or the slot was wrong.
    Lost,
    /// The store is shut down.
    Closed,
}

impl StoreError {
    /// What to do about it.
    pub fn trouble(&self) -> Trouble {
        match self {
            Self::Full { .. } | Self::NoSpace { .. } => Trouble::Full,
            Self::Incompressible => Trouble::Unwanted,
            Self::Unavailable { .. } => Trouble::Transient,
            Self::Empty(_) | Self::Lost { .. } => Trouble::Lost,
            Self::Closed | Self::Open(_) => Trouble::Closed,
        }
    }

    /// The error of an I/O operation on a tier's medium.
    pub(crate) fn io(tier: &'static str, action: &'static str, source: io::Error) -> Self {
        match source.kind() {
            io::ErrorKind::StorageFull
            | io::ErrorKind::QuotaExceeded
            | io::ErrorKind::FileTooLarge => Self::NoSpace { tier, source },
            _ => Self::Unavailable { tier, action, source },
        }
    }
}

/// Why a store cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// No memory file.
    #[error(
        "cannot create the store's memory file: {0}; raise the file limit (ulimit -n) or free memory"
    )]
    MemoryFile(#[source] io::Error),
    /// No addresses for the compressed tier.
    #[error("cannot reserve {bytes} bytes for the lz4 store: {source}; use a smaller one")]
    Addresses {
        /// The budget.
        bytes: u64,
        /// The system's answer.
        source: io::Error,
    },
    /// No file.
    #[error(transparent)]
    File(#[from] FileError),
    /// No network block device.
    #[error(transparent)]
    Nbd(#[from] NbdError),
}

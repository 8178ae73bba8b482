//! A UFFDIO_POISON marker on one page of the probe guest.

// `unsafe`: UFFDIO_POISON (Linux 6.6) is not in the userfaultfd crate; the raw ioctl is here.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::AsRawFd;

use libc::c_void;
use userfaultfd::{RegisterMode, Uffd};

use super::uffd::{self, UffdError};

const PAGE_BYTES: usize = 4096;
/// What a marker on shared memory, and its replacement, need.
const FEATURES: u64 =
    uffd::FEATURE_MISSING_SHMEM | uffd::FEATURE_MINOR_SHMEM | uffd::FEATURE_POISON;
/// UFFDIO_POISON of linux/userfaultfd.h: `_IOWR(0xAA, 0x08, struct uffdio_poison)`.
const UFFDIO_POISON: libc::c_ulong = 0xc020_aa08;

/// struct uffdio_poison.
#[repr(C)]
struct UffdioPoison {
    start: u64,
    len: u64,
    mode: u64,
    updated: i64,
}

/// Why a marker could not be set or replaced.
#[derive(Debug, thiserror::Error)]
pub(super) enum MarkerError {
    #[error("userfaultfd cannot be had here: {0}")]
    NoUffd(UffdError),
    #[error(
        "this kernel's userfaultfd has no POISON for shared memory, which Linux 6.6 brought ({0})"
    )]
    NoPoison(UffdError),
    #[error("cannot register the page at hva {hva:#x} with userfaultfd: {}", words(source))]
    Register { hva: u64, source: userfaultfd::Error },
    #[error("UFFDIO_POISON of the page at hva {hva:#x} failed: {source}")]
    Poison { hva: u64, source: io::Error },
    #[error("cannot fill the page through the alias: {0}")]
    Fill(vm_memory::VolatileMemoryError),
    #[error("UFFDIO_CONTINUE did not replace the marker at hva {hva:#x}: {}", words(source))]
    Continue { hva: u64, source: userfaultfd::Error },
}

/// The crate's own words are "System error"; the errno is in the source.
fn words(error: &userfaultfd::Error) -> String {
    match std::error::Error::source(error) {
        Some(source) => source.to_string(),
        None => error.to_string(),
    }
}

/// A page that is registered with a userfaultfd and carries a marker. Dropping it unregisters.
#[derive(Debug)]
pub(super) struct Marker {
    uffd: Uffd,
    hva: u64,
}

impl Marker {
    /// Registers the page at `hva` (a shared memory mapping that nobody has touched there) and
    /// marks it.
    pub(super) fn set(hva: u64) -> Result<Self, MarkerError> {
        let uffd = uffd::create(FEATURES).map_err(|error| match error {
            UffdError::NoDescriptor { .. } => MarkerError::NoUffd(error),
            UffdError::NoFeatures { .. } => MarkerError::NoPoison(error),
        })?;
        let marker = Self { uffd, hva };
        marker
            .uffd
            .register_with_mode(
                hva as *mut c_void,
                PAGE_BYTES,
                RegisterMode::MISSING | RegisterMode::MINOR,
            )
            .map_err(|source| MarkerError::Register { hva, source })?;
        let mut poison = UffdioPoison { start: hva, len: PAGE_BYTES as u64, mode: 0, updated: 0 };
        // SAFETY: the struct has the layout of struct uffdio_poison and outlives the call; the
        // kernel changes only the page table entry of a page that no Rust object lives in.
        let result =
            unsafe { libc::ioctl(marker.uffd.as_raw_fd(), UFFDIO_POISON, &raw mut poison) };
        if result != 0 {
            return Err(MarkerError::Poison { hva, source: io::Error::last_os_error() });
        }
        Ok(marker)
    }

    /// Maps the page, which lies in the page cache by now, in the marker's place.
    pub(super) fn replace(&self) -> Result<(), MarkerError> {
        self.uffd
            .r#continue(self.hva as *mut c_void, PAGE_BYTES, true)
            .map(|_mapped| ())
            .map_err(|source| MarkerError::Continue { hva: self.hva, source })
    }
}

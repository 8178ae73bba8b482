//! A userfaultfd with chosen features, or the reasons why there is none, for the probe and for
//! `doctor`. Guest RAM opens its own (crate guest-memory), in the same two ways.

// `unsafe`: the userfaultfd crate's builder does not fall back to the system call when the device
// may not be opened, and drops the errno of UFFDIO_API; the raw calls are here.
#![allow(unsafe_code)]

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd};

use userfaultfd::Uffd;

/// The device that gives a userfaultfd to whoever may open it (Linux 6.1 and later).
pub(crate) const DEVICE: &str = "/dev/userfaultfd";

/// UFFD_FEATURE_MISSING_SHMEM of linux/userfaultfd.h, as the following ones.
pub(crate) const FEATURE_MISSING_SHMEM: u64 = 1 << 5;
/// UFFD_FEATURE_MINOR_SHMEM.
pub(crate) const FEATURE_MINOR_SHMEM: u64 = 1 << 10;
/// UFFD_FEATURE_POISON.
pub(crate) const FEATURE_POISON: u64 = 1 << 14;

const UFFD_API: u64 = 0xaa;
/// `_IOWR(0xAA, 0x3F, struct uffdio_api)`.
const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
/// `_IO(0xAA, 0x00)`, on the device.
const USERFAULTFD_IOC_NEW: libc::c_ulong = 0xaa00;

/// struct uffdio_api.
#[repr(C)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// Why there is no userfaultfd.
#[derive(Debug, thiserror::Error)]
pub(crate) enum UffdError {
    /// Neither way gives a descriptor.
    #[error("{DEVICE}: {device}; userfaultfd(2): {syscall}")]
    NoDescriptor {
        /// What the device said.
        device: io::Error,
        /// What the system call said.
        syscall: io::Error,
    },
    /// There is one, but not with these features.
    #[error("UFFDIO_API with features {features:#x}: {source}")]
    NoFeatures {
        /// The bits that were asked for.
        features: u64,
        /// EINVAL for bits that the kernel does not know.
        source: io::Error,
    },
}

/// A userfaultfd for faults of the kernel too (KVM's are such), with these features.
///
/// # Errors
/// [`UffdError`]: no descriptor, or none with these features.
pub(crate) fn create(features: u64) -> Result<Uffd, UffdError> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    let fd = from_device(flags).or_else(|device| {
        from_syscall(flags).map_err(|syscall| UffdError::NoDescriptor { device, syscall })
    })?;
    let mut api = UffdioApi { api: UFFD_API, features, ioctls: 0 };
    // SAFETY: the descriptor is a userfaultfd and `api` has the layout of struct uffdio_api.
    if unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API, &raw mut api) } != 0 {
        return Err(UffdError::NoFeatures { features, source: io::Error::last_os_error() });
    }
    // SAFETY: the descriptor is a userfaultfd, and ownership passes on here.
    Ok(unsafe { Uffd::from_raw_fd(fd.into_raw_fd()) })
}

fn from_device(flags: libc::c_int) -> io::Result<OwnedFd> {
    let device = OpenOptions::new().read(true).write(true).open(DEVICE)?;
    // SAFETY: the ioctl takes the flags by value.
    owned(unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, flags) })
}

fn from_syscall(flags: libc::c_int) -> io::Result<OwnedFd> {
    // SAFETY: the system call takes the flags by value.
    owned(unsafe { libc::syscall(libc::SYS_userfaultfd, flags) } as libc::c_int)
}

fn owned(fd: libc::c_int) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a fresh descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

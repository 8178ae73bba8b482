//! userfaultfd on the guest mapping: messages in, installed pages out. Addresses end here; what goes
//! in and out are pages.
// Unsafe: creating the descriptor (the crate's builder does not fall back to the system call when the
// device may not be opened), and ZEROPAGE, which writes to memory.
#![allow(unsafe_code)]

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};

use userfaultfd::{Event, EventBuffer, RegisterMode, Uffd};
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_val};

use super::GuestMapping;
use crate::address::{PageIndex, PageRun};

/// Why userfaultfd cannot be used on guest RAM.
#[derive(Debug, thiserror::Error)]
pub enum UserfaultError {
    /// Neither the device nor the system call gives a descriptor.
    #[error(
        "userfaultfd is not permitted: /dev/userfaultfd: {device}; system call: {syscall}. \
         Run as root or with CAP_SYS_PTRACE, or give your user read and write access to \
         /dev/userfaultfd (for example: chmod 666 /dev/userfaultfd), or run \
         \"sysctl vm.unprivileged_userfaultfd=1\"; in a container also allow the system call"
    )]
    NotPermitted {
        /// What the device said.
        device: io::Error,
        /// What the system call said.
        syscall: io::Error,
    },
    /// A descriptor cannot be had for another reason.
    #[error(
        "cannot open userfaultfd: /dev/userfaultfd: {device}; system call: {syscall}; \
         check the file limit (ulimit -n)"
    )]
    Open {
        /// What the device said.
        device: io::Error,
        /// What the system call said.
        syscall: io::Error,
    },
    /// The kernel has no userfaultfd at all.
    #[error("this kernel has no userfaultfd: it needs CONFIG_USERFAULTFD=y, Linux 5.14 or later")]
    Missing,
    /// The kernel is too old.
    #[error(
        "userfaultfd of this kernel has no minor faults on shared memory: use Linux 5.14 or later ({0})"
    )]
    NoMinorFaults(#[source] io::Error),
    /// The kernel has no markers.
    #[error(
        "userfaultfd of this kernel has no UFFDIO_POISON, which markers need: use Linux 6.6 or later, \
         or faults without markers (--fault-source uffd) ({0})"
    )]
    NoMarkers(#[source] io::Error),
    /// The guest mapping was refused.
    #[error("cannot register {bytes} bytes of guest RAM with userfaultfd: {source}")]
    Register {
        /// The length of the mapping.
        bytes: usize,
        /// What the kernel said.
        source: io::Error,
    },
}

/// What became of an installation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub(crate) enum Outcome {
    /// All pages are there and whoever waited for them runs.
    Done,
    /// Only the first pages are done: this many, at least one.
    Partial(u32),
    /// EEXIST: somebody was first with the first page. Nobody was woken.
    Exists,
    /// EAGAIN: the address space is changing. Nothing was done; try again a little later.
    Again,
}

/// Which of the two kinds of messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FaultKind {
    /// There was no page in the RAM file.
    Missing,
    /// There was a page in the RAM file, but not in the guest mapping.
    Minor,
}

/// One message: somebody waits for this page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    pub(crate) page: PageIndex,
    pub(crate) kind: FaultKind,
}

/// The buffer for one read of messages.
pub(crate) struct FaultBatch {
    buffer: EventBuffer,
}

impl FaultBatch {
    /// A buffer for `messages` messages.
    pub(crate) fn new(messages: usize) -> Self {
        Self { buffer: EventBuffer::new(messages) }
    }
}

/// The descriptor, with the guest mapping's place. Closing it (by dropping) wakes whoever still
/// waits, and lets every later access see what the RAM file has, zeros in its holes.
#[derive(Debug)]
pub(crate) struct Userfault {
    uffd: Uffd,
    address: usize,
}

/// From `linux/userfaultfd.h`.
const USERFAULTFD_IOC_NEW: libc::c_ulong = 0xaa00;
const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
const UFFD_API: u64 = 0xaa;
const UFFDIO_POISON: libc::c_ulong = 0xc020_aa08;
const UFFD_FEATURE_MINOR_SHMEM: u64 = 1 << 10;
const UFFD_FEATURE_POISON: u64 = 1 << 14;

#[repr(C)]
#[derive(Default)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdioPoison {
    start: u64,
    len: u64,
    mode: u64,
    updated: i64,
}

impl Userfault {
    /// Opens a descriptor and registers all of the guest mapping for missing and minor faults. The
    /// mapping must outlive the descriptor's use.
    pub(crate) fn register(mapping: &GuestMapping, markers: bool) -> Result<Self, UserfaultError> {
        let uffd = open(markers)?;
        let mode = RegisterMode::MISSING | RegisterMode::MINOR;
        uffd.register_with_mode(mapping.address() as *mut _, mapping.len(), mode).map_err(
            |error| UserfaultError::Register { bytes: mapping.len(), source: os_error(error) },
        )?;
        Ok(Self { uffd, address: mapping.address() })
    }

    /// Maps pages whose bytes are in the RAM file, and wakes whoever waits for them.
    pub(crate) fn map(&self, run: PageRun) -> io::Result<Outcome> {
        let (start, len) = self.range(run);
        match self.uffd.r#continue(start, len, true) {
            Ok(mapped) if mapped < run.byte_len() => {
                let pages = crate::address::pages_in(mapped).unwrap_or(0);
                Ok(Outcome::Partial(pages))
            }
            Ok(_) => Ok(Outcome::Done),
            Err(error) => verdict(os_error(error)),
        }
    }

    /// Puts zero pages into the RAM file and maps them, and wakes whoever waits for them. After
    /// [`Outcome::Exists`] and [`Outcome::Again`] some first pages may have been done.
    pub(crate) fn zero(&self, run: PageRun) -> io::Result<Outcome> {
        let (start, len) = self.range(run);
        // SAFETY: the range lies in the guest mapping, of whose bytes this process has no
        // references; pages that exist already are left alone by the kernel.
        match unsafe { self.uffd.zeropage(start, len, true) } {
            Ok(_) => Ok(Outcome::Done),
            Err(error) => verdict(os_error(error)),
        }
    }

    /// Puts markers where no page is mapped: who touches one gets SIGBUS instead of waiting. Wakes
    /// whoever waits there already, to meet the marker. `Exists`: the first page has a mapping or a
    /// marker.
    pub(crate) fn mark(&self, run: PageRun) -> io::Result<Outcome> {
        let (start, len) = self.range(run);
        let mut poison = UffdioPoison { start: start as u64, len: len as u64, mode: 0, updated: 0 };
        // SAFETY: the range lies in the guest mapping, of whose bytes this process has no references, and
        // `poison` has the layout of the struct uffdio_poison that this ioctl reads and writes.
        let result = unsafe { ioctl_with_mut_ref(&self.uffd, UFFDIO_POISON as _, &mut poison) };
        if result >= 0 {
            return Ok(Outcome::Done);
        }
        let error = io::Error::last_os_error();
        match u64::try_from(poison.updated).ok().and_then(crate::address::pages_in) {
            Some(pages @ 1..) => Ok(Outcome::Partial(pages)),
            _ => verdict(error),
        }
    }

    /// Ends it all: whoever waits is woken, and absent pages read as what the RAM file has.
    pub(crate) fn unregister(&self, mapping: &GuestMapping) {
        // It fails only for a range that was not registered, and then nobody waits in it.
        let _ = self.uffd.unregister(mapping.address() as *mut _, mapping.len());
    }

    /// Wakes whoever waits for this page; they fault again if it is not there.
    pub(crate) fn wake(&self, page: PageIndex) -> io::Result<()> {
        let (start, len) = self.range(PageRun::single(page));
        self.uffd.wake(start, len).map_err(os_error)
    }

    /// Reads the messages that are there, at most one buffer full, and never waits.
    pub(crate) fn read<'a>(
        &'a self,
        mapping: &'a GuestMapping,
        batch: &'a mut FaultBatch,
    ) -> io::Result<impl Iterator<Item = Fault> + 'a> {
        let events = self.uffd.read_events(&mut batch.buffer).map_err(os_error)?;
        // No other events were asked for, and all faults are in the mapping that was registered.
        Ok(events.filter_map(|event| match event {
            Ok(Event::Pagefault { kind, addr, .. }) => Some(Fault {
                page: mapping.page_at(addr as usize)?,
                kind: match kind {
                    userfaultfd::FaultKind::Minor => FaultKind::Minor,
                    _ => FaultKind::Missing,
                },
            }),
            _ => None,
        }))
    }

    fn range(&self, run: PageRun) -> (*mut libc::c_void, usize) {
        let start = self.address + run.first().file_offset() as usize;
        (start as *mut libc::c_void, run.byte_len() as usize)
    }
}

impl AsRawFd for Userfault {
    fn as_raw_fd(&self) -> RawFd {
        self.uffd.as_raw_fd()
    }
}

/// A nonblocking descriptor for kernel faults, too (KVM's are such), with minor faults on shared
/// memory and no other events.
fn open(markers: bool) -> Result<Uffd, UserfaultError> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    let fd = from_device(flags).or_else(|device| {
        from_syscall(flags).map_err(|syscall| match syscall.raw_os_error() {
            Some(libc::ENOSYS) => UserfaultError::Missing,
            Some(libc::EPERM | libc::EACCES) => UserfaultError::NotPermitted { device, syscall },
            _ => UserfaultError::Open { device, syscall },
        })
    })?;
    let wanted = UFFD_FEATURE_MINOR_SHMEM | if markers { UFFD_FEATURE_POISON } else { 0 };
    let mut api = UffdioApi { api: UFFD_API, features: wanted, ioctls: 0 };
    // SAFETY: the descriptor is a userfaultfd, and `api` has the layout of its struct uffdio_api.
    if unsafe { ioctl_with_mut_ref(&fd, UFFDIO_API as _, &mut api) } < 0 {
        let error = io::Error::last_os_error();
        return Err(match markers && open(false).is_ok() {
            true => UserfaultError::NoMarkers(error),
            false => UserfaultError::NoMinorFaults(error),
        });
    }
    // SAFETY: the descriptor is a userfaultfd of which this is the only owner.
    Ok(unsafe { Uffd::from_raw_fd(fd.into_raw_fd()) })
}

fn from_device(flags: libc::c_int) -> io::Result<OwnedFd> {
    let device = OpenOptions::new().read(true).write(true).open("/dev/userfaultfd")?;
    // SAFETY: this ioctl takes flags by value and touches no memory.
    let fd = unsafe { ioctl_with_val(&device, USERFAULTFD_IOC_NEW as _, flags as libc::c_ulong) };
    owned(fd)
}

fn from_syscall(flags: libc::c_int) -> io::Result<OwnedFd> {
    // SAFETY: the system call takes flags by value and touches no memory.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    owned(fd as libc::c_int)
}

fn owned(fd: libc::c_int) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just returned this descriptor and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn verdict(error: io::Error) -> io::Result<Outcome> {
    match error.raw_os_error() {
        Some(libc::EEXIST) => Ok(Outcome::Exists),
        Some(libc::EAGAIN) => Ok(Outcome::Again),
        _ => Err(error),
    }
}

/// The crate's errors are errno values in several wrappings.
fn os_error(error: userfaultfd::Error) -> io::Error {
    match error {
        userfaultfd::Error::SystemError(errno) | userfaultfd::Error::ZeropageFailed(errno) => {
            io::Error::from_raw_os_error(errno as i32)
        }
        other => io::Error::other(other),
    }
}

//! The system calls and the one port instruction that the standard library does not offer.
//!
//! Every function here is safe to call: it checks or owns what its `unsafe` block relies on.
// Reason: mount, reboot, scheduling, termios, signalfd, anonymous mappings and OUT have no safe
// form in std, and PID 1 of a guest needs few enough of them that libc alone will do.
#![allow(unsafe_code)]

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

use nowait_wire::paging;

/// The size of a page, in bytes.
pub(crate) const PAGE_BYTES: usize = 4096;
/// The 64-bit words of a page.
pub(crate) const PAGE_WORDS: usize = PAGE_BYTES / 8;

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn c_string(text: &str) -> io::Result<CString> {
    CString::new(text).map_err(io::Error::other)
}

/// Mounts a file system of this type that needs no device.
pub(crate) fn mount(fstype: &str, target: &str) -> io::Result<()> {
    let (fstype, target) = (c_string(fstype)?, c_string(target)?);
    // SAFETY: the three strings are NUL-terminated and outlive the call; no data is passed.
    check(unsafe {
        libc::mount(fstype.as_ptr(), target.as_ptr(), fstype.as_ptr(), 0, std::ptr::null())
    })?;
    Ok(())
}

/// Writes all file systems back, then powers the machine off or restarts it.
/// Returns only when the kernel refuses.
pub(crate) fn reboot(power_off: bool) -> io::Error {
    let command = if power_off { libc::RB_POWER_OFF } else { libc::RB_AUTOBOOT };
    // SAFETY: neither call takes a pointer.
    unsafe {
        libc::sync();
        libc::reboot(command);
    }
    io::Error::last_os_error()
}

/// Makes `terminal` the standard input, output and error of this process.
pub(crate) fn attach_stdio(terminal: &File) -> io::Result<()> {
    for fd in 0..=2 {
        // SAFETY: `terminal` is open; 0 to 2 are the process's own standard descriptors, which std
        // never closes.
        check(unsafe { libc::dup2(terminal.as_raw_fd(), fd) })?;
    }
    Ok(())
}

/// Puts a terminal into raw mode at 115200 baud.
pub(crate) fn make_raw(terminal: &File) -> io::Result<()> {
    let fd = terminal.as_raw_fd();
    // SAFETY: termios is plain data for which all-zero is a value, and tcgetattr fills it; all
    // three calls get a pointer to this local and an open descriptor.
    unsafe {
        let mut termios: libc::termios = std::mem::zeroed();
        check(libc::tcgetattr(fd, &mut termios))?;
        libc::cfmakeraw(&mut termios);
        // Not by cfsetspeed: libc names a version of it that a static glibc does not have.
        termios.c_cflag &= !libc::CBAUD;
        termios.c_cflag |= libc::B115200 | libc::CLOCAL | libc::CREAD;
        check(libc::tcsetattr(fd, libc::TCSANOW, &termios))?;
    }
    Ok(())
}

fn signal_set(signals: &[libc::c_int]) -> libc::sigset_t {
    // SAFETY: sigset_t is plain data; sigemptyset initialises it before sigaddset is used on it.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        for &signal in signals {
            libc::sigaddset(&mut set, signal);
        }
        set
    }
}

/// Blocks these signals in this thread and gives a descriptor from which they are read as
/// `signalfd_siginfo` records ([`SIGNAL_RECORD_BYTES`]).
pub(crate) fn signal_file(signals: &[libc::c_int]) -> io::Result<File> {
    let set = signal_set(signals);
    // SAFETY: `set` is initialised and outlives both calls; the descriptor that signalfd returns is
    // new, so it has no other owner.
    unsafe {
        check(libc::sigprocmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()))?;
        let fd = check(libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK))?;
        Ok(File::from_raw_fd(fd))
    }
}

/// The size of one record that [`signal_file`] gives; its first four bytes are the signal number.
pub(crate) const SIGNAL_RECORD_BYTES: usize = size_of::<libc::signalfd_siginfo>();

/// Waits until one of the files can be read or has hung up: which ones. `None`: no time limit.
pub(crate) fn wait_readable<const N: usize>(
    files: [&impl AsRawFd; N],
    limit_ms: Option<i32>,
) -> io::Result<[bool; N]> {
    let mut polls =
        files.map(|file| libc::pollfd { fd: file.as_raw_fd(), events: libc::POLLIN, revents: 0 });
    // SAFETY: `polls` is an array of N initialised entries that outlives the call.
    let result =
        unsafe { libc::poll(polls.as_mut_ptr(), N as libc::nfds_t, limit_ms.unwrap_or(-1)) };
    match check(result) {
        Err(e) if e.kind() == io::ErrorKind::Interrupted => Ok([false; N]),
        Err(e) => Err(e),
        Ok(_) => Ok(polls.map(|poll| poll.revents != 0)),
    }
}

/// Makes reads of this file return at once.
pub(crate) fn set_nonblocking(file: &impl AsRawFd) -> io::Result<()> {
    // SAFETY: F_GETFL and F_SETFL take no pointer.
    unsafe {
        let flags = check(libc::fcntl(file.as_raw_fd(), libc::F_GETFL))?;
        check(libc::fcntl(file.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK))?;
    }
    Ok(())
}

/// Takes one ended child, ours or an orphan, out of the process table: its process id.
pub(crate) fn reap_one() -> Option<u32> {
    let mut status = 0;
    // SAFETY: `status` outlives the call.
    let pid = unsafe { libc::waitpid(-1, &mut status, libc::WNOHANG) };
    u32::try_from(pid).ok().filter(|&pid| pid != 0)
}

/// Kills every process of a process group.
pub(crate) fn kill_group(leader: u32) {
    let Ok(leader) = i32::try_from(leader) else {
        return;
    };
    // SAFETY: kill takes no pointer; a group that is gone is ESRCH, which is what we want.
    unsafe { libc::kill(-leader, libc::SIGKILL) };
}

/// Has the child lead its own session, with its standard input as the controlling terminal if
/// `terminal` says so, and with no signal blocked.
pub(crate) fn in_own_session(command: &mut Command, terminal: bool) -> &mut Command {
    let none = signal_set(&[]);
    let set_up = move || {
        // SAFETY: setsid, ioctl(TIOCSCTTY) and sigprocmask are async-signal-safe, and `none` is an
        // initialised set that the closure owns.
        unsafe {
            check(libc::setsid())?;
            if terminal {
                check(libc::ioctl(0, libc::TIOCSCTTY, 0))?;
            }
            check(libc::sigprocmask(libc::SIG_SETMASK, &none, std::ptr::null_mut()))?;
        }
        Ok(())
    };
    // SAFETY: the closure runs between fork and exec and makes only the calls above; it does not
    // allocate and takes no lock.
    unsafe { command.pre_exec(set_up) }
}

/// The CPUs that this process may run on, in ascending order.
pub(crate) fn cpus() -> io::Result<Vec<u32>> {
    // SAFETY: cpu_set_t is plain data for which all-zero is the empty set; the kernel fills at most
    // the size that is passed.
    let set = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        check(libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &mut set))?;
        set
    };
    Ok((0..libc::CPU_SETSIZE as usize)
        // SAFETY: the index is below CPU_SETSIZE.
        .filter(|&cpu| unsafe { libc::CPU_ISSET(cpu, &set) })
        .map(|cpu| cpu as u32)
        .collect())
}

/// Pins the calling thread to one CPU and gives it the real-time policy `SCHED_FIFO`.
pub(crate) fn pin_fifo(cpu: u32, priority: i32) -> io::Result<()> {
    if cpu >= libc::CPU_SETSIZE as u32 {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    // SAFETY: both structures are plain data, initialised here, and outlive the calls; the index is
    // below CPU_SETSIZE; thread id 0 is the calling thread.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(cpu as usize, &mut set);
        check(libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set))?;
        let param = libc::sched_param { sched_priority: priority };
        check(libc::sched_setscheduler(0, libc::SCHED_FIFO, &param))?;
    }
    Ok(())
}

/// Keeps all memory of this process, present and future, mapped.
pub(crate) fn lock_memory() -> io::Result<()> {
    // SAFETY: mlockall takes no pointer.
    check(unsafe { libc::mlockall(libc::MCL_CURRENT | libc::MCL_FUTURE) })?;
    Ok(())
}

/// The monotonic clock, in nanoseconds.
pub(crate) fn now_ns() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` outlives the call. CLOCK_MONOTONIC always exists, so it does not fail.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// Sleeps until the monotonic clock reads `deadline_ns`; at once if it does already.
pub(crate) fn sleep_until(deadline_ns: u64) {
    let time = libc::timespec {
        tv_sec: (deadline_ns / 1_000_000_000) as libc::time_t,
        tv_nsec: (deadline_ns % 1_000_000_000) as libc::c_long,
    };
    // SAFETY: `time` is a valid time that outlives the call; an absolute sleep reports no rest.
    while unsafe {
        libc::clock_nanosleep(
            libc::CLOCK_MONOTONIC,
            libc::TIMER_ABSTIME,
            &time,
            std::ptr::null_mut(),
        )
    } == libc::EINTR
    {}
}

/// An anonymous file in memory.
pub(crate) fn memory_file(name: &str) -> io::Result<File> {
    let name = c_string(name)?;
    // SAFETY: the name is NUL-terminated; the descriptor is new, so it has no other owner.
    unsafe {
        let fd = check(libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC))?;
        Ok(File::from(OwnedFd::from_raw_fd(fd)))
    }
}

/// A private anonymous mapping of whole 4 KiB pages, all of them zero at first.
///
/// Its words are atomics, so that threads may share it without any rule about who writes what.
pub(crate) struct Pages {
    base: NonNull<AtomicU64>,
    pages: usize,
}

// SAFETY: the mapping is owned by this value, and it is only reached as atomics or by system calls.
unsafe impl Send for Pages {}
// SAFETY: as above.
unsafe impl Sync for Pages {}

impl Pages {
    /// Maps this many pages and asks the kernel for no huge ones.
    pub(crate) fn new(pages: usize) -> io::Result<Self> {
        let bytes = pages
            .checked_mul(PAGE_BYTES)
            .filter(|&bytes| bytes != 0)
            .ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))?;
        // SAFETY: a new anonymous mapping at an address of the kernel's choice replaces nothing;
        // madvise is asked about exactly this mapping.
        let base = unsafe {
            let base = libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            );
            if base == libc::MAP_FAILED {
                return Err(io::Error::last_os_error());
            }
            // A kernel without huge pages refuses the advice and has nothing to switch off.
            libc::madvise(base, bytes, libc::MADV_NOHUGEPAGE);
            base
        };
        let base = NonNull::new(base.cast())
            .ok_or_else(|| io::Error::other("the kernel mapped pages at address 0"))?;
        Ok(Self { base, pages })
    }

    /// How many pages there are.
    pub(crate) fn len(&self) -> usize {
        self.pages
    }

    /// The address of the first page, for `/proc/self/pagemap`.
    pub(crate) fn address(&self) -> usize {
        self.base.as_ptr() as usize
    }

    /// The words of one page.
    ///
    /// # Panics
    /// When there is no such page.
    pub(crate) fn page(&self, index: usize) -> &[AtomicU64] {
        assert!(index < self.pages, "page {index} of {}", self.pages);
        // SAFETY: the page lies in the mapping, which lives as long as `self`, is aligned to pages,
        // and holds initialised memory; any bytes are a valid AtomicU64.
        unsafe {
            std::slice::from_raw_parts(self.base.as_ptr().add(index * PAGE_WORDS), PAGE_WORDS)
        }
    }

    /// Has the kernel copy `len` bytes at `offset` of the file to byte `at` of one page: the number
    /// of bytes read.
    pub(crate) fn read_file_into(
        &self,
        file: &File,
        offset: u64,
        index: usize,
        at: usize,
        len: usize,
    ) -> io::Result<usize> {
        if at.checked_add(len).is_none_or(|end| end > PAGE_BYTES) {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        let page = self.page(index).as_ptr().cast_mut().cast::<u8>();
        // SAFETY: the target lies within the page by the check above, and the page's words are
        // atomics, which may change at any time.
        let read = unsafe {
            libc::pread(file.as_raw_fd(), page.add(at).cast(), len, offset as libc::off_t)
        };
        usize::try_from(read).map_err(|_| io::Error::last_os_error())
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping that `new` made; no borrow of it outlives `self`.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.pages * PAGE_BYTES) };
    }
}

/// The right of this thread to use I/O ports, given up when dropped. Bound to the thread that asked for it,
/// since the kernel grants it to a thread.
struct Ports(PhantomData<*const ()>);

impl Ports {
    fn open() -> io::Result<Self> {
        // SAFETY: iopl takes no pointer. Ports are used by `out` alone.
        check(unsafe { libc::iopl(3) })?;
        Ok(Self(PhantomData))
    }

    fn out(&self, port: u16, value: u32) {
        // SAFETY: `self` is not Send, so this is the thread that may use ports, and both ports that are
        // used are the VMM's. It answers into a request page, which callers reach only as atomics; the
        // block is not `nomem`, so they read it afresh.
        unsafe {
            std::arch::asm!(
                "out dx, eax",
                in("dx") port,
                in("eax") value,
                options(nostack, preserves_flags),
            );
        }
    }
}

impl Drop for Ports {
    fn drop(&mut self) {
        // SAFETY: iopl takes no pointer; giving the right up cannot fail.
        unsafe { libc::iopl(0) };
    }
}

/// Writes frame numbers of paging requests to the VMM's paging port.
pub(crate) struct PagingPort(Ports);

impl PagingPort {
    /// Asks the kernel for the right to use I/O ports, for this thread.
    pub(crate) fn open() -> io::Result<Self> {
        Ports::open().map(Self)
    }

    /// Tells the VMM that a request stands in the page with this guest frame number.
    pub(crate) fn request(&self, gfn: u32) {
        self.0.out(paging::PORT, gfn);
    }
}

/// Marks the beginning and the end of runs for the VMM. Not together with a [`PagingPort`].
pub(crate) struct MarkPort(Ports);

impl MarkPort {
    /// Asks the kernel for the right to use I/O ports, for this thread.
    pub(crate) fn open() -> io::Result<Self> {
        Ports::open().map(Self)
    }

    /// A run begins that is to last so many milliseconds; with 0 it is over.
    pub(crate) fn mark(&self, duration_ms: u32) {
        self.0.out(paging::MARK_PORT, duration_ms);
    }
}

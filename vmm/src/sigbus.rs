//! SIGBUS on a vCPU thread: the address of a fault that KVM could not serve.
//!
//! When the guest touches a page whose host mapping carries a UFFDIO_POISON marker, KVM sends the
//! vCPU thread a SIGBUS (`BUS_MCEERR_AR`, `si_addr` = host virtual address) and KVM_RUN returns
//! EINTR. The signal is *sent*, not forced: with the signal blocked or ignored KVM_RUN would
//! return EINTR for ever, and a handler that returned from any other SIGBUS would re-execute the
//! faulting instruction for ever. Hence:
//!
//! ```text
//! GuestThread::register(mappings)       handler installed, SIGBUS unblocked in this thread
//!   in_kvm_run(|| vcpu.run())
//!     SIGBUS: AR, inside KVM_RUN, in one of this thread's guest mappings?
//!       yes -> recorded; KVM_RUN returns EINTR; take_fault() -> Some(hva)
//!       AO (a memory error that nobody has run into yet) -> ignored: who does gets an AR
//!       no  -> default action restored, the same signal queued again: the process dies of it
//! ```
//!
//! A vCPU's thread does without the handler ([`GuestThread::collects`]): a signal frame with the state of the
//! floating-point unit, and the way back, cost more than the rest of a fault that is a hit. SIGBUS stays
//! blocked there, but not for KVM_RUN (KVM_SET_SIGNAL_MASK), which it ends; then sigtimedwait(2) has it.
//!
//! A recorded address is not yet a marker: the caller compares it with its page table, since a
//! real memory error on a present page arrives the same way.

// `unsafe`: sigaction, the handler's siginfo pointer, pthread_sigmask and sigtimedwait have no safe wrapper
// that gives si_addr; KVM_SET_SIGNAL_MASK is not in kvm-ioctls.
#![allow(unsafe_code)]

use std::io;
use std::marker::PhantomData;
use std::os::fd::AsRawFd;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, compiler_fence};

use libc::{c_int, c_void, siginfo_t};

/// Guest mappings that one thread may register: RAM below and above the 32-bit hole, and room for
/// regions added later.
pub const MAX_GUEST_MAPPINGS: usize = 8;

/// A part of this process's address space that backs guest RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestMapping {
    /// Host virtual address of its first byte.
    pub hva: u64,
    /// Its length in bytes.
    pub len: u64,
}

/// Why a thread cannot take SIGBUS for guest memory.
#[derive(Debug, thiserror::Error)]
pub enum SigbusError {
    /// More mappings than [`MAX_GUEST_MAPPINGS`].
    #[error(
        "cannot watch {count} guest mappings for SIGBUS: at most {MAX_GUEST_MAPPINGS} per vCPU"
    )]
    TooManyMappings {
        /// How many were given.
        count: usize,
    },
    /// No mapping at all: nothing could ever be recorded.
    #[error("cannot watch guest mappings for SIGBUS: none given")]
    NoMapping,
    /// An empty mapping, one at address 0, or one that wraps round.
    #[error(
        "cannot watch {len:#x} bytes at hva {hva:#x} for SIGBUS: not a mapping of this process"
    )]
    BadMapping {
        /// Its host virtual address.
        hva: u64,
        /// Its length in bytes.
        len: u64,
    },
    /// This thread has a [`GuestThread`] already.
    #[error("this thread is registered for SIGBUS on guest memory already")]
    AlreadyRegistered,
    /// sigaction(2) or pthread_sigmask(3) failed.
    #[error("cannot take SIGBUS: {call}: {source}")]
    Signal {
        /// The call.
        call: &'static str,
        /// What it said.
        source: io::Error,
    },
}

/// What the handler knows of the thread that it interrupts.
///
/// Only the thread itself and the handler on top of it touch these, so relaxed atomics are enough;
/// they are atomics because a plain cell must not change under the feet of the code it interrupts.
struct ThreadState {
    /// Mappings in use; 0 = not registered.
    count: AtomicUsize,
    /// First address and first address behind, per mapping.
    mappings: [(AtomicU64, AtomicU64); MAX_GUEST_MAPPINGS],
    in_kvm_run: AtomicBool,
    /// The recorded hva; 0 = none (no mapping holds address 0).
    fault: AtomicU64,
}

thread_local! {
    // Constant and without a destructor: the handler's access is a plain load relative to the
    // thread pointer, without lazy initialisation, hence async-signal-safe.
    static THREAD: ThreadState = const {
        ThreadState {
            count: AtomicUsize::new(0),
            mappings: [const { (AtomicU64::new(0), AtomicU64::new(0)) }; MAX_GUEST_MAPPINGS],
            in_kvm_run: AtomicBool::new(false),
            fault: AtomicU64::new(0),
        }
    };
}

impl ThreadState {
    /// Records `hva` if this thread is inside KVM_RUN and the address is guest memory of its own.
    /// Async-signal-safe.
    fn record(&self, hva: u64) -> bool {
        if !self.in_kvm_run.load(Ordering::Relaxed) {
            return false;
        }
        let count = self.count.load(Ordering::Relaxed);
        let ours = self.mappings.iter().take(count).any(|(start, end)| {
            (start.load(Ordering::Relaxed)..end.load(Ordering::Relaxed)).contains(&hva)
        });
        if ours {
            self.fault.store(hva, Ordering::Relaxed);
        }
        ours
    }
}

/// The right of the current thread to run a vCPU over some guest mappings. Not `Send`: it belongs
/// to the thread that registered. Dropping it makes every SIGBUS deadly again; after [`Self::collects`] one that
/// is sent waits.
#[derive(Debug)]
pub struct GuestThread {
    _this_thread_only: PhantomData<*const ()>,
}

impl GuestThread {
    /// Installs the process's handler if nobody has yet, unblocks SIGBUS in this thread and names
    /// the mappings whose faults are to be recorded.
    ///
    /// # Errors
    /// [`SigbusError`]: too many or impossible mappings, a second registration, a failed call.
    pub fn register(mappings: &[GuestMapping]) -> Result<Self, SigbusError> {
        if mappings.len() > MAX_GUEST_MAPPINGS {
            return Err(SigbusError::TooManyMappings { count: mappings.len() });
        }
        if mappings.is_empty() {
            return Err(SigbusError::NoMapping);
        }
        if let Some(&GuestMapping { hva, len }) =
            mappings.iter().find(|m| m.hva == 0 || m.len == 0 || m.hva.checked_add(m.len).is_none())
        {
            return Err(SigbusError::BadMapping { hva, len });
        }
        install()?;
        mask::change(libc::SIG_UNBLOCK)?;
        THREAD.with(|thread| {
            if thread.count.load(Ordering::Relaxed) != 0 {
                return Err(SigbusError::AlreadyRegistered);
            }
            for (slot, mapping) in thread.mappings.iter().zip(mappings) {
                slot.0.store(mapping.hva, Ordering::Relaxed);
                slot.1.store(mapping.hva + mapping.len, Ordering::Relaxed);
            }
            thread.fault.store(0, Ordering::Relaxed);
            thread.count.store(mappings.len(), Ordering::Relaxed);
            Ok(Self { _this_thread_only: PhantomData })
        })
    }

    /// Calls `run`, which is to do one KVM_RUN and nothing else that touches guest memory; faults
    /// that the kernel reports meanwhile are recorded for [`Self::take_fault`], or wait for
    /// [`Self::collect`] after [`Self::collects`].
    pub fn in_kvm_run<R>(&self, run: impl FnOnce() -> R) -> R {
        let _scope = KvmRunScope::enter();
        run()
    }

    /// From here on SIGBUS waits for [`Self::collect`], and KVM_RUN of `vcpu` ends by it all the same. A
    /// handler costs a frame with the state of the floating-point unit, and a system call to return.
    ///
    /// One that the kernel forces (a machine check while a kick ends KVM_RUN) finds it blocked, and ends the process.
    ///
    /// # Errors
    /// [`SigbusError::Signal`].
    pub fn collects(&mut self, vcpu: &impl AsRawFd) -> Result<(), SigbusError> {
        mask::in_kvm_run(vcpu)?;
        mask::change(libc::SIG_BLOCK)
    }

    /// Records the fault that KVM_RUN came back for, after [`Self::collects`]: to be called when it was
    /// interrupted. Takes one signal; should there be another, the next KVM_RUN is interrupted by it.
    pub fn collect(&self) {
        if let Some(info) = mask::take() {
            // SAFETY: of a SIGBUS, see `on_sigbus`.
            let (code, hva) = (info.si_code, unsafe { info.si_addr() } as u64);
            let _scope = KvmRunScope::enter();
            if !is_harmless(code, hva) {
                die(&info);
                let _ = mask::change(libc::SIG_UNBLOCK);
            }
        }
    }

    /// Calls `ioctl`, which is one that faults guest memory in and does not unblock SIGBUS by itself, after
    /// [`Self::collects`]. A fault that the kernel reports meanwhile is dropped.
    ///
    /// # Errors
    /// [`SigbusError::Signal`]: nothing was called, or SIGBUS is not blocked again.
    pub fn in_other_ioctl<R>(&self, ioctl: impl FnOnce() -> R) -> Result<R, SigbusError> {
        let scope = KvmRunScope::enter();
        // Blocked, it would have the kernel try again for ever.
        mask::change(libc::SIG_UNBLOCK)?;
        let result = ioctl();
        mask::change(libc::SIG_BLOCK)?;
        drop(scope);
        let _ = self.take_fault();
        Ok(result)
    }

    /// Does [`Self::take_fault`] have one?
    #[must_use]
    pub fn has_fault(&self) -> bool {
        THREAD.with(|thread| thread.fault.load(Ordering::Relaxed)) != 0
    }

    /// The host virtual address of the fault recorded since the last call, if there is one. Ask
    /// after KVM_RUN returned EINTR.
    #[must_use]
    pub fn take_fault(&self) -> Option<u64> {
        let hva = THREAD.with(|thread| thread.fault.swap(0, Ordering::Relaxed));
        (hva != 0).then_some(hva)
    }
}

impl Drop for GuestThread {
    fn drop(&mut self) {
        THREAD.with(|thread| thread.count.store(0, Ordering::Relaxed));
    }
}

/// Marks the thread as inside KVM_RUN; a guard, so that a panic in between unmarks it.
struct KvmRunScope;

impl KvmRunScope {
    fn enter() -> Self {
        THREAD.with(|thread| thread.in_kvm_run.store(true, Ordering::Relaxed));
        compiler_fence(Ordering::SeqCst);
        Self
    }
}

impl Drop for KvmRunScope {
    fn drop(&mut self) {
        compiler_fence(Ordering::SeqCst);
        THREAD.with(|thread| thread.in_kvm_run.store(false, Ordering::Relaxed));
    }
}

/// Installs the handler, once per process.
fn install() -> Result<(), SigbusError> {
    static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
    let installed = *INSTALLED.get_or_init(|| {
        let handler: extern "C" fn(c_int, *mut siginfo_t, *mut c_void) = on_sigbus;
        set_action(handler as libc::sighandler_t, libc::SA_SIGINFO | libc::SA_ONSTACK)
    });
    installed.map_err(|errno| SigbusError::Signal {
        call: "sigaction",
        source: io::Error::from_raw_os_error(errno),
    })
}

/// sigaction(SIGBUS). Async-signal-safe; the error is the errno.
fn set_action(handler: libc::sighandler_t, flags: c_int) -> Result<(), i32> {
    // SAFETY: a zeroed sigaction is a valid value (empty mask, no flags, SIG_DFL), and the handler
    // given with SA_SIGINFO is `on_sigbus`, which has the three-argument signature and does only
    // async-signal-safe things; both pointers are valid or null as sigaction(2) allows.
    let result = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler;
        action.sa_flags = flags;
        libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut())
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error().raw_os_error().unwrap_or(0)) }
}

mod mask {
    //! SIGBUS in the calling thread's signal mask, and in a vCPU's.

    use std::io;
    use std::os::fd::AsRawFd;

    use kvm_bindings::KVMIO;
    use libc::{c_int, siginfo_t, sigset_t};
    use vmm_sys_util::ioctl::ioctl_with_ref;
    use vmm_sys_util::ioctl_iow_nr;

    use super::SigbusError;

    /// `struct kvm_signal_mask` (Documentation/virt/kvm/api.rst, 4.15).
    #[repr(C)]
    struct KvmSignalMask {
        len: u32,
        /// Not aligned to more than `len`, as the kernel has it.
        sigset: [u8; KERNEL_SIGSET_BYTES],
    }

    /// `sizeof(sigset_t)` in the kernel; the C library's is longer.
    const KERNEL_SIGSET_BYTES: usize = 8;

    /// The header only: the set comes behind it.
    #[repr(C)]
    struct Header(u32);

    ioctl_iow_nr!(KVM_SET_SIGNAL_MASK, KVMIO, 0x8b, Header);

    fn sigbus() -> sigset_t {
        // SAFETY: the set is initialised by sigemptyset before it is changed.
        unsafe {
            let mut set: sigset_t = std::mem::zeroed();
            libc::sigemptyset(&mut set);
            libc::sigaddset(&mut set, libc::SIGBUS);
            set
        }
    }

    fn failed(call: &'static str, errno: c_int) -> SigbusError {
        SigbusError::Signal { call, source: io::Error::from_raw_os_error(errno) }
    }

    /// Blocks or unblocks it in the calling thread.
    pub(super) fn change(how: c_int) -> Result<(), SigbusError> {
        // SAFETY: both pointers are valid or null as sigaction(2) allows.
        match unsafe { libc::pthread_sigmask(how, &sigbus(), std::ptr::null_mut()) } {
            0 => Ok(()),
            errno => Err(failed("pthread_sigmask", errno)),
        }
    }

    /// While `vcpu` runs it is not blocked; everything else is as it is for this thread now.
    pub(super) fn in_kvm_run(vcpu: &impl AsRawFd) -> Result<(), SigbusError> {
        // SAFETY: the set is plain data, which the first call fills in and the second changes; the kernel's set
        // is the first part of the C library's.
        let (result, sigset) = unsafe {
            let mut now: sigset_t = std::mem::zeroed();
            let result = libc::pthread_sigmask(libc::SIG_BLOCK, std::ptr::null(), &mut now);
            libc::sigdelset(&mut now, libc::SIGBUS);
            (result, (&raw const now).cast::<[u8; KERNEL_SIGSET_BYTES]>().read())
        };
        if result != 0 {
            return Err(failed("pthread_sigmask", result));
        }
        let mask = KvmSignalMask { len: KERNEL_SIGSET_BYTES as u32, sigset };
        // SAFETY: KVM reads a mask of the length that it says.
        if unsafe { ioctl_with_ref(vcpu, KVM_SET_SIGNAL_MASK(), &mask) } < 0 {
            let errno = io::Error::last_os_error().raw_os_error();
            return Err(failed("KVM_SET_SIGNAL_MASK", errno.unwrap_or(0)));
        }
        Ok(())
    }

    /// One that waits for this thread, or for its process.
    pub(super) fn take() -> Option<siginfo_t> {
        let at_once = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: siginfo is plain data that the call fills in when it returns a signal.
        unsafe {
            let mut info: siginfo_t = std::mem::zeroed();
            (libc::sigtimedwait(&sigbus(), &mut info, &at_once) == libc::SIGBUS).then_some(info)
        }
    }
}

/// The handler. Everything in here is async-signal-safe: thread-local atomics and bare system
/// calls; errno is only touched on the way that ends the process.
extern "C" fn on_sigbus(_signal: c_int, info: *mut siginfo_t, _context: *mut c_void) {
    // SAFETY: installed with SA_SIGINFO, so the kernel passes a valid siginfo; SIGBUS sent by the
    // kernel fills in si_addr, and for other senders the same bytes are read but not used below.
    let (code, hva) = unsafe { ((*info).si_code, (*info).si_addr() as u64) };
    if !is_harmless(code, hva) {
        // SAFETY: `info` is valid as above.
        die(unsafe { &*info });
    }
}

/// Is it a fault of this thread's guest, which is recorded, or none at all? Async-signal-safe.
fn is_harmless(code: c_int, hva: u64) -> bool {
    // An AO's memory is not needed now, and may never be: a page of the store's or of a guest that never looks.
    code == libc::BUS_MCEERR_AO
        || code == libc::BUS_MCEERR_AR && THREAD.try_with(|t| t.record(hva)).unwrap_or(false)
}

/// Returning alone would suffice for an access that faults again, but would swallow a signal that somebody
/// sent: so the same siginfo is queued once more, and kills the process at the interrupted instruction as soon
/// as SIGBUS is no longer blocked, with a core that shows the original cause. Async-signal-safe.
fn die(info: &siginfo_t) {
    let _ = set_action(libc::SIG_DFL, 0);
    // SAFETY: a thread may queue any siginfo to itself.
    unsafe {
        libc::syscall(
            libc::SYS_rt_tgsigqueueinfo,
            libc::getpid(),
            libc::syscall(libc::SYS_gettid),
            libc::SIGBUS,
            std::ptr::from_ref(info),
        );
    }
}

#[cfg(test)]
mod tests;

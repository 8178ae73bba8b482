//! Kicks: making a vCPU thread leave KVM_RUN from another thread.
//!
//! A signal alone can arrive just before KVM_RUN and be lost. So the kicker first writes
//! `immediate_exit` in the vCPU's mapped `kvm_run`, and only then sends the signal; the vCPU thread
//! clears it again after EINTR (Documentation/virt/kvm/api.rst, `immediate_exit`).
#![allow(unsafe_code, reason = "signals, and one shared byte in the mapping of kvm_run")]

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use kvm_ioctls::VcpuFd;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

/// Installs the empty handler for the kick signal; without it the signal would end the process.
///
/// # Errors
/// When the kernel refuses.
pub fn install_handler() -> std::io::Result<()> {
    extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    register_signal_handler(SIGRTMIN(), nothing).map_err(Into::into)
}

/// Where a kick goes: the thread that runs one vCPU, for as long as it does.
#[derive(Clone, Debug, Default)]
pub struct Kicker {
    target: Arc<Mutex<Option<Target>>>,
}

#[derive(Debug)]
struct Target {
    thread: libc::pthread_t,
    immediate_exit: *const AtomicU8,
}

// SAFETY: `immediate_exit` points to one byte of the vCPU's kvm_run, valid while the target is set
// (see `Running`) and only accessed atomically; a pthread_t may be used from any thread while the
// thread lives, which the same rule ensures.
unsafe impl Send for Target {}

impl Kicker {
    /// Makes the vCPU's thread leave KVM_RUN now, or not enter it the next time. No effect when no
    /// thread runs the vCPU.
    pub fn kick(&self) {
        let target = self.target.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(target) = &*target {
            // SAFETY: the target is set, so the thread is alive and its kvm_run mapped.
            unsafe {
                (*target.immediate_exit).store(1, Ordering::SeqCst);
                libc::pthread_kill(target.thread, SIGRTMIN());
            }
        }
    }

    /// Declares that the calling thread runs this vCPU until the guard is dropped.
    pub fn enter(&self, vcpu: &mut VcpuFd) -> Running {
        let byte = &raw mut vcpu.get_kvm_run().immediate_exit;
        // SAFETY: pthread_self has no precondition.
        let thread = unsafe { libc::pthread_self() };
        let target = Target { thread, immediate_exit: byte.cast() };
        *self.target.lock().unwrap_or_else(PoisonError::into_inner) = Some(target);
        Running { kicker: self.clone() }
    }
}

/// While it lives, kicks reach the thread that made it. It must be dropped before the vCPU is.
#[derive(Debug)]
pub struct Running {
    kicker: Kicker,
}

impl Drop for Running {
    fn drop(&mut self) {
        *self.kicker.target.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

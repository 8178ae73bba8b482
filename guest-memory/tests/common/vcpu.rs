//! What a vCPU thread does when it meets a marker: SIGBUS with the address, the pager's first pass on
//! the thread itself, a sleep until the page has come, and the same access again.

use std::cell::Cell;
use std::mem;
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Once};

use guest_memory::{Fault, Pager, Sleeper, Woken};

/// Faults in a row at one address of a thread after which something is wrong.
const MOST_TRIES: u32 = 100_000;

/// How faults of vCPU threads were answered.
#[derive(Debug, Default)]
pub struct Answers {
    pub hits: AtomicU64,
    pub present: AtomicU64,
    pub waits: AtomicU64,
}

struct Vcpu {
    pager: *const Pager,
    lane: u16,
    sleeper: Arc<Sleeper>,
    answers: *const Answers,
    last: Cell<(u64, u32)>,
}

thread_local! {
    static VCPU: Cell<*const Vcpu> = const { Cell::new(ptr::null()) };
}

/// Runs `guest` on this thread as a vCPU: SIGBUS on a marker is a fault for the pager. Without markers
/// nothing happens but what `guest` does.
pub fn as_vcpu<T>(pager: &Pager, lane: u16, answers: &Answers, guest: impl FnOnce() -> T) -> T {
    static HANDLER: Once = Once::new();
    HANDLER.call_once(handle_sigbus);
    let sleeper = Arc::new(Sleeper::default());
    let vcpu = Vcpu { pager, lane, sleeper, answers, last: Cell::new((0, 0)) };
    VCPU.set(&raw const vcpu);
    let result = guest();
    VCPU.set(ptr::null());
    result
}

fn handle_sigbus() {
    let handler: extern "C" fn(_, _, _) = on_sigbus;
    // SAFETY: all zeros are a valid sigaction without flags and mask.
    let mut action: libc::sigaction = unsafe { mem::zeroed() };
    // The thread's own stack: what the pager does does not fit on an alternate one.
    action.sa_flags = libc::SA_SIGINFO;
    action.sa_sigaction = handler as usize;
    // SAFETY: the action is whole, and its handler has the signature that SA_SIGINFO asks for.
    let result = unsafe { libc::sigaction(libc::SIGBUS, &raw const action, ptr::null_mut()) };
    assert_eq!(result, 0);
}

/// The signal comes out of a plain access of guest RAM, where this thread is inside no other code: so that
/// locks and allocations are as safe as in a function called there.
extern "C" fn on_sigbus(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel hands a whole siginfo in, of a signal that has an address.
    let (code, address) = unsafe { ((*info).si_code, (*info).si_addr() as u64) };
    let vcpu = VCPU.get();
    // BUS_ADRERR is what a kernel without CONFIG_MEMORY_FAILURE says outside KVM_RUN.
    if vcpu.is_null() || !matches!(code, libc::BUS_MCEERR_AR | libc::BUS_ADRERR) {
        die("a SIGBUS that is none of ours")
    }
    // SAFETY: `as_vcpu` keeps the value and what it points to while the guest runs on this thread.
    let (vcpu, pager, answers) = unsafe { (&*vcpu, &*(*vcpu).pager, &*(*vcpu).answers) };
    let Some(gfn) = pager.gfn_at(address) else { die("SIGBUS outside guest RAM") };
    let (last, tries) = vcpu.last.get();
    let tries = if last == address { tries + 1 } else { 0 };
    vcpu.last.set((address, tries));
    if tries > MOST_TRIES {
        die("a fault that does not end")
    }
    match pager.fault(gfn, vcpu.lane, &vcpu.sleeper.begin()) {
        Ok(Fault::Hit(_)) => answers.hits.fetch_add(1, Ordering::Relaxed),
        Ok(Fault::Present) => answers.present.fetch_add(1, Ordering::Relaxed),
        Ok(Fault::Waits { .. }) => {
            let Woken::Page(_) = vcpu.sleeper.wait(None) else { die("an odd wake-up") };
            answers.waits.fetch_add(1, Ordering::Relaxed)
        }
        Ok(Fault::Lost) | Err(_) => die("a page is lost"),
    };
}

/// Unwinding out of a signal handler is not possible.
fn die(why: &str) -> ! {
    eprintln!("vCPU thread: {why}");
    std::process::abort();
}

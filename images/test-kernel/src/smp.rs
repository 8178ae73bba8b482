//! A second processor, which waits for work and does it.
// Unsafe: the start-up code is copied to where SIPI wants it; work is kept as an address.
#![allow(unsafe_code)]

use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use crate::{apic, boot, cpu, descriptors, interrupts, memory};

/// The page of the start-up code, below 1 MiB and used by nothing else.
const START_PAGE: u8 = 8;
/// How long the other one may take to come up, in ticks of the time-stamp counter (seconds).
const START_LIMIT_TICKS: u64 = 20_000_000_000;

/// Where the second processor is.
static STATE: AtomicUsize = AtomicUsize::new(OFF);
const OFF: usize = 0;
const IDLE: usize = 1;
const BUSY: usize = 2;

static WORK: AtomicUsize = AtomicUsize::new(0);
static ARGUMENT: AtomicU64 = AtomicU64::new(0);

/// What the second processor can be given.
pub(crate) type Work = fn(u64);

/// There is no second processor, or it does not come up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NoProcessor;

/// Starts the second processor, APIC id 1, unless it runs.
pub(crate) fn start() -> Result<(), NoProcessor> {
    if STATE.load(Ordering::SeqCst) != OFF {
        return Ok(());
    }
    let target = memory::words(u64::from(START_PAGE) * memory::PAGE_BYTES);
    for (word, bytes) in target.iter().zip(boot::trampoline().chunks(8)) {
        let mut padded = [0; 8];
        padded[..bytes.len()].copy_from_slice(bytes);
        word.store(u64::from_le_bytes(padded), Ordering::SeqCst);
    }
    apic::start_processor(1, START_PAGE);
    let begin = cpu::tsc();
    while STATE.load(Ordering::SeqCst) == OFF {
        if cpu::tsc() - begin > START_LIMIT_TICKS {
            return Err(NoProcessor);
        }
        cpu::relax();
    }
    Ok(())
}

/// INIT to the second processor, which must be idle. [`start`] has it begin anew.
pub(crate) fn stop() {
    wait();
    STATE.store(OFF, Ordering::SeqCst);
    apic::stop_processor(1);
}

/// Has the second processor, which must be idle, call `work(argument)`. [`wait`] waits for its end.
pub(crate) fn give(work: Work, argument: u64) {
    wait();
    ARGUMENT.store(argument, Ordering::SeqCst);
    WORK.store(work as usize, Ordering::SeqCst);
    STATE.store(BUSY, Ordering::SeqCst);
}

/// Waits until the second processor is idle.
pub(crate) fn wait() {
    while STATE.load(Ordering::SeqCst) == BUSY {
        cpu::relax();
    }
}

/// Where the second processor begins. It spins while it has nothing to do: it needs no wake-up.
pub(crate) extern "C" fn ap_main() -> ! {
    descriptors::load(1);
    interrupts::load();
    apic::enable();
    STATE.store(IDLE, Ordering::SeqCst);
    loop {
        if STATE.load(Ordering::SeqCst) == BUSY {
            // SAFETY: stored by `give` before the state.
            let work = unsafe { core::mem::transmute::<usize, Work>(WORK.load(Ordering::SeqCst)) };
            work(ARGUMENT.load(Ordering::SeqCst));
            STATE.store(IDLE, Ordering::SeqCst);
        }
        cpu::relax();
    }
}

//! Time, by the local APIC's timer: KVM counts it in nanoseconds.

use core::sync::atomic::{AtomicU64, Ordering};

use crate::apic;
use crate::cpu::{self, MAX_CPUS};
use crate::interrupts::{self, FIRST_INTERRUPT, Frame, Handled};

const VECTOR: u8 = FIRST_INTERRUPT + 15;
const MS: u32 = 1_000_000;

/// The timer's interrupts on each processor.
static TICKS: [AtomicU64; MAX_CPUS] = [const { AtomicU64::new(0) }; MAX_CPUS];

fn tick(_: &mut Frame) -> Handled {
    TICKS[cpu::number()].fetch_add(1, Ordering::SeqCst);
    apic::eoi();
    Handled::Yes
}

/// How often the timer interrupted this processor.
pub(crate) fn ticks() -> u64 {
    TICKS[cpu::number()].load(Ordering::SeqCst)
}

/// From now on an interrupt every so many nanoseconds, until [`stop`].
pub(crate) fn every(ns: u32) {
    interrupts::set_hook(VECTOR, tick);
    apic::timer_every(VECTOR, ns);
}

/// No interrupt of the timer any more.
pub(crate) fn stop() {
    apic::timer_off();
}

/// Lets interrupts come until the condition holds, for so many milliseconds or a little more; whether it
/// holds in the end. Interrupts must be off, and are off between them.
pub(crate) fn wait_until(limit_ms: u64, condition: impl Fn() -> bool) -> bool {
    every(MS);
    let begin = ticks();
    let mut holds = condition();
    while !holds && ticks() - begin < limit_ms {
        cpu::wait_for_interrupt();
        holds = condition();
    }
    stop();
    holds
}

/// Lets interrupts come for so many milliseconds or a little more.
pub(crate) fn wait_ms(ms: u64) {
    wait_until(ms, || false);
}

/// What `work` takes, in nanoseconds: at most 4 seconds. It may not use the timer.
pub(crate) fn time_ns(work: impl FnOnce()) -> u32 {
    apic::timer_silent(u32::MAX);
    work();
    let left = apic::timer_left();
    apic::timer_off();
    u32::MAX - left
}

//! The local APIC, by MSRs (x2APIC) where there are such, else by its page (xAPIC).
// Unsafe: the page is reached by its address.
#![allow(unsafe_code)]

use core::arch::asm;
use core::sync::atomic::{AtomicBool, Ordering};

use crate::{cpu, msr};

/// The page of the xAPIC.
pub(crate) const PAGE: u64 = 0xfee0_0000;
/// Offset of the identification register.
pub(crate) const ID: u32 = 0x20;
/// Offset of the task priority register.
pub(crate) const TASK_PRIORITY: u32 = 0x80;
const END_OF_INTERRUPT: u32 = 0xb0;
const SPURIOUS: u32 = 0xf0;
const COMMAND: u32 = 0x300;
const COMMAND_HIGH: u32 = 0x310;
const TIMER: u32 = 0x320;
const TIMER_COUNT: u32 = 0x380;
const TIMER_LEFT: u32 = 0x390;
const TIMER_DIVIDE: u32 = 0x3e0;
const DIVIDE_BY_1: u32 = 0b1011;
const MASKED: u32 = 1 << 16;
const PERIODIC: u32 = 1 << 17;

const SOFTWARE_ENABLED: u32 = 1 << 8;
const SPURIOUS_VECTOR: u32 = 0x2f;

const MSR_BASE: u32 = 0x1b;
const BASE_X2: u64 = 1 << 10;
const BASE_ENABLED: u64 = 1 << 11;
const MSR_X2: u32 = 0x800;
/// CPUID leaf 1, ECX.
const HAS_X2: u32 = 1 << 21;

/// Commands: INIT, start-up, and to which processors (Intel SDM 3A, 11.6.1).
const INIT: u32 = 5 << 8 | 1 << 14;
const START_UP: u32 = 6 << 8 | 1 << 14;
const SELF: u32 = 1 << 18;

static X2: AtomicBool = AtomicBool::new(false);

fn x2() -> bool {
    X2.load(Ordering::Relaxed)
}

/// Reads a register, by its offset in the page.
pub(crate) fn read(register: u32) -> u32 {
    if x2() {
        return msr::read(MSR_X2 + register / 16).unwrap_or(0) as u32;
    }
    let value;
    // SAFETY: the APIC's page, by one plain load, which KVM emulates.
    unsafe {
        asm!("mov {:e}, [{}]", out(reg) value, in(reg) PAGE + u64::from(register), options(nostack));
    }
    value
}

/// Writes a register.
pub(crate) fn write(register: u32, value: u32) {
    if x2() {
        let _ = msr::write(MSR_X2 + register / 16, u64::from(value));
        return;
    }
    // SAFETY: the APIC's page, by one plain store, which KVM emulates.
    unsafe {
        asm!("mov [{}], {:e}", in(reg) PAGE + u64::from(register), in(reg) value, options(nostack));
    }
}

/// Turns this processor's on, as x2APIC if it is one. The PICs' lines are masked.
pub(crate) fn enable() {
    for pic in [0x21, 0xa1] {
        cpu::out8(pic, 0xff);
    }
    let base = msr::read(MSR_BASE).unwrap_or(PAGE) | BASE_ENABLED;
    let has_x2 = cpu::cpuid(1, 0).ecx & HAS_X2 != 0;
    let is_x2 = has_x2 && msr::write(MSR_BASE, base | BASE_X2).is_ok();
    X2.store(is_x2, Ordering::Relaxed);
    start();
}

/// Makes this processor's an xAPIC, whose registers are in a page. For one processor alone.
pub(crate) fn use_page() -> Result<(), msr::Refused> {
    // From x2APIC the way leads through off only.
    let base = msr::read(MSR_BASE)? & !(BASE_ENABLED | BASE_X2);
    msr::write(MSR_BASE, base)?;
    msr::write(MSR_BASE, base | BASE_ENABLED)?;
    X2.store(false, Ordering::Relaxed);
    start();
    Ok(())
}

fn start() {
    write(TASK_PRIORITY, 0);
    write(SPURIOUS, SOFTWARE_ENABLED | SPURIOUS_VECTOR);
}

/// Turns this processor's off or on by its spurious vector register. Off, it takes no interrupt, and its
/// timer is masked.
pub(crate) fn software_enable(on: bool) {
    write(SPURIOUS, if on { SOFTWARE_ENABLED } else { 0 } | SPURIOUS_VECTOR);
}

/// Acknowledges the interrupt that is being handled.
pub(crate) fn eoi() {
    write(END_OF_INTERRUPT, 0);
}

fn command(to: u32, command: u32) {
    if x2() {
        let _ = msr::write(MSR_X2 + COMMAND / 16, u64::from(to) << 32 | u64::from(command));
        return;
    }
    write(COMMAND_HIGH, to << 24);
    write(COMMAND, command);
}

/// An interrupt to this processor itself.
pub(crate) fn interrupt_self(vector: u8) {
    command(0, SELF | u32::from(vector));
}

/// An interrupt to another processor, by its APIC id.
pub(crate) fn interrupt(to: u32, vector: u8) {
    command(to, u32::from(vector));
}

/// INIT to another processor: it waits for a SIPI.
pub(crate) fn stop_processor(to: u32) {
    command(to, INIT);
}

/// INIT and SIPI to another processor: it begins in real mode at this page below 1 MiB.
pub(crate) fn start_processor(to: u32, page: u8) {
    stop_processor(to);
    command(to, START_UP | u32::from(page));
}

/// One interrupt at this vector, `ticks` of the timer from now (KVM: nanoseconds).
pub(crate) fn timer_once(vector: u8, ticks: u32) {
    timer(u32::from(vector), ticks);
}

/// An interrupt at this vector every `ticks` of the timer.
pub(crate) fn timer_every(vector: u8, ticks: u32) {
    timer(PERIODIC | u32::from(vector), ticks);
}

/// Counts down from `ticks`, without an interrupt.
pub(crate) fn timer_silent(ticks: u32) {
    timer(MASKED, ticks);
}

fn timer(entry: u32, ticks: u32) {
    write(TIMER_DIVIDE, DIVIDE_BY_1);
    write(TIMER, entry);
    write(TIMER_COUNT, ticks);
}

/// What is left of the ticks that the timer counts down from.
pub(crate) fn timer_left() -> u32 {
    read(TIMER_LEFT)
}

/// No interrupt of the timer any more.
pub(crate) fn timer_off() {
    write(TIMER, MASKED);
    write(TIMER_COUNT, 0);
}

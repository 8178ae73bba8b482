//! KVM's paravirtual areas, which KVM itself writes: they stay in memory whatever is evicted, and only as
//! long as they are areas (Documentation/virt/kvm/x86/msr.rst).

use alloc::format;
use core::sync::atomic::{AtomicU64, Ordering};

use super::{Outcome, Test};
use crate::interrupts::{self, FIRST_INTERRUPT, Frame, Handled};
use crate::memory::Pages;
use crate::{apic, cpu, ensure, evict, msr, println};

pub(super) const TESTS: &[Test] = &[
    Test { name: "clock", run: clock },
    Test { name: "steal-time", run: steal_time },
    Test { name: "pv-eoi", run: pv_eoi },
    Test { name: "areas-move", run: moved },
    Test { name: "areas-refused", run: refused },
];

const SYSTEM_TIME: u32 = 0x4b56_4d01;
const STEAL_TIME: u32 = 0x4b56_4d03;
const PV_EOI: u32 = 0x4b56_4d04;
const ENABLED: u64 = 1;

/// KVM's features, CPUID leaf 0x4000_0001, EAX: the bits of these areas.
const FEATURES: u32 = 0x4000_0001;
const HAS_CLOCK: u32 = 1 << 3;
const HAS_STEAL_TIME: u32 = 1 << 5;
const HAS_PV_EOI: u32 = 1 << 6;

const AREAS: Pages = Pages::new(512, 64);
const ROUNDS: u64 = 100;
const VECTOR: u8 = FIRST_INTERRUPT + 1;

fn offered(feature: u32) -> bool {
    cpu::cpuid(FEATURES, 0).eax & feature != 0
}

fn set(msr: u32, value: u64) -> Outcome {
    msr::write(msr, value).map_err(|why| format!("MSR {msr:#x} = {value:#x}: {why:?}"))
}

/// Has `count` pages of areas evicted, of which so many should go; returns how many did.
fn evict_areas(count: u64, should_go: u64) -> Result<u64, alloc::string::String> {
    let first = AREAS.frames().start;
    evict::until(should_go, first..first + count).map_err(|why| format!("{why:?}"))
}

/// Fails if this area's page can be evicted: what KVM writes there would be lost in silence.
fn stays(page: u64) -> Outcome {
    let gone = evict::frames([AREAS.frame(page)]).map_err(|why| format!("{why:?}"))?;
    ensure!(gone == 0, "the area's page was evicted");
    Ok(())
}

fn evict_everything() -> Outcome {
    evict::everything().map(drop).map_err(|why| format!("{why:?}"))
}

/// Nanoseconds of the guest's clock, and the version of the area they come from.
fn now(page: u64) -> (u64, u64) {
    let words = AREAS.words(page);
    let word = |index: usize| words[index].load(Ordering::SeqCst);
    // struct pvclock_vcpu_time_info: version, pad, tsc_timestamp, system_time, mul, shift, flags.
    let (version, stamp, base, scale) = (word(0), word(1), word(2), word(3));
    let shift = (scale >> 32) as i8;
    let ticks = cpu::tsc().wrapping_sub(stamp);
    let ticks = if shift < 0 { ticks >> -shift } else { ticks << shift };
    let scaled = (u128::from(ticks) * u128::from(scale as u32)) >> 32;
    (base.wrapping_add(scaled as u64), version & 0xffff_ffff)
}

fn clock() -> Outcome {
    ensure!(offered(HAS_CLOCK), "KVM offers no clock");
    set(SYSTEM_TIME, AREAS.address(0) | ENABLED)?;
    let (mut before, mut version) = now(0);
    ensure!(version != 0, "the clock was not written at all");
    for round in 0..ROUNDS {
        stays(0)?;
        evict_everything()?;
        // KVM writes the area anew at the next entry.
        set(SYSTEM_TIME, AREAS.address(0) | ENABLED)?;
        let (time, next) = now(0);
        ensure!(next != version, "round {round}: the clock stands still at version {version}");
        ensure!(time > before, "round {round}: {time} ns is not after {before} ns");
        (before, version) = (time, next);
    }
    set(SYSTEM_TIME, 0)
}

fn steal_time() -> Outcome {
    ensure!(offered(HAS_STEAL_TIME), "KVM offers no steal time");
    set(STEAL_TIME, AREAS.address(1) | ENABLED)?;
    // struct kvm_steal_time: steal, version.
    let version = || AREAS.words(1)[1].load(Ordering::SeqCst) as u32;
    let mut before = version();
    for round in 0..ROUNDS {
        stays(1)?;
        evict_everything()?;
        let now = version();
        ensure!(now != before, "round {round}: steal time stays at version {before}");
        before = now;
    }
    set(STEAL_TIME, 0)
}

static INTERRUPTS: AtomicU64 = AtomicU64::new(0);
static SKIPPED: AtomicU64 = AtomicU64::new(0);

/// Acknowledges by the area, if KVM says that this will do.
fn acknowledge(_: &mut Frame) -> Handled {
    INTERRUPTS.fetch_add(1, Ordering::SeqCst);
    if AREAS.words(2)[0].fetch_and(!1, Ordering::SeqCst) & 1 != 0 {
        SKIPPED.fetch_add(1, Ordering::SeqCst);
    } else {
        apic::eoi();
    }
    Handled::Yes
}

fn pv_eoi() -> Outcome {
    ensure!(offered(HAS_PV_EOI), "KVM offers no PV-EOI");
    for count in [&INTERRUPTS, &SKIPPED] {
        count.store(0, Ordering::SeqCst);
    }
    interrupts::set_hook(VECTOR, acknowledge);
    set(PV_EOI, AREAS.address(2) | ENABLED)?;
    for round in 0..ROUNDS {
        stays(2)?;
        evict_everything()?;
        // The first one brings in what the handler needs: every exit on the way takes KVM's word back.
        for number in 2 * round..2 * round + 2 {
            apic::interrupt_self(VECTOR);
            cpu::interrupts_on();
            while INTERRUPTS.load(Ordering::SeqCst) == number {
                cpu::relax();
            }
            cpu::interrupts_off();
        }
    }
    set(PV_EOI, 0)?;
    interrupts::clear_hook(VECTOR);
    let (interrupts, skipped) = (INTERRUPTS.load(Ordering::SeqCst), SKIPPED.load(Ordering::SeqCst));
    println!("measured: pv-eoi interrupts={interrupts} acknowledged-by-area={skipped}");
    // An interrupt of the host's at the wrong moment is an exit, too.
    ensure!(skipped >= ROUNDS / 2, "{skipped} of {interrupts} acknowledged by the area");
    Ok(())
}

fn moved() -> Outcome {
    const MOVES: u64 = 10_000;
    for msr in [SYSTEM_TIME, STEAL_TIME, PV_EOI] {
        for number in 0..MOVES {
            set(msr, AREAS.address(number % AREAS.count()) | ENABLED)?;
        }
        for page in 0..AREAS.count() {
            AREAS.words(page)[64].store(page, Ordering::SeqCst);
        }
        let gone = evict_areas(AREAS.count(), AREAS.count() - 1)?;
        ensure!(gone == AREAS.count() - 1, "MSR {msr:#x}: {gone} of {} evicted", AREAS.count());
        set(msr, 0)?;
        let gone = evict_areas(AREAS.count(), AREAS.count())?;
        ensure!(gone == AREAS.count(), "MSR {msr:#x}: off, and {gone} evicted");
    }
    Ok(())
}

fn refused() -> Outcome {
    let page = AREAS.address(0);
    for (msr, value, why) in [
        (STEAL_TIME, page | 1 << 1 | ENABLED, "reserved bits"),
        (PV_EOI, page | 1 << 1 | ENABLED, "an address that is not aligned"),
        (PV_EOI, 1 << 50 | ENABLED, "an address outside RAM"),
        (0x11, page, "the legacy wall clock"),
        (0x12, page | ENABLED, "the legacy clock"),
        (0x4b56_4dff, 1, "an MSR that is none"),
    ] {
        ensure!(msr::write(msr, value).is_err(), "{msr:#x} = {value:#x} is taken: {why}");
    }
    for msr in [0x11, 0x12] {
        ensure!(msr::read(msr).is_err(), "{msr:#x} can be read");
    }
    // Nothing is pinned for what was refused.
    AREAS.words(0)[64].store(1, Ordering::SeqCst);
    let gone = evict_areas(1, 1)?;
    ensure!(gone == 1, "the page of a refused area stays");
    Ok(())
}

//! Whether this kernel's own parts work: what all other tests build upon.

use alloc::format;
use core::sync::atomic::{AtomicU64, Ordering};

use super::{Outcome, Test};
use crate::interrupts::{self, FIRST_INTERRUPT, Frame, Handled, PAGE_FAULT};
use crate::{apic, cpu, ensure, evict, memory, msr, smp, user};

pub(super) const TESTS: &[Test] = &[
    Test { name: "msr", run: unknown_msr },
    Test { name: "interrupt", run: interrupt },
    Test { name: "page-fault", run: page_fault },
    Test { name: "user", run: user_mode },
    Test { name: "evict", run: evicted },
    Test { name: "processors", run: processors },
];

const VECTOR: u8 = FIRST_INTERRUPT;
/// A tenth of a millisecond, where the timer counts nanoseconds.
const SOON_TICKS: u32 = 100_000;

fn unknown_msr() -> Outcome {
    const NO_MSR: u32 = 0x4b56_4dff;
    ensure!(msr::read(NO_MSR) == Err(msr::Refused), "RDMSR of an MSR that is none");
    ensure!(msr::write(NO_MSR, 1) == Err(msr::Refused), "WRMSR to an MSR that is none");
    const TSC: u32 = 0x10;
    ensure!(msr::read(TSC).is_ok(), "RDMSR of the time-stamp counter");
    Ok(())
}

static COUNT: AtomicU64 = AtomicU64::new(0);

fn count(_: &mut Frame) -> Handled {
    COUNT.fetch_add(1, Ordering::SeqCst);
    apic::eoi();
    Handled::Yes
}

fn interrupt() -> Outcome {
    COUNT.store(0, Ordering::SeqCst);
    interrupts::set_hook(VECTOR, count);
    apic::interrupt_self(VECTOR);
    cpu::interrupts_on();
    while COUNT.load(Ordering::SeqCst) == 0 {
        cpu::relax();
    }
    cpu::interrupts_off();
    apic::timer_once(VECTOR, SOON_TICKS);
    cpu::wait_for_interrupt();
    interrupts::clear_hook(VECTOR);
    let count = COUNT.load(Ordering::SeqCst);
    ensure!(count == 2, "{count} interrupts");
    Ok(())
}

/// An address without a translation: identity-mapped is what lies below 4 GiB.
const UNMAPPED: u64 = 1 << 40;

fn skip_load(frame: &mut Frame) -> Handled {
    if cpu::cr2() != UNMAPPED {
        return Handled::No;
    }
    COUNT.store(frame.error_code, Ordering::SeqCst);
    frame.rip = frame.r15;
    Handled::Yes
}

fn page_fault() -> Outcome {
    COUNT.store(!0, Ordering::SeqCst);
    interrupts::set_hook(PAGE_FAULT, skip_load);
    memory::load_or_skip(UNMAPPED);
    interrupts::clear_hook(PAGE_FAULT);
    let code = COUNT.load(Ordering::SeqCst);
    ensure!(code == 0, "error code {code:#x}");
    Ok(())
}

/// In ring 3.
extern "C" fn wait_for_count(last: u64) -> u64 {
    while COUNT.load(Ordering::SeqCst) < last {
        cpu::relax();
    }
    last + 1
}

static CPL: AtomicU64 = AtomicU64::new(0);

fn note_ring(frame: &mut Frame) -> Handled {
    CPL.store(u64::from(frame.cpl()), Ordering::SeqCst);
    count(frame)
}

fn user_mode() -> Outcome {
    COUNT.store(0, Ordering::SeqCst);
    interrupts::set_hook(VECTOR, note_ring);
    apic::timer_once(VECTOR, SOON_TICKS);
    let result = user::run(wait_for_count, 1);
    apic::timer_off();
    interrupts::clear_hook(VECTOR);
    ensure!(result == 2, "ring 3 returned {result}");
    let cpl = CPL.load(Ordering::SeqCst);
    ensure!(cpl == 3, "the interrupt came at CPL {cpl}");
    Ok(())
}

fn evicted() -> Outcome {
    const PAGES: memory::Pages = memory::Pages::new(evict::REQUEST_PAGES, 16);
    for page in 0..PAGES.count() {
        PAGES.words(page)[7].store(page + 1, Ordering::SeqCst);
    }
    let failed = |why| format!("{why:?}");
    let gone = evict::until(PAGES.count(), PAGES.frames()).map_err(failed)?;
    ensure!(gone == PAGES.count(), "{gone} pages evicted");
    evict::everything().map_err(failed)?;
    evict::kernel().map_err(failed)?;
    for page in 0..PAGES.count() {
        let word = PAGES.words(page)[7].load(Ordering::SeqCst);
        ensure!(word == page + 1, "page {page} has {word}");
    }
    Ok(())
}

fn processors() -> Outcome {
    COUNT.store(0, Ordering::SeqCst);
    smp::start().map_err(|why| format!("{why:?}"))?;
    smp::give(|number| COUNT.store(number + cpu::number() as u64, Ordering::SeqCst), 41);
    smp::wait();
    let count = COUNT.load(Ordering::SeqCst);
    ensure!(count == 42, "the other processor left {count}");
    interrupts::set_hook(VECTOR, count_here);
    smp::give(|to| apic::interrupt(to as u32, VECTOR), 0);
    cpu::wait_for_interrupt();
    smp::wait();
    interrupts::clear_hook(VECTOR);
    let count = COUNT.load(Ordering::SeqCst);
    ensure!(count == 0, "no interrupt from the other processor: {count}");
    Ok(())
}

fn count_here(_: &mut Frame) -> Handled {
    COUNT.store(cpu::number() as u64, Ordering::SeqCst);
    apic::eoi();
    Handled::Yes
}

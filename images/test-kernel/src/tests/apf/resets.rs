//! Async page faults that end before their page-ready: the protocol turned off and on, its area moved, its
//! local APIC off, its processor reset. Made for a store that takes 100 ms for each page: none comes before
//! it ends.

use alloc::format;
use core::sync::atomic::{AtomicU64, Ordering};

use super::pages::{area, check, evict, exit, interrupts_on, touch};
use super::side::{
    ACK, AS_INTERRUPT, EN, ENABLED, INT, KEEP_ACK, READY, SEND_ALWAYS, SKIP, Side, WAKE_ALL, write,
};
use crate::memory::{self, PAGE_BYTES};
use crate::tests::{Outcome, Test};
use crate::{apic, cpu, ensure, msr, println, smp, timer};

pub(crate) const TESTS: &[Test] = &[
    Test { name: "apf-off-and-on", run: off_and_on },
    Test { name: "apf-on-again", run: on_again },
    Test { name: "apf-area-moves", run: area_moves },
    Test { name: "apf-apic-off", run: apic_off },
    Test { name: "apf-processor-reset", run: processor_reset },
    Test { name: "apf-fault-after-reset", run: fault_after_reset },
];

const ON: u64 = ENABLED | AS_INTERRUPT | SEND_ALWAYS;

/// Turned off, nothing is sent for what is outstanding; turned on, the wake-all and nothing else.
fn off_and_on() -> Outcome {
    let side = Side::here();
    side.turn_on(area(0), SEND_ALWAYS)?;
    side.leave_outstanding(0..4)?;
    write(EN, 0)?;
    (0..4).try_for_each(check)?;
    timer::wait_ms(5);
    side.expect_nothing()?;
    ensure!(side.token() == 0, "token word {:#x}", side.token());
    // Off with a page-ready that is not acknowledged.
    side.turn_on(area(0), SEND_ALWAYS)?;
    side.set(KEEP_ACK);
    let tokens = side.leave_outstanding(4..8)?;
    (4..8).try_for_each(check)?;
    timer::wait_ms(5);
    let came = side.readies.take();
    ensure!(came.len() == 1 && tokens.contains(&came[0]), "page-ready for {came:#x?}");
    write(EN, 0)?;
    write(ACK, 1)?;
    timer::wait_ms(5);
    side.expect_nothing()?;
    side.turn_on(area(0), SEND_ALWAYS)?;
    side.whole_cycle(0)?;
    write(EN, 0)
}

/// The same value written again: the wake-all takes the place of all that is owed.
fn on_again() -> Outcome {
    let side = Side::here();
    side.turn_on(area(0), SEND_ALWAYS)?;
    side.leave_outstanding(0..4)?;
    write(EN, area(0) | ON)?;
    side.expect_ready(&[WAKE_ALL])?;
    (0..4).try_for_each(check)?;
    timer::wait_ms(5);
    side.expect_nothing()?;
    side.whole_cycle(5)?;
    write(EN, 0)
}

/// The area that was before is not written any more.
fn area_moves() -> Outcome {
    const PATTERN: u64 = 0x0123_4567_89ab_cdef;
    let side = Side::here();
    side.turn_on(area(0), SEND_ALWAYS)?;
    side.leave_outstanding(0..4)?;
    let words = memory::words(area(0) & !(PAGE_BYTES - 1));
    let old = &words[(area(0) % PAGE_BYTES / 8) as usize];
    // Its token word is free for whoever does not look which area it is.
    old.store(PATTERN & 0xffff_ffff, Ordering::SeqCst);
    side.listen(area(1));
    write(EN, area(1) | ON)?;
    side.expect_ready(&[WAKE_ALL])?;
    (0..4).try_for_each(check)?;
    timer::wait_ms(5);
    side.expect_nothing()?;
    for page in 4..8 {
        side.whole_cycle(page)?;
    }
    let found = old.load(Ordering::SeqCst);
    ensure!(found == PATTERN & 0xffff_ffff, "the old area has {found:#x}");
    write(EN, 0)
}

/// Exits until something is sent, at most this many.
fn exits_until_ready(side: &Side, most: u32) -> u32 {
    for exits in 0..most {
        if side.readies.len() > 0 {
            return exits;
        }
        exit();
        interrupts_on();
        cpu::interrupts_off();
    }
    most
}

/// Nothing is sent while the local APIC takes no interrupt, and nothing is lost.
fn apic_off() -> Outcome {
    // A refused interrupt is tried again ever more rarely, but at every 64th exit.
    const MOST: u32 = 65;
    let side = Side::here();
    apic::software_enable(false);
    side.listen(area(0));
    write(INT, READY.into())?;
    write(EN, area(0) | ON)?;
    for _ in 0..200 {
        exit();
        ensure!(side.token() == 0, "token word {:#x}", side.token());
    }
    apic::software_enable(true);
    let exits = exits_until_ready(side, MOST);
    println!("measured: apf-apic-off wake-all exits={exits}");
    side.expect_ready(&[WAKE_ALL])?;
    // Tokens likewise.
    apic::software_enable(false);
    let tokens = side.leave_outstanding(0..1)?;
    check(0)?;
    for _ in 0..200 {
        exit();
        ensure!(side.token() == 0, "token word {:#x}", side.token());
    }
    side.expect_nothing()?;
    apic::software_enable(true);
    let exits = exits_until_ready(side, MOST);
    println!("measured: apf-apic-off token exits={exits}");
    side.expect_ready(&tokens)?;
    side.whole_cycle(1)?;
    write(EN, 0)
}

/// What the second processor found: 0 when all was well.
static FAILED: AtomicU64 = AtomicU64::new(0);
static FOUND: [AtomicU64; 2] = [const { AtomicU64::new(0) }; 2];

/// Has the second processor do something that may fail.
fn there(work: smp::Work) -> Outcome {
    there_with(work, 0)
}

fn there_with(work: smp::Work, argument: u64) -> Outcome {
    FAILED.store(0, Ordering::SeqCst);
    smp::give(work, argument);
    smp::wait();
    ensure!(FAILED.load(Ordering::SeqCst) == 0, "on the second processor, see above");
    Ok(())
}

fn note(outcome: Outcome) {
    if let Err(why) = outcome {
        println!("second processor: {why}");
        FAILED.store(1, Ordering::SeqCst);
    }
}

fn turn_on_there(_: u64) {
    note(Side::here().turn_on(area(2), SEND_ALWAYS));
}

fn leave_outstanding_there(_: u64) {
    note(Side::here().leave_outstanding(0..COUNT).map(drop));
}

fn cycle_there(_: u64) {
    note(Side::here().whole_cycle(1).map(drop));
    note(write(EN, 0));
}

/// Nothing is announced.
fn off_there(page: u64) {
    let side = Side::here();
    side.set(SKIP);
    note(evict(page..page + 1));
    touch(page);
    note(check(page));
    note(side.expect_nothing());
}

fn read_there(_: u64) {
    for (found, msr) in FOUND.iter().zip([EN, INT]) {
        found.store(msr::read(msr).unwrap_or(!0), Ordering::SeqCst);
    }
}

/// As Linux where it is off, which leaves what it did not ask for.
fn wait_there(_: u64) {
    Side::here().set(KEEP_ACK);
    interrupts_on();
    cpu::interrupts_off();
    (0..100).for_each(|_| exit());
    timer::wait_ms(5);
}

/// When the second processor's page comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Comes {
    /// It is reset, runs again, and has read EN.
    AfterRead,
    /// It is reset and runs again; the VMM has not seen it since.
    WhileItRuns,
    /// It is reset and waits for SIPI.
    WhileItWaits,
}

/// How many pages are outstanding.
const COUNT: u64 = 3;

/// INIT turns the protocol off.
fn processor_reset() -> Outcome {
    let failed = |why| format!("{why:?}");
    smp::start().map_err(failed)?;
    let side = Side::of(1);
    for comes in [Comes::AfterRead, Comes::WhileItRuns, Comes::WhileItWaits] {
        there(turn_on_there)?;
        there(leave_outstanding_there)?;
        ensure!(side.readies.len() == 0, "{comes:?}: the page came too early for this test");
        smp::stop();
        if comes == Comes::WhileItWaits {
            (0..COUNT).try_for_each(check)?;
            timer::wait_ms(5);
        }
        smp::start().map_err(failed)?;
        if comes == Comes::AfterRead {
            there(read_there)?;
        }
        (0..COUNT).try_for_each(check)?;
        timer::wait_ms(1);
        there(wait_there)?;
        let strays = side.readies.take().len();
        println!("measured: apf-processor-reset comes={comes:?} strays={strays}");
        // Only a page that comes before anybody could know of the INIT.
        let most = usize::from(comes == Comes::WhileItRuns);
        ensure!(strays <= most, "{comes:?}: {strays} page-ready after INIT");
        there(read_there)?;
        let found = [0, 1].map(|at: usize| FOUND[at].load(Ordering::SeqCst));
        ensure!(found == [0, 0], "{comes:?}: EN and INT are {found:#x?} after INIT");
        there(off_there)?;
        there(turn_on_there)?;
        there(cycle_there)?;
    }
    Ok(())
}

/// The first thing that the VMM sees of a processor that got INIT is a fault: it is not announced.
fn fault_after_reset() -> Outcome {
    let failed = |why| format!("{why:?}");
    smp::start().map_err(failed)?;
    for _ in 0..2 {
        there(turn_on_there)?;
        there(leave_outstanding_there)?;
        smp::stop();
        smp::start().map_err(failed)?;
        there_with(off_there, COUNT)?;
        (0..COUNT).try_for_each(check)?;
        timer::wait_ms(1);
        there(read_there)?;
        let found = [0, 1].map(|at: usize| FOUND[at].load(Ordering::SeqCst));
        ensure!(found == [0, 0], "EN and INT are {found:#x?} after INIT");
        ensure!(Side::of(1).readies.len() == 0, "page-ready after INIT");
        there(turn_on_there)?;
        there(cycle_there)?;
    }
    Ok(())
}

//! Guests that use the protocol as nobody should: nothing of it hurts anybody else, and they get on again
//! when they do what they should.

use alloc::format;
use core::sync::atomic::{AtomicU64, Ordering};

use super::pages::{AREAS, area, check, evict, exit, touch};
use super::side::{
    ACK, AS_INTERRUPT, EN, ENABLED, INT, KEEP_ACK, LIMIT_MS, READY, SEND_ALWAYS, SKIP, Side,
    WAKE_ALL, check_tokens, write,
};
use crate::memory::PAGE_BYTES;
use crate::tests::{Outcome, Test};
use crate::{ensure, evict, println, timer};

pub(crate) const TESTS: &[Test] = &[
    Test { name: "apf-area-moves-for-ever", run: area_moves_for_ever },
    Test { name: "apf-area-is-evicted", run: area_is_evicted },
    Test { name: "apf-area-on-the-stack", run: area_on_the_stack },
    Test { name: "apf-spoilt-token", run: spoilt_token },
    Test { name: "apf-spoilt-flags", run: spoilt_flags },
    Test { name: "apf-never-acknowledged", run: never_acknowledged },
    Test { name: "apf-low-vector", run: low_vector },
];

const ON: u64 = ENABLED | AS_INTERRUPT | SEND_ALWAYS;
/// The most pages that the VMM keeps outstanding or unacknowledged for one processor.
const MAX_OUTSTANDING: usize = 256;

fn evict_frames(frames: impl IntoIterator<Item = u64>) -> Result<u64, alloc::string::String> {
    evict::frames(frames).map(u64::from).map_err(|why| format!("{why:?}"))
}

/// One page is kept in memory for an area, however often it moves.
fn area_moves_for_ever() -> Outcome {
    const MOVES: u64 = 10_000;
    let side = Side::here();
    side.listen(area(0));
    write(INT, READY.into())?;
    for number in 0..MOVES {
        let address = AREAS.address(number % AREAS.count()) + 64 * (number / AREAS.count() % 64);
        write(EN, address | ON)?;
    }
    for page in 0..AREAS.count() {
        AREAS.words(page)[511].store(page + 1, Ordering::SeqCst);
    }
    let gone = evict_frames(AREAS.frames())?;
    ensure!(gone == AREAS.count() - 1, "{gone} of {} evicted", AREAS.count());
    write(EN, 0)?;
    let gone = evict_frames(AREAS.frames())?;
    ensure!(gone == AREAS.count(), "off, and {gone} evicted");
    timer::wait_ms(1);
    side.turn_on(area(0), SEND_ALWAYS)?;
    side.whole_cycle(0)?;
    write(EN, 0)
}

/// The page of the area is out of memory when EN names it.
fn area_is_evicted() -> Outcome {
    let side = Side::here();
    for page in 0..10 {
        side.listen(area(page));
        AREAS.words(page)[0].store(page + 1, Ordering::SeqCst);
        let gone = evict_frames([area(page) / PAGE_BYTES])?;
        ensure!(gone == 1, "area {page}: not evicted");
        write(INT, READY.into())?;
        write(EN, area(page) | ON)?;
        let gone = evict_frames([area(page) / PAGE_BYTES])?;
        ensure!(gone == 0, "area {page}: evicted while it is one");
        side.expect_ready(&[WAKE_ALL])?;
        side.whole_cycle(page)?;
    }
    write(EN, 0)
}

#[repr(C, align(64))]
struct Local([AtomicU64; 8]);

/// The area lies between this function's variables.
fn area_on_the_stack() -> Outcome {
    let side = Side::here();
    let local = Local([const { AtomicU64::new(0) }; 8]);
    let address = local.0.as_ptr() as u64;
    side.turn_on(address, SEND_ALWAYS)?;
    for page in 0..5 {
        let gone = evict_frames([address / PAGE_BYTES])?;
        ensure!(gone == 0, "the stack with the area was evicted");
        side.whole_cycle(page)?;
    }
    write(EN, 0)?;
    let rest = local.0[1..].iter().all(|word| word.load(Ordering::SeqCst) == 0);
    ensure!(rest, "the rest of the area was written");
    let gone = evict_frames([address / PAGE_BYTES])?;
    ensure!(gone == 1, "off, and the stack's page is kept");
    Ok(())
}

/// Whatever is in the token word, it is the guest's until it is 0.
fn spoilt_token() -> Outcome {
    let side = Side::here();
    side.turn_on(area(0), SEND_ALWAYS)?;
    for spoilt in [1, 0xdead_beef, WAKE_ALL] {
        let tokens = side.leave_outstanding(0..1)?;
        side.spoil_token(spoilt);
        check(0)?;
        for _ in 0..100 {
            exit();
        }
        timer::wait_ms(5);
        side.expect_nothing()?;
        ensure!(side.token() == spoilt, "the token word became {:#x}", side.token());
        // An ACK of nothing.
        write(ACK, 1)?;
        timer::wait_ms(2);
        side.expect_nothing()?;
        side.clear_token();
        exit();
        side.expect_ready(&tokens)?;
    }
    side.whole_cycle(1)?;
    write(EN, 0)
}

/// Likewise the flags.
fn spoilt_flags() -> Outcome {
    let side = Side::here();
    let word = &AREAS.words(0)[(area(0) % PAGE_BYTES / 8) as usize];
    side.turn_on(area(0), SEND_ALWAYS)?;
    side.set(SKIP);
    for spoilt in [2, 0x8000_0000, 0xffff_ffff] {
        evict(0..1)?;
        word.fetch_or(spoilt, Ordering::SeqCst);
        touch(0);
        check(0)?;
        timer::wait_ms(2);
        side.expect_nothing()?;
        ensure!(u64::from(side.clear_flags()) == spoilt, "the flags word was written");
    }
    side.whole_cycle(1)?;
    write(EN, 0)
}

/// More pages than the VMM keeps: those beyond are waited for, and each that was announced is ready in the
/// end.
fn never_acknowledged() -> Outcome {
    const COUNT: u64 = 400;
    let side = Side::here();
    side.turn_on(area(0), SEND_ALWAYS)?;
    side.set(SKIP | KEEP_ACK);
    evict(0..COUNT)?;
    (0..COUNT).for_each(touch);
    (0..COUNT).try_for_each(check)?;
    timer::wait_ms(5);
    let (mut tokens, readies) = (side.faults.take(), side.readies.len());
    println!("measured: apf-never-acknowledged told={} of={COUNT}", tokens.len());
    ensure!(tokens.len() == MAX_OUTSTANDING, "{} page-not-present", tokens.len());
    ensure!(readies == 1, "{readies} page-ready without ACK");
    check_tokens(&tokens)?;
    side.set(0);
    write(ACK, 1)?;
    timer::wait_until(LIMIT_MS, || side.readies.len() >= MAX_OUTSTANDING);
    timer::wait_ms(5);
    let mut came = side.readies.take();
    let count = came.len();
    came.sort_unstable();
    tokens.sort_unstable();
    ensure!(came == tokens, "{count} page-ready, and not one for each token");
    // The same, and off instead of ACK.
    side.set(SKIP | KEEP_ACK);
    evict(0..COUNT)?;
    (0..COUNT).for_each(touch);
    let told = side.faults.len();
    ensure!(told == MAX_OUTSTANDING, "{told} page-not-present");
    write(EN, 0)?;
    (0..COUNT).try_for_each(check)?;
    side.turn_on(area(0), SEND_ALWAYS)?;
    side.whole_cycle(0)?;
    write(EN, 0)
}

/// A vector below 16, which no local APIC delivers: who looks finds the token all the same.
fn low_vector() -> Outcome {
    let side = Side::here();
    side.turn_on(area(0), SEND_ALWAYS)?;
    for vector in [0, 2, 14, 15] {
        write(INT, vector)?;
        let tokens = side.leave_outstanding(0..1)?;
        timer::wait_until(LIMIT_MS, || side.token() != 0);
        ensure!(side.clear_token() == tokens[0], "the token word is not {:#x}", tokens[0]);
        write(ACK, 1)?;
        side.expect_nothing()?;
        check(0)?;
    }
    write(INT, READY.into())?;
    side.whole_cycle(1)?;
    write(EN, 0)
}

//! Async page faults as a guest sees them that may use all of the protocol: page-not-present in ring 0, by
//! "send always". Made for a store that takes 10 ms for each page.

pub(super) mod hostile;
mod pages;
pub(super) mod registers;
pub(super) mod resets;
mod side;

use alloc::format;
use core::sync::atomic::Ordering;

use self::pages::{PAGES, area, check, evict, exit, interrupts_on, touch};
use self::side::{
    ACK, EN, KEEP_ACK, KEEP_FLAGS, KEEP_TOKEN, LIMIT_MS, SEND_ALWAYS, Side, check_tokens, write,
};
use super::{Outcome, Test};
use crate::{cpu, ensure, evict, memory, println, timer, user};

pub(super) const TESTS: &[Test] = &[
    Test { name: "apf-send-always", run: send_always },
    Test { name: "apf-one-at-a-time", run: one_at_a_time },
    Test { name: "apf-flags", run: flags },
    Test { name: "apf-uninterruptible", run: uninterruptible },
    Test { name: "apf-kernel-mode", run: kernel_mode },
    Test { name: "apf-user-mode", run: user_mode },
    Test { name: "apf-hits", run: hits },
];

/// What a page's store takes at the least, in nanoseconds, and a little less.
const DELAY_NS: u32 = 9_000_000;

/// The whole way of a page, over and over.
fn send_always() -> Outcome {
    const ROUNDS: u64 = 50;
    let side = Side::here();
    side.turn_on(area(0), SEND_ALWAYS)?;
    let mut tokens = alloc::vec::Vec::new();
    for round in 0..ROUNDS {
        tokens.push(side.whole_cycle(round % 7)?);
        let cpl = side.fault_cpl.load(Ordering::SeqCst);
        ensure!(cpl == 0, "page-not-present at CPL {cpl}");
    }
    check_tokens(&tokens)?;
    write(EN, 0)
}

/// Pages are outstanding side by side; one page-ready at a time is sent, and the next after ACK.
fn one_at_a_time() -> Outcome {
    const COUNT: u64 = 12;
    let side = Side::here();
    side.turn_on(area(0), SEND_ALWAYS)?;
    side.set(KEEP_TOKEN | KEEP_ACK);
    let tokens = side.leave_outstanding(0..COUNT)?;
    // Until they have come: then each would be sent if it might.
    for page in 0..COUNT {
        check(page)?;
    }
    timer::wait_ms(5);
    let mut came = side.readies.take();
    ensure!(came.len() == 1, "page-ready for {came:#x?}, and there was no ACK");
    for number in 1..COUNT {
        let sent = side.token();
        ensure!(sent == came[came.len() - 1], "the token word became {sent:#x}");
        match number % 3 {
            // The word, but no ACK.
            0 => {
                side.clear_token();
                timer::wait_ms(3);
            }
            // ACK, but not the word: it is looked at again at an exit.
            1 => {
                write(ACK, 1)?;
                timer::wait_ms(3);
                exit();
                ensure!(side.token() == sent, "the token word became {:#x}", side.token());
            }
            // A value that does not acknowledge.
            _ => {
                side.clear_token();
                write(ACK, 2)?;
                timer::wait_ms(3);
            }
        }
        ensure!(side.readies.len() == 0, "{number}: page-ready without word or ACK");
        side.clear_token();
        write(ACK, 1)?;
        exit();
        timer::wait_until(LIMIT_MS, || side.readies.len() > 0);
        came.append(&mut side.readies.take());
    }
    side.clear_token();
    write(ACK, 1)?;
    timer::wait_ms(5);
    side.expect_nothing()?;
    let count = came.len();
    came.sort_unstable();
    let mut tokens = tokens;
    tokens.sort_unstable();
    ensure!(came == tokens, "{count} page-ready {came:#x?} for {tokens:#x?}");
    write(EN, 0)
}

/// While the guest has not read the flags, no other page-not-present comes: the access takes its time.
fn flags() -> Outcome {
    let side = Side::here();
    side.turn_on(area(0), SEND_ALWAYS)?;
    evict(1..2)?;
    side.set(KEEP_FLAGS);
    let first = side.leave_outstanding(0..1)?;
    ensure!(side.flags() == 1, "flags {:#x}", side.flags());
    let took = timer::time_ns(|| touch(1));
    check(1)?;
    ensure!(took > DELAY_NS, "page 1 took {took} ns");
    let faults = side.faults.len();
    ensure!(faults == 0, "page-not-present while flags is {:#x}", side.flags());
    side.expect_ready(&first)?;
    side.clear_flags();
    side.whole_cycle(2)?;
    write(EN, 0)
}

/// With interrupts off nothing is sent, and no interrupt runs meanwhile.
fn uninterruptible() -> Outcome {
    let side = Side::here();
    side.turn_on(area(0), SEND_ALWAYS)?;
    evict(0..2)?;
    let took = timer::time_ns(|| drop(check(0)));
    check(0)?;
    ensure!(took > DELAY_NS, "page 0 took {took} ns");
    let before = timer::ticks();
    timer::every(500_000);
    let found = check(1);
    let after = timer::ticks();
    timer::stop();
    found?;
    ensure!(after == before, "{} interrupts with IF clear", after - before);
    timer::wait_ms(5);
    side.expect_nothing()?;
    write(EN, 0)
}

/// Without "send always" ring 0 is not told, but halted: interrupts run meanwhile.
fn kernel_mode() -> Outcome {
    let side = Side::here();
    side.turn_on(area(0), 0)?;
    for page in 0..5 {
        evict(page..page + 1)?;
        let before = timer::ticks();
        timer::every(1_000_000);
        interrupts_on();
        let found = check(page);
        cpu::interrupts_off();
        timer::stop();
        found?;
        let ticks = timer::ticks() - before;
        println!("measured: apf-kernel-mode ticks={ticks}");
        ensure!(ticks >= 3, "page {page}: {ticks} interrupts while it was waited for");
    }
    timer::wait_ms(5);
    side.expect_nothing()?;
    write(EN, 0)
}

/// In ring 3.
extern "C" fn load(page: u64) -> u64 {
    PAGES.words(page)[7].load(Ordering::SeqCst)
}

/// Without "send always" ring 3 is told.
fn user_mode() -> Outcome {
    let side = Side::here();
    side.turn_on(area(0), 0)?;
    for page in 0..5 {
        evict(page..page + 1)?;
        let found = user::run(load, page);
        check(page)?;
        ensure!(found == load(page), "page {page} has {found:#x}");
        let tokens = side.faults.take();
        ensure!(tokens.len() == 1, "{} page-not-present for one access", tokens.len());
        check_tokens(&tokens)?;
        let cpl = side.fault_cpl.load(Ordering::SeqCst);
        ensure!(cpl == 3, "page-not-present at CPL {cpl}");
        side.expect_ready(&tokens)?;
    }
    write(EN, 0)
}

/// Pages whose bytes are at hand: nobody is told of them. With `--evict-to idle`.
fn hits() -> Outcome {
    const ROUNDS: u64 = 50;
    const COUNT: u64 = 100;
    let side = Side::here();
    side.turn_on(area(0), SEND_ALWAYS)?;
    for _ in 0..ROUNDS {
        evict(0..COUNT)?;
        interrupts_on();
        let found = (0..COUNT).try_for_each(check);
        cpu::interrupts_off();
        found?;
    }
    timer::wait_ms(5);
    side.expect_nothing()?;
    // Of the area's page there is but one.
    let gone = evict::frames([area(0) / memory::PAGE_BYTES]).map_err(|why| format!("{why:?}"))?;
    ensure!(gone == 0, "the area's page was evicted");
    println!("measured: apf-hits faults={}", ROUNDS * COUNT);
    write(EN, 0)
}

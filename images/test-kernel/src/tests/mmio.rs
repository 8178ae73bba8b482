//! Instructions that move data between RAM and a device, which KVM emulates as a whole.

use alloc::format;
use core::sync::atomic::Ordering;

use super::emulated::{self, Evicted, OPERANDS};
use super::{Outcome, Test, false_faults};
use crate::memory::{self, PAGE_BYTES, Pages};
use crate::{apic, ensure, evict, println};

pub(super) const TESTS: &[Test] =
    &[Test { name: "mmio-nothing", run: nothing }, Test { name: "mmio-apic", run: local_apic }];

/// Where there is neither RAM nor a device: reads as ones.
const NOTHING: u64 = 0xd000_0000;
/// How often each is tried.
const TRIES: u64 = 50;
/// The bytes of an operand.
const BYTES: u64 = 4;

/// The operand across two pages.
fn get(pages: Pages) -> u64 {
    let (low, high) =
        (pages.words(0)[511].load(Ordering::SeqCst), pages.words(1)[0].load(Ordering::SeqCst));
    low >> 48 | (high & 0xffff) << 16
}

fn put(pages: Pages, value: u64) {
    pages.words(0)[511].store(value << 48, Ordering::SeqCst);
    pages.words(1)[0].store(value >> 16, Ordering::SeqCst);
}

/// `one` is given a number, what to evict and where, and says whether all was right.
fn measure(what: &str, one: fn(u64, Evicted, Pages) -> bool) -> Outcome {
    let mut all_wrong = 0;
    for evicted in Evicted::ALL {
        let (mut wrong, mut gone) = (0, 0);
        false_faults::begin();
        for (try_, pages) in (0..TRIES).zip(OPERANDS.iter().cycle()) {
            wrong += u64::from(!one(try_, evicted, *pages));
            gone += evict::answer().map_err(|why| format!("{why:?}"))?;
            false_faults::progress();
        }
        let faults = false_faults::end();
        all_wrong += wrong;
        println!(
            "measured: {what} evicted={evicted:?} tries={TRIES} pages={gone} \
             false-faults={faults} wrong={wrong}"
        );
    }
    ensure!(all_wrong == 0, "{what}: {all_wrong} values are wrong");
    Ok(())
}

fn request(evicted: Evicted, pages: Pages) -> u32 {
    evict::prepare(evicted.frames(pages))
}

fn nothing() -> Outcome {
    measure("load", |_, evicted, pages| {
        emulated::load(request(evicted, pages), NOTHING) == u32::MAX
    })?;
    measure("movs-from-nothing", |_, evicted, pages| {
        put(pages, 0);
        let request = request(evicted, pages);
        emulated::movsd(request, NOTHING, emulated::operand(pages, BYTES));
        get(pages) == u64::from(u32::MAX)
    })?;
    measure("movs-to-nothing", |try_, evicted, pages| {
        put(pages, try_);
        let request = request(evicted, pages);
        emulated::movsd(request, emulated::operand(pages, BYTES), NOTHING);
        get(pages) == try_
    })?;
    measure("push-from-nothing", |_, evicted, pages| {
        let stack = pages.address(1);
        let word = &memory::words(stack - PAGE_BYTES)[511];
        word.store(0, Ordering::SeqCst);
        emulated::push(request(evicted, pages), NOTHING, stack);
        word.load(Ordering::SeqCst) == u64::MAX
    })
}

/// A task priority: on AMD processors KVM keeps the upper half of it only, which is CR8.
fn priority(try_: u64) -> u64 {
    (try_ & 0xf) << 4
}

fn local_apic() -> Outcome {
    const REGISTER: u64 = apic::PAGE + apic::TASK_PRIORITY as u64;
    apic::use_page().map_err(|why| format!("{why:?}"))?;
    ensure!(apic::read(apic::ID) == 0, "the boot processor's APIC id");
    measure("movs-to-apic", |try_, evicted, pages| {
        let value = priority(try_);
        put(pages, value);
        let request = request(evicted, pages);
        emulated::movsd(request, emulated::operand(pages, BYTES), REGISTER);
        u64::from(apic::read(apic::TASK_PRIORITY)) == value
    })?;
    measure("movs-from-apic", |try_, evicted, pages| {
        let value = priority(try_);
        apic::write(apic::TASK_PRIORITY, value as u32);
        put(pages, !0);
        let request = request(evicted, pages);
        emulated::movsd(request, REGISTER, emulated::operand(pages, BYTES));
        get(pages) == value
    })?;
    measure("load-from-apic", |try_, evicted, pages| {
        let value = priority(try_) as u32;
        apic::write(apic::TASK_PRIORITY, value);
        emulated::load(request(evicted, pages), REGISTER) == value
    })?;
    apic::write(apic::TASK_PRIORITY, 0);
    Ok(())
}

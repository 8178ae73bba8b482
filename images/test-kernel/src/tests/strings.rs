//! `REP OUTSB` and `REP INSB`, which KVM emulates: bytes go out to a UART that sends them back to itself,
//! and come in from it. Its FIFO loses a byte that is read twice.

use alloc::format;

use core::sync::atomic::{AtomicBool, Ordering};

use super::emulated::{self, Evicted, OPERANDS};
use super::{Outcome, Test, false_faults};
use crate::memory::{PAGE_BYTES, Pages};
use crate::{boot, cpu, ensure, evict, memory, println, smp};

pub(super) const TESTS: &[Test] = &[
    Test { name: "rep-outs", run: outs },
    Test { name: "rep-ins", run: ins },
    Test { name: "rep-beside-eviction", run: beside_eviction },
];

const COM2: u16 = 0x2f8;
const MODEM_CONTROL: u16 = COM2 + 4;
const LOOPBACK: u8 = 1 << 4;
/// How often each instruction is tried.
const TRIES: u64 = 500;
/// The bytes of each.
const BYTES: u64 = 16;

fn byte(try_: u64, at: u64) -> u8 {
    (try_ * 31 + at * 7 + 1) as u8
}

fn at(pages: Pages, offset: u64) -> (&'static core::sync::atomic::AtomicU64, u32) {
    let address = emulated::operand(pages, BYTES) + offset;
    let words = memory::words(address & !(PAGE_BYTES - 1));
    (&words[(address % PAGE_BYTES / 8) as usize], (address % 8 * 8) as u32)
}

fn put(pages: Pages, offset: u64, value: u8) {
    let (word, shift) = at(pages, offset);
    word.fetch_and(!(0xff << shift), Ordering::SeqCst);
    word.fetch_or(u64::from(value) << shift, Ordering::SeqCst);
}

fn get(pages: Pages, offset: u64) -> u8 {
    let (word, shift) = at(pages, offset);
    (word.load(Ordering::SeqCst) >> shift) as u8
}

/// One try; the bytes that are not what they should be.
fn out_and_back(try_: u64, evicted: Evicted, pages: Pages) -> u64 {
    (0..BYTES).for_each(|offset| put(pages, offset, byte(try_, offset)));
    let request = evict::prepare(evicted.frames(pages));
    emulated::rep_outsb(request, COM2, emulated::operand(pages, BYTES), BYTES);
    false_faults::progress();
    (0..BYTES).filter(|offset| cpu::in8(COM2) != byte(try_, *offset)).count() as u64
}

/// One try; the bytes that are not what they should be.
fn in_from_there(try_: u64, evicted: Evicted, pages: Pages) -> u64 {
    for offset in 0..BYTES {
        put(pages, offset, 0);
        cpu::out8(COM2, byte(try_, offset));
    }
    let request = evict::prepare(evicted.frames(pages));
    emulated::rep_insb(request, COM2, emulated::operand(pages, BYTES), BYTES);
    false_faults::progress();
    (0..BYTES).filter(|offset| get(pages, *offset) != byte(try_, *offset)).count() as u64
}

type Try = fn(u64, Evicted, Pages) -> u64;

fn measure(what: &str, one: Try) -> Outcome {
    cpu::out8(MODEM_CONTROL, LOOPBACK);
    let mut all_wrong = 0;
    for evicted in Evicted::ALL {
        // Over and over with the same operand, and with two by turns.
        for operands in [&OPERANDS[..1], &OPERANDS[..]] {
            let (mut wrong, mut gone) = (0, 0);
            false_faults::begin();
            for (try_, pages) in (0..TRIES).zip(operands.iter().cycle()) {
                wrong += one(try_, evicted, *pages);
                gone += evict::answer().map_err(|why| format!("{why:?}"))?;
            }
            let faults = false_faults::end();
            all_wrong += wrong;
            println!(
                "measured: {what} evicted={evicted:?} operands={} tries={TRIES} pages={gone} \
                 false-faults={faults} wrong={wrong}",
                operands.len()
            );
        }
    }
    cpu::out8(MODEM_CONTROL, 0);
    ensure!(all_wrong == 0, "{all_wrong} bytes are wrong");
    Ok(())
}

fn outs() -> Outcome {
    measure("rep-outs", out_and_back)
}

fn ins() -> Outcome {
    measure("rep-ins", in_from_there)
}

static STOP: AtomicBool = AtomicBool::new(false);

/// The second processor: evicts all that the first one needs, over and over.
fn keep_evicting(_: u64) {
    while !STOP.load(Ordering::SeqCst) {
        let operands = OPERANDS.iter().flat_map(Pages::frames);
        let _ = evict::frames(operands.chain(boot::kernel_frames()));
    }
}

fn beside_eviction() -> Outcome {
    smp::start().map_err(|why| format!("{why:?}"))?;
    cpu::out8(MODEM_CONTROL, LOOPBACK);
    STOP.store(false, Ordering::SeqCst);
    false_faults::begin();
    smp::give(keep_evicting, 0);
    let mut wrong = 0;
    for (try_, pages) in (0..TRIES).zip(OPERANDS.iter().cycle()) {
        wrong += out_and_back(try_, Evicted::Nothing, *pages);
        wrong += in_from_there(try_, Evicted::Nothing, *pages);
    }
    STOP.store(true, Ordering::SeqCst);
    smp::wait();
    let faults = false_faults::end();
    cpu::out8(MODEM_CONTROL, 0);
    println!("measured: rep-beside-eviction tries={TRIES} false-faults={faults} wrong={wrong}");
    ensure!(wrong == 0, "{wrong} bytes are wrong");
    Ok(())
}

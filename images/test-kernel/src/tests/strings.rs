//! `REP OUTSB` and `REP INSB`, which KVM emulates: bytes go out to a UART that sends them back to itself,
//! and come in from it. Its FIFO loses a byte that is read twice.

use alloc::format;

use core::sync::atomic::{AtomicBool, Ordering};

use super::emulated::{self, Evicted, OPERANDS, SITES};
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
const TRIES: u64 = 100;
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

/// A way to try; both return the bytes that are not what they should be.
struct Way {
    name: &'static str,
    code: u64,
    once: fn(u64, Evicted, usize) -> u64,
}

const OUTS: Way = Way { name: "rep-outs", code: emulated::REP_OUTSB, once: out_and_back };
const INS: Way = Way { name: "rep-ins", code: emulated::REP_INSB, once: in_from_there };

fn run(evicted: Evicted, number: usize) {
    let (pages, site) = (OPERANDS[number], SITES[number]);
    let code = site.frames().filter(|_| evicted == Evicted::Everything);
    let request = evict::prepare(evicted.frames(pages).chain(code));
    emulated::run_code(site, request, COM2, emulated::operand(pages, BYTES), BYTES);
    false_faults::progress();
}

fn out_and_back(try_: u64, evicted: Evicted, number: usize) -> u64 {
    (0..BYTES).for_each(|offset| put(OPERANDS[number], offset, byte(try_, offset)));
    run(evicted, number);
    (0..BYTES).filter(|offset| cpu::in8(COM2) != byte(try_, *offset)).count() as u64
}

fn in_from_there(try_: u64, evicted: Evicted, number: usize) -> u64 {
    for offset in 0..BYTES {
        put(OPERANDS[number], offset, 0);
        cpu::out8(COM2, byte(try_, offset));
    }
    run(evicted, number);
    let wrong = |offset: &u64| get(OPERANDS[number], *offset) != byte(try_, *offset);
    (0..BYTES).filter(wrong).count() as u64
}

fn begin(way: &Way) {
    SITES.iter().for_each(|site| emulated::write_code(*site, way.code));
    cpu::out8(MODEM_CONTROL, LOOPBACK);
}

fn measure(way: &Way) -> Outcome {
    begin(way);
    let mut all_wrong = 0;
    for evicted in Evicted::ALL {
        // Over and over with the same operand and code, and with two by turns.
        for operands in [1, 2] {
            let (mut wrong, mut gone) = (0, 0);
            false_faults::begin();
            for (try_, number) in (0..TRIES).zip((0..operands).cycle()) {
                wrong += (way.once)(try_, evicted, number);
                gone += evict::answer().map_err(|why| format!("{why:?}"))?;
            }
            let faults = false_faults::end();
            all_wrong += wrong;
            println!(
                "measured: {} evicted={evicted:?} operands={operands} tries={TRIES} pages={gone} \
                 false-faults={faults} wrong={wrong}",
                way.name
            );
        }
    }
    cpu::out8(MODEM_CONTROL, 0);
    ensure!(all_wrong == 0, "{all_wrong} bytes are wrong");
    Ok(())
}

fn outs() -> Outcome {
    measure(&OUTS)
}

fn ins() -> Outcome {
    measure(&INS)
}

static STOP: AtomicBool = AtomicBool::new(false);

/// The second processor: evicts all that the first one needs, over and over.
fn keep_evicting(_: u64) {
    while !STOP.load(Ordering::SeqCst) {
        let operands = OPERANDS.iter().chain(&SITES).flat_map(Pages::frames);
        let _ = evict::frames(operands.chain(boot::kernel_frames()));
    }
}

fn beside_eviction() -> Outcome {
    smp::start().map_err(|why| format!("{why:?}"))?;
    STOP.store(false, Ordering::SeqCst);
    false_faults::begin();
    smp::give(keep_evicting, 0);
    let mut wrong = 0;
    for way in [&OUTS, &INS] {
        begin(way);
        for try_ in 0..TRIES {
            wrong += (way.once)(try_, Evicted::Nothing, (try_ % 2) as usize);
        }
    }
    STOP.store(true, Ordering::SeqCst);
    smp::wait();
    let faults = false_faults::end();
    cpu::out8(MODEM_CONTROL, 0);
    println!(
        "measured: rep-beside-eviction tries={} false-faults={faults} wrong={wrong}",
        2 * TRIES
    );
    ensure!(wrong == 0, "{wrong} bytes are wrong");
    Ok(())
}

//! CPUID and the MSRs: what they say, take and refuse.

use alloc::format;

use super::pages::{area, check, evict, touch};
use super::side::{
    ACK, AS_INTERRUPT, AS_VMEXIT, EN, ENABLED, INT, READY, SEND_ALWAYS, Side, WAKE_ALL, write,
};
use crate::tests::{Outcome, Test};
use crate::{cpu, ensure, memory, msr, multiboot, timer};

pub(crate) const TESTS: &[Test] = &[
    Test { name: "apf-no-vector", run: no_vector },
    Test { name: "apf-registers", run: registers },
    Test { name: "apf-hidden", run: hidden },
];

/// CPUID leaf 0x4000_0001, EAX: ASYNC_PF, ASYNC_PF_VMEXIT, ASYNC_PF_INT.
const FEATURES: u32 = 0x4000_0001;
const OFFERED: u32 = 1 << 4 | 1 << 14;
const ALL: u32 = OFFERED | 1 << 10;

fn features() -> u32 {
    cpu::cpuid(FEATURES, 0).eax & ALL
}

/// Before the guest has said which vector nothing is sent; the wake-all is when it has. For a processor
/// that was just reset.
fn no_vector() -> Outcome {
    let side = Side::here();
    side.listen(area(0));
    write(EN, area(0) | ENABLED | SEND_ALWAYS | AS_INTERRUPT)?;
    evict(0..1)?;
    touch(0);
    check(0)?;
    timer::wait_ms(1);
    side.expect_nothing()?;
    ensure!(side.token() == 0, "token word {:#x}", side.token());
    write(INT, READY.into())?;
    side.expect_ready(&[WAKE_ALL])?;
    side.whole_cycle(1)?;
    write(EN, 0)
}

fn registers() -> Outcome {
    ensure!(features() == OFFERED, "CPUID says {:#x}", features());
    let (at, on) = (area(0), ENABLED | AS_INTERRUPT);
    let side = Side::here();
    side.listen(at);
    let read = |msr| msr::read(msr).map_err(|why| format!("MSR {msr:#x}: {why:?}"));
    let last = multiboot::ram_end() - 64;
    let outside = multiboot::ram_end().next_multiple_of(memory::PAGE_BYTES);
    let valid: [(u32, &[u64]); 3] = [
        // Without bit 0 no address is looked at; without bit 3 it is off.
        (
            EN,
            &[
                0,
                at | ENABLED,
                at | AS_INTERRUPT,
                outside,
                at | on,
                at | on | SEND_ALWAYS,
                last | on,
            ],
        ),
        (INT, &[0, 1, 0xff, READY as u64]),
        (ACK, &[0, 1, 2, !0]),
    ];
    for (msr, values) in valid {
        for value in values {
            write(msr, *value)?;
            let expected = if msr == ACK { 0 } else { *value };
            ensure!(read(msr)? == expected, "MSR {msr:#x}: {value:#x} was written");
        }
    }
    write(EN, at | on)?;
    let invalid: [(u32, &[u64]); 2] = [
        (EN, &[at | on | AS_VMEXIT, at | on | 1 << 4, at | on | 1 << 5, AS_VMEXIT, 1 << 4, 1 << 5]),
        (INT, &[0x100, 1 << 32, 1 << 63, !0, 0xff00 | READY as u64]),
    ];
    let nowhere: (u32, &[u64]) = (EN, &[outside | on, 1 << 40 | on, 0xffff_ffff_ffff_ffc0 | on]);
    for (msr, values) in invalid.into_iter().chain([nowhere]) {
        for value in values {
            ensure!(msr::write(msr, *value).is_err(), "MSR {msr:#x} takes {value:#x}");
        }
    }
    ensure!(
        read(EN)? == at | on && read(INT)? == u64::from(READY),
        "what is refused changes nothing"
    );
    timer::wait_ms(1);
    write(EN, 0)?;
    // Neither of these is on.
    for bits in [ENABLED | SEND_ALWAYS, AS_INTERRUPT | SEND_ALWAYS] {
        side.listen(at);
        write(EN, at | bits)?;
        evict(0..1)?;
        touch(0);
        check(0)?;
        timer::wait_ms(1);
        side.expect_nothing()?;
    }
    write(EN, 0)
}

/// Where the VMM does not offer it, it is not there.
fn hidden() -> Outcome {
    ensure!(features() == 0, "CPUID says {:#x}", features());
    for (msr, value) in [(EN, area(0) | ENABLED | AS_INTERRUPT), (INT, READY.into()), (ACK, 1)] {
        ensure!(msr::write(msr, value).is_err(), "MSR {msr:#x} takes {value:#x}");
        ensure!(msr::read(msr).is_err(), "MSR {msr:#x} can be read");
    }
    Ok(())
}

//! Model-specific registers. A #GP of such an access is caught.
// Unsafe: inline assembly that names the place to go on at after a #GP.
#![allow(unsafe_code)]

use core::arch::asm;

use crate::interrupts;

/// The processor refused with #GP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Refused;

/// RDMSR.
pub(crate) fn read(msr: u32) -> Result<u64, Refused> {
    let (low, high, refused): (u32, u32, u32);
    // SAFETY: reads a register, or goes on behind it.
    unsafe {
        asm!(
            "lea {at}, [rip + 2f]",
            "mov [{place}], {at}",
            "rdmsr",
            "xor {refused:e}, {refused:e}",
            "jmp 3f",
            "2: mov {refused:e}, 1",
            "3: mov qword ptr [{place}], 0",
            at = out(reg) _,
            place = in(reg) interrupts::go_on_at(),
            refused = out(reg) refused,
            in("ecx") msr,
            inout("eax") 0 => low,
            inout("edx") 0 => high,
            options(nostack),
        );
    }
    if refused == 0 { Ok(u64::from(high) << 32 | u64::from(low)) } else { Err(Refused) }
}

/// WRMSR.
pub(crate) fn write(msr: u32, value: u64) -> Result<(), Refused> {
    let refused: u32;
    // SAFETY: a test writes what it may; KVM's areas are pages of the test's own.
    unsafe {
        asm!(
            "lea {at}, [rip + 2f]",
            "mov [{place}], {at}",
            "wrmsr",
            "xor {refused:e}, {refused:e}",
            "jmp 3f",
            "2: mov {refused:e}, 1",
            "3: mov qword ptr [{place}], 0",
            at = out(reg) _,
            place = in(reg) interrupts::go_on_at(),
            refused = out(reg) refused,
            in("ecx") msr,
            in("eax") value as u32,
            in("edx") (value >> 32) as u32,
            options(nostack),
        );
    }
    if refused == 0 { Ok(()) } else { Err(Refused) }
}

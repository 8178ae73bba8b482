//! A bare-metal kernel that tests what KVM and nowait do to a guest, one hazard at a time.
//!
//! ```text
//!   Multiboot, 32-bit -> boot.rs: long mode, identity map -> kernel_main: GDT, IDT, APIC
//!     -> tests/: every test that `test=NAME,NAME` on the command line names, or all
//!     -> debug-exit port: 0 when all passed, else 1
//! ```
//!
//! Everything runs in ring 0 but what [`user::run`] is given; all memory is mapped for both, so that any
//! function may run in either. A test is a function in a table (tests/mod.rs). What it needs:
//!
//! | wanted | where |
//! |---|---|
//! | MSRs whose #GP is an `Err`, CPUID, CR2, ports | `msr`, `cpu` |
//! | a function called at an exception or interrupt vector | `interrupts::set_hook` |
//! | pages evicted by the VMM | `evict` |
//! | IPIs, the APIC's timer, `sti; hlt` | `apic`, `cpu::wait_for_interrupt` |
//! | waits that interrupts may shorten, and what something takes | `timer` |
//! | a function run at CPL 3 with interrupts on | `user` |
//! | a second processor | `smp` |
//!
//! The kernel is built without unwinding (`cargo xtask images`). Where it is built with it (clippy), it is
//! an ordinary program that does nothing, so that every line is checked all the same.
#![cfg_attr(panic = "abort", no_std, no_main)]

extern crate alloc;

mod apic;
mod boot;
mod cpu;
mod descriptors;
mod evict;
mod heap;
mod interrupts;
mod memory;
mod msr;
mod multiboot;
mod serial;
mod smp;
mod tests;
mod timer;
mod user;

use cpu::out8;

/// The debug-exit port.
const DEBUG_EXIT: u16 = 0xf4;

/// Entered by the boot code with what the boot loader left in EAX and EBX.
extern "C" fn kernel_main(magic: u32, information: u32) -> ! {
    descriptors::load(0);
    interrupts::load();
    apic::enable();
    match multiboot::command_line(magic, information) {
        Some(command_line) => finish(tests::run(command_line)),
        None => {
            println!("FAIL: not entered by a Multiboot loader");
            finish(false)
        }
    }
}

/// Ends the run with a verdict.
fn finish(passed: bool) -> ! {
    loop {
        out8(DEBUG_EXIT, u8::from(!passed));
        cpu::halt();
    }
}

#[cfg(panic = "abort")]
#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    println!("FAIL: {info}");
    finish(false)
}

#[cfg(not(panic = "abort"))]
fn main() {
    let _ = &boot::NAMED;
    println!("a kernel: build it with `cargo xtask images`");
}

//! Code in ring 3, with interrupts on: what async page faults are for.
//!
//! ```text
//!   run(f, x): enter: callee-saved registers kept, IRETQ -> ring 3: f(x), int 0x80
//!                                            leave: registers back <-'
//! ```
// Unsafe: assembly that changes rings.
#![allow(unsafe_code)]

use core::arch::naked_asm;
use core::sync::atomic::AtomicU64;

use crate::boot::Stack;
use crate::cpu::{self, MAX_CPUS};
use crate::descriptors::{TSS, USER_CODE, USER_DATA};
use crate::interrupts::LEAVE_USER;

static STACKS: [Stack; MAX_CPUS] = [const { Stack::new() }; MAX_CPUS];
/// The stack pointer of each processor's ring 0 while it is in ring 3.
static LEFT: [AtomicU64; MAX_CPUS] = [const { AtomicU64::new(0) }; MAX_CPUS];

/// IF, and the bit that is always 1.
const FLAGS: u64 = 1 << 9 | 1 << 1;

/// Runs `f(argument)` at CPL 3 with interrupts on. It may use all memory, but no privileged instruction
/// and no port: a test that wants to print returns first.
pub(crate) fn run(f: extern "C" fn(u64) -> u64, argument: u64) -> u64 {
    let cpu = cpu::number();
    // The stack of a function: 8 below a multiple of 16, as behind a call.
    enter(f, argument, STACKS[cpu].top() - 16, LEFT[cpu].as_ptr())
}

#[unsafe(naked)]
extern "C" fn enter(
    f: extern "C" fn(u64) -> u64,
    argument: u64,
    stack: u64,
    left: *mut u64,
) -> u64 {
    naked_asm!(
        "pushfq",
        "push rbx",
        "push rbp",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        "mov [rcx], rsp",
        "lea rax, [rip + {begin}]",
        "push {user_data}",
        "push rdx",
        "push {flags}",
        "push {user_code}",
        "push rax",
        "iretq",
        begin = sym begin,
        user_data = const USER_DATA,
        user_code = const USER_CODE,
        flags = const FLAGS,
    )
}

/// In ring 3.
#[unsafe(naked)]
extern "C" fn begin() {
    naked_asm!(
        "mov rax, rdi",
        "mov rdi, rsi",
        "call rax",
        "int {leave}",
        "ud2",
        leave = const LEAVE_USER,
    )
}

/// The gate out of ring 3: goes on where [`enter`] left, with RAX as its result.
#[unsafe(naked)]
pub(crate) extern "C" fn leave() {
    naked_asm!(
        "xor ecx, ecx",
        "str cx",
        "sub ecx, {tss}",
        "shr ecx, 4",
        "lea rdx, [rip + {left}]",
        "mov rsp, [rdx + rcx * 8]",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop rbp",
        "pop rbx",
        "popfq",
        "ret",
        tss = const TSS,
        left = sym LEFT,
    )
}

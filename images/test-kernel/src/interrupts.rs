//! Exceptions and interrupts: every vector below [`VECTORS`] has a gate, and may have a hook.
//!
//! ```text
//!   vector -> stub: vector and error code on an IST stack -> common: all registers -> dispatch
//!     hook installed? -> hook(frame): Handled::Yes ends it
//!     #GP with a place to go on at (msr.rs) -> go on there
//!     else a report, and the run fails
//! ```
//!
//! A hook may change the frame, and so where and with what the interrupted code goes on. It runs with
//! interrupts off; a hook for #PF may turn them on (`sti; hlt`), for each kind has its own stack.
//! Interrupts have to be acknowledged by their hooks (`apic::eoi`).
// Unsafe: stubs in assembly, a table of them for the processor, and hooks kept as addresses.
#![allow(unsafe_code)]

use core::arch::{asm, naked_asm};
use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use crate::cpu::{self, MAX_CPUS};
use crate::descriptors::{IstStack, KERNEL_CODE, Pointer};
use crate::{finish, println, user};

/// How many vectors have gates: the exceptions, and 16 for interrupts.
pub(crate) const VECTORS: usize = 48;
/// The first vector of interrupts.
pub(crate) const FIRST_INTERRUPT: u8 = 32;
/// The vector by which code in ring 3 returns.
pub(crate) const LEAVE_USER: u8 = 0x80;
/// #GP.
pub(crate) const PROTECTION: u8 = 13;
/// #PF.
pub(crate) const PAGE_FAULT: u8 = 14;
const BREAKPOINT: u8 = 3;

/// What the interrupted code had in its registers.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct Frame {
    pub(crate) r15: u64,
    pub(crate) r14: u64,
    pub(crate) r13: u64,
    pub(crate) r12: u64,
    pub(crate) r11: u64,
    pub(crate) r10: u64,
    pub(crate) r9: u64,
    pub(crate) r8: u64,
    pub(crate) rdi: u64,
    pub(crate) rsi: u64,
    pub(crate) rbp: u64,
    pub(crate) rbx: u64,
    pub(crate) rdx: u64,
    pub(crate) rcx: u64,
    pub(crate) rax: u64,
    pub(crate) vector: u64,
    pub(crate) error_code: u64,
    pub(crate) rip: u64,
    pub(crate) cs: u64,
    pub(crate) rflags: u64,
    pub(crate) rsp: u64,
    pub(crate) ss: u64,
}

impl Frame {
    /// The privilege level of the interrupted code.
    pub(crate) fn cpl(&self) -> u8 {
        (self.cs & 3) as u8
    }
}

/// What a hook did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Handled {
    /// Go on with the frame as it is now.
    Yes,
    /// Do as if there were no hook.
    No,
}

/// A function that is called at a vector, on any processor.
pub(crate) type Hook = fn(&mut Frame) -> Handled;

/// The hooks' addresses; 0 is none.
static HOOKS: [AtomicUsize; VECTORS] = [const { AtomicUsize::new(0) }; VECTORS];
/// Where each processor goes on after a #GP; 0 is nowhere.
static GO_ON_AT: [AtomicU64; MAX_CPUS] = [const { AtomicU64::new(0) }; MAX_CPUS];

/// Has `hook` called at this vector from now on.
pub(crate) fn set_hook(vector: u8, hook: Hook) {
    HOOKS[usize::from(vector)].store(hook as usize, Ordering::SeqCst);
}

/// No hook at this vector any more.
pub(crate) fn clear_hook(vector: u8) {
    HOOKS[usize::from(vector)].store(0, Ordering::SeqCst);
}

fn hook(vector: usize) -> Option<Hook> {
    let address = HOOKS.get(vector)?.load(Ordering::SeqCst);
    // SAFETY: what is not 0 was stored as a hook.
    (address != 0).then(|| unsafe { core::mem::transmute::<usize, Hook>(address) })
}

/// Where this processor keeps the address to go on at after a #GP.
pub(crate) fn go_on_at() -> *mut u64 {
    GO_ON_AT[cpu::number()].as_ptr()
}

/// Called by the stubs.
extern "C" fn dispatch(frame: &mut Frame) {
    let vector = frame.vector as usize;
    if let Some(hook) = hook(vector)
        && hook(frame) == Handled::Yes
    {
        return;
    }
    if vector == usize::from(PROTECTION) {
        let go_on = GO_ON_AT[cpu::number()].swap(0, Ordering::SeqCst);
        if go_on != 0 {
            frame.rip = go_on;
            return;
        }
    }
    if vector == usize::from(BREAKPOINT) {
        return;
    }
    println!("FAIL: vector {vector} on processor {}: {frame:#x?}", cpu::number());
    println!("cr2 {:#x}", cpu::cr2());
    finish(false);
}

/// Saves all registers, calls [`dispatch`], and returns with what is in the frame then.
#[unsafe(naked)]
extern "C" fn common() {
    naked_asm!(
        "push rax",
        "push rcx",
        "push rdx",
        "push rbx",
        "push rbp",
        "push rsi",
        "push rdi",
        "push r8",
        "push r9",
        "push r10",
        "push r11",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        "mov rdi, rsp",
        "mov rbp, rsp",
        "sub rsp, 512",
        "and rsp, -16",
        "fxsave64 [rsp]",
        "cld",
        "call {dispatch}",
        "fxrstor64 [rsp]",
        "mov rsp, rbp",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop r11",
        "pop r10",
        "pop r9",
        "pop r8",
        "pop rdi",
        "pop rsi",
        "pop rbp",
        "pop rbx",
        "pop rdx",
        "pop rcx",
        "pop rax",
        "add rsp, 16",
        "iretq",
        dispatch = sym dispatch,
    )
}

/// For a vector without an error code.
#[unsafe(naked)]
extern "C" fn plain<const VECTOR: u8>() {
    naked_asm!("push 0", "push {vector}", "jmp {common}", vector = const VECTOR, common = sym common)
}

/// For a vector whose error code the processor has pushed.
#[unsafe(naked)]
extern "C" fn with_code<const VECTOR: u8>() {
    naked_asm!("push {vector}", "jmp {common}", vector = const VECTOR, common = sym common)
}

macro_rules! stubs {
    ($($kind:ident: $($vector:literal)*;)*) => {
        [$($($kind::<$vector> as extern "C" fn(),)*)*]
    };
}

static STUBS: [extern "C" fn(); VECTORS] = stubs! {
    plain: 0 1 2 3 4 5 6 7;
    with_code: 8;
    plain: 9;
    with_code: 10 11 12 13 14;
    plain: 15 16;
    with_code: 17;
    plain: 18 19 20;
    with_code: 21;
    plain: 22 23 24 25 26 27 28;
    with_code: 29 30;
    plain: 31 32 33 34 35 36 37 38 39 40 41 42 43 44 45 46 47;
};

const GATES: usize = 256;
const PRESENT_INTERRUPT_GATE: u64 = 0x8e;
const FOR_USER: u64 = 3 << 5;

static IDT: [AtomicU64; 2 * GATES] = [const { AtomicU64::new(0) }; 2 * GATES];
static IDT_POINTER: Pointer<[AtomicU64; 2 * GATES]> =
    Pointer { limit: (16 * GATES - 1) as u16, base: &IDT };

fn set_gate(vector: u8, to: extern "C" fn(), ist: u64, kind: u64) {
    let address = to as usize as u64;
    let low = (address & 0xffff)
        | u64::from(KERNEL_CODE) << 16
        | ist << 32
        | kind << 40
        | (address >> 16 & 0xffff) << 48;
    IDT[2 * usize::from(vector)].store(low, Ordering::Relaxed);
    IDT[2 * usize::from(vector) + 1].store(address >> 32, Ordering::Relaxed);
}

/// Fills the table in, and loads it on this processor. Interrupts stay off.
pub(crate) fn load() {
    for (vector, stub) in (0..).zip(STUBS) {
        let stack = match vector {
            PAGE_FAULT => IstStack::PageFault,
            PROTECTION => IstStack::Protection,
            FIRST_INTERRUPT.. => IstStack::Interrupt,
            _ => IstStack::Other,
        };
        set_gate(vector, stub, stack as u64, PRESENT_INTERRUPT_GATE);
    }
    set_gate(LEAVE_USER, user::leave, 0, PRESENT_INTERRUPT_GATE | FOR_USER);
    // SAFETY: the table is there for ever, and its gates lead to the stubs.
    unsafe { asm!("lidt [{}]", in(reg) &raw const IDT_POINTER, options(nostack, readonly)) };
}

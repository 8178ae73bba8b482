//! A guest's side of async page faults (Documentation/virt/kvm/x86/msr.rst): the MSRs, the area, and a note
//! of everything that comes.
//!
//! Page-not-present with anything but error code 0, flags 1 and a token in CR2 fails the run at once. What
//! the handlers do besides is up to the test, see [`Side::set`].

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};

use super::pages::{check, evict, interrupts_on, touch};
use crate::cpu::{self, MAX_CPUS};
use crate::interrupts::{self, FIRST_INTERRUPT, Frame, Handled, PAGE_FAULT};
use crate::memory::{self, PAGE_BYTES};
use crate::tests::Outcome;
use crate::{apic, ensure, msr, println, timer};

/// `MSR_KVM_ASYNC_PF_EN`, `_INT` and `_ACK`.
pub(super) const EN: u32 = 0x4b56_4d02;
pub(super) const INT: u32 = 0x4b56_4d06;
pub(super) const ACK: u32 = 0x4b56_4d07;

/// Bits of EN.
pub(super) const ENABLED: u64 = 1 << 0;
pub(super) const SEND_ALWAYS: u64 = 1 << 1;
pub(super) const AS_VMEXIT: u64 = 1 << 2;
pub(super) const AS_INTERRUPT: u64 = 1 << 3;

/// The vector of page-ready.
pub(super) const READY: u8 = FIRST_INTERRUPT + 2;
/// The token that wakes everything.
pub(super) const WAKE_ALL: u32 = !0;

/// Longer than any page-ready takes: with a store that takes 10 ms, in the emulated machine.
pub(super) const LIMIT_MS: u64 = 5000;

/// What the handlers do not do of what a kernel does, as bits.
///
/// Page-not-present: do not wait for page-ready, go on behind [`memory::load_or_skip`]'s load.
pub(super) const SKIP: u32 = 1 << 0;
/// Page-not-present: leave the flags word.
pub(super) const KEEP_FLAGS: u32 = 1 << 1;
/// Page-ready: leave the token word.
pub(super) const KEEP_TOKEN: u32 = 1 << 2;
/// Page-ready: do not write ACK.
pub(super) const KEEP_ACK: u32 = 1 << 3;

/// In bytes, and one more.
const LONGEST_INSTRUCTION: u64 = 16;
const LOG_LEN: usize = 512;

/// What came, in its order.
pub(super) struct Log {
    len: AtomicUsize,
    entries: [AtomicU64; LOG_LEN],
}

impl Log {
    const fn new() -> Self {
        Self { len: AtomicUsize::new(0), entries: [const { AtomicU64::new(0) }; LOG_LEN] }
    }

    fn push(&self, entry: u64) {
        let at = self.len.fetch_add(1, Ordering::SeqCst);
        self.entries[at % LOG_LEN].store(entry, Ordering::SeqCst);
    }

    pub(super) fn len(&self) -> usize {
        self.len.load(Ordering::SeqCst)
    }

    fn entries(&self) -> impl Iterator<Item = u64> {
        self.entries.iter().take(self.len()).map(|entry| entry.load(Ordering::SeqCst))
    }

    /// The tokens, all of them from now on forgotten.
    pub(super) fn take(&self) -> Vec<u32> {
        let tokens = self.entries().map(|entry| entry as u32).collect();
        self.len.store(0, Ordering::SeqCst);
        tokens
    }

    fn has(&self, token: u32) -> bool {
        self.entries().any(|entry| entry as u32 == token)
    }
}

/// One processor's.
pub(super) struct Side {
    area: AtomicU64,
    manner: AtomicU32,
    /// page-not-present.
    pub(super) faults: Log,
    /// The privilege level of the last of them.
    pub(super) fault_cpl: AtomicU32,
    /// page-ready.
    pub(super) readies: Log,
}

static SIDES: [Side; MAX_CPUS] = [const {
    Side {
        area: AtomicU64::new(0),
        manner: AtomicU32::new(0),
        faults: Log::new(),
        fault_cpl: AtomicU32::new(0),
        readies: Log::new(),
    }
}; MAX_CPUS];

impl Side {
    pub(super) fn of(cpu: usize) -> &'static Self {
        &SIDES[cpu]
    }

    /// This processor's.
    pub(super) fn here() -> &'static Self {
        Self::of(cpu::number())
    }

    /// How the handlers differ from a kernel's.
    pub(super) fn set(&self, manner: u32) {
        self.manner.store(manner, Ordering::SeqCst);
    }

    fn does(&self, bit: u32) -> bool {
        self.manner.load(Ordering::SeqCst) & bit != 0
    }

    /// Declares where the area is, zeroes it, and has what comes noted.
    pub(super) fn listen(&self, area: u64) {
        self.area.store(area, Ordering::SeqCst);
        self.both().store(0, Ordering::SeqCst);
        self.set(0);
        self.faults.take();
        self.readies.take();
        interrupts::set_hook(PAGE_FAULT, not_present);
        interrupts::set_hook(READY, ready);
    }

    /// Turns the protocol on with these bits besides, and takes the wake-all.
    pub(super) fn turn_on(&self, area: u64, bits: u64) -> Outcome {
        self.listen(area);
        write(INT, READY.into())?;
        write(EN, area | ENABLED | AS_INTERRUPT | bits)?;
        self.expect_ready(&[WAKE_ALL])
    }

    /// Waits for so many page-ready, and a moment longer; these must be all.
    pub(super) fn expect_ready(&self, tokens: &[u32]) -> Outcome {
        timer::wait_until(LIMIT_MS, || self.readies.len() >= tokens.len());
        timer::wait_ms(1);
        let came = self.readies.take();
        ensure!(came == tokens, "page-ready for {came:#x?} instead of {tokens:#x?}");
        Ok(())
    }

    /// Nothing came.
    pub(super) fn expect_nothing(&self) -> Outcome {
        let (faults, readies) = (self.faults.take(), self.readies.take());
        ensure!(faults.is_empty(), "page-not-present: {faults:#x?}");
        ensure!(readies.is_empty(), "page-ready: {readies:#x?}");
        Ok(())
    }

    /// Touches pages that have been evicted, with interrupts on, and skips the accesses; the tokens.
    pub(super) fn leave_outstanding(
        &self,
        pages: core::ops::Range<u64>,
    ) -> Result<Vec<u32>, String> {
        evict(pages.clone())?;
        self.set(self.manner.load(Ordering::SeqCst) | SKIP);
        for (number, page) in pages.enumerate() {
            touch(page);
            let faults = self.faults.len();
            ensure!(faults == number + 1, "page {page} is there, or was waited for");
        }
        let tokens = self.faults.take();
        check_tokens(&tokens)?;
        Ok(tokens)
    }

    /// All that a kernel sees of one page: page-not-present, page-ready for it, and the right bytes.
    pub(super) fn whole_cycle(&self, page: u64) -> Result<u32, String> {
        self.set(0);
        evict(page..page + 1)?;
        interrupts_on();
        let found = check(page);
        cpu::interrupts_off();
        found?;
        let tokens = self.faults.take();
        ensure!(tokens.len() == 1, "{} page-not-present for one access", tokens.len());
        check_tokens(&tokens)?;
        self.expect_ready(&tokens)?;
        Ok(tokens[0])
    }

    fn both(&self) -> &'static AtomicU64 {
        let area = self.area.load(Ordering::SeqCst);
        &memory::words(area & !(PAGE_BYTES - 1))[(area % PAGE_BYTES / 8) as usize]
    }

    /// The flags word.
    pub(super) fn flags(&self) -> u32 {
        self.both().load(Ordering::SeqCst) as u32
    }

    /// Writes 0 to the flags word; what it was.
    pub(super) fn clear_flags(&self) -> u32 {
        self.both().fetch_and(u64::from(u32::MAX) << 32, Ordering::SeqCst) as u32
    }

    /// The token word.
    pub(super) fn token(&self) -> u32 {
        (self.both().load(Ordering::SeqCst) >> 32) as u32
    }

    /// Writes to the token word, which must be 0.
    pub(super) fn spoil_token(&self, token: u32) {
        self.both().fetch_or(u64::from(token) << 32, Ordering::SeqCst);
    }

    /// Writes 0 to the token word; what it was.
    pub(super) fn clear_token(&self) -> u32 {
        (self.both().fetch_and(u64::from(u32::MAX), Ordering::SeqCst) >> 32) as u32
    }
}

/// No token is 0, the wake-all, or there twice.
pub(super) fn check_tokens(tokens: &[u32]) -> Outcome {
    for (at, token) in tokens.iter().enumerate() {
        ensure!(![0, WAKE_ALL].contains(token), "token {token:#x}");
        ensure!(!tokens[..at].contains(token), "token {token:#x} twice");
    }
    Ok(())
}

/// #PF. Whatever is not page-not-present as it should be is a failure of the run.
fn not_present(frame: &mut Frame) -> Handled {
    let side = Side::here();
    let (cr2, flags) = (cpu::cr2(), side.flags());
    if frame.error_code != 0 || flags != 1 || cr2 == 0 || cr2 >= u64::from(WAKE_ALL) {
        println!("no page-not-present: flags {flags:#x}, CR2 {cr2:#x}");
        return Handled::No;
    }
    if !side.does(KEEP_FLAGS) {
        side.clear_flags();
    }
    let token = cr2 as u32;
    side.faults.push(cr2);
    side.fault_cpl.store(frame.cpl().into(), Ordering::SeqCst);
    if side.does(SKIP) {
        if frame.r15.wrapping_sub(frame.rip) >= LONGEST_INSTRUCTION {
            println!("page-not-present for an access that cannot be skipped: CR2 {cr2:#x}");
            return Handled::No;
        }
        frame.rip = frame.r15;
    } else if !timer::wait_until(LIMIT_MS, || side.readies.has(token)) {
        println!("no page-ready for {token:#x}");
        return Handled::No;
    }
    Handled::Yes
}

/// Page-ready, in the order in which Linux does it.
fn ready(_: &mut Frame) -> Handled {
    apic::eoi();
    let side = Side::here();
    let token = if side.does(KEEP_TOKEN) { side.token() } else { side.clear_token() };
    side.readies.push(token.into());
    if !side.does(KEEP_ACK) && msr::write(ACK, 1).is_err() {
        return Handled::No;
    }
    Handled::Yes
}

/// WRMSR that must not be refused.
pub(super) fn write(msr: u32, value: u64) -> Outcome {
    msr::write(msr, value).map_err(|why| format!("MSR {msr:#x} = {value:#x}: {why:?}"))
}

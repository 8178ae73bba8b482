//! What a vCPU keeps in memory for KVM's instruction emulator, and when it looks for it.
//!
//! A page table that the emulator cannot read becomes a page fault in the guest that is none, and in the
//! middle of an INS the byte that was read is lost with it. Nobody tells us. So the tables are brought in
//! and pinned where we are at hand before the emulator walks them:
//!
//! ```text
//!   PIO exit of INS or OUTS, MMIO exit -> the instruction, its operands, all their tables; then KVM_RUN
//!   marker fault, shortly after such an exit -> the tables of RIP, RSI, RDI, RSP as they are now
//! ```
//!
//! A guest that does no such access pays for neither its port accesses nor its faults: the registers are in
//! `kvm_run` after each exit. All of it is prevention: what cannot be had is left out, and nothing is held when pins are
//! scarce.

use guest_memory::PagerError;
use kvm_bindings::{kvm_regs, kvm_sregs};
use kvm_ioctls::VcpuFd;

use super::inject;
use crate::paging::Faults;
use crate::paging::walk::{Extent, Held, Walker};

/// For so many marker faults after an emulated access, the next one is expected.
const WATCHED_FAULTS: u32 = 1024;
/// How many port instructions are remembered that are no string instructions, as a power of two.
const PLAIN_BITS: u32 = 5;
/// The size of the pages by which [`Place`] compares, as a shift.
const PAGE_SHIFT: u32 = 12;

/// The state of one vCPU's emulated accesses.
#[derive(Debug, Default)]
pub(super) struct Emulation {
    /// What the instruction needs that the emulator is at.
    instruction: Kept,
    /// Tables of where the last marker fault was.
    tables: Kept,
    /// Marker faults that are still looked at.
    watched: u32,
    /// Addresses of port instructions that need nothing, by a hash of them.
    plain: [u64; 1 << PLAIN_BITS],
}

/// Pages, and what they were kept for.
#[derive(Debug, Default)]
struct Kept {
    place: Option<Place>,
    _held: Held,
}

/// Pages that an instruction may touch, and the root of the tables that lead there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    root: u64,
    pages: [u64; 4],
    /// Counts down within one string instruction.
    rcx: u64,
}

impl Place {
    fn of(regs: &kvm_regs, sregs: &kvm_sregs) -> Self {
        let pages = [regs.rip, regs.rsi, regs.rdi, regs.rsp].map(|at| at >> PAGE_SHIFT);
        Self { root: sregs.cr3, pages, rcx: regs.rcx }
    }

    /// Is this the instruction of `before`, further on?
    fn continues(&self, before: &Self) -> bool {
        self.root == before.root && self.pages == before.pages && self.rcx < before.rcx
    }

    fn is_at(&self, before: &Self) -> bool {
        self.root == before.root && self.pages == before.pages
    }
}

impl Emulation {
    /// Before a port access is completed: if a string instruction made it, it goes on in the emulator.
    pub(super) fn port_access(&mut self, fd: &VcpuFd, faults: &Faults) {
        if !self.may_hold(faults) {
            return;
        }
        let regs = inject::registers(fd);
        let plain = plain_slot(regs.rip);
        if self.plain[plain] == regs.rip {
            return;
        }
        let Ok(sregs) = fd.get_sregs() else { return };
        if self.goes_on(&regs, &sregs) {
            return;
        }
        match walker(faults, &regs, &sregs).string_io() {
            Ok(Some(held)) => self.keep(held, &regs, &sregs),
            Ok(None) => self.plain[plain] = regs.rip,
            Err(_) => {}
        }
    }

    /// Before an access to an address without RAM is completed: the instruction may move data.
    pub(super) fn device_access(&mut self, fd: &VcpuFd, faults: &Faults) {
        if !self.may_hold(faults) {
            return;
        }
        let (Ok(regs), Ok(sregs)) = (fd.get_regs(), fd.get_sregs()) else { return };
        if self.goes_on(&regs, &sregs) {
            return;
        }
        if let Ok(held) = walker(faults, &regs, &sregs).instruction(Extent::Pages) {
            self.keep(held, &regs, &sregs);
        }
    }

    /// The emulator could not reach an operand or the instruction: all that it may need is brought in.
    ///
    /// # Errors
    /// When a page does not come. That there are too many pins is no error: this vCPU's own are let go, and
    /// the next try has more of them.
    pub(super) fn bring(
        &mut self,
        faults: &Faults,
        regs: &kvm_regs,
        sregs: &kvm_sregs,
    ) -> Result<(), PagerError> {
        match walker(faults, regs, sregs).instruction(Extent::Pages) {
            Ok(held) => self.keep(held, regs, sregs),
            Err(PagerError::Busy { .. }) => *self = Self::default(),
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// After a marker fault was served: what was evicted together is often wanted together.
    pub(super) fn fault_served(&mut self, fd: &VcpuFd, faults: &Faults) {
        let Some(left) = self.watched.checked_sub(1) else { return };
        self.watched = left;
        if left == 0 || !self.may_hold(faults) {
            self.tables = Kept::default();
            return;
        }
        let (Ok(regs), Ok(sregs)) = (fd.get_regs(), fd.get_sregs()) else { return };
        let place = Place::of(&regs, &sregs);
        if self.tables.place.is_some_and(|before| place.is_at(&before)) {
            return;
        }
        if let Ok(held) = walker(faults, &regs, &sregs).instruction(Extent::Tables) {
            self.tables = Kept { place: Some(place), _held: held };
        }
    }

    /// Faults come to this thread, and there are pins. What is held is let go when there are too few.
    fn may_hold(&mut self, faults: &Faults) -> bool {
        let scarce = faults.pager().pins_are_scarce();
        if scarce {
            (self.instruction, self.tables) = (Kept::default(), Kept::default());
        }
        faults.has_markers() && !scarce
    }

    fn goes_on(&self, regs: &kvm_regs, sregs: &kvm_sregs) -> bool {
        let before = self.instruction.place;
        before.is_some_and(|before| Place::of(regs, sregs).continues(&before))
    }

    fn keep(&mut self, held: Held, regs: &kvm_regs, sregs: &kvm_sregs) {
        self.instruction = Kept { place: Some(Place::of(regs, sregs)), _held: held };
        self.watched = WATCHED_FAULTS;
    }
}

/// Where an instruction's address is remembered: by Fibonacci hashing, since the same offset in many
/// pages is common.
fn plain_slot(rip: u64) -> usize {
    (rip.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (u64::BITS - PLAIN_BITS)) as usize
}

fn walker<'a>(faults: &'a Faults, regs: &'a kvm_regs, sregs: &'a kvm_sregs) -> Walker<'a> {
    Walker { pager: faults.pager(), by: faults.sleeper(), regs, sregs }
}

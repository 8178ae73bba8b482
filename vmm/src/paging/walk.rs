//! What KVM's instruction emulator needs of guest memory, brought in and kept there.
//!
//! The emulator (MMIO, string I/O) reads the instruction, its operands, and the guest's page tables that
//! lead to them, from the guest mapping. Over a marker such a read fails in a way that only KVM sees: a
//! failed fetch of the instruction ends in KVM_EXIT_INTERNAL_ERROR, a failed operand in an MMIO exit
//! whose address lies in RAM, and a failed read of a table in a page fault in the guest that is none.
//! The first two come here; from then on all that the instruction may touch is pinned until the vCPU
//! is through.
//!
//! Tables are read as the processor would (Intel SDM volume 3, 5.5; AMD APM volume 2, 5.3): 4-level and
//! 5-level paging, and none. A guest with 32-bit paging has only the operands' own pages brought in.

use std::sync::Arc;

use guest_memory::{Gpa, PAGE_BYTES, Pager, PagerError, Pinned, Sleeper};
use kvm_bindings::{kvm_regs, kvm_sregs};
use vm_memory::{Bytes, GuestAddress};

/// The longest instruction, in bytes.
const INSTRUCTION_BYTES: u64 = 15;
/// The most that one operand has, in bytes, before it is asked for again.
const OPERAND_BYTES: u64 = 64;

const CR0_PG: u64 = 1 << 31;
const CR4_LA57: u64 = 1 << 12;
const EFER_LMA: u64 = 1 << 10;
const PRESENT: u64 = 1 << 0;
const LARGE: u64 = 1 << 7;
/// Bits 12 to 51 of a table entry.
const FRAME: u64 = 0x000f_ffff_ffff_f000;

/// How a guest translates addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Paging {
    None,
    Levels {
        root: Gpa,
        levels: u32,
    },
    /// Not followed.
    Legacy,
}

impl Paging {
    fn of(sregs: &kvm_sregs) -> Self {
        let levels = if sregs.cr4 & CR4_LA57 != 0 { 5 } else { 4 };
        match (sregs.cr0 & CR0_PG != 0, sregs.efer & EFER_LMA != 0) {
            (false, _) => Self::None,
            (true, true) => Self::Levels { root: Gpa(sregs.cr3 & FRAME), levels },
            (true, false) => Self::Legacy,
        }
    }
}

/// Pages that stay in memory for an instruction.
#[derive(Debug, Default)]
pub(crate) struct Held(Vec<Pinned>);

impl Held {
    /// Brings in and keeps what the instruction at RIP may touch: itself, what RSI, RDI and the stack
    /// pointer name, and the tables that lead there. What is not mapped in the guest is left out.
    ///
    /// # Errors
    /// When a page does not come.
    pub(crate) fn for_instruction(
        pager: &Pager,
        by: &Arc<Sleeper>,
        regs: &kvm_regs,
        sregs: &kvm_sregs,
    ) -> Result<Self, PagerError> {
        let paging = Paging::of(sregs);
        let rip = regs.rip.wrapping_add(sregs.cs.base);
        let operands = [
            (rip, INSTRUCTION_BYTES),
            (regs.rsi, OPERAND_BYTES),
            (regs.rdi, OPERAND_BYTES),
            (regs.rsp, OPERAND_BYTES),
        ];
        let mut held = Self::default();
        for (address, bytes) in operands {
            let last = address.wrapping_add(bytes - 1);
            held.address(pager, by, paging, address)?;
            if last / PAGE_BYTES != address / PAGE_BYTES {
                held.address(pager, by, paging, last)?;
            }
        }
        Ok(held)
    }

    fn address(
        &mut self,
        pager: &Pager,
        by: &Arc<Sleeper>,
        paging: Paging,
        address: u64,
    ) -> Result<(), PagerError> {
        let (mut table, levels) = match paging {
            Paging::Legacy => return Ok(()),
            Paging::None => return self.page(pager, by, Gpa(address)).map(drop),
            Paging::Levels { root, levels } => (root, levels),
        };
        for level in (0..levels).rev() {
            let shift = 12 + 9 * level;
            let entry = Gpa(table.0 + (address >> shift & 0x1ff) * 8);
            if !self.page(pager, by, entry)? {
                return Ok(());
            }
            let read = self.0.last().map(|page| page.read_obj::<u64>(GuestAddress(entry.0)));
            let Some(Ok(entry)) = read else { return Ok(()) };
            if entry & PRESENT == 0 {
                return Ok(());
            }
            if level == 0 || (level <= 2 && entry & LARGE != 0) {
                let offset = address & ((1 << shift) - 1);
                let base = entry & FRAME & !((1 << shift) - 1);
                return self.page(pager, by, Gpa(base | offset)).map(drop);
            }
            table = Gpa(entry & FRAME);
        }
        Ok(())
    }

    /// Keeps the page at this address; false when it is no RAM.
    fn page(&mut self, pager: &Pager, by: &Arc<Sleeper>, gpa: Gpa) -> Result<bool, PagerError> {
        match pager.pin(&[(Gpa(gpa.0 & !(PAGE_BYTES - 1)), PAGE_BYTES)], by) {
            Ok(pinned) => {
                self.0.push(pinned);
                Ok(true)
            }
            Err(PagerError::OutOfRange(_)) => Ok(false),
            Err(error) => Err(error),
        }
    }
}

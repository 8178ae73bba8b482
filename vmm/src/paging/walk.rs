//! What KVM's instruction emulator needs of guest memory, brought in and kept there.
//!
//! The emulator (MMIO, string I/O) reads the instruction, its operands, and the guest's page tables that
//! lead to them, from the guest mapping. Over a marker such a read fails in a way that only KVM sees: a
//! failed fetch of the instruction ends in KVM_EXIT_INTERNAL_ERROR, a failed operand in an MMIO exit
//! whose address lies in RAM, and a failed read of a table in a page fault in the guest that is none.
//! The first two come here. The third cannot be seen, only prevented: `kvm/emulation.rs` says when.
//!
//! Tables are read as the processor would (Intel SDM volume 3, 5.5; AMD APM volume 2, 5.3): 4-level and
//! 5-level paging, and none. A guest with 32-bit paging has only the operands' own pages brought in.

use std::sync::Arc;

use guest_memory::{Gfn, Gpa, PAGE_BYTES, Pager, PagerError, Pinned, Sleeper};
use kvm_bindings::{kvm_regs, kvm_sregs};
use vm_memory::{Bytes, GuestAddress};

/// The longest instruction, in bytes.
const INSTRUCTION_BYTES: u64 = 15;
/// The most that one operand has, in bytes, before it is asked for again.
const OPERAND_BYTES: u64 = 64;
/// What PUSH puts below the stack pointer, in bytes.
const PUSHED_BYTES: u64 = 8;

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

/// How much is brought in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Extent {
    /// The tables only.
    Tables,
    /// The tables and the pages that they lead to.
    Pages,
}

/// Pages that stay in memory for an instruction.
#[derive(Debug, Default)]
pub(crate) struct Held(Vec<(Gfn, Pinned)>);

/// Walks one guest's tables.
#[derive(Clone, Copy)]
pub(crate) struct Walker<'a> {
    pub(crate) pager: &'a Pager,
    pub(crate) by: &'a Arc<Sleeper>,
    pub(crate) regs: &'a kvm_regs,
    pub(crate) sregs: &'a kvm_sregs,
}

impl Walker<'_> {
    /// Brings in and keeps what the instruction at RIP may touch: itself, what RSI, RDI and the stack
    /// pointer name, and the tables that lead there. What is not mapped in the guest is left out.
    ///
    /// # Errors
    /// When a page does not come.
    pub(crate) fn instruction(&self, extent: Extent) -> Result<Held, PagerError> {
        let mut held = Held::default();
        self.code(extent, &mut held)?;
        self.operands(extent, &mut held)?;
        Ok(held)
    }

    /// The same, if the instruction at RIP is a string instruction that accesses a port; else `None`.
    ///
    /// # Errors
    /// When a page does not come.
    pub(crate) fn string_io(&self) -> Result<Option<Held>, PagerError> {
        let mut held = Held::default();
        let bytes = self.code(Extent::Pages, &mut held)?;
        let long = self.sregs.cs.l != 0;
        if !is_string_io(&bytes, long) {
            return Ok(None);
        }
        self.operands(Extent::Pages, &mut held)?;
        Ok(Some(held))
    }

    /// The instruction at RIP; its bytes as far as they can be had.
    fn code(&self, extent: Extent, held: &mut Held) -> Result<Vec<u8>, PagerError> {
        let mut bytes = Vec::with_capacity(INSTRUCTION_BYTES as usize);
        let rip = self.regs.rip.wrapping_add(self.sregs.cs.base);
        for (address, len) in parts(rip, INSTRUCTION_BYTES) {
            let Some(gpa) = self.address(address, extent, held)? else { break };
            let mut part = vec![0; len as usize];
            if held.read(gpa, &mut part) {
                bytes.append(&mut part);
            }
        }
        Ok(bytes)
    }

    fn operands(&self, extent: Extent, held: &mut Held) -> Result<(), PagerError> {
        for operand in [self.regs.rsi, self.regs.rdi, self.regs.rsp] {
            for (address, _) in parts(operand, OPERAND_BYTES) {
                self.address(address, extent, held)?;
            }
        }
        // What PUSH writes.
        self.address(self.regs.rsp.wrapping_sub(PUSHED_BYTES), extent, held).map(drop)
    }

    /// Where this address leads in the guest, if it is mapped.
    fn address(
        &self,
        address: u64,
        extent: Extent,
        held: &mut Held,
    ) -> Result<Option<Gpa>, PagerError> {
        let (mut table, levels) = match Paging::of(self.sregs) {
            Paging::Legacy => return Ok(None),
            Paging::None => return self.leaf(Gpa(address), extent, held),
            Paging::Levels { root, levels } => (root, levels),
        };
        for level in (0..levels).rev() {
            let shift = 12 + 9 * level;
            let entry = Gpa(table.0 + (address >> shift & 0x1ff) * 8);
            let mut bytes = [0; 8];
            if !self.page(entry, held)? || !held.read(entry, &mut bytes) {
                return Ok(None);
            }
            let entry = u64::from_le_bytes(bytes);
            if entry & PRESENT == 0 {
                return Ok(None);
            }
            if level == 0 || (level <= 2 && entry & LARGE != 0) {
                let offset = address & ((1 << shift) - 1);
                let base = entry & FRAME & !((1 << shift) - 1);
                return self.leaf(Gpa(base | offset), extent, held);
            }
            table = Gpa(entry & FRAME);
        }
        Ok(None)
    }

    fn leaf(&self, gpa: Gpa, extent: Extent, held: &mut Held) -> Result<Option<Gpa>, PagerError> {
        if extent == Extent::Pages {
            self.page(gpa, held)?;
        }
        Ok(Some(gpa))
    }

    /// Keeps the page at this address; false when it is no RAM.
    fn page(&self, gpa: Gpa, held: &mut Held) -> Result<bool, PagerError> {
        if held.find(gpa).is_some() {
            return Ok(true);
        }
        match self.pager.pin(&[(Gpa(gpa.0 & !(PAGE_BYTES - 1)), PAGE_BYTES)], self.by) {
            Ok(pinned) => {
                held.0.push((gpa.gfn(), pinned));
                Ok(true)
            }
            Err(PagerError::OutOfRange(_)) => Ok(false),
            Err(error) => Err(error),
        }
    }
}

impl Held {
    fn find(&self, gpa: Gpa) -> Option<&Pinned> {
        self.0.iter().find(|(gfn, _)| *gfn == gpa.gfn()).map(|(_, pinned)| pinned)
    }

    /// Reads from one of the pages; false when it is none of them.
    fn read(&self, gpa: Gpa, bytes: &mut [u8]) -> bool {
        self.find(gpa).is_some_and(|page| page.read_slice(bytes, GuestAddress(gpa.0)).is_ok())
    }
}

/// The parts of a range that lie in different pages: address and length in bytes. At most two, for ranges
/// of less than a page.
fn parts(address: u64, bytes: u64) -> impl Iterator<Item = (u64, u64)> {
    let first = bytes.min(PAGE_BYTES - address % PAGE_BYTES);
    [(address, first), (address.wrapping_add(first), bytes - first)]
        .into_iter()
        .filter(|(_, len)| *len > 0)
}

/// INS or OUTS, behind any prefixes (Intel SDM volume 2A, 2.1.1).
fn is_string_io(bytes: &[u8], long: bool) -> bool {
    let is_prefix = |byte: &u8| {
        matches!(byte, 0x26 | 0x2e | 0x36 | 0x3e | 0x64..=0x67 | 0xf0 | 0xf2 | 0xf3)
            || (long && matches!(byte, 0x40..=0x4f))
    };
    bytes.iter().find(|byte| !is_prefix(byte)).is_some_and(|byte| matches!(byte, 0x6c..=0x6f))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn string_io_is_told_from_the_rest() {
        for code in [&[0xf3, 0x6e][..], &[0x6c], &[0x66, 0xf3, 0x6f], &[0xf3, 0x67, 0x6d, 0x90]] {
            assert!(is_string_io(code, true) && is_string_io(code, false), "{code:x?}");
        }
        assert!(is_string_io(&[0xf3, 0x48, 0x6e], true));
        assert!(!is_string_io(&[0xf3, 0x48, 0x6e], false), "DEC EAX");
        for code in [&[0xee][..], &[0xe6, 0x6e], &[0xf3, 0xa4], &[0xf3], &[]] {
            assert!(!is_string_io(code, true), "{code:x?}");
        }
    }

    #[test]
    fn ranges_are_cut_at_pages() {
        let cut = |address, bytes| parts(address, bytes).collect::<Vec<_>>();
        assert_eq!(cut(0x1000, 15), [(0x1000, 15)]);
        assert_eq!(cut(0x1ff1, 15), [(0x1ff1, 15)]);
        assert_eq!(cut(0x1ff2, 15), [(0x1ff2, 14), (0x2000, 1)]);
        assert_eq!(cut(u64::MAX, 15), [(u64::MAX, 1), (0, 14)]);
    }
}

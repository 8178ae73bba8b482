//! Which slots of a medium are taken.
//!
//! ```text
//!   unused --take--> Reserved --hold--> Held --forget--> Reserved --release--> unused
//! ```
//! Reserved slots belong to an operation that is under way, so that nobody else gets them before it
//! is over.

use super::{MAX_SLOTS, Slot, StoreError};
use crate::address::PAGE_BYTES;

/// The slots of one medium. Memory grows with the slots that were ever used.
#[derive(Debug)]
pub(crate) struct Slots {
    tier: &'static str,
    capacity: u32,
    /// One bit for each slot that was ever used: it holds a page.
    held: Vec<u64>,
    /// How many slots were ever used.
    used: u32,
    /// Used slots that are free now.
    free: Vec<u32>,
}

impl Slots {
    /// Slots for `capacity_bytes` bytes of pages, or as many as there can be.
    pub(crate) fn new(tier: &'static str, capacity_bytes: Option<u64>) -> Self {
        let pages = capacity_bytes.map_or(u64::MAX, |bytes| bytes / PAGE_BYTES);
        let capacity = u32::try_from(pages).unwrap_or(MAX_SLOTS).min(MAX_SLOTS);
        Self { tier, capacity, held: Vec::new(), used: 0, free: Vec::new() }
    }

    /// Reserves a slot: one that was used before, if there is one.
    pub(crate) fn take(&mut self) -> Result<Slot, StoreError> {
        if let Some(slot) = self.free.pop() {
            return Ok(Slot(slot));
        }
        if self.used == self.capacity {
            return Err(self.full());
        }
        self.used += 1;
        self.held.resize(self.used.div_ceil(64) as usize, 0);
        Ok(Slot(self.used - 1))
    }

    /// The error of a store that has no free slot.
    pub(crate) fn full(&self) -> StoreError {
        StoreError::Full { tier: self.tier, capacity_bytes: self.capacity_bytes() }
    }

    /// A reserved slot has its page.
    pub(crate) fn hold(&mut self, slot: Slot) {
        debug_assert!(!self.holds(slot), "slot {slot} has a page already");
        self.held[slot.0 as usize / 64] |= 1 << (slot.0 % 64);
    }

    /// Whether the slot has a page.
    pub(crate) fn holds(&self, slot: Slot) -> bool {
        self.held.get(slot.0 as usize / 64).is_some_and(|word| word & (1 << (slot.0 % 64)) != 0)
    }

    /// An error unless the slot has a page.
    pub(crate) fn check(&self, slot: Slot) -> Result<(), StoreError> {
        if self.holds(slot) { Ok(()) } else { Err(StoreError::Empty(slot)) }
    }

    /// The slot's page is dropped; the slot is reserved until [`Slots::release`].
    pub(crate) fn forget(&mut self, slot: Slot) -> Result<(), StoreError> {
        self.check(slot)?;
        self.held[slot.0 as usize / 64] &= !(1 << (slot.0 % 64));
        Ok(())
    }

    /// A reserved slot may be used again.
    pub(crate) fn release(&mut self, slot: Slot) {
        debug_assert!(!self.holds(slot) && slot.0 < self.used, "slot {slot} is not reserved");
        self.free.push(slot.0);
    }

    /// What the medium can hold, in bytes.
    pub(crate) fn capacity_bytes(&self) -> u64 {
        u64::from(self.capacity) * PAGE_BYTES
    }

    /// What these tables take, in bytes.
    pub(crate) fn metadata_bytes(&self) -> u64 {
        (self.held.capacity() * 8 + self.free.capacity() * 4) as u64
    }
}

/// Where a slot's bytes begin in a medium that has nothing but slots.
pub(crate) fn offset(slot: Slot) -> u64 {
    u64::from(slot.0) * PAGE_BYTES
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    #[test]
    fn capacities_are_bounded() {
        assert_eq!(Slots::new("test", None).capacity, MAX_SLOTS);
        assert_eq!(Slots::new("test", Some(u64::MAX)).capacity, MAX_SLOTS);
        assert_eq!(Slots::new("test", Some(8191)).capacity, 1);
        let none = Slots::new("test", Some(1)).take();
        assert!(matches!(none, Err(StoreError::Full { tier: "test", capacity_bytes: 0 })));
    }

    proptest! {
        #[test]
        fn slots_are_taken_once_and_used_again(ops in prop::collection::vec(any::<(u8, u8)>(), 1..300)) {
            let mut slots = Slots::new("test", Some(64 * PAGE_BYTES));
            let (mut held, mut reserved) = (BTreeSet::new(), BTreeSet::new());
            for (op, which) in ops {
                let pick = |set: &BTreeSet<Slot>| set.iter().nth(usize::from(which) % set.len().max(1)).copied();
                match op % 5 {
                    0 | 1 => match slots.take() {
                        Ok(slot) => prop_assert!(!held.contains(&slot) && reserved.insert(slot)),
                        Err(_) => prop_assert_eq!(held.len() + reserved.len(), 64),
                    },
                    2 => if let Some(slot) = pick(&reserved) {
                        slots.hold(slot);
                        reserved.remove(&slot);
                        held.insert(slot);
                    },
                    3 => if let Some(slot) = pick(&reserved) {
                        slots.release(slot);
                        reserved.remove(&slot);
                    },
                    _ => {
                        let slot = pick(&held).unwrap_or(Slot(u32::from(which)));
                        prop_assert_eq!(slots.forget(slot).is_ok(), held.remove(&slot));
                        prop_assert!(matches!(slots.check(slot), Err(StoreError::Empty(s)) if s == slot));
                        if slot.0 < slots.used && !slots.free.contains(&slot.0) {
                            reserved.insert(slot);
                        }
                    }
                }
                for slot in (0..70).map(Slot) {
                    prop_assert_eq!(slots.holds(slot), held.contains(&slot));
                }
            }
        }
    }
}

//! Pages in host memory.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::{Slot, Store, StoreError};
use crate::address::{PAGE_BYTES, PageBytes};
use crate::sys::memfd;

/// A store in a memory file of its own. The file is never mapped, so that stored pages are no part
/// of the process's resident set; a freed slot gives its memory back.
#[derive(Debug)]
pub struct MemoryStore {
    file: File,
    /// For every slot that was ever used, whether it holds a page.
    used: Vec<bool>,
    /// The slots that were used and hold no page.
    free: Vec<Slot>,
}

impl MemoryStore {
    /// An empty store.
    ///
    /// # Errors
    /// [`StoreError::Create`] when there is no memory file to be had.
    pub fn new() -> Result<Self, StoreError> {
        Ok(Self {
            file: memfd::create(c"nowait-store", 0).map_err(StoreError::Create)?,
            used: Vec::new(),
            free: Vec::new(),
        })
    }

    fn holds(&self, slot: Slot) -> Result<(), StoreError> {
        match self.used.get(slot.0 as usize) {
            Some(true) => Ok(()),
            _ => Err(StoreError::Empty(slot)),
        }
    }
}

impl Store for MemoryStore {
    fn write(&mut self, page: &PageBytes) -> Result<Slot, StoreError> {
        let next = u32::try_from(self.used.len()).ok().map(Slot);
        let slot = self.free.last().copied().or(next);
        let slot = slot.ok_or(StoreError::Full { slots: u32::MAX })?;
        self.file.write_all_at(page, offset(slot)).map_err(error("write", slot))?;
        if self.free.pop().is_none() {
            self.used.push(false);
        }
        self.used[slot.0 as usize] = true;
        Ok(slot)
    }

    fn read(&mut self, slot: Slot, page: &mut PageBytes) -> Result<(), StoreError> {
        self.holds(slot)?;
        self.file.read_exact_at(page, offset(slot)).map_err(error("read", slot))
    }

    fn free(&mut self, slot: Slot) -> Result<(), StoreError> {
        self.holds(slot)?;
        self.used[slot.0 as usize] = false;
        self.free.push(slot);
        memfd::punch(&self.file, offset(slot), PAGE_BYTES).map_err(error("free", slot))
    }
}

fn offset(slot: Slot) -> u64 {
    u64::from(slot.0) * PAGE_BYTES
}

fn error(action: &'static str, slot: Slot) -> impl FnOnce(io::Error) -> StoreError {
    move |source| StoreError::Io { action, slot, source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::address::PAGE_SIZE;
    use proptest::prelude::*;
    use std::collections::BTreeMap;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn a_slot_that_holds_no_page_is_refused() {
        let mut store = MemoryStore::new().unwrap();
        let mut page = [0; PAGE_SIZE];
        let slot = store.write(&[1; PAGE_SIZE]).unwrap();
        store.free(slot).unwrap();
        assert!(matches!(store.free(slot), Err(StoreError::Empty(s)) if s == slot));
        assert!(matches!(store.read(slot, &mut page), Err(StoreError::Empty(_))));
        assert!(matches!(store.read(Slot(u32::MAX), &mut page), Err(StoreError::Empty(_))));
        assert_eq!(store.file.metadata().unwrap().blocks(), 0);
    }

    proptest! {
        #[test]
        fn pages_come_back_and_slots_are_used_again(ops in prop::collection::vec((any::<bool>(), any::<u8>()), 1..200)) {
            let mut store = MemoryStore::new().unwrap();
            let mut model = BTreeMap::new();
            let mut peak = 0;
            for (put, byte) in ops {
                if put || model.is_empty() {
                    let slot = store.write(&[byte; PAGE_SIZE]).unwrap();
                    prop_assert_eq!(model.insert(slot, byte), None, "the slot was taken");
                } else {
                    let slot = *model.keys().nth(usize::from(byte) % model.len()).unwrap();
                    let mut page = [0; PAGE_SIZE];
                    store.read(slot, &mut page).unwrap();
                    prop_assert_eq!(page, [model[&slot]; PAGE_SIZE]);
                    store.free(slot).unwrap();
                    model.remove(&slot);
                }
                peak = peak.max(model.len());
                prop_assert_eq!(store.file.metadata().unwrap().blocks() * 512, model.len() as u64 * PAGE_BYTES);
            }
            prop_assert!(store.used.len() <= peak, "slots are used again before the store grows");
        }
    }
}

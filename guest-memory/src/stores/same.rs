//! Pages that are one 64-bit word over and over, zero above all: the slot names the word, and no
//! bytes are kept.
//!
//! ```text
//!   slot   0x8000_0000            the zero page
//!          0x8000_0000 | n        the n-th word of the table
//!          below                  the slot of the store behind
//! ```

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use super::meter::{Counter, Meter, TierReport};
use super::{Read, Slot, Store, StoreError, Write};
use crate::address::PageBytes;
use crate::pass::{MayWait, NoWait};

/// In a slot: the page is here.
const HERE: u32 = 1 << 31;
/// The most words at a time; pages of others go to the store behind.
const MAX_WORDS: usize = 1 << 16;

/// Same-filled pages here, all others in the store behind.
pub(crate) struct Same {
    behind: Arc<dyn Store>,
    zero_pages: AtomicU64,
    words: Mutex<Words>,
    meter: Meter,
    reads: Counter,
}

/// The words other than zero that pages are filled with.
#[derive(Default)]
struct Words {
    numbers: HashMap<u64, u32>,
    /// By number, from 1: the word, and how many pages it fills (0: the number is unused).
    pages: Vec<(u64, u64)>,
    unused: Vec<u32>,
}

impl Same {
    /// Takes same-filled pages away from `behind`.
    pub(crate) fn new(behind: Arc<dyn Store>) -> Self {
        Self {
            behind,
            zero_pages: AtomicU64::new(0),
            words: Mutex::default(),
            meter: Meter::new(Duration::ZERO),
            reads: Counter::default(),
        }
    }

    fn words(&self) -> MutexGuard<'_, Words> {
        self.words.lock().expect("nothing panics with this lock held")
    }

    /// Fills `page` if it is here.
    fn fill(&self, slot: Slot, page: &mut PageBytes) -> Option<Result<(), StoreError>> {
        let number = number(slot)?;
        Some(self.word(slot, number).map(|word| {
            page.as_chunks_mut().0.fill(word.to_ne_bytes());
        }))
    }

    fn word(&self, slot: Slot, number: u32) -> Result<u64, StoreError> {
        let word = match number {
            0 => (self.zero_pages.load(Ordering::Relaxed) > 0).then_some(0),
            _ => self.words().get(number),
        };
        word.ok_or(StoreError::Empty(slot))
    }

    /// The slot of a page that is `word` over and over; `None` when the table is full.
    fn keep(&self, word: u64) -> Option<Slot> {
        let number = match word {
            0 => {
                self.zero_pages.fetch_add(1, Ordering::Relaxed);
                0
            }
            _ => self.words().add(word)?,
        };
        self.meter.pages.add(1);
        Some(Slot(HERE | number))
    }
}

/// The number in a slot that is here.
fn number(slot: Slot) -> Option<u32> {
    (slot.0 & HERE != 0).then_some(slot.0 & !HERE)
}

/// The word that the page is filled with, if it is one.
fn filled_with(page: &PageBytes) -> Option<u64> {
    let first = *page.first_chunk()?;
    // A page that is equal to itself shifted by a word; most pages differ within the first bytes.
    (page[8..] == page[..page.len() - 8]).then_some(u64::from_ne_bytes(first))
}

impl Words {
    fn get(&self, number: u32) -> Option<u64> {
        let (word, pages) = *self.pages.get(number as usize - 1)?;
        (pages > 0).then_some(word)
    }

    fn add(&mut self, word: u64) -> Option<u32> {
        if let Some(number) = self.numbers.get(&word) {
            self.pages[*number as usize - 1].1 += 1;
            return Some(*number);
        }
        if self.numbers.len() == MAX_WORDS {
            return None;
        }
        let number = self.unused.pop().unwrap_or_else(|| {
            self.pages.push((0, 0));
            self.pages.len() as u32
        });
        self.pages[number as usize - 1] = (word, 1);
        self.numbers.insert(word, number);
        Some(number)
    }

    /// One page less; `None` when there was none.
    fn remove(&mut self, number: u32) -> Option<()> {
        let (word, pages) = self.pages.get_mut(number as usize - 1)?;
        *pages = pages.checked_sub(1)?;
        if *pages == 0 {
            self.numbers.remove(word);
            self.unused.push(number);
        }
        Some(())
    }

    fn metadata_bytes(&self) -> u64 {
        (self.numbers.capacity() * 16 + self.pages.capacity() * 16 + self.unused.capacity() * 4)
            as u64
    }
}

impl Store for Same {
    fn read_now(
        &self,
        pass: &NoWait,
        slot: Slot,
        page: &mut PageBytes,
    ) -> Result<bool, StoreError> {
        match self.fill(slot, page) {
            Some(result) => {
                self.meter.hits.add(1);
                result.map(|()| true)
            }
            None => self.behind.read_now(pass, slot, page),
        }
    }

    fn at_hand(&self, slot: Slot) -> bool {
        number(slot).is_some() || self.behind.at_hand(slot)
    }

    fn read(&self, pass: &MayWait, reads: &mut [Read<'_>]) {
        let mut others = Vec::new();
        for read in reads {
            match self.fill(read.slot, read.page) {
                Some(result) => {
                    self.reads.add(1);
                    read.result = result;
                }
                None => others.push(read),
            }
        }
        read_through(&*self.behind, pass, others);
    }

    fn write(&self, pass: &MayWait, writes: &mut [Write<'_>]) {
        let mut others = Vec::new();
        for write in writes {
            match filled_with(write.page).and_then(|word| self.keep(word)) {
                Some(slot) => write.result = Ok(slot),
                None => others.push(write),
            }
        }
        write_through(&*self.behind, pass, others);
    }

    fn free(&self, slot: Slot) -> Result<(), StoreError> {
        let Some(number) = number(slot) else {
            return self.behind.free(slot);
        };
        let freed = match number {
            0 => {
                let (set, fetch) = (Ordering::Relaxed, Ordering::Relaxed);
                let less = self.zero_pages.fetch_update(set, fetch, |pages| pages.checked_sub(1));
                less.ok().map(|_| ())
            }
            _ => self.words().remove(number),
        };
        freed.ok_or(StoreError::Empty(slot))?;
        self.meter.pages.sub(1);
        Ok(())
    }

    fn expected_read(&self) -> Duration {
        self.behind.expected_read()
    }

    fn memory_bytes(&self) -> u64 {
        self.behind.memory_bytes()
    }

    fn report(&self) -> Vec<TierReport> {
        let report = self.meter.report("same-filled".to_owned());
        let mut tiers = vec![TierReport {
            reads: self.reads.get(),
            metadata_bytes: self.words().metadata_bytes(),
            ..report
        }];
        tiers.extend(self.behind.report());
        tiers
    }

    fn close(&self) {
        self.behind.close();
    }
}

/// Reads some of a batch from the store behind, under the same slots.
fn read_through(behind: &dyn Store, pass: &MayWait, reads: Vec<&mut Read<'_>>) {
    if reads.is_empty() {
        return;
    }
    let (mut inner, results): (Vec<_>, Vec<_>) = reads
        .into_iter()
        .map(|read| (Read::new(read.slot, &mut *read.page), &mut read.result))
        .unzip();
    behind.read(pass, &mut inner);
    for (result, inner) in results.into_iter().zip(inner) {
        *result = inner.result;
    }
}

/// Writes some of a batch to the store behind, whose slots must leave the top bit alone.
fn write_through(behind: &dyn Store, pass: &MayWait, writes: Vec<&mut Write<'_>>) {
    if writes.is_empty() {
        return;
    }
    let mut inner: Vec<_> = writes.iter().map(|write| Write::new(write.page)).collect();
    behind.write(pass, &mut inner);
    for (write, inner) in writes.into_iter().zip(inner) {
        debug_assert!(inner.result.as_ref().map_or(true, |slot| number(*slot).is_none()));
        write.result = inner.result;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::address::PAGE_SIZE;
    use crate::stores::memory::Memory;
    use crate::stores::testing::{self, Model};
    use proptest::prelude::*;

    fn store(pages: u64) -> Same {
        Same::new(Arc::new(Memory::new(Some(pages << 12)).unwrap()))
    }

    #[test]
    fn same_filled_pages_take_no_room_and_are_at_hand() {
        let store = store(0);
        let mut slots = Vec::new();
        for byte in [0, 0, 7, 7, 0xff] {
            slots.push(testing::write(&store, &[byte; PAGE_SIZE]).unwrap());
        }
        let mut page = [1; PAGE_SIZE];
        assert!(store.at_hand(slots[2]));
        assert!(store.read_now(&testing::no_wait(), slots[2], &mut page).unwrap());
        assert_eq!(page, [7; PAGE_SIZE]);
        page[PAGE_SIZE - 1] = 8;
        assert!(matches!(testing::write(&store, &page), Err(StoreError::Full { .. })));
        assert_eq!(store.report()[0].pages, 5);
        slots.into_iter().for_each(|slot| store.free(slot).unwrap());
        assert_eq!(store.report()[0].pages, 0);
        assert!(store.words().numbers.is_empty());
    }

    #[test]
    fn more_words_than_the_table_has_go_on() {
        let store = store(1);
        for word in 1..=MAX_WORDS as u64 {
            assert!(store.keep(word).is_some());
        }
        let mut page = [0; PAGE_SIZE];
        page.as_chunks_mut().0.fill((MAX_WORDS as u64 + 1).to_ne_bytes());
        let slot = testing::write(&store, &page).unwrap();
        assert_eq!(number(slot), None);
        assert_eq!(testing::read(&store, slot).unwrap(), page);
    }

    #[test]
    fn slots_that_hold_nothing_are_refused() {
        let store = store(1);
        for slot in [Slot(HERE), Slot(HERE | 1), Slot(u32::MAX), Slot(3)] {
            assert!(matches!(testing::read(&store, slot), Err(StoreError::Empty(_))), "{slot}");
            assert!(matches!(store.free(slot), Err(StoreError::Empty(_))), "{slot}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn it_keeps_what_a_map_keeps(ops in testing::operations(80)) {
            Model::new(None).run(&store(4096), &ops)?;
        }

        #[test]
        fn only_same_filled_pages_are_found(word: u64, at in 0..PAGE_SIZE, flip in 0..=255_u8) {
            let mut page = [0; PAGE_SIZE];
            page.as_chunks_mut().0.fill(word.to_ne_bytes());
            page[at] ^= flip;
            prop_assert_eq!(filled_with(&page), (flip == 0).then_some(word));
        }
    }
}

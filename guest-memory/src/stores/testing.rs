//! What tests and measurements of stores need; no part of the interface.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::fail::Fail;
pub use super::fail::Switch;
use super::{MAX_BATCH, Read, Slot, Store, StoreError, StoreSpec, Trouble, Write};
use crate::address::{PAGE_SIZE, PageBytes};
use crate::pass::{MayWait, NoWait};

/// The first pass, for whoever drives a store without a pager.
#[must_use]
pub fn no_wait() -> NoWait {
    NoWait::first_pass()
}

/// The second pass, for whoever drives a store without a pager.
#[must_use]
pub fn may_wait() -> MayWait {
    MayWait::second_pass()
}

/// A store that can be switched off and on: while it is down, whatever asks for pages fails as if
/// its medium did not answer.
#[must_use]
pub fn switchable(store: Arc<dyn Store>) -> (Arc<dyn Store>, Switch) {
    let (fail, switch) = Fail::switched(store);
    (Arc::new(fail), switch)
}

/// Opens a store by its text.
///
/// # Panics
/// When the text names no store.
///
/// # Errors
/// As [`open`](super::open()).
pub fn open(text: &str) -> Result<Arc<dyn Store>, StoreError> {
    super::open(&text.parse::<StoreSpec>().unwrap_or_else(|error| panic!("{text}: {error}")))
}

/// The usual stack, with a store of the caller's behind what is compressed.
///
/// # Errors
/// As [`open`](super::open()).
#[cfg(any(test, fuzzing))]
pub(crate) fn compressed_before(
    budget_bytes: u64,
    behind: Arc<dyn Store>,
) -> Result<Arc<dyn Store>, StoreError> {
    let compressed = super::tiered::Tiered::new(budget_bytes, Some(behind))?;
    Ok(Arc::new(super::same::Same::new(Arc::new(compressed))))
}

/// Stores one page.
///
/// # Errors
/// The store's.
pub fn write(store: &dyn Store, page: &PageBytes) -> Result<Slot, StoreError> {
    let mut write = Write::new(page);
    store.write(&may_wait(), std::slice::from_mut(&mut write));
    write.result
}

/// Reads one page in the second pass.
///
/// # Errors
/// The store's.
pub fn read(store: &dyn Store, slot: Slot) -> Result<PageBytes, StoreError> {
    let mut page = [0xa5; PAGE_SIZE];
    let mut read = Read::new(slot, &mut page);
    store.read(&may_wait(), std::slice::from_mut(&mut read));
    read.result.map(|()| page)
}

/// A page that `seed` decides: of 16 seeds one is all zeros, one another word, six do not compress,
/// and eight do, more or less well.
#[must_use]
pub fn page(seed: u64) -> PageBytes {
    let mut page = [0; PAGE_SIZE];
    let mut random = fastrand::Rng::with_seed(seed);
    let random_bytes = match seed % 16 {
        0 => 0,
        1 => {
            page.as_chunks_mut().0.fill(seed.to_ne_bytes());
            0
        }
        kind @ 2..10 => kind as usize * 300,
        _ => PAGE_SIZE,
    };
    random.fill(&mut page[..random_bytes]);
    if seed % 16 > 1 {
        page[PAGE_SIZE - 8..].copy_from_slice(&seed.to_ne_bytes());
    }
    page
}

/// One step of a [`Model`]'s run.
#[derive(Clone, Copy, Debug)]
pub enum Step {
    /// Store this many pages with seeds from this number on.
    Write(usize, u64),
    /// Read this many of the stored pages, from the one with this index on.
    Read(usize, usize),
    /// Free the page with this index.
    Free(usize),
}

/// Steps for a [`Model`], at most `max` of them.
#[cfg(test)]
pub(crate) fn operations(max: usize) -> impl proptest::strategy::Strategy<Value = Vec<Step>> {
    use proptest::prelude::*;
    let step = prop_oneof![
        3 => (1..=MAX_BATCH, 0..64_u64).prop_map(|(pages, seed)| Step::Write(pages.min(1 + pages / 4), seed)),
        3 => (1..=MAX_BATCH, any::<usize>()).prop_map(|(pages, at)| Step::Read(pages, at)),
        8 => any::<usize>().prop_map(Step::Free),
    ];
    prop::collection::vec(step, 1..max)
}

/// The reference that a store is compared with: a map.
#[derive(Debug, Default)]
pub struct Model {
    /// For every slot its page's seed, as often as a page was stored there.
    pages: BTreeMap<u32, Vec<u64>>,
    capacity: Option<usize>,
}

/// What a store did that a map would not.
#[derive(Debug)]
pub struct Difference(String);

impl std::fmt::Display for Difference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
impl From<Difference> for proptest::test_runner::TestCaseError {
    fn from(difference: Difference) -> Self {
        Self::fail(difference.0)
    }
}

fn different<T>(text: String) -> Result<T, Difference> {
    Err(Difference(text))
}

impl Model {
    /// An empty map for `capacity` pages.
    #[must_use]
    pub fn new(capacity: Option<usize>) -> Self {
        Self { pages: BTreeMap::new(), capacity }
    }

    /// How many pages there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.pages.values().map(Vec::len).sum()
    }

    /// Whether there is no page.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }

    /// Does the same to the store and to the map, and in the end frees all pages.
    ///
    /// # Errors
    /// At the first difference.
    pub fn run(&mut self, store: &dyn Store, steps: &[Step]) -> Result<(), Difference> {
        for step in steps {
            match *step {
                Step::Write(pages, seed) => self.write(store, pages, seed)?,
                Step::Read(pages, at) => self.read(store, pages, at)?,
                Step::Free(at) => self.free(store, at)?,
            }
        }
        while !self.is_empty() {
            self.read(store, MAX_BATCH, 0)?;
            self.free(store, 0)?;
        }
        match store.report().iter().map(|tier| tier.pages).sum::<u64>() {
            0 => Ok(()),
            pages => different(format!("{pages} pages are left")),
        }
    }

    fn write(&mut self, store: &dyn Store, pages: usize, seed: u64) -> Result<(), Difference> {
        let pages: Vec<_> = (seed..).take(pages).map(|seed| (seed, page(seed))).collect();
        let mut writes: Vec<_> = pages.iter().map(|(_, page)| Write::new(page)).collect();
        store.write(&may_wait(), &mut writes);
        for ((seed, _), write) in pages.iter().zip(writes) {
            match write.result {
                Ok(Slot(u32::MAX)) => return different("the slot is reserved".into()),
                Ok(slot) => {
                    let seeds = self.pages.entry(slot.0).or_default();
                    if seeds.first().is_some_and(|first| page(*first) != page(*seed)) {
                        return different(format!("slot {slot} was taken"));
                    }
                    seeds.push(*seed);
                }
                Err(error) if error.trouble() != Trouble::Full => {
                    return different(format!("write: {error}"));
                }
                Err(error) if self.capacity.is_none_or(|capacity| self.len() < capacity) => {
                    return different(format!("with {} pages: {error}", self.len()));
                }
                Err(_) => {}
            }
        }
        Ok(())
    }

    fn read(&self, store: &dyn Store, pages: usize, at: usize) -> Result<(), Difference> {
        let skip = at % self.pages.len().max(1);
        let expected: Vec<_> = self.pages.iter().skip(skip).take(pages).collect();
        if expected.is_empty() {
            return Ok(());
        }
        let mut buffers = vec![[0; PAGE_SIZE]; expected.len()];
        let mut reads: Vec<_> = (expected.iter().zip(&mut buffers))
            .map(|((slot, _), page)| Read::new(Slot(**slot), page))
            .collect();
        store.read(&may_wait(), &mut reads);
        for (read, (slot, seeds)) in reads.into_iter().zip(&expected) {
            match read.result {
                Ok(()) if *read.page == page(seeds[0]) => {}
                Ok(()) => return different(format!("slot {slot} has other bytes")),
                Err(error) => return different(format!("slot {slot}: {error}")),
            }
        }
        for (slot, seeds) in expected {
            let mut now = [0; PAGE_SIZE];
            match store.read_now(&no_wait(), Slot(*slot), &mut now) {
                Ok(true) if now == page(seeds[0]) => {}
                Ok(false) if !store.at_hand(Slot(*slot)) => {}
                other => return different(format!("slot {slot} in the first pass: {other:?}")),
            }
        }
        Ok(())
    }

    fn free(&mut self, store: &dyn Store, at: usize) -> Result<(), Difference> {
        let Some(slot) = self.pages.keys().nth(at % self.pages.len().max(1)).copied() else {
            return Ok(());
        };
        if let Err(error) = store.free(Slot(slot)) {
            return different(format!("free of slot {slot}: {error}"));
        }
        let seeds = self.pages.get_mut(&slot).expect("the slot was found in the map");
        seeds.pop();
        if !seeds.is_empty() {
            return Ok(());
        }
        self.pages.remove(&slot);
        let again = (store.free(Slot(slot)), read(store, Slot(slot)));
        match again {
            (Err(StoreError::Empty(_)), Err(StoreError::Empty(_))) => Ok(()),
            other => different(format!("slot {slot} was freed, and then {:?}", other.0)),
        }
    }
}

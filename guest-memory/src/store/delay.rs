//! A store that is slower than it is: for measurements.

use std::time::Duration;

use super::{Slot, Store, StoreError};
use crate::address::PageBytes;

/// Another store whose fetches last longer by a fixed time. Writes are as fast as they were.
#[derive(Debug)]
pub struct Delay<S> {
    store: S,
    delay: Duration,
}

impl<S: Store> Delay<S> {
    /// Adds `delay` to every fetch from `store`.
    pub fn new(store: S, delay: Duration) -> Self {
        Self { store, delay }
    }
}

impl<S: Store> Store for Delay<S> {
    fn write(&mut self, page: &PageBytes) -> Result<Slot, StoreError> {
        self.store.write(page)
    }

    fn read(&mut self, slot: Slot, page: &mut PageBytes) -> Result<(), StoreError> {
        self.store.read(slot, page)
    }

    fn free(&mut self, slot: Slot) -> Result<(), StoreError> {
        self.store.free(slot)
    }

    fn latency(&self) -> Duration {
        self.store.latency().saturating_add(self.delay)
    }
}

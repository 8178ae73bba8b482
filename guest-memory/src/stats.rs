//! What the pager counts.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::address::PAGE_BYTES;

/// A snapshot of the pager's counters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct PagerStats {
    /// Guest RAM, in bytes.
    pub total_bytes: u64,
    /// Guest RAM that is in memory now, in bytes: what the host keeps for the RAM file.
    pub resident_bytes: u64,
    /// Bytes of guest pages that are in the store now.
    pub stored_bytes: u64,
    /// Pages that were ever installed, for whatever reason; each counts once.
    pub pages_touched: u64,
    /// Pages that the loader had written before the start.
    pub pages_loaded: u64,
    /// userfaultfd messages of the kind *missing* (no page in the RAM file).
    pub messages_missing: u64,
    /// userfaultfd messages of the kind *minor* (a page in the RAM file, but not mapped).
    pub messages_minor: u64,
    /// Messages for a page for which another message or fetch was under way already.
    pub messages_joined: u64,
    /// Messages for a page that was mapped already.
    pub messages_duplicate: u64,
    /// Faults answered with a zero page.
    pub zero_faults: u64,
    /// Zero pages installed along with another page's fault.
    pub fault_around_pages: u64,
    /// Pages of which only the mapping was missing.
    pub remapped_pages: u64,
    /// Pages fetched from the store.
    pub fetched_pages: u64,
    /// Pages moved to the store.
    pub evicted_pages: u64,
    /// Fetches under way now.
    pub outstanding: u64,
    /// The most fetches that were under way at once.
    pub outstanding_max: u64,
    /// Installations that the kernel put off (EAGAIN).
    pub install_retries: u64,
}

/// A counter that the pager thread writes and everybody reads.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    // Relaxed everywhere: a counter orders nothing, and readers want a rough picture.
    pub(crate) fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    pub(crate) fn sub(&self, n: u64) {
        self.0.fetch_sub(n, Ordering::Relaxed);
    }

    pub(crate) fn raise_to(&self, n: u64) {
        self.0.fetch_max(n, Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// The counters behind [`PagerStats`]; see there.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) stored_pages: Counter,
    pub(crate) pages_touched: Counter,
    pub(crate) pages_loaded: Counter,
    pub(crate) messages_missing: Counter,
    pub(crate) messages_minor: Counter,
    pub(crate) messages_joined: Counter,
    pub(crate) messages_duplicate: Counter,
    pub(crate) zero_faults: Counter,
    pub(crate) fault_around_pages: Counter,
    pub(crate) remapped_pages: Counter,
    pub(crate) fetched_pages: Counter,
    pub(crate) evicted_pages: Counter,
    pub(crate) outstanding: Counter,
    pub(crate) outstanding_max: Counter,
    pub(crate) install_retries: Counter,
}

impl Counters {
    /// A fetch began.
    pub(crate) fn fetch_began(&self) {
        self.outstanding.add(1);
        self.outstanding_max.raise_to(self.outstanding.get());
    }

    /// The snapshot, with what only the caller knows.
    pub(crate) fn snapshot(&self, total_bytes: u64, resident_bytes: u64) -> PagerStats {
        PagerStats {
            total_bytes,
            resident_bytes,
            stored_bytes: self.stored_pages.get() * PAGE_BYTES,
            pages_touched: self.pages_touched.get(),
            pages_loaded: self.pages_loaded.get(),
            messages_missing: self.messages_missing.get(),
            messages_minor: self.messages_minor.get(),
            messages_joined: self.messages_joined.get(),
            messages_duplicate: self.messages_duplicate.get(),
            zero_faults: self.zero_faults.get(),
            fault_around_pages: self.fault_around_pages.get(),
            remapped_pages: self.remapped_pages.get(),
            fetched_pages: self.fetched_pages.get(),
            evicted_pages: self.evicted_pages.get(),
            outstanding: self.outstanding.get(),
            outstanding_max: self.outstanding_max.get(),
            install_retries: self.install_retries.get(),
        }
    }
}

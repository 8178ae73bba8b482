//! Evictions: unmap, store, punch.
//!
//! Unmapping comes first: only this thread maps pages, so from then on the bytes stand still, and no
//! write of the guest can be lost. Who touches a page meanwhile waits for the end of the request.

use std::os::unix::fs::FileExt;

use super::PagerError;
use super::worker::Worker;
use crate::address::{PageIndex, PageRun};
use crate::state::{OnStored, PageState};
use crate::store::Slot;
use crate::sys::memfd;

impl Worker {
    /// Moves pages, sorted and each once, to the store; returns how many are out of memory then.
    pub(super) fn evict(&mut self, pages: &[PageIndex]) -> Result<u32, PagerError> {
        let mut done = 0;
        let mut rest = pages;
        while let Some((&first, after_first)) = rest.split_first() {
            match self.table.state(first) {
                PageState::Mapped => {
                    let run = self.mapped_run(rest);
                    self.evict_run(run, done)?;
                    done += run.pages();
                    rest = &rest[run.pages() as usize..];
                    continue;
                }
                PageState::Zero | PageState::Stored(_) => done += 1,
                // It is wanted just now, or lost.
                PageState::Fetching(_) | PageState::Failed(_) => {}
            }
            rest = after_first;
        }
        Ok(done)
    }

    /// The first pages of the list that follow one another and are mapped; the first one is.
    fn mapped_run(&self, pages: &[PageIndex]) -> PageRun {
        let first = pages[0];
        let follows = |(page, number): &(&PageIndex, u32)| {
            page.0 == *number && self.table.state(**page) == PageState::Mapped
        };
        let count = pages.iter().zip(first.0..).take_while(follows).count();
        let run = u32::try_from(count).ok().and_then(|n| PageRun::new(first, n));
        run.unwrap_or(PageRun::single(first))
    }

    /// `done`: pages of the request that were out before, for the error.
    fn evict_run(&mut self, run: PageRun, done: u32) -> Result<(), PagerError> {
        let unmapped = self.shared.mapping.unmap(run);
        unmapped.map_err(self.on_pages("unmap", run))?;
        let mut slots = Vec::with_capacity(run.pages() as usize);
        let stored = run.iter().try_for_each(|page| {
            slots.push(self.store_page(page, done + slots.len() as u32)?);
            Ok(())
        });
        // Pages after a failure are still Mapped; their next fault maps them again.
        if let Some(absent) = run.prefix(slots.len() as u32) {
            self.forget(absent, &slots)?;
        }
        stored
    }

    fn store_page(&mut self, page: PageIndex, done: u32) -> Result<Slot, PagerError> {
        self.shared
            .file
            .read_exact_at(&mut self.buffer[..], page.file_offset())
            .map_err(self.on_pages("read", PageRun::single(page)))?;
        let gfn = self.shared.layout.gfn_of(page);
        let slot = self.store.write(&self.buffer);
        slot.map_err(|source| PagerError::Evict { gfn, done, source })
    }

    /// The pages are in the store: gives their memory back.
    fn forget(&mut self, run: PageRun, slots: &[Slot]) -> Result<(), PagerError> {
        for (page, slot) in run.iter().zip(slots) {
            // The word says Mapped: nothing has happened since `mapped_run`.
            let OnStored::Absent = self.table.edge(page, |word| word.stored(*slot)) else {
                continue;
            };
            self.shared.counters.evicted_pages.add(1);
            self.shared.counters.stored_pages.add(1);
        }
        // After the states: should it fail half-way, the store has the bytes all the same.
        let file = &self.shared.file;
        memfd::punch(file, run.first().file_offset(), run.byte_len())
            .map_err(self.on_pages("free the memory of", run))
    }
}

//! The way out: pages are taken out of the guest mapping and marked, written to the store, and their
//! memory is given back, in this order. So their bytes stand still while they are written, and no write
//! of the guest can be lost. Whoever touches a page on its way gets it back, or waits for the end of
//! one step.

use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use super::PagerError;
use super::core::Core;
use super::first::{First, Source};
use super::trouble::is_want_of_memory;
use crate::address::{PAGE_SIZE, PageBytes, PageIndex, PageRun, runs};
use crate::checksum::checksum;
use crate::pass::MayWait;
use crate::room::Closed;
use crate::stores::{Slot, StoreError, Trouble, Write};
use crate::sys::memfd;
use crate::word::{Generation, OnDropped, OnStored, OnUnmapped, PageWord, Taken};

/// The most pages that are written, or unmapped, in one go.
pub(super) const BATCH_PAGES: usize = 64;

/// How many pages are looked at in one search for copies that can be done without (256 MiB of RAM): the
/// next one goes on from there.
const MAX_COPY_LOOKS: u32 = 1 << 16;

/// A page that is being written, with what is known of it.
struct Leaving<'a> {
    page: PageIndex,
    generation: Generation,
    bytes: &'a PageBytes,
    checksum: u64,
}

/// How many pages of a batch left memory, and why the first other did not.
#[derive(Default)]
pub(super) struct WrittenBack {
    pub(super) pages: u32,
    pub(super) refused: Option<(PageIndex, StoreError)>,
}

impl Core {
    /// Takes pages, sorted, out of the guest mapping; returns those that are Idle then.
    pub(super) fn unmap(
        self: &Arc<Self>,
        pages: &[PageIndex],
    ) -> Result<Vec<PageIndex>, PagerError> {
        let begun = |page: &PageIndex| self.table.edge(*page, PageWord::begin_unmap) == Taken::Yes;
        let taken: Vec<_> = pages.iter().copied().filter(begun).collect();
        let mut error = None;
        for run in runs(&taken) {
            if let Err(refused) = self.mapping.unmap(run) {
                error.get_or_insert(self.on_pages("unmap", run)(refused));
                continue;
            }
            if self.markers {
                self.mark(run);
            }
        }
        self.counters.unmapped_pages.add(taken.len() as u64);
        let settled = |page: &PageIndex| self.settle_unmapped(*page, error.is_some());
        let idle = taken.into_iter().filter(settled).collect();
        error.map_or(Ok(idle), Err)
    }

    /// Ends the unmapping of a page; true when it is Idle. After an error it may still be mapped, and
    /// must not count as Idle.
    fn settle_unmapped(self: &Arc<Self>, page: PageIndex, failed: bool) -> bool {
        match self.table.edge(page, |word| word.unmapped(failed)) {
            OnUnmapped::Idle => true,
            OnUnmapped::Wanted => {
                if let Some(mut policy) = self.policy() {
                    policy.not_aged(page);
                }
                self.map_owned(page);
                false
            }
        }
    }

    /// A batch that nobody has begun to write yet.
    pub(super) fn next_leaving(&self) -> Option<Vec<(PageIndex, Generation)>> {
        self.leaving.lock().unwrap_or_else(PoisonError::into_inner).pop_front()
    }

    /// Writes such a batch, if there is one.
    pub(super) fn write_back_next(self: &Arc<Self>, pass: &MayWait) -> bool {
        let Some(batch) = self.next_leaving() else { return false };
        self.write_back(&batch, pass);
        self.room.write_back_ended(batch.len());
        true
    }

    /// Room for a page. Workers that wait for it may be all that there are: they write out what waits
    /// for a worker.
    pub(super) fn take_room(self: &Arc<Self>, pass: &MayWait) -> Result<(), Closed> {
        self.room.take(1, pass, || self.write_back_next(pass))
    }

    /// Writes pages that are Storing to the store, and gives the memory back of those that were not
    /// used meanwhile.
    pub(super) fn write_back(
        self: &Arc<Self>,
        batch: &[(PageIndex, Generation)],
        pass: &MayWait,
    ) -> WrittenBack {
        let mut bytes: Vec<PageBytes> = vec![[0; PAGE_SIZE]; batch.len()];
        let mut leaving = Vec::with_capacity(batch.len());
        for ((page, generation), bytes) in batch.iter().zip(&mut bytes) {
            match self.file.read_exact_at(bytes, page.file_offset()) {
                Ok(()) => leaving.push(Leaving {
                    page: *page,
                    generation: *generation,
                    checksum: checksum(bytes),
                    bytes,
                }),
                Err(error) => {
                    self.keep(*page, *generation);
                    // One that the host has swapped out, and has no memory for now, stays where it is.
                    if !is_want_of_memory(&error) {
                        self.fail(self.on_pages("read", PageRun::single(*page))(error));
                    }
                }
            }
        }
        let (clean, dirty): (Vec<_>, Vec<_>) =
            leaving.into_iter().partition(|page| self.is_clean(page));
        // At once: whoever wants one of these need not wait for the others to be written.
        let mut result = WrittenBack { pages: self.drop_clean(&clean), refused: None };
        let mut gone = Vec::with_capacity(dirty.len());
        for (page, result_of) in dirty.iter().zip(self.write_dirty(&dirty, pass)) {
            match result_of {
                Ok(slot) => gone.extend(self.begin_drop(page, slot, true)),
                Err(error) => {
                    self.keep(page.page, page.generation);
                    self.counters.write_errors.add(1);
                    result.refused.get_or_insert((page.page, error));
                }
            }
        }
        self.weigh_store();
        result.pages += gone.len() as u32;
        self.note_writes(result.refused.as_ref().map(|(_, error)| error), gone.len());
        self.drop_pages(gone);
        result
    }

    /// Drops pages whose older copies are still good; returns how many.
    fn drop_clean(self: &Arc<Self>, clean: &[Leaving<'_>]) -> u32 {
        let mut gone = Vec::with_capacity(clean.len());
        for page in clean {
            if let Some(slot) = self.table.word(page.page).slot() {
                self.counters.clean_pages.add(1);
                gone.extend(self.begin_drop(page, slot, false));
            }
        }
        let dropped = gone.len() as u32;
        self.drop_pages(gone);
        dropped
    }

    /// Writes pages that differ from their older copies, which are given up. A full store is asked once
    /// more when pages in memory have done without theirs.
    fn write_dirty(&self, dirty: &[Leaving<'_>], pass: &MayWait) -> Vec<Result<Slot, StoreError>> {
        for page in dirty {
            if let Some(older) = self.table.edge(page.page, |w| w.forget_older(page.generation)) {
                self.free_slot(older);
            }
        }
        let mut results = self.write_all(dirty.iter(), pass);
        let is_full = |result: &Result<Slot, StoreError>| {
            result.as_ref().is_err_and(|error| error.trouble() == Trouble::Full)
        };
        let full = results.iter().filter(|result| is_full(result)).count();
        if full > 0 && self.give_up_copies(full) > 0 {
            let again = dirty.iter().zip(&results).filter(|(_, result)| is_full(result));
            let mut again = self.write_all(again.map(|(page, _)| page), pass).into_iter();
            for result in results.iter_mut().filter(|result| is_full(result)) {
                *result = again.next().unwrap_or(Err(StoreError::Closed));
            }
        }
        results
    }

    fn write_all<'a>(
        &self,
        pages: impl Iterator<Item = &'a Leaving<'a>>,
        pass: &MayWait,
    ) -> Vec<Result<Slot, StoreError>> {
        let mut writes: Vec<_> = pages.map(|page| Write::new(page.bytes)).collect();
        if !writes.is_empty() {
            self.store.write(pass, &mut writes);
        }
        writes.into_iter().map(|write| write.result).collect()
    }

    /// Frees copies of pages that are in memory, at most `most`, and returns how many. They only spare a
    /// write, should their page leave as it came.
    fn give_up_copies(&self, most: usize) -> usize {
        let all = self.layout.all_pages().pages();
        let from = self.copies_from.load(Ordering::Relaxed);
        let (mut freed, mut looked) = (0, 0);
        while freed < most && looked < all.min(MAX_COPY_LOOKS) {
            let page = PageIndex(((u64::from(from) + u64::from(looked)) % u64::from(all)) as u32);
            looked += 1;
            if let Some(slot) = self.table.edge(page, PageWord::forget_copy) {
                self.free_slot(slot);
                freed += 1;
            }
        }
        let next = (u64::from(from) + u64::from(looked)) % u64::from(all);
        self.copies_from.store(next as u32, Ordering::Relaxed);
        freed
    }

    /// Is the older copy in the store the same? Clean is decided by content: a device or the VMM may
    /// write pages where no dirty bit tells.
    fn is_clean(&self, leaving: &Leaving<'_>) -> bool {
        self.table.word(leaving.page).slot().is_some()
            && self.table.checksum(leaving.page) == leaving.checksum
    }

    /// The store has the page in `slot`: it is the caller's to drop, unless it was used meanwhile.
    fn begin_drop(&self, leaving: &Leaving<'_>, slot: Slot, new: bool) -> Option<PageIndex> {
        let page = leaving.page;
        match self.table.edge(page, |word| word.stored(leaving.generation, slot)) {
            OnStored::Drop { older } => {
                self.table.set_checksum(page, leaving.checksum);
                if let Some(older) = older.filter(|older| *older != slot) {
                    self.free_slot(older);
                }
                Some(page)
            }
            OnStored::Late => {
                self.counters.late_stores.add(1);
                // That of a clean page is the page's, to keep or to free.
                if new {
                    self.free_slot(slot);
                }
                None
            }
        }
    }

    /// Gives the memory of pages back that are Dropping.
    fn drop_pages(self: &Arc<Self>, mut pages: Vec<PageIndex>) {
        if pages.is_empty() {
            return;
        }
        pages.sort_unstable();
        for run in runs(&pages) {
            let punched = memfd::punch(&self.file, run.first().file_offset(), run.byte_len());
            if let Err(error) = punched {
                self.fail(self.on_pages("free the memory of", run)(error));
            }
        }
        self.counters.evicted_pages.add(pages.len() as u64);
        self.counters.stored_pages.add(pages.len() as u64);
        self.room.give(pages.len() as u64);
        if let Some(mut policy) = self.policy() {
            pages.iter().for_each(|page| policy.gone(*page));
        }
        for page in pages {
            if self.table.edge(page, PageWord::dropped) == OnDropped::Wanted {
                self.fault_again(page);
            }
        }
    }

    /// Somebody wanted the page while it left: brings it back for them.
    pub(super) fn fault_again(self: &Arc<Self>, page: PageIndex) {
        if let First::Retry(retry) = self.first_pass(page, Source::Direct) {
            // Refused, it is dropped and has them fault again.
            drop(self.workers.submit(retry.0, Duration::ZERO));
        }
    }
}

//! What is wrong with the store or the host's memory at the moment, for the VMM to tell its user. None of
//! it loses data: while reads fail, or there is no memory for pages, who needs the pages waits (the VMM
//! pauses the guest); while writes fail, pages stay in memory.

use std::error::Error;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::core::Core;
use super::work::Work;
use crate::stores::StoreError;

/// What the store or the host does not do at the moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Health {
    /// Somebody waits for pages that cannot be read, again and again; why.
    pub reads: Option<String>,
    /// Somebody waits for pages that the host has no memory for, again and again; why.
    pub memory: Option<String>,
    /// Pages cannot be evicted, and the resident limit may be exceeded; why.
    pub writes: Option<String>,
}

#[derive(Debug, Default)]
pub(super) struct Trouble(Mutex<Known>);

#[derive(Debug, Default)]
struct Known {
    /// Works that fail again and again for want of the store, and of memory.
    store_works: u64,
    memory_works: u64,
    health: Health,
}

/// What a work that fails again and again waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WaitsFor {
    /// That the store answers.
    Store,
    /// That the host has memory.
    Memory,
}

impl Known {
    fn of(&mut self, what: WaitsFor) -> (&mut u64, &mut Option<String>) {
        match what {
            WaitsFor::Store => (&mut self.store_works, &mut self.health.reads),
            WaitsFor::Memory => (&mut self.memory_works, &mut self.health.memory),
        }
    }
}

/// Has the host no memory, or no room in the file system of a memory file? That may pass.
pub(super) fn is_want_of_memory(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOMEM | libc::ENOSPC))
}

impl Core {
    /// This work fails again and again: somebody should know.
    pub(super) fn trouble_with(&self, work: &mut Work, what: WaitsFor, error: &dyn Error) {
        if work.in_trouble == Some(what) {
            return;
        }
        if let Some(other) = work.in_trouble.replace(what) {
            self.trouble_over(other);
        }
        self.change_health(|known| {
            let (works, why) = known.of(what);
            *works += 1;
            why.get_or_insert_with(|| error.to_string());
        });
    }

    /// A work in trouble has ended, well or not, or is in another.
    pub(super) fn trouble_over(&self, what: WaitsFor) {
        self.change_health(|known| {
            let (works, why) = known.of(what);
            *works -= 1;
            if *works == 0 {
                *why = None;
            }
        });
    }

    /// After a batch of writes: why some were refused, if so, and how many pages left all the same.
    pub(super) fn note_writes(&self, refused: Option<&StoreError>, left: usize) {
        match refused {
            _ if self.is_closing() => {}
            // Without a limit whoever asked for the eviction hears of it, and nobody else need.
            Some(error) if left == 0 && self.room.limited() => self.change_health(|known| {
                known.health.writes = Some(error.to_string());
                self.room.set_stuck(true);
            }),
            None if left > 0 => self.evictions_work(),
            Some(_) | None => {}
        }
    }

    /// Evictions work again, or need not.
    pub(super) fn evictions_work(&self) {
        if self.room.is_stuck() {
            self.change_health(|known| {
                known.health.writes = None;
                self.room.set_stuck(false);
            });
        }
    }

    pub(super) fn health(&self) -> Health {
        self.known().health.clone()
    }

    fn change_health(&self, change: impl FnOnce(&mut Known)) {
        let mut known = self.known();
        let before = known.health.clone();
        change(&mut known);
        if known.health != before {
            drop(known);
            self.ring();
        }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.trouble.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

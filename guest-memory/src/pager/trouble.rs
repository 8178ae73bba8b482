//! What is wrong with the store at the moment, for the VMM to tell its user. None of it loses data: while
//! reads fail, who needs the pages waits (the VMM pauses the guest); while writes fail, pages stay in
//! memory.

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::core::Core;
use super::work::Work;
use crate::stores::StoreError;

/// What the store does not do at the moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Health {
    /// Somebody waits for pages that cannot be read, again and again; why.
    pub reads: Option<String>,
    /// Pages cannot be evicted, and the resident limit may be exceeded; why.
    pub writes: Option<String>,
}

#[derive(Debug, Default)]
pub(super) struct Trouble(Mutex<Known>);

#[derive(Debug, Default)]
struct Known {
    /// Works that fail again and again.
    works: u64,
    health: Health,
}

impl Core {
    /// This work fails again and again: somebody should know.
    pub(super) fn trouble_with(&self, work: &mut Work, error: &StoreError) {
        if std::mem::replace(&mut work.in_trouble, true) {
            return;
        }
        self.change_health(|known| {
            known.works += 1;
            known.health.reads.get_or_insert_with(|| error.to_string());
        });
    }

    /// A work in trouble has ended, well or not.
    pub(super) fn trouble_over(&self) {
        self.change_health(|known| {
            known.works -= 1;
            if known.works == 0 {
                known.health.reads = None;
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

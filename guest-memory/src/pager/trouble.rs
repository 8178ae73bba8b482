//! What is wrong with the store at the moment, for the VMM to tell its user. None of it loses data: while
//! reads fail, who needs the pages waits (the VMM pauses the guest); while writes fail, pages stay in
//! memory.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

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
pub(super) struct Trouble {
    /// Works that fail again and again.
    reads: AtomicU64,
    why: Mutex<Health>,
}

impl Core {
    /// This work fails again and again: somebody should know.
    pub(super) fn trouble_with(&self, work: &mut Work, error: &StoreError) {
        if std::mem::replace(&mut work.in_trouble, true) {
            return;
        }
        if self.trouble.reads.fetch_add(1, Ordering::SeqCst) == 0 {
            self.change_health(|health| health.reads = Some(error.to_string()));
        }
    }

    /// A work in trouble has ended, well or not.
    pub(super) fn trouble_over(&self) {
        if self.trouble.reads.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.change_health(|health| health.reads = None);
        }
    }

    /// After a batch of writes: why some were refused, if so, and how many pages left all the same.
    pub(super) fn note_writes(&self, refused: Option<&StoreError>, left: usize) {
        match refused {
            Some(error) if left == 0 => {
                self.room.set_stuck(true);
                self.change_health(|health| health.writes = Some(error.to_string()));
            }
            Some(_) => {}
            None if left > 0 && self.room.is_stuck() => {
                self.room.set_stuck(false);
                self.change_health(|health| health.writes = None);
            }
            None => {}
        }
    }

    pub(super) fn health(&self) -> Health {
        self.trouble.why.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn change_health(&self, change: impl FnOnce(&mut Health)) {
        let mut health = self.trouble.why.lock().unwrap_or_else(PoisonError::into_inner);
        let before = health.clone();
        change(&mut health);
        if *health != before {
            drop(health);
            self.ring();
        }
    }
}

//! The evictor: a thread that keeps room below the resident limit, so that a fault hardly ever waits for
//! an eviction. It ages mapped pages to idle ones, and hands the idle ones that nobody touched to the
//! workers to be written back, both in batches.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use super::PagerError;
use super::core::Core;
use super::work::{Job, Work};
use super::write_back::BATCH_PAGES;
use crate::address::PageIndex;
use crate::policy::Policy;
use crate::word::{PageState, PageWord};

/// How soon it looks again when the store takes no pages.
const STUCK_PAUSE: Duration = Duration::from_millis(200);
/// How soon it looks again when there was nothing that could go (all pages pinned, or on their way).
const IDLE_PAUSE: Duration = Duration::from_millis(5);
/// Batches of ageing in one turn, so that evictions get theirs.
const AGE_BATCHES: usize = 4;

/// The thread.
pub(super) fn run(core: &Arc<Core>) {
    // A panic leaves its pages without owner; the guest cannot go on, and is told.
    if catch_unwind(AssertUnwindSafe(|| core.keep_room())).is_err() {
        core.fail(PagerError::Panicked);
    }
}

impl Core {
    fn keep_room(self: &Arc<Self>) {
        // What is there at the start may be more than the limit.
        let mut pause = self.make_room();
        while self.room.wait_until_wanted(pause) {
            pause = self.unpark().into_iter().chain(self.make_room()).min();
        }
    }

    /// One turn; says how soon the next is due if nobody asks before.
    pub(super) fn make_room(self: &Arc<Self>) -> Option<Duration> {
        if !self.room.is_tight() {
            // Whether evictions work does not matter any more.
            self.evictions_work();
            return None;
        }
        let capacity = u32::try_from(self.room.capacity_pages()).unwrap_or(u32::MAX);
        self.policy_always().set_capacity(capacity);
        let aged = (0..AGE_BATCHES).take_while(|_| self.age() > 0).count();
        let stuck = self.room.is_stuck();
        let excess = self.room.excess();
        if excess == 0 && !stuck {
            return None;
        }
        // While the store takes nothing, a page asks whether it does again.
        let begun = self.begin_write_backs(excess.max(1));
        match (begun, aged) {
            _ if stuck => Some(STUCK_PAUSE),
            // More pages are to be idle by the time the store has taken what it has.
            (_, AGE_BATCHES) => Some(Duration::ZERO),
            // What begins rings again when it ends.
            (1.., _) => None,
            (0, _) => Some(IDLE_PAUSE),
        }
    }

    /// Unmaps a batch of pages, if the policy has any; returns how many it had.
    fn age(self: &Arc<Self>) -> usize {
        let mut pages = Vec::with_capacity(BATCH_PAGES);
        self.policy_always().age(BATCH_PAGES, &mut pages);
        let chosen = pages.len();
        pages.sort_unstable();
        let idle = match self.unmap(&pages) {
            Ok(idle) => idle,
            Err(error) => {
                self.fail(error);
                Vec::new()
            }
        };
        let mut policy = self.policy_always();
        for page in pages {
            // Sorted as they were.
            match idle.binary_search(&page) {
                Ok(_) => policy.aged(page),
                Err(_) => self.was_not_mapped(&mut policy, page),
            }
        }
        chosen
    }

    /// A page that could not be unmapped is pinned, or wanted just now; or it is not mapped at all, which nobody
    /// told the policy while there was no limit.
    fn was_not_mapped(&self, policy: &mut Policy, page: PageIndex) {
        let word = self.table.word(page);
        match word.state() {
            PageState::Idle if word.pins() == 0 => policy.aged(page),
            PageState::Zero | PageState::Stored | PageState::Failed => policy.left(page),
            _ => policy.not_aged(page),
        }
    }

    /// Hands up to `excess` idle pages to the workers; returns how many batches that were.
    fn begin_write_backs(self: &Arc<Self>, excess: u64) -> usize {
        let mut left = usize::try_from(excess).unwrap_or(usize::MAX);
        // While the store takes nothing, one batch at a time asks whether it does again.
        let mut batches = if self.room.is_stuck() { 1 } else { usize::MAX };
        let mut begun = 0;
        while left > 0 && batches > 0 && self.room.begin_write_back() {
            let batch = self.choose(left.min(BATCH_PAGES));
            if batch.is_empty() {
                self.room.write_back_ended(0);
                break;
            }
            self.room.write_back_began(batch.len());
            left = left.saturating_sub(batch.len());
            batches -= 1;
            begun += 1;
            self.leaving.lock().unwrap_or_else(PoisonError::into_inner).push_back(batch);
            self.room.look_again();
            let work = Work::new(Arc::clone(self), Job::WriteBack);
            // Refused, it is dropped and a batch stays.
            drop(self.workers.submit(work, Duration::ZERO));
        }
        begun
    }

    /// Idle pages that are Storing now.
    fn choose(&self, most: usize) -> Vec<(PageIndex, crate::word::Generation)> {
        let mut pages = Vec::with_capacity(most);
        let mut policy = self.policy_always();
        policy.victims(most, &mut pages);
        let mut batch = Vec::with_capacity(pages.len());
        for page in pages {
            match self.table.edge(page, PageWord::begin_store) {
                Some(generation) => batch.push((page, generation)),
                None => policy.kept(page),
            }
        }
        batch.sort_unstable_by_key(|(page, _)| *page);
        batch
    }
}

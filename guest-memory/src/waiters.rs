//! Who waits for which page. A waiter is opaque here: what it does when its page has come is the
//! VMM's (a vCPU thread that sleeps, a notification for a guest, a device).
//!
//! The page's word says that somebody waits (WAITERS), and is written under the list's lock; whoever
//! settles the page clears it and then empties the list. So each waiter is told exactly once, and none
//! enters after the page was settled.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use crate::address::PageIndex;
use crate::loom::{Condvar, Mutex, MutexGuard};
use crate::table::{WordCell, edge};
use crate::word::{OnWait, PageWord};

/// Lists, so that threads seldom meet at one lock. A power of two.
const LISTS: usize = if cfg!(loom) { 1 } else { 64 };

/// What became of the page that somebody waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageEnd {
    /// It is there, or was a moment ago: access it (again).
    Ready,
    /// Its bytes are lost; [`crate::Pager::failure`] says why.
    Lost,
}

/// Told when a page has come.
pub trait Wake: Send + Sync {
    /// The page that was asked for with `token` is settled. Called once for each wait, on whichever
    /// thread settled it, with no lock held; must not wait.
    fn wake(&self, token: u64, end: PageEnd);
}

/// One wait: whom to tell, and what it is called there.
#[derive(Clone)]
pub struct Waiter {
    /// Whom to tell.
    pub wake: Arc<dyn Wake>,
    /// Handed back to it.
    pub token: u64,
}

/// All waits.
pub(crate) struct Waiters {
    lists: Vec<Mutex<Vec<(PageIndex, Waiter)>>>,
}

impl Waiters {
    pub(crate) fn new() -> Self {
        Self { lists: (0..LISTS).map(|_| Mutex::default()).collect() }
    }

    /// Adds a waiter if somebody is at work on the page, which has this word; else nobody would tell it.
    pub(crate) fn add(&self, word: &impl WordCell, page: PageIndex, waiter: &Waiter) -> OnWait {
        let mut list = self.list(page);
        let verdict = edge(word, PageWord::wait);
        if verdict == OnWait::Waits {
            list.push((page, waiter.clone()));
        }
        verdict
    }

    /// This one does not wait any more.
    pub(crate) fn leave(&self, page: PageIndex, waiter: &Waiter) {
        let same = |(p, other): &(PageIndex, Waiter)| {
            *p == page && other.token == waiter.token && Arc::ptr_eq(&other.wake, &waiter.wake)
        };
        self.list(page).retain(|entry| !same(entry));
    }

    /// Tells whoever waits for the page, which was just settled, and returns how many they were.
    pub(crate) fn tell(&self, page: PageIndex, end: PageEnd) -> usize {
        let told: Vec<_> = self.list(page).extract_if(.., |(p, _)| *p == page).collect();
        for (_, waiter) in &told {
            waiter.wake.wake(waiter.token, end);
        }
        told.len()
    }

    fn list(&self, page: PageIndex) -> MutexGuard<'_, Vec<(PageIndex, Waiter)>> {
        // Nothing in here panics with a lock held.
        self.lists[page.0 as usize % LISTS].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Why a [`Sleeper`] woke up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Woken {
    /// Its page is settled.
    Page(PageEnd),
    /// Somebody interrupted it; the page is still on its way.
    Interrupted,
    /// It is closed: nobody is to wait any more.
    Closed,
    /// The time is over; the page is still on its way.
    TimedOut,
}

/// A thread that waits for one page at a time, and can be interrupted meanwhile.
#[derive(Debug, Default)]
pub struct Sleeper {
    state: Mutex<SleeperState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct SleeperState {
    /// Which wait this is; what ends an earlier one is ignored.
    token: u64,
    end: Option<PageEnd>,
    interrupted: bool,
    closed: bool,
}

impl Sleeper {
    /// A waiter for the next page; waits begun earlier are over.
    #[must_use]
    pub fn begin(self: &Arc<Self>) -> Waiter {
        let mut state = self.lock();
        state.token += 1;
        state.end = None;
        let token = state.token;
        drop(state);
        Waiter { wake: Arc::<Self>::clone(self), token }
    }

    /// Sleeps until the page of the last [`Sleeper::begin`] is settled, or an interrupt. What came before the
    /// call, either of them, ends it at once, and is used up.
    pub fn wait(&self, limit: Option<Duration>) -> Woken {
        let mut state = self.lock();
        let until = limit.map(|limit| std::time::Instant::now() + limit);
        loop {
            if let Some(end) = state.end.take() {
                return Woken::Page(end);
            }
            if state.closed {
                return Woken::Closed;
            }
            if std::mem::take(&mut state.interrupted) {
                return Woken::Interrupted;
            }
            let Some(until) = until else {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let left = until.saturating_duration_since(std::time::Instant::now());
            if left.is_zero() {
                return Woken::TimedOut;
            }
            let waited = self.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Ends the wait that is under way, or the next one.
    pub fn interrupt(&self) {
        self.lock().interrupted = true;
        self.changed.notify_all();
    }

    /// Ends this wait and all later ones.
    pub fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, SleeperState> {
        // Nothing in here panics with the lock held.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Wake for Sleeper {
    fn wake(&self, token: u64, end: PageEnd) {
        let mut state = self.lock();
        if state.token == token {
            state.end = Some(end);
            drop(state);
            self.changed.notify_all();
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::table::PageTable;
    use crate::word::Taken;

    #[test]
    fn a_waiter_enters_only_while_somebody_owns_the_page() {
        let (table, waiters) = (PageTable::new(2).unwrap(), Waiters::new());
        let sleeper = Arc::new(Sleeper::default());
        let waiter = sleeper.begin();
        let page = PageIndex(1);
        assert_eq!(waiters.add(table.cell(page), page, &waiter), OnWait::Settled);
        assert_eq!(table.edge(page, PageWord::claim_zero), Taken::Yes);
        assert_eq!(waiters.add(table.cell(page), page, &waiter), OnWait::Waits);
        assert_eq!(sleeper.wait(Some(Duration::ZERO)), Woken::TimedOut);
        assert!(table.edge(page, PageWord::installed).waiters);
        assert_eq!(waiters.tell(page, PageEnd::Ready), 1);
        assert_eq!(waiters.tell(page, PageEnd::Ready), 0);
        assert_eq!(sleeper.wait(None), Woken::Page(PageEnd::Ready));
    }

    /// A thread waits with the same one for what it has no waiter of, too.
    #[test]
    fn a_page_ends_one_wait_and_no_later_one() {
        let sleeper = Arc::new(Sleeper::default());
        let waiter = sleeper.begin();
        waiter.wake.wake(waiter.token, PageEnd::Ready);
        assert_eq!(sleeper.wait(None), Woken::Page(PageEnd::Ready));
        assert_eq!(sleeper.wait(Some(Duration::from_millis(1))), Woken::TimedOut);
    }

    #[test]
    fn an_interrupt_is_never_lost_and_an_old_page_wakes_nobody() {
        let sleeper = Arc::new(Sleeper::default());
        let old = sleeper.begin();
        sleeper.interrupt();
        assert_eq!(sleeper.wait(None), Woken::Interrupted);
        let new = sleeper.begin();
        old.wake.wake(old.token, PageEnd::Lost);
        assert_eq!(sleeper.wait(Some(Duration::from_millis(1))), Woken::TimedOut);
        new.wake.wake(new.token, PageEnd::Ready);
        assert_eq!(sleeper.wait(None), Woken::Page(PageEnd::Ready));
    }
}

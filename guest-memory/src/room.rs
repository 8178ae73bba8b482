//! How much of guest RAM is in memory, and whether there is room for more: the resident limit.
//!
//! Pages are counted before they are installed and after they are gone, so that the RAM file's blocks
//! are never more than this says. What the store keeps in memory counts, too. The first pass asks
//! ([`Room::try_take`]) and never waits; the second may ([`Room::take`]).

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::address::PAGE_BYTES;
use crate::pass::MayWait;

/// No limit.
const NONE: u64 = u64::MAX;
/// How long a wait for room looks away at most: should a wake-up ever be lost, it costs this.
const LOOK_AGAIN: Duration = Duration::from_millis(50);
/// Free pages below the limit so that faults find room: a 64th of the limit, but within these bounds. The
/// evictor makes as much free, and is woken when half of it is gone.
const MIN_HEADROOM_PAGES: u64 = 16;
const MAX_HEADROOM_PAGES: u64 = 512;
/// Pages of the RAM file for which there is always room, whatever the store keeps in memory: a store that
/// grows to the limit would leave the guest none (1 MiB).
const FLOOR_PAGES: u64 = 256;
/// The most batches of pages that are on their way to the store at once.
const MAX_WRITE_BACKS: u64 = 4;

/// The account.
#[derive(Debug)]
pub(crate) struct Room {
    /// In pages.
    limit: AtomicU64,
    /// Pages of the RAM file that are, or may be, in memory.
    used: AtomicU64,
    /// What the store keeps in memory, in bytes, as of its last change.
    stored: AtomicU64,
    /// Nothing can be evicted (the store is full or does not answer): the limit is exceeded rather than
    /// the guest stopped.
    stuck: AtomicBool,
    write_backs: AtomicU64,
    /// Pages that are on their way to the store.
    leaving: AtomicU64,
    /// Workers that wait for room.
    waiters: AtomicU64,
    waiting: Mutex<Waiting>,
    /// For whoever waits for room.
    freed: Condvar,
    /// For the evictor.
    wanted: Condvar,
}

#[derive(Debug, Default)]
struct Waiting {
    /// The evictor has something to look at.
    rung: bool,
    closed: bool,
}

/// One waiter more while it lives.
struct Counted<'a>(&'a AtomicU64);

impl<'a> Counted<'a> {
    fn new(waiters: &'a AtomicU64) -> Self {
        waiters.fetch_add(1, Ordering::SeqCst);
        Self(waiters)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Why a wait for room ended without it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Closed;

impl Room {
    /// An empty account; `None` is no limit.
    pub(crate) fn new(limit_bytes: Option<u64>) -> Self {
        Self {
            limit: AtomicU64::new(pages(limit_bytes)),
            used: AtomicU64::new(0),
            stored: AtomicU64::new(0),
            stuck: AtomicBool::new(false),
            write_backs: AtomicU64::new(0),
            leaving: AtomicU64::new(0),
            waiters: AtomicU64::new(0),
            waiting: Mutex::default(),
            freed: Condvar::new(),
            wanted: Condvar::new(),
        }
    }

    /// Room for `pages` more, if there is.
    #[must_use]
    pub(crate) fn try_take(&self, pages: u64) -> bool {
        // Who waits comes first.
        let taken = self.waiters.load(Ordering::SeqCst) == 0 && self.take_if_free(pages);
        self.ring_if_full();
        taken
    }

    fn take_if_free(&self, pages: u64) -> bool {
        let limit = self.limit.load(Ordering::Relaxed);
        let limit = if self.stuck.load(Ordering::Relaxed) { NONE } else { limit };
        let stored = if limit == NONE { 0 } else { self.stored_pages() };
        let more = |used: u64| {
            let after = used.checked_add(pages)?;
            (after + stored <= limit || after <= limit.min(FLOOR_PAGES)).then_some(after)
        };
        self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).is_ok()
    }

    /// Waits until there is room for `pages` more, and takes it. Whoever waits first does what `help`
    /// finds to do for there to be room, until that is nothing.
    pub(crate) fn take(
        &self,
        pages: u64,
        _: &MayWait,
        mut help: impl FnMut() -> bool,
    ) -> Result<(), Closed> {
        if self.try_take(pages) {
            return Ok(());
        }
        let _counted = Counted::new(&self.waiters);
        loop {
            self.ring_if_full();
            if self.take_if_free(pages) {
                return Ok(());
            }
            if help() {
                continue;
            }
            let waiting = self.lock();
            if waiting.closed {
                return Err(Closed);
            }
            // Asked again under the lock, which whoever gives room takes after that.
            if self.take_if_free(pages) {
                return Ok(());
            }
            drop(self.freed.wait_timeout(waiting, LOOK_AGAIN));
        }
    }

    /// Takes room whether there is or not: for what is in memory already.
    pub(crate) fn force(&self, pages: u64) {
        self.used.fetch_add(pages, Ordering::Relaxed);
    }

    /// Gives room back.
    pub(crate) fn give(&self, pages: u64) {
        self.used.fetch_sub(pages, Ordering::SeqCst);
        if self.waiters.load(Ordering::SeqCst) > 0 {
            self.look_again();
        }
    }

    /// Has whoever waits for room look whether there is some, or something to do for it.
    pub(crate) fn look_again(&self) {
        drop(self.lock());
        self.freed.notify_all();
    }

    /// What the store keeps in memory now.
    pub(crate) fn set_stored(&self, bytes: u64) {
        if self.stored.swap(bytes, Ordering::SeqCst) > bytes && self.limited() {
            self.look_again();
        }
    }

    /// Another limit from now on; was there one before?
    pub(crate) fn set_limit(&self, limit_bytes: Option<u64>) -> bool {
        let before = self.limit.swap(pages(limit_bytes), Ordering::SeqCst);
        self.ring();
        self.look_again();
        before != NONE
    }

    /// Evictions fail, or work again.
    pub(crate) fn set_stuck(&self, stuck: bool) {
        if self.stuck.swap(stuck, Ordering::Relaxed) != stuck {
            self.look_again();
            self.ring();
        }
    }

    /// Do evictions fail?
    pub(crate) fn is_stuck(&self) -> bool {
        self.stuck.load(Ordering::Relaxed)
    }

    /// Is there a limit?
    pub(crate) fn limited(&self) -> bool {
        self.limit.load(Ordering::SeqCst) != NONE
    }

    /// The limit in bytes.
    pub(crate) fn limit_bytes(&self) -> Option<u64> {
        let limit = self.limit.load(Ordering::Relaxed);
        (limit != NONE).then(|| limit * PAGE_BYTES)
    }

    /// The limit in pages of the RAM file: without what the store keeps in memory.
    pub(crate) fn capacity_pages(&self) -> u64 {
        let limit = self.limit.load(Ordering::Relaxed);
        if limit == NONE {
            return limit;
        }
        limit.saturating_sub(self.stored_pages()).max(FLOOR_PAGES.min(limit))
    }

    /// Pages of the RAM file that are, or may be, in memory.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn used_pages(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// How many pages there is room for, also when evictions fail.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn free_pages(&self) -> u64 {
        let limit = self.limit.load(Ordering::Relaxed);
        limit.min(FLOOR_PAGES).saturating_sub(self.used_pages())
    }

    /// How many pages have to go so that faults find room, beside those on their way.
    pub(crate) fn excess(&self) -> u64 {
        self.over().saturating_sub(self.leaving.load(Ordering::Relaxed))
    }

    /// How many pages are too many for faults to find room.
    fn over(&self) -> u64 {
        let (all, used) = self.overs();
        all.min(used)
    }

    /// By how much what is in memory exceeds the target, and the guest's own pages what they have in any case:
    /// what is in the store does not go by evicting more.
    fn overs(&self) -> (u64, u64) {
        let used = self.used.load(Ordering::Relaxed);
        let floor = FLOOR_PAGES.min(self.limit.load(Ordering::Relaxed));
        let own = used.saturating_sub(floor.saturating_sub(MIN_HEADROOM_PAGES));
        ((used + self.stored_pages()).saturating_sub(self.target()), own)
    }

    /// Is less than a quarter of the limit free? Before, no page need be looked at.
    pub(crate) fn is_tight(&self) -> bool {
        let limit = self.limit.load(Ordering::Relaxed);
        limit != NONE && self.used.load(Ordering::Relaxed) + self.stored_pages() > limit - limit / 4
    }

    /// Is there so little room that fetching ahead would take it from faults? They keep half of what the
    /// evictor keeps free.
    pub(crate) fn is_tight_for_prefetch(&self) -> bool {
        let limit = self.limit.load(Ordering::Relaxed);
        let all = self.used.load(Ordering::Relaxed) + self.stored_pages();
        limit != NONE && all > limit.saturating_sub(headroom(limit) / 2)
    }

    /// One more write-back may begin, of [`MAX_WRITE_BACKS`] at once.
    #[must_use]
    pub(crate) fn begin_write_back(&self) -> bool {
        let more = |n| (n < MAX_WRITE_BACKS).then_some(n + 1);
        self.write_backs.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).is_ok()
    }

    /// The write-back that may begin has so many pages.
    pub(crate) fn write_back_began(&self, pages: usize) {
        self.leaving.fetch_add(pages as u64, Ordering::Relaxed);
    }

    /// A write-back is over, that of so many pages.
    pub(crate) fn write_back_ended(&self, pages: usize) {
        self.leaving.fetch_sub(pages as u64, Ordering::Relaxed);
        self.write_backs.fetch_sub(1, Ordering::Relaxed);
        self.ring_if_full();
    }

    /// Has the evictor look if there is enough for it to do. While evictions fail it looks by itself,
    /// now and then.
    fn ring_if_full(&self) {
        if self.is_worth_a_look() && !self.is_stuck() {
            self.ring();
        }
    }

    /// Does somebody wait for room, or is half of the headroom gone? An evictor that keeps all of it free
    /// is woken, and wakes a worker, for each page that comes in.
    fn is_worth_a_look(&self) -> bool {
        if self.waiters.load(Ordering::SeqCst) > 0 {
            return self.excess() > 0;
        }
        let leaving = self.leaving.load(Ordering::Relaxed);
        let (all, used) = self.overs();
        let headroom = headroom(self.limit.load(Ordering::Relaxed));
        all.saturating_sub(leaving) > headroom / 2
            && used.saturating_sub(leaving) > MIN_HEADROOM_PAGES / 2
    }

    /// For the evictor: waits until somebody wants something of it, or `limit` is over; false when the
    /// end has come.
    pub(crate) fn wait_until_wanted(&self, limit: Option<Duration>) -> bool {
        let until = limit.map(|limit| Instant::now() + limit);
        let mut waiting = self.lock();
        while !waiting.rung && !waiting.closed {
            let Some(until) = until else {
                waiting = self.wanted.wait(waiting).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let waited = self.wanted.wait_timeout(waiting, left);
            waiting = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        waiting.rung = false;
        !waiting.closed
    }

    /// Has the evictor look.
    pub(crate) fn ring(&self) {
        let mut waiting = self.lock();
        if !waiting.rung {
            waiting.rung = true;
            drop(waiting);
            self.wanted.notify_all();
        }
    }

    /// Ends all waits.
    pub(crate) fn close(&self) {
        self.lock().closed = true;
        self.freed.notify_all();
        self.wanted.notify_all();
    }

    /// The evictor works when more is in memory than this, in pages.
    fn target(&self) -> u64 {
        let limit = self.limit.load(Ordering::Relaxed);
        if limit == NONE {
            return NONE;
        }
        limit.saturating_sub(headroom(limit))
    }

    fn stored_pages(&self) -> u64 {
        self.stored.load(Ordering::Relaxed).div_ceil(PAGE_BYTES)
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        // Nothing in here panics with the lock held.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The pages that the evictor keeps free below a limit.
fn headroom(limit: u64) -> u64 {
    (limit / 64).clamp(MIN_HEADROOM_PAGES, MAX_HEADROOM_PAGES)
}

fn pages(limit_bytes: Option<u64>) -> u64 {
    limit_bytes.map_or(NONE, |bytes| bytes / PAGE_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn there_is_room_up_to_the_limit_and_the_store_counts() {
        let room = Room::new(Some(1000 * PAGE_BYTES));
        assert!(room.try_take(600));
        room.set_stored(100 * PAGE_BYTES + 1);
        assert!(room.try_take(299));
        assert!(!room.try_take(1));
        assert_eq!((room.excess(), room.capacity_pages()), (16, 899));
        assert!(room.is_tight_for_prefetch());
        room.give(8);
        assert!(!room.is_tight_for_prefetch() && room.try_take(8));
        room.set_stuck(true);
        assert!(room.try_take(1));
        room.set_stuck(false);
        assert!(!room.try_take(1));
        assert!(room.set_limit(None));
        assert!(room.try_take(1 << 40));
        assert_eq!(room.excess(), 0);
        assert!(!room.set_limit(Some(1000 * PAGE_BYTES)));
    }

    #[test]
    fn a_store_that_takes_all_of_the_limit_leaves_the_floor() {
        let room = Room::new(Some(1000 * PAGE_BYTES));
        room.set_stored(2000 * PAGE_BYTES);
        assert!(room.try_take(FLOOR_PAGES));
        assert!(!room.try_take(1));
        assert_eq!((room.excess(), room.capacity_pages()), (MIN_HEADROOM_PAGES, FLOOR_PAGES));
    }

    /// Has the evictor been rung since it was asked last?
    fn rung(room: &Room) -> bool {
        std::mem::take(&mut room.lock().rung)
    }

    #[test]
    fn the_evictor_is_woken_for_half_of_its_headroom_or_for_who_waits() {
        let room = Room::new(Some(6400 * PAGE_BYTES));
        room.force(6400 - 100);
        let woken = (1..=100).filter(|_| {
            assert!(room.try_take(1));
            let woken = rung(&room);
            if woken {
                // As the evictor does: all of the headroom is made free.
                room.give(room.excess());
            }
            woken
        });
        // 51 pages use up half of the headroom of 100 pages, and each time as many are given.
        assert_eq!(woken.count(), 1);
        assert!(room.excess() > 0);
        let _waits = Counted::new(&room.waiters);
        room.ring_if_full();
        assert!(rung(&room));
    }

    #[test]
    fn pages_on_their_way_out_wake_nobody() {
        let room = Room::new(Some(6400 * PAGE_BYTES));
        room.force(6400);
        room.ring_if_full();
        assert!(rung(&room));
        assert!(room.begin_write_back());
        room.write_back_began(60);
        room.ring_if_full();
        assert!(!rung(&room));
        room.give(60);
        room.write_back_ended(60);
        assert!(!rung(&room), "40 of 100 pages are used up");
    }

    #[test]
    fn who_waits_gets_room_when_some_is_given() {
        let room = Arc::new(Room::new(Some(PAGE_BYTES)));
        assert!(room.try_take(1));
        let waiter = std::thread::spawn({
            let room = Arc::clone(&room);
            move || room.take(1, &MayWait::second_pass(), || false)
        });
        assert!(room.wait_until_wanted(None));
        room.give(1);
        assert_eq!(waiter.join().unwrap(), Ok(()));
        room.close();
        assert_eq!(room.take(1, &MayWait::second_pass(), || false), Err(Closed));
        assert!(!room.wait_until_wanted(None));
    }
}

//! A worker's life: take, run, take; rest; leave.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::Shared;
use super::crew::State;
use super::queue::{Grant, Taken};
use crate::loom::{Condvar, MutexGuard, lock, wait};

/// A job that is over.
struct Done {
    grant: Grant,
    panicked: bool,
}

/// A worker's place in the pool.
pub(super) struct Post {
    /// Its seat's number.
    pub(super) seat: u32,
    /// Its seat's bell.
    pub(super) bell: Arc<Condvar>,
    /// Set when nothing is left but to return.
    pub(super) ended: Arc<AtomicBool>,
}

/// Runs jobs until the pool closes or there is nothing to do for a while.
pub(super) fn work<J: Send + 'static>(shared: &Arc<Shared<J>>, post: &Post) {
    let mut done = None;
    while let Some(Taken { job, grant }) = next(shared, post, done.take()) {
        // A job that panics takes its own data with it; the pool's is out of its reach.
        let outcome = catch_unwind(AssertUnwindSafe(|| (shared.run)(job)));
        done = Some(Done { grant, panicked: outcome.is_err() });
    }
}

/// Gives back what was done, and waits for the next job. None: the worker has left its seat.
fn next<J: Send + 'static>(
    shared: &Arc<Shared<J>>,
    post: &Post,
    done: Option<Done>,
) -> Option<Taken<J>> {
    let mut now = shared.clock.now();
    let mut state = lock(&shared.state);
    // A new worker is idle or has a job in its hand.
    if let Some(Done { grant, panicked }) = done {
        state.queue.finish(grant, panicked);
        state.queue.ripen(now);
        match state.queue.take(now) {
            Some(taken) => return Some(begin(shared, state, now, taken)),
            None => state.rest(post.seat),
        }
    }
    let rest_ends = now.saturating_add(shared.idle_timeout);
    loop {
        if let Some(taken) = state.hand(post.seat) {
            return Some(begin(shared, state, now, taken));
        }
        let due = state.keep_time(post.seat);
        if due.is_some_and(|due| due <= now) {
            state.queue.ripen(now);
            if let Some(taken) = state.queue.take(now) {
                state.rise(post.seat);
                return Some(begin(shared, state, now, taken));
            }
            // What is due has to wait for its medium. There may be more to keep time for.
            continue;
        }
        if state.queue.is_closed() || (due.is_none() && now >= rest_ends) {
            leave(shared, state, post);
            return None;
        }
        let limit = due.unwrap_or(rest_ends).saturating_sub(now);
        state = wait(&shared.state, state, &post.bell, limit);
        now = shared.clock.now();
    }
}

/// Lets others have what else may begin, and goes to work.
fn begin<J: Send + 'static>(
    shared: &Arc<Shared<J>>,
    mut state: MutexGuard<'_, State<J>>,
    now: Duration,
    taken: Taken<J>,
) -> Taken<J> {
    let calls = state.dispatch(now);
    drop(state);
    shared.perform(calls);
    taken
}

/// Leaves the seat. Nobody hands a job to a worker without one, and there is none in its hand.
fn leave<J>(shared: &Shared<J>, mut state: MutexGuard<'_, State<J>>, post: &Post) {
    state.leave(post.seat);
    let closed = state.queue.is_closed();
    // The last thing under the lock: who sees it knows that joining takes no time.
    post.ended.store(true, Ordering::Release);
    drop(state);
    if closed {
        shared.left.notify_all();
    }
}

//! The parts of the standard library that loom replaces. `--cfg loom` builds the pool for its
//! models, `tests/loom_pool.rs`; everything that threads share goes through this module.

use std::time::Duration;

#[cfg(loom)]
pub(crate) use loom::sync::{Condvar, Mutex, MutexGuard};
#[cfg(loom)]
pub(crate) use loom::thread;
#[cfg(not(loom))]
pub(crate) use std::sync::{Condvar, Mutex, MutexGuard};
#[cfg(not(loom))]
pub(crate) use std::thread;

/// Locks. No code that could panic runs under our locks, so a poisoned one is still sound.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Waits for the bell, at most that long; may also come back for no reason.
#[cfg(not(loom))]
pub(crate) fn wait<'a, T>(
    _mutex: &'a Mutex<T>,
    guard: MutexGuard<'a, T>,
    bell: &Condvar,
    limit: Duration,
) -> MutexGuard<'a, T> {
    bell.wait_timeout(guard, limit).unwrap_or_else(std::sync::PoisonError::into_inner).0
}

/// loom knows no time: a limit of zero is over at once, in every way in which other threads can
/// come in between; any other limit is never over.
#[cfg(loom)]
pub(crate) fn wait<'a, T>(
    mutex: &'a Mutex<T>,
    guard: MutexGuard<'a, T>,
    bell: &Condvar,
    limit: Duration,
) -> MutexGuard<'a, T> {
    if limit.is_zero() {
        drop(guard);
        thread::yield_now();
        return lock(mutex);
    }
    bell.wait(guard).unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// The time since a pool was made.
#[derive(Debug)]
pub(crate) struct Clock {
    #[cfg(not(loom))]
    start: std::time::Instant,
}

impl Clock {
    pub(crate) fn start() -> Self {
        Self {
            #[cfg(not(loom))]
            start: std::time::Instant::now(),
        }
    }

    pub(crate) fn now(&self) -> Duration {
        #[cfg(not(loom))]
        return self.start.elapsed();
        // Time stands still in a model.
        #[cfg(loom)]
        return Duration::ZERO;
    }
}

//! Starts all threads of a run at one moment, or none of them.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// Where threads wait until all are ready.
///
/// ```text
///   thread: arrive(ready or why not) ... waits ... -> Some(start) | None: do not run
///   owner:  wait_for(count) -> open(Some(start)) or open(None)
/// ```
#[derive(Default)]
pub(super) struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    arrived: usize,
    failure: Option<String>,
    verdict: Option<Option<u64>>,
}

impl Gate {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A thread that panics ends the agent, so what it leaves behind does not matter.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Called by a thread once it has set itself up, or could not; gives the start of the run on
    /// the monotonic clock in nanoseconds, `None` when there will be no run.
    pub(super) fn arrive(&self, set_up: Result<(), String>) -> Option<u64> {
        let mut state = self.lock();
        state.arrived += 1;
        if let Err(message) = set_up {
            state.failure.get_or_insert(message);
        }
        self.changed.notify_all();
        loop {
            if let Some(verdict) = state.verdict {
                return verdict;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Waits until this many threads have arrived: `Err` when one of them could not set itself up.
    pub(super) fn wait_for(&self, count: usize) -> Result<(), String> {
        let mut state = self.lock();
        while state.arrived < count {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.failure.take().map_or(Ok(()), Err)
    }

    /// Lets all threads go on: with a start, or without a run.
    pub(super) fn open(&self, verdict: Option<u64>) {
        self.lock().verdict = Some(verdict);
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    #[test]
    fn all_get_the_same_start() {
        let gate = Gate::default();
        thread::scope(|scope| {
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(|| gate.arrive(Ok(())))).collect();
            gate.wait_for(4).unwrap();
            gate.open(Some(7));
            for thread in threads {
                assert_eq!(thread.join().unwrap(), Some(7));
            }
        });
    }

    #[test]
    fn one_failure_is_reported_and_nobody_hangs() {
        let gate = Gate::default();
        thread::scope(|scope| {
            let threads = [Ok(()), Err("no".to_owned()), Ok(())]
                .map(|set_up| scope.spawn(|| gate.arrive(set_up)));
            assert_eq!(gate.wait_for(3), Err("no".to_owned()));
            gate.open(None);
            for thread in threads {
                assert_eq!(thread.join().unwrap(), None);
            }
        });
    }
}

//! What is due when: a bounded queue by deadline. It has no clock of its own.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Instant;

use crate::address::PageIndex;

/// What is to be done with a page at its time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Task {
    /// The store's latency is over: take the bytes. A page has at most one of these.
    Fetch,
    /// The kernel said EAGAIN: answer again, by the page's state at that time.
    Retry,
}

/// The queue is full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Full;

/// Tasks by deadline; those of one deadline in the order they came.
#[derive(Debug)]
pub(crate) struct Deadlines {
    heap: BinaryHeap<Reverse<(Instant, u64, Task, PageIndex)>>,
    capacity: usize,
    pushed: u64,
}

impl Deadlines {
    /// An empty queue for at most `capacity` tasks; memory grows as they come.
    pub(crate) fn new(capacity: usize) -> Self {
        Self { heap: BinaryHeap::new(), capacity, pushed: 0 }
    }

    /// Adds a task.
    pub(crate) fn push(&mut self, due: Instant, task: Task, page: PageIndex) -> Result<(), Full> {
        if self.room() == 0 {
            return Err(Full);
        }
        self.heap.push(Reverse((due, self.pushed, task, page)));
        self.pushed += 1;
        Ok(())
    }

    /// Takes the next task whose deadline is not after `now`.
    pub(crate) fn pop_due(&mut self, now: Instant) -> Option<(Task, PageIndex)> {
        (self.next_due()? <= now).then(|| self.pop())?
    }

    /// Takes the next task whatever its deadline.
    pub(crate) fn pop(&mut self) -> Option<(Task, PageIndex)> {
        let Reverse((_, _, task, page)) = self.heap.pop()?;
        Some((task, page))
    }

    /// The earliest deadline.
    pub(crate) fn next_due(&self) -> Option<Instant> {
        self.heap.peek().map(|Reverse((due, ..))| *due)
    }

    /// How many more tasks fit.
    pub(crate) fn room(&self) -> usize {
        self.capacity - self.heap.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::time::Duration;

    proptest! {
        #[test]
        fn tasks_come_by_deadline_and_then_in_order(delays in prop::collection::vec(0..50_u64, 0..80), now in 0..60_u64) {
            let start = Instant::now();
            let at = |ms: u64| start + Duration::from_millis(ms);
            let mut queue = Deadlines::new(64);
            let mut reference = Vec::new();
            for (page, delay) in (0..).map(PageIndex).zip(delays) {
                let pushed = queue.push(at(delay), Task::Fetch, page);
                prop_assert_eq!(pushed.is_ok(), reference.len() < 64);
                if pushed.is_ok() {
                    reference.push((delay, page));
                }
            }
            reference.sort();
            prop_assert_eq!(queue.next_due(), reference.first().map(|(delay, _)| at(*delay)));
            let due: Vec<_> = std::iter::from_fn(|| queue.pop_due(at(now))).map(|(_, page)| page).collect();
            let expected: Vec<_> = reference.iter().filter(|(d, _)| *d <= now).map(|(_, p)| *p).collect();
            prop_assert_eq!(queue.room(), 64 - (reference.len() - due.len()));
            prop_assert_eq!(due, expected);
        }
    }
}

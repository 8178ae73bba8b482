//! Which job is next: bounded, by class, in turns between lanes, never more of a medium than its
//! share. No lock, no clock, no thread: the time (since the pool's start) is handed in, and what
//! is taken runs elsewhere.
//!
//! ```text
//!   insert ------> lines of its class --take--> Taken --(runs)--> finish
//!                    ^           |  ^              |
//!   insert_at -> delayed --due --+  +-- put_back --+      drain: all that have not begun
//! ```

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use super::lines::{Lines, Linked, Links};
use super::running::Running;
use super::slab::Slab;
use super::stats::Tally;
use super::{Class, Key, Lane, PoolConfig, Promoted, Rejected, Ticket, Why};

#[cfg(test)]
mod tests;

/// Names a job: they are counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct JobId(u64);

/// A job that has begun, and what is to be given back with [`Queue::finish`].
#[derive(Debug)]
pub(super) struct Taken<J> {
    pub(super) job: J,
    pub(super) grant: Grant,
}

/// A job's leave to occupy a worker.
#[must_use]
#[derive(Clone, Copy, Debug)]
pub(super) struct Grant {
    pub(super) id: JobId,
    ticket: Ticket,
    ready: Duration,
    waited: Duration,
}

/// A job that waits.
#[derive(Debug)]
struct Node<J> {
    job: J,
    id: JobId,
    ticket: Ticket,
    /// Since when it could have run, or when it will be due.
    ready: Duration,
    delayed: bool,
    links: Links,
}

impl<J> Linked for Node<J> {
    fn links(&self) -> &Links {
        &self.links
    }

    fn links_mut(&mut self) -> &mut Links {
        &mut self.links
    }
}

/// The waiting jobs, and who runs.
#[derive(Debug)]
pub(super) struct Queue<J> {
    max: [usize; Class::COUNT],
    media: u8,
    slab: Slab<Node<J>>,
    lines: [Lines; Class::COUNT],
    /// By due time; of one time in the order they came.
    delayed: BTreeMap<(Duration, JobId), u32>,
    keys: HashMap<Key, u32>,
    /// Waiting jobs by class, those with a delay among them.
    depth: [usize; Class::COUNT],
    running: Running,
    next_id: u64,
    closed: bool,
    tally: Tally,
}

impl<J> Queue<J> {
    /// An empty queue; the configuration is [checked](PoolConfig::check).
    pub(super) fn new(config: &PoolConfig) -> Self {
        Self {
            max: config.queue_max,
            media: config.media,
            slab: Slab::new(),
            lines: [(); Class::COUNT].map(|()| Lines::new(config.media)),
            delayed: BTreeMap::new(),
            keys: HashMap::new(),
            depth: [0; Class::COUNT],
            running: Running::new(config),
            next_id: 0,
            closed: false,
            tally: Tally::default(),
        }
    }

    /// Adds a job that may begin at once.
    pub(super) fn insert(
        &mut self,
        now: Duration,
        ticket: Ticket,
        job: J,
    ) -> Result<JobId, Rejected<J>> {
        let (number, id) = self.admit(now, false, ticket, job)?;
        let lines = &mut self.lines[ticket.class.index()];
        lines.push_back(&mut self.slab, number, ticket.lane, ticket.medium);
        Ok(id)
    }

    /// Adds a job that may begin at `due`.
    pub(super) fn insert_at(
        &mut self,
        due: Duration,
        ticket: Ticket,
        job: J,
    ) -> Result<JobId, Rejected<J>> {
        let (number, id) = self.admit(due, true, ticket, job)?;
        self.delayed.insert((due, id), number);
        Ok(id)
    }

    /// When the first of the delayed jobs is due.
    pub(super) fn next_due(&self) -> Option<Duration> {
        self.delayed.first_key_value().map(|((due, _), _)| *due)
    }

    /// Lets jobs begin whose time has come.
    pub(super) fn ripen(&mut self, now: Duration) {
        while let Some(entry) = self.delayed.first_entry() {
            if entry.key().0 > now {
                return;
            }
            let number = entry.remove();
            let Some(node) = self.slab.get_mut(number) else { continue };
            node.delayed = false;
            let Ticket { class, lane, medium, .. } = node.ticket;
            self.lines[class.index()].push_back(&mut self.slab, number, lane, medium);
        }
    }

    /// Takes the job that is next, if one may begin.
    pub(super) fn take(&mut self, now: Duration) -> Option<Taken<J>> {
        if self.running.all_busy() {
            return None;
        }
        let (class, (lane, medium)) = Class::ALL.into_iter().find_map(|class| {
            let open = |medium| self.running.admits(class, medium);
            Some((class, self.lines[class.index()].next(&self.slab, open)?))
        })?;
        let number = self.lines[class.index()].serve(&mut self.slab, lane, medium)?;
        let Node { job, id, ticket, ready, .. } = self.forget(number)?;
        self.running.begin(class, medium);
        let waited = now.saturating_sub(ready);
        Some(Taken { job, grant: Grant { id, ticket, ready, waited } })
    }

    /// A job is over; `panicked` if it ended in a panic.
    pub(super) fn finish(&mut self, grant: Grant, panicked: bool) {
        let Ticket { class, medium, .. } = grant.ticket;
        self.running.end(class, medium);
        self.tally.ended(class, grant.waited, panicked);
    }

    /// A job that was taken did not begin after all: it is the first in its line again.
    pub(super) fn put_back(&mut self, taken: Taken<J>) {
        let Taken { job, grant: Grant { id, ticket, ready, .. } } = taken;
        self.running.end(ticket.class, ticket.medium);
        let links = Links::default();
        let number = self.remember(Node { job, id, ticket, ready, delayed: false, links });
        let lines = &mut self.lines[ticket.class.index()];
        lines.push_front(&mut self.slab, number, ticket.lane, ticket.medium);
    }

    /// Takes a waiting job out again, wherever it is. Slow.
    pub(super) fn withdraw(&mut self, id: JobId) -> Option<J> {
        let number = self.slab.iter().find(|(_, node)| node.id == id)?.0;
        let &Node { ticket, ready, delayed, .. } = self.slab.get(number)?;
        if delayed {
            self.delayed.remove(&(ready, id));
        } else {
            let lines = &mut self.lines[ticket.class.index()];
            lines.unlink(&mut self.slab, number, ticket.lane, ticket.medium);
        }
        Some(self.forget(number)?.job)
    }

    /// Moves a waiting job to an earlier class.
    pub(super) fn promote(&mut self, key: Key, class: Class, lane: Lane) -> Promoted {
        let Some(&number) = self.keys.get(&key) else { return Promoted::NotWaiting };
        let Some(node) = self.slab.get_mut(number) else { return Promoted::NotWaiting };
        let old = node.ticket;
        if old.class <= class {
            return Promoted::Already;
        }
        if self.depth[class.index()] >= self.max[class.index()] {
            return Promoted::Full;
        }
        node.ticket = Ticket { class, lane, ..old };
        if !node.delayed {
            let from = &mut self.lines[old.class.index()];
            from.unlink(&mut self.slab, number, old.lane, old.medium);
            self.lines[class.index()].push_back(&mut self.slab, number, lane, old.medium);
        }
        self.depth[old.class.index()] -= 1;
        self.depth[class.index()] += 1;
        self.tally.promoted += 1;
        Promoted::Moved
    }

    /// Takes no more jobs; the delayed ones, in the order they were due.
    pub(super) fn close(&mut self) -> Vec<J> {
        self.closed = true;
        let delayed = std::mem::take(&mut self.delayed);
        delayed.into_values().filter_map(|number| Some(self.forget(number)?.job)).collect()
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed
    }

    /// Takes out all that wait: by class, and there in the order of arrival.
    pub(super) fn drain(&mut self) -> Vec<J> {
        let place = |(number, node): (u32, &Node<J>)| (node.ticket.class, node.id, number);
        let mut all: Vec<_> = self.slab.iter().map(place).collect();
        all.sort_unstable();
        self.delayed.clear();
        self.lines = [(); Class::COUNT].map(|()| Lines::new(self.media));
        all.into_iter().filter_map(|(.., number)| Some(self.forget(number)?.job)).collect()
    }

    pub(super) fn running(&self) -> &Running {
        &self.running
    }

    pub(super) fn depth(&self) -> [usize; Class::COUNT] {
        self.depth
    }

    pub(super) fn delayed(&self) -> usize {
        self.delayed.len()
    }

    pub(super) fn tally(&self) -> &Tally {
        &self.tally
    }

    /// Checks a new job against the bounds and gives it a place, but none in a line.
    fn admit(
        &mut self,
        ready: Duration,
        delayed: bool,
        ticket: Ticket,
        job: J,
    ) -> Result<(u32, JobId), Rejected<J>> {
        let class = ticket.class.index();
        let why = if self.closed {
            Some(Why::Closed)
        } else if ticket.medium.0 >= self.media {
            Some(Why::NoSuchMedium)
        } else {
            (self.depth[class] >= self.max[class]).then_some(Why::Full)
        };
        if let Some(why) = why {
            self.tally.rejected[class] += 1;
            return Err(Rejected { job, why });
        }
        let id = JobId(self.next_id);
        self.next_id += 1;
        let links = Links::default();
        Ok((self.remember(Node { job, id, ticket, ready, delayed, links }), id))
    }

    fn remember(&mut self, node: Node<J>) -> u32 {
        let Ticket { class, key, .. } = node.ticket;
        self.depth[class.index()] += 1;
        let number = self.slab.insert(node);
        if let Some(key) = key {
            self.keys.insert(key, number);
        }
        number
    }

    /// Frees a job's place; it stands in no line any more.
    fn forget(&mut self, number: u32) -> Option<Node<J>> {
        let node = self.slab.remove(number)?;
        self.depth[node.ticket.class.index()] -= 1;
        if let Some(key) = node.ticket.key
            && self.keys.get(&key) == Some(&number)
        {
            self.keys.remove(&key);
        }
        Some(node)
    }
}

//! What is said about a job: how urgent it is, whose it is, and what it will occupy.

use std::fmt;

/// How urgent a job is. An earlier class is served before a later one, always.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Class {
    /// Somebody waits for the page.
    Fault,
    /// Somebody may soon want the page.
    Prefetch,
    /// A page on its way out of memory.
    WriteBack,
}

impl Class {
    /// How many there are.
    pub const COUNT: usize = 3;
    /// All of them, in the order of service.
    pub const ALL: [Self; Self::COUNT] = [Self::Fault, Self::Prefetch, Self::WriteBack];

    /// The place in tables by class.
    #[must_use]
    pub fn index(self) -> usize {
        self as usize
    }
}

/// For whom a job is done: the number of a vCPU, or one for everything else. Lanes of one class
/// take turns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lane(pub u16);

/// What a job will wait for: a store's medium. Numbers start at 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Medium(pub u8);

/// Finds a job that has not begun ([`Pool::promote`](super::Pool::promote)). Keys of jobs that wait
/// at the same time should differ: of several with one key only the latest is ever found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key(pub u64);

/// What the pool knows of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticket {
    /// How urgent it is.
    pub class: Class,
    /// Whose it is.
    pub lane: Lane,
    /// What it occupies.
    pub medium: Medium,
    /// How it can be found again.
    pub key: Option<Key>,
}

impl Ticket {
    /// A ticket for a job that will not be looked for.
    #[must_use]
    pub fn new(class: Class, lane: Lane, medium: Medium) -> Self {
        Self { class, lane, medium, key: None }
    }

    /// The same with a key.
    #[must_use]
    pub fn with_key(self, key: Key) -> Self {
        Self { key: Some(key), ..self }
    }
}

/// A job that the pool did not take.
#[derive(PartialEq, Eq)]
pub struct Rejected<J> {
    /// The job, untouched.
    pub job: J,
    /// The reason.
    pub why: Why,
}

impl<J> fmt::Debug for Rejected<J> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rejected").field("why", &self.why).finish_non_exhaustive()
    }
}

/// Why the pool does not take a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Why {
    /// As many jobs of its class wait as may.
    #[error("as many jobs wait as may: try again when some are done")]
    Full,
    /// The pool is closed or closing.
    #[error("the worker pool is closed")]
    Closed,
    /// There is no worker, and the host gave no thread for one.
    #[error("the host gives no thread for a worker: raise its limit of threads")]
    NoThread,
    /// The pool was not made for this medium.
    #[error("the worker pool has no medium of this number: see PoolConfig::media")]
    NoSuchMedium,
}

/// What became of a wish to promote.
#[must_use]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Promoted {
    /// The job is in the class and lane now; if it waits for a time, it still does.
    Moved,
    /// The job waits in this class or an earlier one already. It stays in its lane.
    Already,
    /// As many jobs of the class wait as may: the job stays where it was.
    Full,
    /// No job with this key waits: it was never submitted, runs, or is done.
    NotWaiting,
}

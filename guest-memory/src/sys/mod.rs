//! The operating system: mappings, the RAM file, userfaultfd, waiting. The only unsafe code of this
//! crate; what it exports is safe to call.

mod arena;
mod mapping;
pub(crate) mod memfd;
mod poll;
pub(crate) mod ring;
mod userfault;
pub(crate) mod view;
mod words;

pub(crate) use arena::Arena;
pub(crate) use mapping::{GuestMapping, keep_private, populate};
pub(crate) use poll::wait_readable;
pub use userfault::UserfaultError;
pub(crate) use userfault::{Fault, FaultBatch, FaultKind, Outcome, Userfault};
pub(crate) use words::ZeroedWords;

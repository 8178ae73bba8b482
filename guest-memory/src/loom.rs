//! The parts of the standard library that loom replaces. `--cfg loom` builds the crate for the models of
//! pages and their waiters, `loom_models.rs`, and for nothing else.

#[cfg(loom)]
pub(crate) use loom::sync::{Condvar, Mutex, MutexGuard};
#[cfg(not(loom))]
pub(crate) use std::sync::{Condvar, Mutex, MutexGuard};

//! The bodies of the fuzz targets in `fuzz/`, and tests that replay what was found. Each takes any bytes
//! as a script, and panics when its oracle is not content.

mod script;

pub(crate) use script::Script;

pub use crate::pager::fuzzing::{Ran, page_lives};
pub use crate::stores::nbd_fuzzing::{handshake, replies};

#[cfg(test)]
mod tests;

//! Types that the guest agent (PID 1 of the test guest) and the host share.
//!
//! Two channels join them:
//!
//! ```text
//!   agent  --- COM2, one JSON message a line --->  host     results, after a run
//!   agent  <-- COM2, one JSON message a line ----  host     requests
//!   agent  --- OUT to the paging port ---------->  host     evict these pages (synchronous)
//! ```
//!
//! The host treats everything that arrives here as hostile: lines and lists are bounded by the
//! constants in these modules, and a message that does not parse is an error, never a panic.
#![cfg_attr(not(any(test, feature = "agent")), no_std)]
#![forbid(unsafe_code)]

extern crate alloc;

#[cfg(feature = "agent")]
pub mod agent;
pub mod paging;

//! What makes a page fault asynchronous, without knowing pages or KVM: who does the waiting.
//!
//! ```text
//!   first pass (vCPU thread, pager thread)          second pass (worker)
//!
//!   fault -> lookup that never waits -> Retry -----> Pool::submit -> job waits in a store
//!                      |                                               |
//!                      v                                               v
//!                    mapped                                   mapped; waiters are told
//! ```
//!
//! [`pool`] is the bounded worker pool: the only place where a guest's page may be waited for.
//! [`protocol`] is what the guest is told meanwhile: KVM's paravirtual async page faults.

#![forbid(unsafe_code)]

#[cfg(all(fuzzing, not(loom)))]
pub mod fuzzing {
    //! What the targets of `fuzz/` call.
    pub use crate::protocol::model::script as protocol;
}
mod loom;
pub mod pool;
pub mod protocol;

pub use pool::{
    Class, Key, Lane, Medium, Pool, PoolConfig, PoolStats, Promoted, Rejected, Report, Ticket, Why,
};

//! nowait: a small KVM virtual machine monitor whose guest RAM is demand-paged by userfaultfd.
//!
//! The only crate that touches KVM. Start with `ARCHITECTURE.md`; in the code, with [`machine`].

pub mod agent;
pub mod boot;
#[cfg(feature = "bed")]
#[doc(hidden)]
pub use control::bed;
pub mod commands;
pub mod console;
mod control;
pub mod devices;
pub mod doctor;
pub mod events;
pub mod exit;
pub mod kvm;
pub mod machine;
pub mod operand;
pub mod output;
pub mod paging;
pub mod patience;
pub mod probe;
pub mod sigbus;
pub mod size;
pub mod spec;
pub mod stall;
pub mod stalls;
pub mod stats;
pub mod terminal;
mod threads;
pub mod top;
pub mod trace;

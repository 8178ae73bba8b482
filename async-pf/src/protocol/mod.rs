//! KVM's paravirtual async page faults (Documentation/virt/kvm/x86/msr.rst), all of it on the VMM's side.
//!
//! ```text
//!   vCPU thread                                          whoever completes pages
//!
//!   fault -> begin -> ask for the page (not here)
//!         -> decide: Notify | Halt | Wait | Arrived      complete -> page-ready, or wake the vCPU
//!   WRMSR -> set_en, set_int, write_ack
//! ```
//!
//! [`Machine`] is the pure state; [`AsyncPf`] is it behind the lock that both sides take, with the guest's
//! area and the interrupt.

mod counters;
mod machine;
#[cfg(all(any(test, fuzzing), not(loom)))]
pub(crate) mod model;
mod msr;
mod shared;
mod token;
mod verdict;

pub use counters::ProtocolStats;
pub use machine::{Machine, Page, Saved};
pub use msr::{AREA_BYTES, En, GeneralProtection, MSR_ACK, MSR_EN, MSR_INT, Msr};
pub use shared::{Area, AsyncPf, Interrupt, Taken};
pub use token::{MAX_OUTSTANDING, MAX_VCPU, Token, WAKE_ALL};
pub use verdict::{Begun, Completed, Decision, GuestState, Mode, Ready, Refusal};

#[cfg(all(test, not(loom)))]
mod tests;

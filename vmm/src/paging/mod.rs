//! The glue between KVM, the pager and the workers: the only place that knows all three.
//!
//! ```text
//!   guest touches a marker -> SIGBUS, KVM_RUN returns EINTR
//!     -> Faults::resolve (this vCPU's thread) -> Pager::fault: Hit, or wait, interruptibly -> KVM_RUN
//!                                                           or (--apf user) Notifier:
//!                                                           a page fault injected, a halt, or a wait
//! ```
//!
//! What markers do to KVM's own accesses to guest memory is answered in [`areas`] (its paravirtual areas)
//! and [`walk`] (its instruction emulator).

pub(crate) mod areas;
mod faults;
pub(crate) mod host;
mod notify;
mod threshold;
pub(crate) mod walk;
mod workers;

pub(crate) use faults::{Faults, Resolved, mappings};
pub use notify::{AsyncPfStats, Cost, Costs};
pub(crate) use notify::{Notifier, Policy};
pub use threshold::{BadThreshold, Threshold};
pub(crate) use threshold::{Changed, InUse};
pub(crate) use workers::Crew;
pub use workers::WorkerStats;

use clap::ValueEnum;
use serde::Serialize;

use crate::kvm::cpuid::Apf;

/// How faults on guest RAM come to the pager.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum FaultSource {
    /// As messages of userfaultfd, to the pager's thread; KVM's workers wait.
    Uffd,
    /// By UFFDIO_POISON markers, to the vCPU's own thread (Linux 6.6).
    Marker,
}

impl std::fmt::Display for FaultSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Uffd => "uffd",
            Self::Marker => "marker",
        })
    }
}

impl FaultSource {
    /// The one source that goes with this way of handling async page faults: with markers KVM's own
    /// way is never reached, and without them a vCPU's thread cannot wait.
    #[must_use]
    pub fn of(apf: Apf) -> Self {
        match apf {
            Apf::Host | Apf::Kernel => Self::Uffd,
            Apf::Off | Apf::User => Self::Marker,
        }
    }
}

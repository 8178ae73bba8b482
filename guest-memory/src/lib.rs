//! Demand-paged guest RAM: where the bytes of a guest page are, and how they come when the guest
//! needs them. This crate knows userfaultfd and memory files; it knows nothing of KVM.
//!
//! ```text
//!   RamLayout -> GuestRam -> (the loader writes) -> start -> Pager
//!
//!   guest touches an absent or idle page
//!     -> marker: SIGBUS, the vCPU's own thread asks       Pager::fault
//!     -> no marker: message on the userfaultfd            pager thread
//!     first pass, which never waits: what does the page's word say?        (word, table)
//!          never touched:     zero pages, mapped at once, with their untouched neighbours
//!          in the RAM file:   map it
//!          in the store, at hand (compressed): fill it and map it          (stores)
//!          in the store, not at hand: Retry
//!     second pass, on a worker, which may wait: store, room, map it        (room, waiters)
//! ```
//!
//! Every page has one atomic word; its states, edges and owners are in `word.rs`. What a page's edge
//! decides is done by the one thread that took it, without any lock around it.

mod address;
mod ages;
mod checksum;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzzing;
mod layout;
mod loom;
#[cfg(all(test, loom))]
mod loom_models;
mod pager;
mod pass;
// The simulator of the benchmark and some tuning is used by tests only.
#[allow(dead_code)]
mod policy;
mod ram;
mod room;
mod stats;
pub mod stores;
mod survey;
mod sys;
mod table;
mod waiters;
mod word;

pub use address::{Gfn, Gpa, PAGE_BYTES, PAGE_SIZE, PageBytes};
pub use ages::{AGE_BOUNDS_US, FetchAges};
pub use layout::{HOLE_END, HOLE_START, LayoutError, MAX_MEMORY_BYTES, RamLayout, RamRegion};
pub use pager::{
    Fault, Health, Hit, MAX_FAULT_AROUND_BYTES, MIN_RESIDENT_LIMIT_BYTES, Pager, PagerConfig,
    PagerError, Pinned, Work, WorkClass, Workers,
};
pub use pass::{MayWait, NoWait};
pub use ram::{GuestRam, GuestSlot, OnMapped, OnStep, RamError, Step, make_present};
pub use stats::{LATENCY_BOUNDS_US, LatencyBuckets, PagerStats};
pub use stores::{StoreSpec, StoreSpecError};
// For the benchmarks.
#[doc(hidden)]
pub use policy::simulate;
pub use survey::{PageCounts, Survey, SurveyCell};
pub use sys::UserfaultError;
pub use waiters::{PageEnd, Sleeper, Waiter, Wake, Woken};

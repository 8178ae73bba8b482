//! Demand-paged guest RAM: where the bytes of a guest page are, and how they come when the guest
//! needs them. This crate knows userfaultfd and memory files; it knows nothing of KVM.
//!
//! ```text
//!   RamLayout -> GuestRam -> (the loader writes) -> start -> Pager
//!
//!   guest touches an absent page
//!     -> message on the userfaultfd
//!     -> pager thread: what does the page's word say?        (state, table)
//!          never touched:  zero pages, mapped at once, with their untouched neighbours
//!          in the store:   fetch; due after the store's latency, many at once   (deadline, store)
//!          in the RAM file: map it
//!     -> CONTINUE or ZEROPAGE maps the page and wakes whoever waits
//! ```
//!
//! The pager thread alone has the pages' states and alone maps, unmaps and moves pages: requests
//! come to it over a channel, so faults and evictions cannot race.

mod address;
mod deadline;
mod layout;
mod pager;
// Until the pager asks it.
#[allow(dead_code)]
mod policy;
pub mod pass;
mod ram;
mod state;
mod stats;
pub mod store;
pub mod stores;
mod sys;
mod table;

pub use address::{Gfn, Gpa, PAGE_BYTES, PAGE_SIZE, PageBytes};
pub use layout::{HOLE_END, HOLE_START, LayoutError, MAX_MEMORY_BYTES, RamLayout, RamRegion};
pub use pager::{MAX_FAULT_AROUND_BYTES, Pager, PagerConfig, PagerError};
pub use ram::{GuestRam, GuestSlot, OnMapped, RamError, make_present};
pub use stats::PagerStats;
pub use store::{StoreSpec, StoreSpecError};
pub use sys::UserfaultError;

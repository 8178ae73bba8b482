//! The two passes of a page fault as types. The first pass looks at what is at hand and never waits;
//! the second runs in a pool job and may. A store's methods ask for the pass they are made for, so
//! that a wait in the first pass is a type error:
//!
//! ```
//! # use guest_memory::{MayWait, NoWait, PageBytes, stores::{Read, Slot, Store, StoreError}};
//! fn first(store: &dyn Store, pass: &NoWait, page: &mut PageBytes) -> Result<bool, StoreError> {
//!     store.read_now(pass, Slot(0), page)
//! }
//! fn second(store: &dyn Store, pass: &MayWait, page: &mut PageBytes) {
//!     store.read(pass, &mut [Read::new(Slot(0), page)]);
//! }
//! ```
//! The second pass's read in the first, and the other way round:
//! ```compile_fail,E0308
//! # use guest_memory::{MayWait, NoWait, PageBytes, stores::{Read, Slot, Store, StoreError}};
//! fn first(store: &dyn Store, pass: &NoWait, page: &mut PageBytes) {
//!     store.read(pass, &mut [Read::new(Slot(0), page)]);
//! }
//! ```
//! ```compile_fail,E0308
//! # use guest_memory::{MayWait, NoWait, PageBytes, stores::{Read, Slot, Store, StoreError}};
//! fn second(store: &dyn Store, pass: &MayWait, page: &mut PageBytes) -> Result<bool, StoreError> {
//!     store.read_now(pass, Slot(0), page)
//! }
//! ```
//! Nobody but the pager says which pass it is:
//! ```compile_fail,E0423
//! let pass = guest_memory::MayWait(());
//! ```
//! ```compile_fail,E0624
//! let pass = guest_memory::MayWait::second_pass();
//! ```
//! ```compile_fail,E0277
//! let pass: guest_memory::MayWait = Default::default();
//! ```
//! ```compile_fail,E0599
//! fn twice(pass: &guest_memory::MayWait) -> guest_memory::MayWait {
//!     guest_memory::MayWait::clone(pass)
//! }
//! ```

/// Witness of the first pass: whoever has one must not wait, and holds no lock across I/O.
#[derive(Debug)]
pub struct NoWait(());

/// Witness of the second pass: whoever has one runs where waiting keeps nobody else waiting.
#[derive(Debug)]
pub struct MayWait(());

impl NoWait {
    /// The first pass begins.
    pub(crate) const fn first_pass() -> Self {
        Self(())
    }
}

impl MayWait {
    /// The second pass begins: only in a pool job that was made from a first pass's retry.
    pub(crate) const fn second_pass() -> Self {
        Self(())
    }
}

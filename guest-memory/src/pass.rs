//! The two passes of a page fault as types. The first pass looks at what is at hand and never waits;
//! the second runs in a pool job and may. A store's methods ask for the pass they are made for, so
//! that a wait in the first pass is a type error.

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

//! The word that says what is known of one page, and its edges.
//!
//! ```text
//!   Zero --installed--> Mapped --stored(slot)--> Stored --fault--> Fetching --fetched--> Mapped
//!                         |  ^                                        |
//!                         +--+ fault: map again                       +--failed--> Failed
//! ```
//!
//! | bits   | meaning |
//! |--------|---------|
//! | 0..=2  | the state: 0 Zero, 1 Mapped, 2 Stored, 3 Fetching, 4 Failed |
//! | 3..=31 | always 0 |
//! | 32..=63| the slot in the store, in Stored, Fetching and Failed; else 0 |
//!
//! The zero word is a page that was never touched, so that a table of such pages costs no memory.
//! Only the pager thread has these words: no edge can race another.

use crate::store::Slot;

const STATE_BITS: u64 = 0b111;
const SLOT_SHIFT: u32 = 32;

/// What is known of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PageState {
    /// Never touched: all zero, and no memory is behind it.
    Zero,
    /// Its bytes are in the RAM file. The guest mapping has it, unless an installation is being
    /// retried or the host's reclaim took the entry away.
    Mapped,
    /// Its bytes are in the store only.
    Stored(Slot),
    /// As [`PageState::Stored`], and a fetch is under way.
    Fetching(Slot),
    /// Its fetch failed; nobody gets this page any more.
    Failed(Slot),
}

/// How a fault on a page is to be answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub(crate) enum OnFault {
    /// Install a zero page, then [`PageWord::installed`].
    InstallZero,
    /// The bytes are there: map them (again).
    MapAgain,
    /// The page is Fetching now: start its fetch.
    StartFetch,
    /// A fetch is under way: whoever waits is woken by its end.
    Join,
    /// The page is lost; nothing can be done.
    Lost,
}

/// What an installation was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub(crate) enum OnInstalled {
    /// The page's first bytes: it had never been touched.
    First,
    /// The page was not waiting for bytes; nothing changed.
    Unchanged,
}

/// What the end of a fetch, good or bad, did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub(crate) enum OnFetchEnd {
    /// The page left Fetching; this was its slot.
    Ended(Slot),
    /// The page was not Fetching; nothing changed.
    Stale,
}

/// What storing a page did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub(crate) enum OnStored {
    /// The page is absent now.
    Absent,
    /// The page was not Mapped; nothing changed and the slot is still the caller's.
    Refused,
}

/// One page's state, packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PageWord(u64);

impl PageWord {
    /// Takes a word of the table; only words that [`PageWord::bits`] gave, or 0.
    pub(crate) const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// The word for the table.
    pub(crate) const fn bits(self) -> u64 {
        self.0
    }

    /// Decodes the word.
    pub(crate) fn state(self) -> PageState {
        let slot = Slot((self.0 >> SLOT_SHIFT) as u32);
        match self.0 & STATE_BITS {
            0 => PageState::Zero,
            1 => PageState::Mapped,
            2 => PageState::Stored(slot),
            3 => PageState::Fetching(slot),
            _ => PageState::Failed(slot),
        }
    }

    /// Edge: somebody needs the page.
    pub(crate) fn fault(&mut self) -> OnFault {
        match self.state() {
            PageState::Zero => OnFault::InstallZero,
            PageState::Mapped => OnFault::MapAgain,
            PageState::Stored(slot) => {
                *self = Self::pack(3, Some(slot));
                OnFault::StartFetch
            }
            PageState::Fetching(_) => OnFault::Join,
            PageState::Failed(_) => OnFault::Lost,
        }
    }

    /// Edge: the page's first bytes are in the RAM file.
    pub(crate) fn installed(&mut self) -> OnInstalled {
        if self.state() == PageState::Zero {
            *self = Self::pack(1, None);
            OnInstalled::First
        } else {
            OnInstalled::Unchanged
        }
    }

    /// Edge: the fetched bytes are in the RAM file.
    pub(crate) fn fetched(&mut self) -> OnFetchEnd {
        if let PageState::Fetching(slot) = self.state() {
            *self = Self::pack(1, None);
            OnFetchEnd::Ended(slot)
        } else {
            OnFetchEnd::Stale
        }
    }

    /// Edge: the fetch failed.
    pub(crate) fn failed(&mut self) -> OnFetchEnd {
        if let PageState::Fetching(slot) = self.state() {
            *self = Self::pack(4, Some(slot));
            OnFetchEnd::Ended(slot)
        } else {
            OnFetchEnd::Stale
        }
    }

    /// Edge: the bytes are in the store and nowhere else.
    pub(crate) fn stored(&mut self, slot: Slot) -> OnStored {
        if self.state() == PageState::Mapped {
            *self = Self::pack(2, Some(slot));
            OnStored::Absent
        } else {
            OnStored::Refused
        }
    }

    fn pack(state: u64, slot: Option<Slot>) -> Self {
        let slot = slot.map_or(0, |slot| u64::from(slot.0));
        Self(state | slot << SLOT_SHIFT)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The reference: the same machine with the states unpacked.
    fn step(state: PageState, edge: u8, slot: Slot) -> PageState {
        use PageState::{Failed, Fetching, Mapped, Stored, Zero};
        match (edge, state) {
            (0, Stored(slot)) => Fetching(slot),
            (1, Zero) | (2, Fetching(_)) => Mapped,
            (3, Fetching(slot)) => Failed(slot),
            (4, Mapped) => Stored(slot),
            (_, same) => same,
        }
    }

    fn apply(word: &mut PageWord, edge: u8, slot: Slot) -> bool {
        let before = *word;
        let changed = match edge {
            0 => word.fault() == OnFault::StartFetch,
            1 => word.installed() == OnInstalled::First,
            2 => matches!(word.fetched(), OnFetchEnd::Ended(_)),
            3 => matches!(word.failed(), OnFetchEnd::Ended(_)),
            _ => word.stored(slot) == OnStored::Absent,
        };
        changed == (before.state() != word.state())
    }

    #[test]
    fn a_page_goes_out_and_comes_back() {
        let mut word = PageWord::from_bits(0);
        assert_eq!(word.fault(), OnFault::InstallZero);
        assert_eq!(word.installed(), OnInstalled::First);
        assert_eq!(word.fault(), OnFault::MapAgain);
        assert_eq!(word.stored(Slot(u32::MAX)), OnStored::Absent);
        assert_eq!(word.fault(), OnFault::StartFetch);
        assert_eq!(word.fault(), OnFault::Join);
        assert_eq!(word.stored(Slot(1)), OnStored::Refused);
        assert_eq!(word.fetched(), OnFetchEnd::Ended(Slot(u32::MAX)));
        assert_eq!(word.fetched(), OnFetchEnd::Stale);
        assert_eq!(word.state(), PageState::Mapped);
    }

    #[test]
    fn a_failed_page_stays_failed() {
        let mut word = PageWord::from_bits(0);
        assert_eq!(word.installed(), OnInstalled::First);
        assert_eq!(word.stored(Slot(7)), OnStored::Absent);
        assert_eq!(word.fault(), OnFault::StartFetch);
        assert_eq!(word.failed(), OnFetchEnd::Ended(Slot(7)));
        assert_eq!(word.fault(), OnFault::Lost);
        assert_eq!(word.fetched(), OnFetchEnd::Stale);
        assert_eq!(word.state(), PageState::Failed(Slot(7)));
    }

    proptest! {
        #[test]
        fn the_word_follows_the_reference(edges in prop::collection::vec((0..5_u8, any::<u32>()), 0..64)) {
            let mut word = PageWord::from_bits(0);
            let mut state = PageState::Zero;
            for (edge, slot) in edges {
                prop_assert!(apply(&mut word, edge, Slot(slot)), "a verdict does not tell the change");
                state = step(state, edge, Slot(slot));
                prop_assert_eq!(word.state(), state);
                prop_assert_eq!(PageWord::from_bits(word.bits()), word);
            }
        }
    }
}

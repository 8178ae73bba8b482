use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use proptest::prelude::*;

use super::*;
use crate::table::edge;

/// The page as the reference has it: what its word says, unpacked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Model {
    state: PageState,
    wanted: bool,
    waiters: bool,
    slot: Option<u32>,
    pins: u64,
    generation: u16,
}

const UNTOUCHED: Model = Model {
    state: PageState::Zero,
    wanted: false,
    waiters: false,
    slot: None,
    pins: 0,
    generation: 0,
};

#[derive(Clone, Copy, Debug)]
enum Edge {
    Fault { at_hand: bool },
    Remap,
    Prefetch,
    ClaimZero,
    ZeroAgain,
    FillMissed,
    Installed,
    Fetched,
    Unfetched,
    Unfilled,
    Failed,
    BeginUnmap,
    Unmapped { failed: bool },
    BeginStore,
    NotStored { late: bool },
    Stored { late: bool, slot: u32 },
    Dropped,
    ForgetSlot,
    ForgetOlder { late: bool },
    ForgetCopy,
    Wait,
    Pin,
    Unpin,
}

fn any_edge() -> impl Strategy<Value = Edge> {
    use Edge as E;
    prop_oneof![
        4 => any::<bool>().prop_map(|at_hand| E::Fault { at_hand }),
        1 => any::<bool>().prop_map(|failed| E::Unmapped { failed }),
        1 => any::<bool>().prop_map(|late| E::NotStored { late }),
        1 => any::<bool>().prop_map(|late| E::ForgetOlder { late }),
        3 => (any::<bool>(), any::<u32>()).prop_map(|(late, slot)| E::Stored { late, slot }),
        12 => prop::sample::select(vec![
            E::Remap, E::Prefetch, E::ClaimZero, E::ZeroAgain, E::FillMissed, E::Installed,
            E::Fetched, E::Unfetched, E::Unfilled, E::Failed, E::BeginUnmap, E::BeginStore,
            E::Dropped, E::ForgetSlot, E::ForgetCopy, E::Wait, E::Pin, E::Unpin,
        ]),
    ]
}

impl Model {
    /// May this edge be asked for now? Those of owners only by owners.
    fn allows(&self, edge: Edge) -> bool {
        use PageState as S;
        match edge {
            Edge::ZeroAgain | Edge::Installed | Edge::Unfilled | Edge::ForgetSlot => {
                self.state == S::Installing
            }
            Edge::FillMissed => self.state == S::Installing && self.slot.is_some(),
            Edge::Fetched | Edge::Unfetched => self.state == S::Fetching,
            Edge::Failed => matches!(self.state, S::Installing | S::Fetching),
            Edge::Unmapped { .. } => self.state == S::Unmapping,
            Edge::Dropped => self.state == S::Dropping,
            Edge::Unpin => self.pins > 0,
            _ => true,
        }
    }

    fn settle(&mut self, state: PageState) {
        (self.state, self.wanted, self.waiters) = (state, false, false);
    }

    fn step(&mut self, edge: Edge) {
        use PageState as S;
        let wanted = self.wanted || self.waiters;
        match (edge, self.state) {
            (Edge::Fault { .. }, S::Zero | S::Idle | S::Storing) => self.state = S::Installing,
            (Edge::Fault { at_hand: true }, S::Stored) if self.slot.is_some() => {
                self.state = S::Installing;
            }
            (Edge::Fault { at_hand: false }, S::Stored) if self.slot.is_some() => {
                (self.state, self.wanted) = (S::Fetching, true);
                self.generation = self.generation.wrapping_add(1);
            }
            (Edge::Fault { .. }, S::Installing | S::Unmapping | S::Dropping | S::Fetching) => {
                self.wanted = true;
            }
            (Edge::Remap, S::Mapped) | (Edge::ClaimZero, S::Zero) => self.state = S::Installing,
            (Edge::Prefetch, S::Stored) if self.slot.is_some() => {
                self.state = S::Fetching;
                self.generation = self.generation.wrapping_add(1);
            }
            (Edge::FillMissed, _) => {
                (self.state, self.wanted) = (S::Fetching, true);
                self.generation = self.generation.wrapping_add(1);
            }
            (Edge::ZeroAgain, _) => self.settle(S::Zero),
            (Edge::Installed, _) => self.settle(S::Mapped),
            (Edge::Unfetched | Edge::Unfilled, _) => self.settle(S::Stored),
            (Edge::Failed, _) => self.settle(S::Failed),
            (Edge::Fetched, _) => {
                (self.state, self.wanted) = (if wanted { S::Installing } else { S::Idle }, false);
            }
            (Edge::BeginUnmap, S::Mapped) if self.pins == 0 => self.state = S::Unmapping,
            (Edge::Unmapped { failed }, _) => {
                self.state = if failed || wanted { S::Installing } else { S::Idle };
                self.wanted = false;
            }
            (Edge::BeginStore, S::Idle) => {
                self.state = S::Storing;
                self.generation = self.generation.wrapping_add(1);
            }
            (Edge::NotStored { late: false }, S::Storing) => self.state = S::Idle,
            (Edge::Stored { late: false, slot }, S::Storing) => {
                (self.state, self.slot) = (S::Dropping, Some(slot));
            }
            (Edge::Dropped, _) => (self.state, self.wanted) = (S::Stored, false),
            (Edge::ForgetSlot, _)
            | (Edge::ForgetOlder { late: false }, S::Storing)
            | (Edge::ForgetCopy, S::Mapped | S::Idle) => self.slot = None,
            (Edge::Wait, S::Installing | S::Unmapping | S::Dropping | S::Fetching) => {
                self.waiters = true;
            }
            (Edge::Pin, S::Mapped) if self.pins < MAX_PINS => self.pins += 1,
            (Edge::Unpin, _) => self.pins -= 1,
            _ => {}
        }
    }
}

fn apply(word: &mut PageWord, edge: Edge) {
    let current = word.generation();
    let of = |late| if late { Generation(current.0.wrapping_sub(1)) } else { current };
    match edge {
        Edge::Fault { at_hand } => drop(word.fault(|_| at_hand)),
        Edge::Remap => drop(word.remap()),
        Edge::Prefetch => drop(word.prefetch()),
        Edge::ClaimZero => drop(word.claim_zero()),
        Edge::ZeroAgain => drop(word.zero_again()),
        Edge::FillMissed => drop(word.fill_missed()),
        Edge::Installed => drop(word.installed()),
        Edge::Fetched => drop(word.fetched()),
        Edge::Unfetched => drop(word.unfetched()),
        Edge::Unfilled => drop(word.unfilled()),
        Edge::Failed => drop(word.failed()),
        Edge::BeginUnmap => drop(word.begin_unmap()),
        Edge::Unmapped { failed } => drop(word.unmapped(failed)),
        Edge::BeginStore => drop(word.begin_store()),
        Edge::NotStored { late } => drop(word.not_stored(of(late))),
        Edge::Stored { late, slot } => drop(word.stored(of(late), Slot(slot))),
        Edge::Dropped => drop(word.dropped()),
        Edge::ForgetSlot => drop(word.forget_slot()),
        Edge::ForgetOlder { late } => drop(word.forget_older(of(late))),
        Edge::ForgetCopy => drop(word.forget_copy()),
        Edge::Wait => drop(word.wait()),
        Edge::Pin => drop(word.pin()),
        Edge::Unpin => word.unpin(),
    }
}

fn unpacked(word: PageWord) -> Model {
    Model {
        state: word.state(),
        wanted: word.0 & WANTED != 0,
        waiters: word.0 & WAITERS != 0,
        slot: word.slot().map(|slot| slot.0),
        pins: word.pins(),
        generation: word.generation().0,
    }
}

proptest! {
    #[test]
    fn the_word_follows_the_reference(edges in prop::collection::vec(any_edge(), 0..200)) {
        let (mut word, mut model) = (PageWord::from_bits(0), UNTOUCHED);
        for edge in edges.into_iter() {
            if !model.allows(edge) {
                continue;
            }
            apply(&mut word, edge);
            model.step(edge);
            prop_assert_eq!(unpacked(word), model, "after {:?}", edge);
            prop_assert_eq!(PageWord::from_bits(word.bits()), word);
            prop_assert_eq!(word.bits() & (1 << 7), 0);
        }
    }

    #[test]
    fn an_owners_edge_asserts_when_another_takes_it(edges in prop::collection::vec(any_edge(), 0..40), last in any_edge()) {
        let (mut word, mut model) = (PageWord::from_bits(0), UNTOUCHED);
        for edge in edges {
            if model.allows(edge) {
                apply(&mut word, edge);
                model.step(edge);
            }
        }
        if !model.allows(last) && !matches!(last, Edge::FillMissed) {
            let taken = std::panic::catch_unwind(move || apply(&mut word, last));
            prop_assert!(taken.is_err(), "{:?} in {:?}", last, model);
        }
    }
}

#[test]
fn a_page_goes_out_and_comes_back() {
    let mut word = PageWord::from_bits(0);
    assert_eq!(word.fault(|_| true), OnFault::InstallZero);
    assert!(!word.installed().waiters);
    assert_eq!(word.fault(|_| true), OnFault::Present);
    assert_eq!(word.begin_unmap(), Taken::Yes);
    assert_eq!(word.unmapped(false), OnUnmapped::Idle);
    let first = word.begin_store().unwrap();
    // Used while it was written: what was written is late, also when it is written anew.
    assert_eq!(word.fault(|_| true), OnFault::Remap);
    let _ = word.installed();
    assert_eq!(word.begin_unmap(), Taken::Yes);
    assert_eq!(word.unmapped(false), OnUnmapped::Idle);
    let second = word.begin_store().unwrap();
    assert_eq!(word.stored(first, Slot(1)), OnStored::Late);
    assert_eq!(word.not_stored(first), Taken::No);
    assert_eq!(word.stored(second, Slot(2)), OnStored::Drop { older: None });
    assert_eq!(word.dropped(), OnDropped::Stored);
    assert_eq!(word.slot(), Some(Slot(2)));
    assert!(matches!(word.fault(|_| false), OnFault::StartFetch(Slot(2), _)));
    assert_eq!(word.fault(|_| false), OnFault::Join);
    assert_eq!(word.wait(), OnWait::Waits);
    assert_eq!(word.fetched(), OnFetched::Wanted);
    assert_eq!(word.slot(), Some(Slot(2)), "kept: the page may stay the same");
    assert!(word.installed().waiters);
}

#[test]
fn a_pinned_page_stays_mapped() {
    let mut word = PageWord::from_bits(0);
    assert_eq!(word.pin(), OnPin::Absent);
    assert_eq!(word.fault(|_| true), OnFault::InstallZero);
    assert_eq!(word.pin(), OnPin::Absent);
    let _ = word.installed();
    (0..MAX_PINS).for_each(|_| assert_eq!(word.pin(), OnPin::Pinned));
    assert_eq!(word.pin(), OnPin::TooMany);
    assert_eq!(word.begin_unmap(), Taken::No);
    (0..MAX_PINS).for_each(|_| word.unpin());
    assert_eq!(word.begin_unmap(), Taken::Yes);
}

#[test]
fn of_all_threads_that_fault_one_becomes_the_owner() {
    for _ in 0..200 {
        let cell = Arc::new(AtomicU64::new(0));
        let threads: Vec<_> = (0..3)
            .map(|_| {
                let cell = Arc::clone(&cell);
                std::thread::spawn(move || edge(&*cell, |word| word.fault(|_| true)))
            })
            .collect();
        let verdicts: Vec<_> = threads.into_iter().map(|t| t.join().unwrap()).collect();
        assert_eq!(verdicts.iter().filter(|v| **v == OnFault::InstallZero).count(), 1);
        assert_eq!(verdicts.iter().filter(|v| **v == OnFault::Join).count(), 2);
    }
}

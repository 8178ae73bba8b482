//! The policy against a model that keeps nothing but each page's place.

use std::collections::{HashMap, HashSet};

use super::word::Place;
use super::*;
use proptest::prelude::*;

const PAGES: u32 = 24;

#[derive(Clone, Copy, Debug)]
enum Call {
    Entered(u32, Entry),
    Touched(u32),
    Age(usize),
    Aged(u32),
    NotAged(u32),
    Victims(usize),
    Evicted(u32),
    Kept(u32),
    Left(u32),
    Gone(u32),
    Capacity(u32),
}

fn calls() -> impl Strategy<Value = Vec<Call>> {
    // Some pages are beyond the last one.
    let page = || 0..PAGES + 2;
    let entry = prop_oneof![Just(Entry::Fresh), Just(Entry::Refault), Just(Entry::Prefetched)];
    let call = prop_oneof![
        6 => (page(), entry).prop_map(|(page, entry)| Call::Entered(page, entry)),
        3 => page().prop_map(Call::Touched),
        3 => (0..6_usize).prop_map(Call::Age),
        4 => page().prop_map(Call::Aged),
        1 => page().prop_map(Call::NotAged),
        3 => (0..6_usize).prop_map(Call::Victims),
        4 => page().prop_map(Call::Evicted),
        1 => page().prop_map(Call::Kept),
        1 => page().prop_map(Call::Left),
        1 => page().prop_map(Call::Gone),
        1 => (0..PAGES).prop_map(Call::Capacity),
    ];
    prop::collection::vec(call, 0..300)
}

/// The table at the module's head.
fn after(call: Call, place: Place) -> Place {
    use Place::{Ageing, Ghost, Idle, Leaving, Mapped, Out};
    match (call, place) {
        (Call::Entered(_, Entry::Prefetched), Out | Ghost) => Idle,
        (Call::Entered(_, Entry::Prefetched), same) => same,
        (Call::Entered(..) | Call::Touched(_), _) | (Call::NotAged(_), Ageing) => Mapped,
        (Call::Aged(_), Ageing) | (Call::Kept(_), Leaving) => Idle,
        (Call::Evicted(_) | Call::Gone(_), Leaving) => Ghost,
        (Call::Gone(_), Mapped | Ageing | Idle) => Out,
        (Call::Left(_), _) => Out,
        (_, same) => same,
    }
}

#[derive(Default)]
struct Model(HashMap<u32, Place>);

impl Model {
    fn place(&self, page: u32) -> Place {
        self.0.get(&page).copied().unwrap_or(Place::Out)
    }

    fn count(&self, places: &[Place]) -> u32 {
        self.0.values().filter(|place| places.contains(place)).count() as u32
    }

    fn report(&mut self, call: Call, page: u32) {
        if page < PAGES {
            self.0.insert(page, after(call, self.place(page)));
        }
    }

    /// Pages were handed out: each was `from`, none of them twice.
    fn handed_out(
        &mut self,
        pages: &[PageIndex],
        from: Place,
        to: Place,
    ) -> Result<(), TestCaseError> {
        let unique: HashSet<_> = pages.iter().collect();
        prop_assert_eq!(unique.len(), pages.len(), "a page was handed out twice at once");
        for page in pages {
            prop_assert_eq!(self.place(page.0), from);
            self.0.insert(page.0, to);
        }
        Ok(())
    }
}

fn apply(policy: &mut Policy, model: &mut Model, call: Call) -> Result<(), TestCaseError> {
    let mut pages = Vec::new();
    match call {
        Call::Entered(page, entry) => policy.entered(PageIndex(page), entry),
        Call::Touched(page) => policy.touched(PageIndex(page)),
        Call::Aged(page) => policy.aged(PageIndex(page)),
        Call::NotAged(page) => policy.not_aged(PageIndex(page)),
        Call::Evicted(page) => policy.evicted(PageIndex(page)),
        Call::Kept(page) => policy.kept(PageIndex(page)),
        Call::Left(page) => policy.left(PageIndex(page)),
        Call::Gone(page) => policy.gone(PageIndex(page)),
        Call::Capacity(pages) => policy.set_capacity(pages),
        Call::Age(max) => {
            policy.age(max, &mut pages);
            prop_assert!(pages.len() <= max);
            model.handed_out(&pages, Place::Mapped, Place::Ageing)?;
        }
        Call::Victims(max) => {
            let idle = model.count(&[Place::Idle]) as usize;
            policy.victims(max, &mut pages);
            prop_assert_eq!(pages.len(), max.min(idle), "idle pages are there to be evicted");
            model.handed_out(&pages, Place::Idle, Place::Leaving)?;
        }
    }
    match call {
        Call::Entered(page, _) | Call::Touched(page) | Call::Aged(page) | Call::NotAged(page) => {
            model.report(call, page);
        }
        Call::Evicted(page) | Call::Kept(page) | Call::Left(page) | Call::Gone(page) => {
            model.report(call, page);
        }
        Call::Age(_) | Call::Victims(_) | Call::Capacity(_) => {}
    }
    Ok(())
}

fn check(policy: &Policy, model: &Model) -> Result<(), TestCaseError> {
    for page in 0..PAGES + 2 {
        prop_assert_eq!(policy.lists.word(PageIndex(page)).place(), model.place(page));
    }
    let counts = policy.counts();
    prop_assert_eq!(counts.mapped, model.count(&[Place::Mapped, Place::Ageing]));
    prop_assert_eq!(counts.idle, model.count(&[Place::Idle, Place::Leaving]));
    prop_assert_eq!(counts.ghosts, model.count(&[Place::Ghost]));
    let listed = policy.lists.check();
    let expected: HashSet<_> = (0..PAGES)
        .filter(|page| matches!(model.place(*page), Place::Mapped | Place::Idle))
        .map(PageIndex)
        .collect();
    prop_assert_eq!(listed.len(), expected.len(), "a page is in two lists");
    prop_assert_eq!(listed.into_iter().collect::<HashSet<_>>(), expected);
    Ok(())
}

proptest! {
    #[test]
    fn every_page_is_in_one_place_after_any_calls(calls in calls(), capacity in 0..PAGES) {
        let mut policy = Policy::new(PAGES, capacity).unwrap();
        let mut model = Model::default();
        for call in calls {
            apply(&mut policy, &mut model, call)?;
            check(&policy, &model)?;
        }
    }
}

/// A policy with the pages `0..pages` in memory, mapped.
fn full(pages: u32) -> Policy {
    let mut policy = Policy::new(1000, pages).unwrap();
    (0..pages).for_each(|page| policy.entered(PageIndex(page), Entry::Fresh));
    policy
}

fn age(policy: &mut Policy, max: usize) -> Vec<PageIndex> {
    let mut pages = Vec::new();
    policy.age(max, &mut pages);
    pages.iter().for_each(|page| policy.aged(*page));
    pages
}

fn evict(policy: &mut Policy, max: usize) -> Vec<PageIndex> {
    let mut pages = Vec::new();
    policy.victims(max, &mut pages);
    pages.iter().for_each(|page| policy.evicted(*page));
    pages
}

#[test]
fn nothing_is_aged_while_memory_is_far_from_full() {
    let mut policy = full(100);
    policy.set_capacity(200);
    assert!(age(&mut policy, 100).is_empty());
    assert!(evict(&mut policy, 100).is_empty());
    policy.set_capacity(10);
    assert_eq!(age(&mut policy, 1000).len() as u32, 100 - Tuning::default().mapped(10));
}

#[test]
fn a_capacity_of_nothing_ages_everything() {
    let mut policy = full(100);
    policy.set_capacity(0);
    assert_eq!(age(&mut policy, 1000).len(), 100);
    assert_eq!(evict(&mut policy, 1000).len(), 100);
    assert_eq!(policy.counts(), Counts { ghosts: 100, evictions: 100, ..Counts::default() });
}

#[test]
fn a_touched_page_outlives_the_others() {
    let mut policy = full(100);
    let idle = age(&mut policy, 5);
    policy.touched(idle[2]);
    assert_eq!(evict(&mut policy, 4), [idle[0], idle[1], idle[3], idle[4]]);
    assert_eq!(policy.counts().idle_touches, 1);
}

#[test]
fn a_page_that_comes_back_soon_was_evicted_too_early() {
    let mut policy = full(100);
    let out = {
        age(&mut policy, 5);
        evict(&mut policy, 5)
    };
    policy.entered(out[0], Entry::Refault);
    policy.entered(out[1], Entry::Fresh);
    policy.left(out[2]);
    policy.entered(out[2], Entry::Refault);
    let counts = policy.counts();
    assert_eq!((counts.refaults, counts.recent_refaults, counts.ghosts), (2, 1, 2));
}

#[test]
fn the_first_access_to_a_prefetched_page_does_not_prove_it() {
    let mut policy = full(100);
    policy.entered(PageIndex(500), Entry::Prefetched);
    policy.touched(PageIndex(500));
    assert_eq!(policy.counts().small, 101);
    policy.entered(PageIndex(501), Entry::Prefetched);
    let mut pages = Vec::new();
    policy.victims(1, &mut pages);
    policy.kept(PageIndex(501));
    policy.touched(PageIndex(501));
    assert_eq!(pages, [PageIndex(501)]);
    assert_eq!(policy.counts().small, 102);
    // One that was evicted a moment ago has been proven by coming back.
    let out = age(&mut policy, 1)[0];
    assert_eq!(evict(&mut policy, 1), [out]);
    policy.entered(out, Entry::Prefetched);
    policy.touched(out);
    assert_eq!(policy.counts().small, 101);
    assert_eq!(policy.counts().refaults, 0);
}

#[test]
fn neighbours_are_pages_of_the_same_batch() {
    let mut policy = full(100);
    age(&mut policy, 10);
    assert_eq!(evict(&mut policy, 4).len(), 4);
    assert_eq!(evict(&mut policy, 4).len(), 4);
    let near = |policy: &Policy, page| {
        let mut pages = Vec::new();
        policy.prefetch_neighbours(PageIndex(page), &mut pages);
        pages.into_iter().map(|page| page.0).collect::<Vec<_>>()
    };
    assert_eq!(near(&policy, 1), [2, 0, 3]);
    assert_eq!(near(&policy, 7), [6, 5, 4]);
    assert_eq!(near(&policy, 8), [0; 0]);
    assert_eq!(near(&policy, u32::MAX), [0; 0]);
    policy.entered(PageIndex(1), Entry::Refault);
    policy.entered(PageIndex(2), Entry::Prefetched);
    assert_eq!(near(&policy, 0), [3]);
    assert_eq!(near(&policy, 1), [0; 0]);
}

#[test]
fn more_pages_than_a_word_can_number_are_refused() {
    assert!(Policy::new(u32::MAX, 1).is_err());
    assert!(Policy::new(word::MAX_PAGES, 1).is_ok());
}

#[test]
fn the_last_page_can_be_linked() {
    let mut policy = Policy::new(word::MAX_PAGES, 2).unwrap();
    let last = PageIndex(word::MAX_PAGES - 1);
    [last, PageIndex(0), last].into_iter().for_each(|page| policy.entered(page, Entry::Fresh));
    policy.set_capacity(0);
    assert_eq!(age(&mut policy, 3), [last, PageIndex(0)]);
    assert_eq!(evict(&mut policy, 3), [last, PageIndex(0)]);
}

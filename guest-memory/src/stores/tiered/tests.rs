use std::collections::HashMap;

use fastrand::Rng;
use proptest::prelude::*;

use super::*;
use crate::stores::Trouble;
use crate::stores::memory::Memory;
use crate::stores::testing::{self, Model, page, read, write};

/// A page that compresses to about 1200 bytes.
fn small_page(seed: u64) -> PageBytes {
    page(seed * 16 + 4)
}

fn tiered(slabs: usize, behind: Arc<dyn Store>) -> Tiered {
    Tiered::new((slabs * SLAB_BYTES) as u64, Some(behind)).unwrap()
}

fn memory() -> Arc<dyn Store> {
    Arc::new(Memory::new(None).unwrap())
}

#[test]
fn the_oldest_pages_move_on_and_keep_their_slots() {
    let store = tiered(4, memory());
    let slots: Vec<_> = (0..200).map(|n| write(&store, &small_page(n)).unwrap()).collect();
    let here: Vec<_> = slots.iter().map(|slot| store.at_hand(*slot)).collect();
    let moved = here.iter().filter(|here| !**here).count();
    assert!(moved > 100 && moved < 190, "{moved} moved");
    assert!(here[..moved].iter().all(|here| !here), "the oldest move first");
    let [front, behind] = &store.report()[..] else { panic!("two tiers") };
    assert_eq!((front.pages + behind.pages, behind.pages), (200, moved as u64));
    assert_eq!(front.demotions, moved as u64);
    assert_eq!(store.memory_bytes(), front.memory_bytes);
    assert!(front.memory_bytes <= 4 * SLAB_BYTES as u64 && front.stored_bytes > 0);
    for (n, slot) in (0..).zip(&slots) {
        assert_eq!(read(&store, *slot).unwrap(), small_page(n));
        let mut now = [0; PAGE_SIZE];
        let at_hand = store.read_now(&testing::no_wait(), *slot, &mut now).unwrap();
        assert_eq!(at_hand, here[n as usize]);
        assert!(!at_hand || now == small_page(n));
    }
    slots.into_iter().for_each(|slot| store.free(slot).unwrap());
    assert_eq!(store.memory_bytes(), 0);
    assert!(store.report().iter().all(|tier| tier.pages == 0));
}

#[test]
fn a_refusal_behind_is_the_writes_and_costs_no_page() {
    let (behind, switch) = testing::switchable(memory());
    let store = tiered(4, behind);
    switch.down();
    let mut slots = Vec::new();
    let error = loop {
        match write(&store, &small_page(slots.len() as u64)) {
            Ok(slot) => slots.push(slot),
            Err(error) => break error,
        }
    };
    assert_eq!(error.trouble(), Trouble::Transient, "{error}");
    assert!(slots.len() > 30, "{} fit", slots.len());
    assert_eq!(write(&store, &page(10)).unwrap_err().trouble(), Trouble::Transient);
    let all_there = |slots: &[Slot]| {
        for (n, slot) in (0..).zip(slots) {
            assert_eq!(read(&store, *slot).unwrap(), small_page(n));
        }
    };
    all_there(&slots);
    // A page that goes makes room for another.
    store.free(slots.pop().unwrap()).unwrap();
    let last = write(&store, &small_page(slots.len() as u64)).unwrap();
    slots.push(last);
    switch.up();
    for n in 0..100 {
        write(&store, &small_page(1000 + n)).unwrap();
    }
    all_there(&slots);
}

#[test]
fn full_behind_is_full() {
    let store = tiered(4, Arc::new(Memory::new(Some(5 << 12)).unwrap()));
    let errors: Vec<_> =
        (0..100).filter_map(|n| write(&store, &small_page(n)).err()).map(|e| e.trouble()).collect();
    assert!(errors.len() > 20 && errors.len() < 70);
    assert!(errors.iter().all(|trouble| *trouble == Trouble::Full));
    assert_eq!(store.report()[1].pages, 5);
}

#[test]
fn alone_it_refuses_what_does_not_fit() {
    let store = Tiered::new(SLAB_BYTES as u64, None).unwrap();
    assert_eq!(write(&store, &page(10)).unwrap_err().trouble(), Trouble::Unwanted);
    let slots: Vec<_> = (0..).map_while(|n| write(&store, &small_page(n)).ok()).collect();
    assert!(slots.len() >= 12, "{} fit in {SLAB_BYTES} bytes", slots.len());
    assert_eq!(write(&store, &small_page(0)).unwrap_err().trouble(), Trouble::Full);
    assert_eq!(read(&store, slots[3]).unwrap(), small_page(3));
    store.close();
    assert!(matches!(read(&store, slots[3]), Err(StoreError::Closed)));
    assert!(matches!(write(&store, &small_page(0)), Err(StoreError::Closed)));
}

/// Threads that write, read and free pages of their own while the oldest pages of all of them are
/// moving to a slow store that now and then refuses.
#[test]
fn pages_survive_moving_while_others_read_and_free() {
    let behind = testing::open("raw+delay=300us,write=1ms+fail=write:rate=0.05+memory").unwrap();
    let store = tiered(6, behind);
    let seed = Rng::new().u64(..);
    println!("seed {seed}");
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let store = &store;
            scope.spawn(move || churn(store, Rng::with_seed(seed ^ thread)));
        }
    });
    let tiers = store.report();
    assert_eq!((tiers[0].pages, store.memory_bytes()), (0, 0));
    assert_eq!(tiers.last().unwrap().pages, 0, "orphans are freed behind, too");
    assert!(tiers[0].demotions > 100);
}

fn churn(store: &Tiered, mut random: Rng) {
    let mut pages: HashMap<Slot, u64> = HashMap::new();
    for _ in 0..600 {
        let any = random.choice(pages.keys().copied().collect::<Vec<_>>());
        match (random.u8(0..10), any) {
            (0..4, _) | (_, None) => {
                let seed = random.u64(..);
                match write(store, &page(seed)) {
                    Ok(slot) => assert_eq!(pages.insert(slot, seed), None, "{slot} was taken"),
                    Err(error) => assert_eq!(error.trouble(), Trouble::Transient, "{error}"),
                }
            }
            (4..7, Some(slot)) => {
                let mut now = [0; PAGE_SIZE];
                let at_hand = store.read_now(&testing::no_wait(), slot, &mut now).unwrap();
                let bytes = if at_hand { now } else { read(store, slot).unwrap() };
                assert_eq!(bytes, page(pages[&slot]));
            }
            (_, Some(slot)) => {
                store.free(slot).unwrap();
                pages.remove(&slot);
            }
        }
    }
    for (slot, seed) in pages {
        assert_eq!(read(store, slot).unwrap(), page(seed));
        store.free(slot).unwrap();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn it_keeps_what_a_map_keeps(ops in testing::operations(60), slabs in 1..20_usize) {
        Model::new(None).run(&tiered(slabs, memory()), &ops)?;
    }

    /// Frees and the ends of moves in any order.
    #[test]
    fn pages_are_where_the_table_says(ops in prop::collection::vec((0..6_u8, any::<usize>()), 1..200)) {
        let mut table = Table::new(Slabs::new(1 << 20).unwrap());
        // By slot: the page's bytes, and where it is if it is behind.
        let mut model: HashMap<Slot, (Vec<u8>, Option<Slot>)> = HashMap::new();
        let mut moving: Vec<(Vec<Move>, Vec<Slot>)> = Vec::new();
        let (mut behind, mut order, mut fill) = (0, Vec::new(), 0_u8);
        for (op, which) in ops {
            let any = model.keys().copied().max_by_key(|slot| slot.0.wrapping_mul(which as u32 | 1));
            fill = fill.wrapping_add(1);
            match (op, any) {
                (0 | 1, _) => {
                    let bytes = vec![fill; 1 + which % 3000];
                    let slot = table.insert(&bytes).unwrap();
                    order.push(slot);
                    prop_assert!(model.insert(slot, (bytes, None)).is_none());
                }
                (2, _) => {
                    let moves = table.begin_move(1 + which % 4);
                    let slots: Vec<_> = order.drain(..moves.len()).collect();
                    for (moved, slot) in moves.iter().zip(&slots) {
                        prop_assert_eq!(&moved.packed, &model[slot].0, "not the oldest");
                    }
                    moving.push((moves, slots));
                }
                (3, _) if !moving.is_empty() => {
                    let (moves, slots) = moving.swap_remove(which % moving.len());
                    for (moved, slot) in moves.iter().zip(slots).rev() {
                        behind += 1;
                        let to = (which % 3 > 0).then_some(Slot(behind));
                        // A slot that was freed meanwhile may be somebody else's now.
                        let same = model.get(&slot).is_some_and(|(bytes, _)| *bytes == moved.packed);
                        match (table.end_move(moved, to), to) {
                            (Moved::Done, Some(to)) => {
                                prop_assert!(same);
                                model.get_mut(&slot).unwrap().1 = Some(to);
                            }
                            (Moved::Unwanted(unwanted), _) => prop_assert_eq!(Some(unwanted), to),
                            (Moved::Done, None) if same && !order.contains(&slot) => order.insert(0, slot),
                            (Moved::Done, None) => {}
                        }
                    }
                }
                (4.., Some(slot)) => {
                    let expected = match model.remove(&slot).unwrap().1 {
                        None => Freed::Here,
                        Some(place) => Freed::Behind(place),
                    };
                    order.retain(|queued| *queued != slot);
                    prop_assert_eq!(table.free(slot), expected);
                    prop_assert_eq!(table.free(slot), Freed::Nothing);
                }
                _ => {}
            }
            let mut packed = [0; MAX_OBJECT_BYTES];
            for (slot, (bytes, place)) in &model {
                match (table.find(*slot, &mut packed), place) {
                    (Found::Here(len), None) => prop_assert_eq!(&packed[..len], &bytes[..]),
                    (found, place) => prop_assert_eq!(Some(found), place.map(Found::Behind)),
                }
            }
            let here = model.values().filter(|(_, place)| place.is_none()).count();
            prop_assert_eq!(table.pages(), here as u64);
        }
    }
}

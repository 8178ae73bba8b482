//! The protocol, case by case, and in random order beside the naive model.

use proptest::prelude::*;

use super::model::{Apic, Bed, EN_ON, Event, KERNEL, Run, Shared, USER, VECTOR, script};
use super::*;

#[test]
fn a_page_is_announced_twice_and_in_order_behind_the_ack() {
    let bed = Bed::ready();
    let (a, b) = (bed.notify(10), bed.notify(11));
    assert_eq!(bed.apf.complete(b), Completed::Nothing);
    assert_eq!(bed.apf.complete(a), Completed::Nothing);
    assert_eq!(bed.apic.0.lock().unwrap().1.len(), 1, "the second waits for the ACK");
    assert_eq!(bed.take_ready(), Some(b.raw()));
    assert_eq!(bed.take_ready(), Some(a.raw()));
    assert_eq!(bed.take_ready(), None);
    assert_eq!(bed.apf.outstanding(), 0);
}

#[test]
fn a_page_that_came_before_the_decision_is_not_announced() {
    let bed = Bed::ready();
    let token = bed.new_token(1);
    assert_eq!(bed.apf.complete(token), Completed::Nothing);
    assert_eq!(bed.apf.decide(token, USER), Decision::Arrived);
    assert_eq!(bed.area.0.lock().unwrap().flags, 0);
    assert_eq!(bed.take_ready(), None);
    assert_eq!(bed.apf.stats().avoided, [1, 0]);
}

#[test]
fn refusals_have_their_reasons() {
    let cases = [
        (KERNEL, Refusal::KernelMode, Decision::Halt),
        (GuestState { interrupts: false, ..USER }, Refusal::Uninterruptible, Decision::Wait),
        (GuestState { shadow: true, ..USER }, Refusal::Uninterruptible, Decision::Wait),
        (GuestState { event: true, ..USER }, Refusal::Event, Decision::Wait),
        (GuestState { paging: false, ..USER }, Refusal::NoPaging, Decision::Halt),
    ];
    for (guest, refusal, decision) in cases {
        let bed = Bed::ready();
        let token = bed.new_token(1);
        assert_eq!(bed.apf.decide(token, guest), decision, "{guest:?}");
        let stats = bed.apf.stats();
        assert_eq!(stats.refused[guest.mode() as usize][refusal as usize], 1, "{guest:?}");
        let end = if decision == Decision::Halt { Completed::EndHalt } else { Completed::EndWait };
        assert_eq!(bed.apf.complete(token), end);
        assert_eq!(bed.take_ready(), None);
    }
}

#[test]
fn send_always_reaches_ring_0() {
    let bed = Bed::ready();
    bed.enable(EN_ON | 2);
    assert_eq!(bed.take_ready(), Some(WAKE_ALL));
    let token = bed.new_token(1);
    assert!(matches!(bed.apf.decide(token, KERNEL), Decision::Notify { .. }));
}

#[test]
fn flags_that_were_not_read_refuse_the_next_one() {
    let bed = Bed::ready();
    let (a, b) = (bed.new_token(1), bed.new_token(2));
    assert!(matches!(bed.apf.decide(a, USER), Decision::Notify { .. }));
    assert_eq!(bed.apf.decide(b, USER), Decision::Halt);
    assert_eq!(bed.apf.stats().refused[0][Refusal::FlagsBusy as usize], 1);
}

#[test]
fn off_until_both_msrs_are_written() {
    let bed = Bed::new();
    let token = bed.new_token(1);
    assert_eq!(bed.apf.decide(token, USER), Decision::Halt);
    bed.enable(EN_ON);
    let token = bed.new_token(2);
    assert_eq!(bed.apf.decide(token, USER), Decision::Halt);
    assert_eq!(bed.take_ready(), None, "no vector yet");
    bed.apf.set_int(VECTOR.into()).unwrap();
    assert_eq!(bed.take_ready(), Some(WAKE_ALL));
}

#[test]
fn an_apic_that_is_off_is_tried_again_at_the_next_exit() {
    let bed = Bed::new();
    bed.apic.0.lock().unwrap().0 = false;
    bed.apf.set_int(VECTOR.into()).unwrap();
    bed.enable(EN_ON);
    assert_eq!(bed.area.0.lock().unwrap().token, 0, "taken back");
    bed.apf.awake();
    bed.apic.0.lock().unwrap().0 = true;
    assert_eq!(bed.take_ready(), None);
    // The pauses grow, up to a bound.
    bed.apic.0.lock().unwrap().0 = false;
    (0..10_000).for_each(|_| bed.apf.awake());
    let refused = bed.apf.stats().interrupts_refused;
    assert!((100..200).contains(&refused), "{refused}");
    bed.apic.0.lock().unwrap().0 = true;
    (0..64).for_each(|_| bed.apf.awake());
    assert_eq!(bed.take_ready(), Some(WAKE_ALL));
    assert_eq!(bed.apf.stats().interrupts_refused, refused);
}

#[test]
fn a_repeated_fault_asks_nobody_and_is_woken_once() {
    let bed = Bed::ready();
    let token = bed.new_token(1);
    assert_eq!(bed.apf.decide(token, KERNEL), Decision::Halt);
    for _ in 0..3 {
        bed.apf.awake();
        let begun = bed.apf.begin(Page(1));
        assert_eq!(begun, Begun::Outstanding);
        assert_eq!(bed.apf.decide_again(begun, Page(1), KERNEL), Decision::Halt);
    }
    assert_eq!(bed.apf.complete(token), Completed::EndHalt);
    assert_eq!(bed.apf.complete(token), Completed::Nothing);
    assert!(matches!(bed.apf.begin(Page(1)), Begun::New(_)));
}

/// The vCPU is at one instruction, which no other page helps on.
#[test]
fn a_halt_ends_with_its_own_page_only() {
    let bed = Bed::ready();
    let (a, b, c) = (bed.new_token(1), bed.new_token(2), bed.new_token(3));
    for token in [a, b, c] {
        assert_eq!(bed.apf.decide(token, KERNEL), Decision::Halt);
        bed.apf.awake();
    }
    // An interrupt had the guest run another task, which meets the second page.
    let begun = bed.apf.begin(Page(2));
    assert_eq!(bed.apf.decide_again(begun, Page(2), KERNEL), Decision::Halt);
    assert_eq!(bed.apf.complete(a), Completed::Nothing);
    assert_eq!(bed.apf.complete(b), Completed::EndHalt);
    // It runs, and has not been seen asleep since.
    assert_eq!(bed.apf.complete(c), Completed::Nothing);
}

#[test]
fn a_task_that_meets_anothers_page_is_woken_with_it() {
    let bed = Bed::ready();
    let token = bed.notify(1);
    let begun = bed.apf.begin(Page(1));
    let off = GuestState { interrupts: false, ..USER };
    assert_eq!(bed.apf.decide_again(begun, Page(1), off), Decision::Wait);
    assert_eq!(bed.apf.complete(token), Completed::EndWait);
    assert_eq!(bed.take_ready(), Some(token.raw()));
    assert_eq!(bed.apf.decide_again(begun, Page(1), off), Decision::Arrived);
}

#[test]
fn turned_off_it_says_nothing_any_more() {
    let bed = Bed::ready();
    let (a, b) = (bed.notify(1), bed.notify(2));
    let _ = bed.apf.complete(a);
    bed.enable(0);
    bed.apic.0.lock().unwrap().1.clear();
    bed.area.0.lock().unwrap().token = 0;
    assert_eq!(bed.apf.complete(b), Completed::Nothing);
    bed.apf.write_ack(1);
    bed.apf.awake();
    assert_eq!(bed.take_ready(), None);
    assert_eq!(bed.area.0.lock().unwrap().token, 0);
    assert_eq!((bed.apf.outstanding(), bed.apf.stats().cancelled), (0, 1));
    bed.enable(EN_ON);
    assert_eq!(bed.take_ready(), Some(WAKE_ALL));
}

#[test]
fn after_a_restore_everything_is_woken_and_no_token_comes_again() {
    let bed = Bed::ready();
    let (a, b) = (bed.notify(1), bed.notify(2));
    let _ = bed.apf.complete(a);
    let saved = bed.apf.save();
    let json = serde_json::to_string(&saved).unwrap();
    let saved: Saved = serde_json::from_str(&json).unwrap();
    let (area, apic) = (Shared::default(), Apic::default());
    apic.0.lock().unwrap().0 = true;
    let machine = Machine::restore(3, &saved).unwrap();
    let apf = AsyncPf::new(machine, Some(area.clone()), apic.clone());
    let bed = Bed { apf, area, apic };
    assert_eq!(bed.apf.registers(), (EN_ON, VECTOR.into()));
    assert_eq!(bed.take_ready(), Some(WAKE_ALL));
    let _ = bed.apf.complete(b);
    assert_eq!(bed.take_ready(), None);
    assert!(![a, b].contains(&bed.notify(1)));
    assert!(Machine::restore(3, &Saved { en: 0x10, ..saved }).is_err());
}

#[test]
fn a_guest_that_never_acknowledges_costs_no_memory() {
    let bed = Bed::ready();
    let mut waits = 0;
    for page in 0..2 * MAX_OUTSTANDING as u64 {
        match bed.apf.begin(Page(page)) {
            Begun::New(token) => {
                let _ = bed.apf.decide(token, USER);
                bed.area.0.lock().unwrap().flags = 0;
                let _ = bed.apf.complete(token);
            }
            begun => {
                assert_eq!(bed.apf.decide_again(begun, Page(page), USER), Decision::Wait);
                waits += 1;
            }
        }
    }
    assert_eq!((bed.apf.outstanding(), waits), (MAX_OUTSTANDING, MAX_OUTSTANDING));
}

fn event() -> impl Strategy<Value = Event> {
    let guest = (0..4u8, any::<[bool; 4]>()).prop_map(|(cpl, [a, b, c, d])| GuestState {
        cpl,
        interrupts: a,
        shadow: b && c,
        event: b && d,
        paging: a || b || c,
    });
    prop_oneof![
        1 => prop_oneof![Just(0), Just(EN_ON), Just(EN_ON | 2), Just(0x2009), Just(0x100d), any::<u64>()]
            .prop_map(Event::WriteEn),
        1 => prop_oneof![Just(u64::from(VECTOR)), Just(0x1ff)].prop_map(Event::WriteInt),
        8 => (0..6u64, prop_oneof![3 => Just(USER), 1 => Just(KERNEL), 2 => guest], any::<bool>())
            .prop_map(|(page, guest, wait)| Event::Fault(page, guest, wait)),
        6 => (0..8usize).prop_map(Event::Complete),
        5 => Just(Event::ReadFlags),
        5 => Just(Event::TakeReady),
        1 => (0..4u64).prop_map(Event::Ack),
        1 => any::<bool>().prop_map(Event::Apic),
        2 => Just(Event::Exit),
        1 => Just(Event::Init),
        1 => Just(Event::SaveAndRestore),
    ]
}

proptest! {
    #[test]
    fn any_order_keeps_the_promises(events in prop::collection::vec(event(), 1..200)) {
        let mut run = Run::new();
        for event in events {
            run.event(event);
        }
    }

    #[test]
    fn any_script_keeps_the_promises(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        script(&bytes);
    }
}

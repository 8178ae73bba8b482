//! The protocol beside a naive model of what the guest and the pager know, in random order.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use proptest::prelude::*;

use super::*;

/// The area, as the guest shares it.
#[derive(Debug, Default)]
struct Words {
    flags: u32,
    token: u32,
}

#[derive(Clone, Debug, Default)]
struct Shared(Arc<Mutex<Words>>);

impl Area for Shared {
    fn flags(&self) -> u32 {
        self.0.lock().unwrap().flags
    }
    fn set_flags(&mut self, flags: u32) {
        self.0.lock().unwrap().flags = flags;
    }
    fn token(&self) -> u32 {
        self.0.lock().unwrap().token
    }
    fn set_token(&mut self, token: u32) {
        self.0.lock().unwrap().token = token;
    }
}

/// The APIC: on or off, what it took and the guest has not, and how many it took in all.
#[derive(Clone, Debug, Default)]
struct Apic(Arc<Mutex<(bool, Vec<u8>, usize)>>);

impl Interrupt for Apic {
    fn raise(&mut self, vector: u8) -> Taken {
        let mut apic = self.0.lock().unwrap();
        if !apic.0 {
            return Taken::No;
        }
        apic.1.push(vector);
        apic.2 += 1;
        Taken::Yes
    }
}

const USER: GuestState =
    GuestState { cpl: 3, interrupts: true, shadow: false, event: false, paging: true };
const KERNEL: GuestState = GuestState { cpl: 0, ..USER };
const EN_ON: u64 = 0x1009;
const VECTOR: u8 = 0xf3;

struct Bed {
    apf: AsyncPf<Shared, Apic>,
    area: Shared,
    apic: Apic,
}

impl Bed {
    fn new() -> Self {
        let (area, apic) = (Shared::default(), Apic::default());
        apic.0.lock().unwrap().0 = true;
        let apf = AsyncPf::new(Machine::new(3), None, apic.clone());
        Self { apf, area, apic }
    }

    fn enable(&self, en: u64) {
        let en = En::new(en).unwrap();
        let area = en.area().map(|_| self.area.clone());
        self.apf.set_en(en, area);
    }

    /// Turned on, and the first wake-all taken.
    fn ready() -> Self {
        let bed = Self::new();
        bed.apf.set_int(VECTOR.into()).unwrap();
        bed.enable(EN_ON);
        assert_eq!(bed.take_ready(), Some(WAKE_ALL));
        bed
    }

    fn new_token(&self, page: u64) -> Token {
        match self.apf.begin(Page(page)) {
            Begun::New(token) => token,
            other => panic!("{other:?}"),
        }
    }

    fn notify(&self, page: u64) -> Token {
        let token = self.new_token(page);
        let cr2 = u64::from(token.raw());
        assert_eq!(self.apf.decide(token, USER), Decision::Notify { cr2 });
        assert_eq!(std::mem::take(&mut self.area.0.lock().unwrap().flags), 1);
        token
    }

    /// As Linux does: reads the token, clears the word, acknowledges.
    fn take_ready(&self) -> Option<u32> {
        let took = self.apic.0.lock().unwrap().1.pop()?;
        assert_eq!(took, VECTOR);
        let token = std::mem::take(&mut self.area.0.lock().unwrap().token);
        assert_ne!(token, 0, "an interrupt without a token");
        self.apf.write_ack(1);
        Some(token)
    }
}

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

/// What may happen, in any order.
#[derive(Clone, Debug)]
enum Event {
    WriteEn(u64),
    WriteInt(u64),
    /// Touches a page, in this state; waits first or not.
    Fault(u64, GuestState, bool),
    /// The n-th outstanding page comes.
    Complete(usize),
    ReadFlags,
    TakeReady,
    /// Without reading the token.
    Ack(u64),
    Apic(bool),
    Exit,
    Init,
    SaveAndRestore,
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

/// What guest and pager know, kept as plainly as possible.
#[derive(Default)]
struct Model {
    /// Asked for and not come: token, page, whether the guest was told.
    outstanding: Vec<(Token, u64, bool)>,
    /// Told of, come, and not yet sent.
    due: VecDeque<u32>,
    /// Sent and not acknowledged.
    unacknowledged: Option<u32>,
    on: bool,
    int: bool,
    /// Every page-not-present there was, and what became of it.
    told: u64,
    sent: u64,
    cancelled: u64,
}

impl Model {
    fn forget(&mut self) {
        self.unacknowledged = None;
        let wake_alls = self.due.iter().filter(|token| **token == WAKE_ALL).count() as u64;
        self.cancelled += self.due.len() as u64 - wake_alls;
        self.due.clear();
        for entry in &mut self.outstanding {
            self.cancelled += u64::from(std::mem::take(&mut entry.2));
        }
    }
}

struct Run {
    bed: Bed,
    model: Model,
}

impl Run {
    fn event(&mut self, event: Event) {
        let before = self.bed.apic.0.lock().unwrap().2;
        match event {
            Event::WriteEn(value) => {
                let expected = value & 0x34 == 0;
                let en = En::new(value);
                assert_eq!(en.is_ok(), expected, "{value:#x}");
                let Ok(en) = en else { return };
                self.bed.enable(en.raw());
                self.model.forget();
                self.model.on = value & 9 == 9;
                if self.model.on {
                    self.model.due.push_front(WAKE_ALL);
                }
            }
            Event::WriteInt(value) => {
                let written = self.bed.apf.set_int(value).is_ok();
                assert_eq!(written, value < 256);
                self.model.int |= written;
            }
            Event::Fault(page, guest, wait) => self.fault(page, guest, wait),
            Event::Complete(n) => {
                if self.model.outstanding.is_empty() {
                    return;
                }
                let n = n % self.model.outstanding.len();
                let (token, _, told) = self.model.outstanding.remove(n);
                let _ = self.bed.apf.complete(token);
                // Late, and once more.
                assert_eq!(self.bed.apf.complete(token), Completed::Nothing);
                if told {
                    self.model.due.push_back(token.raw());
                }
            }
            Event::ReadFlags => self.bed.area.0.lock().unwrap().flags = 0,
            Event::TakeReady => {
                let took = self.bed.apic.0.lock().unwrap().1.pop();
                if took.is_some() {
                    self.bed.area.0.lock().unwrap().token = 0;
                    self.ack(1);
                }
            }
            Event::Ack(value) => self.ack(value),
            Event::Apic(on) => self.bed.apic.0.lock().unwrap().0 = on,
            Event::Exit => self.bed.apf.awake(),
            Event::Init => {
                self.bed.apf.reset();
                self.model.forget();
                (self.model.on, self.model.int) = (false, false);
            }
            Event::SaveAndRestore => {
                let machine = Machine::restore(3, &self.bed.apf.save()).unwrap();
                let area = self.model.on.then(|| self.bed.area.clone());
                self.model.forget();
                // The pager of before is gone, and its completions with it.
                self.model.outstanding.clear();
                // Counters begin anew.
                (self.model.told, self.model.sent, self.model.cancelled) = (0, 0, 0);
                if self.model.on {
                    self.model.due.push_front(WAKE_ALL);
                }
                self.bed.apf = AsyncPf::new(machine, area, self.bed.apic.clone());
            }
        }
        self.sends(before);
        self.check();
    }

    fn ack(&mut self, value: u64) {
        if value & 1 != 0 {
            self.model.unacknowledged = None;
        }
        self.bed.apf.write_ack(value);
    }

    fn fault(&mut self, page: u64, guest: GuestState, wait: bool) {
        let flags_before = self.bed.area.0.lock().unwrap().flags;
        let known = self.model.outstanding.iter().any(|(_, other, _)| *other == page);
        let begun = self.bed.apf.begin(Page(page));
        let Begun::New(token) = begun else {
            assert!(known || self.bed.apf.outstanding() == MAX_OUTSTANDING);
            let decision = self.bed.apf.decide_again(begun, Page(page), guest);
            assert!(matches!(decision, Decision::Halt | Decision::Wait));
            return;
        };
        assert!(!known);
        if wait {
            assert_eq!(self.bed.apf.wait_first(token), Decision::Wait);
            self.bed.apf.awake();
        }
        let may = self.model.on
            && self.model.int
            && guest.paging
            && guest.interruptible()
            && flags_before == 0
            && (guest.cpl > 0 || self.bed.apf.registers().0 & 2 != 0);
        let decision = self.bed.apf.decide(token, guest);
        assert_eq!(matches!(decision, Decision::Notify { .. }), may, "{guest:?}: {decision:?}");
        if !may {
            assert_eq!(decision == Decision::Halt, guest.interruptible());
            assert_eq!(self.bed.area.0.lock().unwrap().flags, flags_before);
        }
        self.model.told += u64::from(may);
        self.model.outstanding.push((token, page, may));
    }

    /// What was sent by the last event is what was due, and no more than one.
    fn sends(&mut self, before: usize) {
        let now = self.bed.apic.0.lock().unwrap().2;
        if now == before {
            return;
        }
        assert_eq!(now, before + 1);
        assert!(self.model.on && self.model.int, "a page-ready from a protocol that is off");
        assert_eq!(self.model.unacknowledged, None, "two without an ACK between");
        let due = self.model.due.pop_front().expect("nothing was due");
        assert_eq!(self.bed.area.0.lock().unwrap().token, due);
        self.model.unacknowledged = Some(due);
        self.model.sent += u64::from(due != WAKE_ALL);
    }

    fn check(&self) {
        let stats = self.bed.apf.stats();
        assert_eq!(stats.notified.iter().sum::<u64>(), self.model.told);
        assert_eq!(stats.ready_sent - stats.wake_alls, self.model.sent);
        assert_eq!(stats.cancelled, self.model.cancelled);
        // Each has one end, or is under way.
        let under_way = self.model.outstanding.iter().filter(|entry| entry.2).count();
        let due = self.model.due.iter().filter(|token| **token != WAKE_ALL).count();
        let told = self.model.sent + self.model.cancelled + (under_way + due) as u64;
        assert_eq!(told, self.model.told);
    }
}

proptest! {
    #[test]
    fn any_order_keeps_the_promises(events in prop::collection::vec(event(), 1..200)) {
        let mut run = Run { bed: Bed::new(), model: Model::default() };
        for event in events {
            run.event(event);
        }
    }
}

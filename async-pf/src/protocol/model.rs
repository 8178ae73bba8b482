//! A naive model of what the guest and the pager know, beside the protocol: for the tests, and for fuzzing.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use super::*;

/// The area, as the guest shares it.
#[derive(Debug, Default)]
pub(super) struct Words {
    pub(super) flags: u32,
    pub(super) token: u32,
}

#[derive(Clone, Debug, Default)]
pub(super) struct Shared(pub(super) Arc<Mutex<Words>>);

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
pub(super) struct Apic(pub(super) Arc<Mutex<(bool, Vec<u8>, usize)>>);

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

pub(super) const USER: GuestState =
    GuestState { cpl: 3, interrupts: true, shadow: false, event: false, paging: true };
pub(super) const KERNEL: GuestState = GuestState { cpl: 0, ..USER };
pub(super) const EN_ON: u64 = 0x1009;
pub(super) const VECTOR: u8 = 0xf3;

/// The protocol with a guest.
pub(super) struct Bed {
    pub(super) apf: AsyncPf<Shared, Apic>,
    pub(super) area: Shared,
    pub(super) apic: Apic,
}

impl Bed {
    pub(super) fn new() -> Self {
        let (area, apic) = (Shared::default(), Apic::default());
        apic.0.lock().unwrap().0 = true;
        let apf = AsyncPf::new(Machine::new(3), None, apic.clone());
        Self { apf, area, apic }
    }

    pub(super) fn enable(&self, en: u64) {
        let en = En::new(en).unwrap();
        let area = en.area().map(|_| self.area.clone());
        self.apf.set_en(en, area);
    }

    /// Turned on, and the first wake-all taken.
    pub(super) fn ready() -> Self {
        let bed = Self::new();
        bed.apf.set_int(VECTOR.into()).unwrap();
        bed.enable(EN_ON);
        assert_eq!(bed.take_ready(), Some(WAKE_ALL));
        bed
    }

    pub(super) fn new_token(&self, page: u64) -> Token {
        match self.apf.begin(Page(page)) {
            Begun::New(token) => token,
            other => panic!("{other:?}"),
        }
    }

    pub(super) fn notify(&self, page: u64) -> Token {
        let token = self.new_token(page);
        let cr2 = u64::from(token.raw());
        assert_eq!(self.apf.decide(token, USER), Decision::Notify { cr2 });
        assert_eq!(std::mem::take(&mut self.area.0.lock().unwrap().flags), 1);
        token
    }

    /// As Linux does: reads the token, clears the word, acknowledges.
    pub(super) fn take_ready(&self) -> Option<u32> {
        let took = self.apic.0.lock().unwrap().1.pop()?;
        assert_eq!(took, VECTOR);
        let token = std::mem::take(&mut self.area.0.lock().unwrap().token);
        assert_ne!(token, 0, "an interrupt without a token");
        self.apf.write_ack(1);
        Some(token)
    }
}

/// What may happen, in any order.
#[derive(Clone, Debug)]
pub(super) enum Event {
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

impl Event {
    /// Three bytes of a script.
    fn decode([kind, a, b]: [u8; 3]) -> Self {
        let bit = |bit: u8| b >> bit & 1 != 0;
        let guest = GuestState {
            cpl: b & 3,
            interrupts: !bit(2),
            shadow: bit(3) && bit(4),
            event: bit(5) && bit(6),
            paging: !(bit(3) && bit(6)),
        };
        match kind % 16 {
            0 => Self::WriteEn(u64::from_le_bytes([a, b, b & 1, 0, 0, 0, 0, 0])),
            1 => Self::WriteEn([EN_ON, EN_ON | 2, 0, 0x2009][usize::from(a % 4)]),
            2 => Self::WriteInt(u64::from(a) << (b % 2)),
            3..=6 => Self::Fault((a % 8).into(), guest, bit(7)),
            7 | 8 => Self::Complete(a.into()),
            9 => Self::ReadFlags,
            10 | 11 => Self::TakeReady,
            12 => Self::Ack(a.into()),
            13 => Self::Apic(a % 4 != 0),
            14 if a < 32 => Self::Init,
            15 if a < 32 => Self::SaveAndRestore,
            _ => Self::Exit,
        }
    }
}

/// Plays a script of events, three bytes each.
#[cfg_attr(not(fuzzing), allow(unreachable_pub, reason = "public for the targets of fuzz/ only"))]
pub fn script(bytes: &[u8]) {
    let mut run = Run::new();
    let (events, _) = bytes.as_chunks();
    events.iter().for_each(|bytes| run.event(Event::decode(*bytes)));
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
    /// What the vCPU does outside of the guest, and the page that its instruction needs.
    asleep: Option<(u64, Completed)>,
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

/// The protocol and its model.
pub(super) struct Run {
    bed: Bed,
    model: Model,
}

impl Run {
    pub(super) fn new() -> Self {
        Self { bed: Bed::new(), model: Model::default() }
    }

    /// Has it happen to both.
    pub(super) fn event(&mut self, event: Event) {
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
                let (token, page, told) = self.model.outstanding.remove(n);
                let asleep = self.model.asleep.take_if(|(awaited, _)| *awaited == page);
                let expected = asleep.map_or(Completed::Nothing, |(_, end)| end);
                assert_eq!(self.bed.apf.complete(token), expected);
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
            Event::Exit => self.awake(),
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
                self.model.asleep = None;
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

    /// The vCPU's thread is back from the guest.
    fn awake(&mut self) {
        self.bed.apf.awake();
        self.model.asleep = None;
    }

    fn asleep(&mut self, page: u64, decision: Decision) {
        self.model.asleep = match decision {
            Decision::Halt => Some((page, Completed::EndHalt)),
            Decision::Wait => Some((page, Completed::EndWait)),
            other => panic!("{other:?}"),
        };
    }

    fn fault(&mut self, page: u64, guest: GuestState, wait: bool) {
        let flags_before = self.bed.area.0.lock().unwrap().flags;
        let known = self.model.outstanding.iter().any(|(_, other, _)| *other == page);
        let begun = self.bed.apf.begin(Page(page));
        let Begun::New(token) = begun else {
            assert!(known || self.bed.apf.outstanding() == MAX_OUTSTANDING);
            let decision = self.bed.apf.decide_again(begun, Page(page), guest);
            match begun {
                // Without a name it is waited for elsewhere.
                Begun::TooMany => assert_eq!(decision, Decision::Wait),
                _ => self.asleep(page, decision),
            }
            return;
        };
        assert!(!known);
        if wait {
            assert_eq!(self.bed.apf.wait_first(token), Decision::Wait);
            self.awake();
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
            self.asleep(page, decision);
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

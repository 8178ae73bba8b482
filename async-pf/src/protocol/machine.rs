//! The protocol of one vCPU: events in, verdicts out. No clock, no descriptor, no lock, no guest memory.
//!
//! ```text
//!                         begin
//!                           |
//!                        Pending --- cancel (it was at hand), complete (it came) ---> gone
//!                           | decide
//!            +--------------+----------------+
//!            v                               v
//!         Notified                  Silent (the vCPU halts, or its thread waits)
//!            | complete                      | complete: the vCPU is woken
//!            v                               v
//!          Ready --- queued ----+          gone
//!            | next_ready, sent |
//!            v                  | EN is written, INIT, restore: the guest is told to wake all of
//!          Sent                 | them, or is no longer there: cancelled
//!            | acknowledge      |
//!            v                  v
//!          gone               gone (outstanding ones become Silent)
//! ```
//!
//! A notified page ends in exactly one page-ready or one cancel. At most one page-ready is unacknowledged.

use std::collections::VecDeque;

use super::counters::ProtocolStats;
use super::msr::{self, AREA_BYTES, En, GeneralProtection};
use super::token::{MAX_OUTSTANDING, Slab, Token, WAKE_ALL};
use super::verdict::{Begun, Completed, Decision, GuestState, Ready, Refusal};

/// An outstanding page, as its vCPU names it; what it is is nobody's business here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Page(pub u64);

/// What the protocol owes for a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// It was asked for; nothing is decided.
    Pending,
    /// page-not-present was sent.
    Notified,
    /// Nothing was sent, and nothing will be.
    Silent,
    /// It has come, and page-ready waits its turn or to be acknowledged.
    Ready,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    page: Page,
    state: State,
}

/// How a vCPU sleeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asleep {
    Halted,
    Waiting,
}

/// A page-ready that was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sent {
    WakeAll,
    Page(Token),
}

/// What is kept across a save and a restore. Outstanding pages are not: their tasks are woken.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Saved {
    /// EN.
    pub en: u64,
    /// INT, if it was written.
    pub int: Option<u8>,
    /// The generation of the last token of each place, so that no token is made twice.
    pub generations: Vec<u16>,
}

/// The protocol of one vCPU.
#[derive(Clone, Debug)]
pub struct Machine {
    en: En,
    int: Option<u8>,
    entries: Slab<Entry>,
    /// Tokens whose pages have come. All are in state Ready.
    queue: VecDeque<Token>,
    wake_all: bool,
    sent: Option<Sent>,
    /// What the vCPU was told to do and for which page, if it has not been seen since. It is at one
    /// instruction, which needs this page next: no other one is worth an exit.
    asleep: Option<(Asleep, Page)>,
    stats: ProtocolStats,
}

impl Machine {
    /// Of a vCPU after reset.
    ///
    /// # Panics
    /// When `vcpu` is larger than [`super::MAX_VCPU`].
    #[must_use]
    pub fn new(vcpu: u8) -> Self {
        Self::with(Slab::new(vcpu))
    }

    fn with(entries: Slab<Entry>) -> Self {
        Self {
            en: En::default(),
            int: None,
            entries,
            queue: VecDeque::new(),
            wake_all: false,
            sent: None,
            asleep: None,
            stats: ProtocolStats::default(),
        }
    }

    /// What the guest reads from EN.
    #[must_use]
    pub fn en(&self) -> En {
        self.en
    }

    /// What the guest reads from INT.
    #[must_use]
    pub fn int(&self) -> u64 {
        self.int.unwrap_or(0).into()
    }

    /// The guest writes EN, and the area that the value names is there. Whatever is outstanding is
    /// forgotten: turned on, the guest is told to wake everything; turned off, nothing is sent.
    pub fn set_en(&mut self, en: En) {
        self.forget();
        self.en = en;
        self.wake_all = en.area().is_some();
    }

    /// The guest writes INT.
    ///
    /// # Errors
    /// [`GeneralProtection`] when the value has more than a vector.
    pub fn set_int(&mut self, value: u64) -> Result<(), GeneralProtection> {
        self.int = Some(msr::vector(value)?);
        Ok(())
    }

    /// The guest writes ACK: another page-ready may follow. Returns the page whose task it has woken, and
    /// which will be touched next.
    pub fn write_ack(&mut self, value: u64) -> Option<Page> {
        if !msr::acknowledges(value) {
            return None;
        }
        let sent = self.sent.take()?;
        self.stats.ready_acknowledged += 1;
        match sent {
            Sent::Page(token) => self.entries.remove(token).map(|entry| entry.page),
            Sent::WakeAll => None,
        }
    }

    /// The vCPU got INIT: the protocol is off.
    pub fn reset(&mut self) {
        self.forget();
        self.stats.resets += 1;
        self.en = En::default();
        self.int = None;
        self.wake_all = false;
    }

    /// Ends every page-ready that is owed.
    fn forget(&mut self) {
        let sent = self.sent.take();
        let unsent = self.queue.len();
        for token in self.queue.drain(..) {
            self.entries.remove(token);
        }
        if let Some(Sent::Page(token)) = sent {
            self.entries.remove(token);
        }
        let mut cancelled = unsent;
        for entry in self.entries.iter_mut() {
            if entry.state == State::Notified {
                entry.state = State::Silent;
                cancelled += 1;
            }
        }
        self.stats.cancelled += cancelled as u64;
    }

    /// The vCPU meets a page that is not there.
    pub fn begin(&mut self, page: Page) -> Begun {
        if self.outstanding(page).is_some() {
            return Begun::Outstanding;
        }
        let entry = Entry { page, state: State::Pending };
        match self.entries.insert(entry) {
            Some(token) => {
                self.stats.outstanding_max = self.stats.outstanding_max.max(self.entries.len());
                Begun::New(token)
            }
            None => Begun::TooMany,
        }
    }

    fn outstanding(&self, page: Page) -> Option<&Entry> {
        self.entries.iter().find(|entry| entry.page == page && entry.state != State::Ready)
    }

    /// The page was at hand after all: nobody will complete this token.
    pub fn cancel(&mut self, token: Token) {
        let entry = self.entries.remove(token);
        debug_assert!(entry.is_none_or(|entry| entry.state != State::Notified));
    }

    /// The page is on its way: what to do? `flags_busy`: the flags word of the area is not 0. Ask for a
    /// token that was not decided, or was decided to be waited for.
    pub fn decide(&mut self, token: Token, guest: GuestState, flags_busy: bool) -> Decision {
        let refusal = self.refusal(guest, flags_busy);
        let mode = guest.mode();
        let Some(entry) = self.entries.get_mut(token) else {
            self.stats.decided(|stats| &mut stats.avoided, mode);
            return Decision::Arrived;
        };
        debug_assert!(matches!(entry.state, State::Pending | State::Silent));
        let Some(refusal) = refusal else {
            entry.state = State::Notified;
            self.stats.decided(|stats| &mut stats.notified, mode);
            return Decision::Notify { cr2: token.raw().into() };
        };
        entry.state = State::Silent;
        let page = entry.page;
        self.sleep(page, guest, refusal)
    }

    /// As [`Machine::decide`] for a page that [`Begun`] had no new token for. It may have come since.
    pub fn decide_again(&mut self, begun: Begun, page: Page, guest: GuestState) -> Decision {
        match begun {
            Begun::TooMany => {
                // Nobody knows its name when it comes.
                self.count_refusal(guest, Refusal::TooMany);
                self.stats.decided(|stats| &mut stats.waited, guest.mode());
                Decision::Wait
            }
            _ if self.outstanding(page).is_none() => Decision::Arrived,
            _ => self.sleep(page, guest, Refusal::Repeated),
        }
    }

    /// Its thread is going to wait for a page that is expected soon, before anything is decided.
    /// [`Decision::Arrived`] when it has come already, else [`Decision::Wait`].
    pub fn wait_first(&mut self, token: Token) -> Decision {
        let Some(entry) = self.entries.get_mut(token) else { return Decision::Arrived };
        entry.state = State::Silent;
        self.asleep = Some((Asleep::Waiting, entry.page));
        Decision::Wait
    }

    fn sleep(&mut self, page: Page, guest: GuestState, refusal: Refusal) -> Decision {
        self.count_refusal(guest, refusal);
        if guest.interruptible() {
            self.asleep = Some((Asleep::Halted, page));
            self.stats.decided(|stats| &mut stats.halted, guest.mode());
            Decision::Halt
        } else {
            self.asleep = Some((Asleep::Waiting, page));
            self.stats.decided(|stats| &mut stats.waited, guest.mode());
            Decision::Wait
        }
    }

    fn count_refusal(&mut self, guest: GuestState, refusal: Refusal) {
        self.stats.refused[guest.mode() as usize][refusal as usize] += 1;
    }

    /// Why page-not-present may not be sent now.
    fn refusal(&self, guest: GuestState, flags_busy: bool) -> Option<Refusal> {
        if self.en.area().is_none() || self.int.is_none() {
            Some(Refusal::Off)
        } else if !guest.paging {
            Some(Refusal::NoPaging)
        } else if guest.cpl == 0 && !self.en.send_always() {
            Some(Refusal::KernelMode)
        } else if guest.event {
            Some(Refusal::Event)
        } else if !guest.interrupts || guest.shadow {
            Some(Refusal::Uninterruptible)
        } else if flags_busy {
            Some(Refusal::FlagsBusy)
        } else {
            None
        }
    }

    /// The vCPU left the guest, or its thread's wait: whatever it slept for, it looks again.
    pub fn awake(&mut self) {
        self.asleep = None;
    }

    /// A page has come, or is lost: whoever waits looks again. No effect when nobody does any more.
    pub fn complete(&mut self, token: Token) -> Completed {
        let Some(entry) = self.entries.get_mut(token) else { return Completed::Nothing };
        let page = entry.page;
        match entry.state {
            State::Notified => {
                entry.state = State::Ready;
                self.queue.push_back(token);
                debug_assert!(self.queue.len() <= MAX_OUTSTANDING);
            }
            State::Pending | State::Silent => {
                self.entries.remove(token);
            }
            State::Ready => return Completed::Nothing,
        }
        match self.asleep.take_if(|(_, awaited)| *awaited == page) {
            None => Completed::Nothing,
            Some((Asleep::Halted, _)) => Completed::EndHalt,
            Some((Asleep::Waiting, _)) => Completed::EndWait,
        }
    }

    /// The page-ready that may be sent now, if the token word is 0.
    #[must_use]
    pub fn next_ready(&self) -> Option<Ready> {
        let vector = self.int?;
        if self.sent.is_some() || self.en.area().is_none() {
            return None;
        }
        let page = self.queue.front().map(|token| token.raw());
        let token = if self.wake_all { WAKE_ALL } else { page? };
        Some(Ready { token, vector })
    }

    /// The [`Machine::next_ready`] was sent.
    pub fn ready_sent(&mut self) {
        self.stats.ready_sent += 1;
        if std::mem::take(&mut self.wake_all) {
            self.stats.wake_alls += 1;
            self.sent = Some(Sent::WakeAll);
        } else {
            self.sent = self.queue.pop_front().map(Sent::Page);
        }
    }

    /// No local APIC took the interrupt of [`Machine::next_ready`]: it stays due.
    pub fn ready_refused(&mut self) {
        self.stats.interrupts_refused += 1;
    }

    /// What was counted so far.
    #[must_use]
    pub fn stats(&self) -> &ProtocolStats {
        &self.stats
    }

    /// How many pages are outstanding or unacknowledged.
    #[must_use]
    pub fn outstanding_len(&self) -> usize {
        self.entries.len()
    }

    /// Plain data to go on from.
    #[must_use]
    pub fn save(&self) -> Saved {
        Saved { en: self.en.raw(), int: self.int, generations: self.entries.generations() }
    }

    /// Goes on from saved data: nothing is outstanding, and the guest is told to wake everything.
    ///
    /// # Errors
    /// [`GeneralProtection`] for an EN that no guest can have written.
    pub fn restore(vcpu: u8, saved: &Saved) -> Result<Self, GeneralProtection> {
        let en = En::new(saved.en)?;
        let mut machine = Self::with(Slab::after(vcpu, &saved.generations));
        machine.int = saved.int;
        machine.set_en(en);
        Ok(machine)
    }
}

const _: () = assert!(AREA_BYTES.is_power_of_two());

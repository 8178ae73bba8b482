//! The protocol between its two sides: a vCPU's thread, and the threads that complete its pages.
//!
//! One lock holds the [`Machine`], the guest's area and the interrupt. Decisions and completions take it,
//! so that a page that came before a decision is never announced, and one that came after always is; the
//! area's words change under it only. It is held for a moment, never over anything that waits.

use std::sync::atomic::{AtomicBool, Ordering};

use super::counters::ProtocolStats;
use super::machine::{Machine, Page, Saved};
use super::msr::{En, GeneralProtection};
use super::token::Token;
use super::verdict::{Begun, Completed, Decision, GuestState};
use crate::loom::{Mutex, MutexGuard, lock};

/// The 64 bytes of guest memory that EN names. Both words are accessed atomically.
pub trait Area: Send {
    /// Bytes 0 to 3: 1 while a page-not-present has not been read.
    fn flags(&self) -> u32;
    /// Writes bytes 0 to 3.
    fn set_flags(&mut self, flags: u32);
    /// Bytes 4 to 7: the token of a page-ready that has not been read.
    fn token(&self) -> u32;
    /// Writes bytes 4 to 7.
    fn set_token(&mut self, token: u32);
}

/// Whether a local APIC took an interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Taken {
    /// It did.
    Yes,
    /// There was none that is enabled.
    No,
}

/// Raises an interrupt on the vCPU, from any thread, without waiting.
pub trait Interrupt: Send {
    /// With this vector.
    fn raise(&mut self, vector: u8) -> Taken;
}

const PAGE_NOT_PRESENT: u32 = 1;

#[derive(Debug)]
struct State<A, I> {
    machine: Machine,
    area: Option<A>,
    interrupt: I,
    /// Exits until a refused interrupt is tried again, and how many there were before the last try.
    patience: (u32, u32),
}

/// The most exits between two tries of an interrupt that no APIC takes: a guest may turn the protocol on
/// long before its APIC (Linux does: 10,000 exits of its boot).
const MAX_PATIENCE: u32 = 63;

/// The protocol of one vCPU, shared.
#[derive(Debug)]
pub struct AsyncPf<A, I> {
    state: Mutex<State<A, I>>,
    /// A page-ready is due and was not sent, for want of an enabled APIC or because the guest left the
    /// token word.
    due: AtomicBool,
}

impl<A: Area, I: Interrupt> AsyncPf<A, I> {
    /// Of a vCPU after reset, or of one that goes on.
    pub fn new(machine: Machine, area: Option<A>, interrupt: I) -> Self {
        let state = Mutex::new(State { machine, area, interrupt, patience: (0, 0) });
        let this = Self { state, due: AtomicBool::new(false) };
        this.send_ready(&mut lock(&this.state));
        this
    }

    /// See [`Machine::begin`].
    pub fn begin(&self, page: Page) -> Begun {
        lock(&self.state).machine.begin(page)
    }

    /// See [`Machine::cancel`].
    pub fn cancel(&self, token: Token) {
        lock(&self.state).machine.cancel(token);
    }

    /// See [`Machine::decide`]; with [`Decision::Notify`] the flags word is written.
    pub fn decide(&self, token: Token, guest: GuestState) -> Decision {
        let mut state = lock(&self.state);
        let flags_busy = state.area.as_ref().is_some_and(|area| area.flags() != 0);
        let decision = state.machine.decide(token, guest, flags_busy);
        if let (Decision::Notify { .. }, Some(area)) = (decision, &mut state.area) {
            area.set_flags(PAGE_NOT_PRESENT);
        }
        decision
    }

    /// See [`Machine::decide_again`].
    pub fn decide_again(&self, begun: Begun, page: Page, guest: GuestState) -> Decision {
        lock(&self.state).machine.decide_again(begun, page, guest)
    }

    /// See [`Machine::wait_first`].
    pub fn wait_first(&self, token: Token) -> Decision {
        lock(&self.state).machine.wait_first(token)
    }

    /// Does the next [`AsyncPf::awake`] try to send a page-ready that is due?
    pub fn sends_next(&self) -> bool {
        self.due.load(Ordering::Relaxed) && lock(&self.state).patience.0 == 0
    }

    /// The vCPU's thread is back from the guest or from its wait.
    pub fn awake(&self) {
        let mut state = lock(&self.state);
        state.machine.awake();
        if self.due.load(Ordering::Relaxed) {
            match state.patience.0.checked_sub(1) {
                Some(left) => state.patience.0 = left,
                None => self.send_ready(&mut state),
            }
        }
    }

    /// See [`Machine::complete`]; page-ready is sent, if its turn has come.
    pub fn complete(&self, token: Token) -> Completed {
        let mut state = lock(&self.state);
        let completed = state.machine.complete(token);
        self.send_ready(&mut state);
        completed
    }

    /// The guest writes EN; `area` is where the value says.
    pub fn set_en(&self, en: En, area: Option<A>) {
        debug_assert_eq!(en.area().is_some(), area.is_some());
        let before = {
            let mut state = lock(&self.state);
            state.machine.set_en(en);
            let before = std::mem::replace(&mut state.area, area);
            self.send_ready(&mut state);
            before
        };
        // Without the lock: its pages are let go of.
        drop(before);
    }

    /// The guest writes INT.
    ///
    /// # Errors
    /// As [`Machine::set_int`].
    pub fn set_int(&self, value: u64) -> Result<(), GeneralProtection> {
        let mut state = lock(&self.state);
        state.machine.set_int(value)?;
        self.send_ready(&mut state);
        Ok(())
    }

    /// See [`Machine::write_ack`]; the next page-ready is sent.
    pub fn write_ack(&self, value: u64) -> Option<Page> {
        let mut state = lock(&self.state);
        let page = state.machine.write_ack(value);
        self.send_ready(&mut state);
        page
    }

    /// What the guest reads from EN and INT.
    pub fn registers(&self) -> (u64, u64) {
        let state = lock(&self.state);
        (state.machine.en().raw(), state.machine.int())
    }

    /// The vCPU got INIT.
    pub fn reset(&self) {
        let area = {
            let mut state = lock(&self.state);
            state.machine.reset();
            state.area.take()
        };
        drop(area);
    }

    /// Plain data to go on from.
    pub fn save(&self) -> Saved {
        lock(&self.state).machine.save()
    }

    /// The counters now.
    pub fn stats(&self) -> ProtocolStats {
        lock(&self.state).machine.stats().clone()
    }

    /// How many pages are outstanding or unacknowledged now.
    pub fn outstanding(&self) -> usize {
        lock(&self.state).machine.outstanding_len()
    }

    fn send_ready(&self, state: &mut MutexGuard<'_, State<A, I>>) {
        let State { machine, area, interrupt, patience } = &mut **state;
        let (Some(ready), Some(area)) = (machine.next_ready(), area) else {
            return self.due.store(false, Ordering::Relaxed);
        };
        let mut due = true;
        if area.token() == 0 {
            area.set_token(ready.token);
            match interrupt.raise(ready.vector) {
                Taken::Yes => {
                    machine.ready_sent();
                    *patience = (0, 0);
                    due = false;
                }
                Taken::No => {
                    area.set_token(0);
                    machine.ready_refused();
                    *patience = (patience.1, MAX_PATIENCE.min(2 * patience.1 + 1));
                }
            }
        }
        self.due.store(due, Ordering::Relaxed);
    }
}

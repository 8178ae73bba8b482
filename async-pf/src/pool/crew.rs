//! The workers as data: who is idle, who gets which job, whom to wake and when to hire.
//!
//! Under the pool's lock these are true, and the rest follows from them:
//! - every worker either runs a job or is idle: `seats = idle + running`;
//! - no job that may begin waits while a worker is idle or could be hired: whoever makes one
//!   ready hands it over at once ([`State::dispatch`]), so exactly one worker wakes for it;
//! - while a delayed job waits, the worker that has been idle longest keeps the time, and there
//!   is one unless all are busy. The latest idle gets the next job, so the others can leave.

use std::sync::Arc;
use std::time::Duration;

use super::queue::{Queue, Taken};
use super::slab::Slab;
use super::{PoolConfig, PoolStats};
use crate::loom::Condvar;

/// A worker's seat.
#[derive(Debug)]
pub(super) struct Seat<J> {
    /// Wakes its worker.
    bell: Arc<Condvar>,
    /// A job handed to it that it has not seen yet.
    hand: Option<Taken<J>>,
}

/// What has to be done once the lock is free.
#[must_use]
#[derive(Debug)]
pub(super) enum Call {
    /// Wake a worker.
    Ring(Arc<Condvar>),
    /// Start a worker for this seat; it sleeps on this bell.
    Hire(u32, Arc<Condvar>),
}

/// What the pool's lock guards.
#[derive(Debug)]
pub(super) struct State<J> {
    pub(super) queue: Queue<J>,
    seats: Slab<Seat<J>>,
    /// The longest idle first.
    idle: Vec<u32>,
    /// The idle worker that keeps the time, and until when it sleeps at most. Of nobody else is it known
    /// when it wakes by itself.
    timekeeper: Option<(u32, Duration)>,
    workers_max: usize,
    peak: usize,
    started: u64,
    refused: u64,
}

impl<J> State<J> {
    pub(super) fn new(config: &PoolConfig) -> Self {
        Self {
            queue: Queue::new(config),
            seats: Slab::new(),
            idle: Vec::new(),
            timekeeper: None,
            workers_max: config.workers_max,
            peak: 0,
            started: 0,
            refused: 0,
        }
    }

    /// Workers that exist.
    pub(super) fn workers(&self) -> usize {
        self.seats.len()
    }

    /// Hands every job that may begin to an idle worker, or to a new one.
    pub(super) fn dispatch(&mut self, now: Duration) -> Vec<Call> {
        self.hand_out(now, true)
    }

    fn hand_out(&mut self, now: Duration, hire: bool) -> Vec<Call> {
        debug_assert_eq!(self.idle.len() + self.queue.running().total(), self.seats.len());
        let mut calls = Vec::new();
        while hire || !self.idle.is_empty() {
            let Some(taken) = self.queue.take(now) else { break };
            let number = match self.idle.pop() {
                Some(number) => {
                    self.keeps_no_time(number);
                    calls.extend(self.ring(number));
                    number
                }
                None => self.hire(&mut calls),
            };
            if let Some(seat) = self.seats.get_mut(number) {
                seat.hand = Some(taken);
            }
        }
        self.appoint(hire, &mut calls);
        calls
    }

    /// Sees to it that somebody keeps the time, if there is need.
    fn appoint(&mut self, hire: bool, calls: &mut Vec<Call>) {
        let Some(due) = self.queue.next_due() else { return };
        match self.idle.first() {
            Some(first) => {
                let knows = |(number, until)| number == *first && until <= due;
                if !self.timekeeper.is_some_and(knows) {
                    calls.extend(self.ring(*first));
                }
            }
            None if hire && self.seats.len() < self.workers_max => {
                let number = self.hire(calls);
                self.idle.push(number);
            }
            // All are busy: who is done first looks at the time.
            None => {}
        }
    }

    /// How long this idle worker has to keep the time: until the first delayed job is due. None
    /// if that is not its task.
    pub(super) fn keep_time(&mut self, number: u32) -> Option<Duration> {
        self.keeps_no_time(number);
        if self.idle.first() != Some(&number) {
            return None;
        }
        let due = self.queue.next_due()?;
        self.timekeeper = Some((number, due));
        Some(due)
    }

    /// A worker that may have kept the time is awake.
    fn keeps_no_time(&mut self, number: u32) {
        self.timekeeper = self.timekeeper.filter(|(other, _)| *other != number);
    }

    /// The bells of all idle workers.
    pub(super) fn idle_bells(&self) -> Vec<Arc<Condvar>> {
        self.idle.iter().filter_map(|number| Some(self.seats.get(*number)?.bell.clone())).collect()
    }

    /// The job that was handed to this worker.
    pub(super) fn hand(&mut self, number: u32) -> Option<Taken<J>> {
        self.seats.get_mut(number)?.hand.take()
    }

    /// A worker has nothing to do.
    pub(super) fn rest(&mut self, number: u32) {
        self.idle.push(number);
    }

    /// An idle worker found something to do by itself.
    pub(super) fn rise(&mut self, number: u32) {
        self.keeps_no_time(number);
        // Few are idle: a scan is cheaper than links.
        self.idle.retain(|other| *other != number);
    }

    /// A worker is no more: it ended, or its thread never began. The job that was in its hand.
    pub(super) fn leave(&mut self, number: u32) -> Option<Taken<J>> {
        self.rise(number);
        self.seats.remove(number)?.hand
    }

    /// There was no thread for this seat. Its job waits in the queue again, unless somebody is
    /// idle. Hires nobody, or it would go on for ever.
    pub(super) fn refuse(&mut self, number: u32, now: Duration) -> Vec<Call> {
        self.refused += 1;
        if let Some(taken) = self.leave(number) {
            self.queue.put_back(taken);
        }
        self.hand_out(now, false)
    }

    pub(super) fn stats(&self) -> PoolStats {
        let running = self.queue.running();
        let tally = self.queue.tally().clone();
        PoolStats {
            depth: self.queue.depth(),
            delayed: self.queue.delayed(),
            running: running.by_class(),
            running_by_medium: running.by_medium(),
            workers: self.seats.len(),
            workers_idle: self.idle.len(),
            workers_peak: self.peak,
            workers_started: self.started,
            workers_refused: self.refused,
            executed: tally.executed,
            panicked: tally.panicked,
            rejected: tally.rejected,
            promoted: tally.promoted,
            waited: tally.waited,
            waited_us: tally.waited_us,
        }
    }

    fn ring(&self, number: u32) -> Option<Call> {
        Some(Call::Ring(self.seats.get(number)?.bell.clone()))
    }

    fn hire(&mut self, calls: &mut Vec<Call>) -> u32 {
        let bell = Arc::new(Condvar::new());
        let number = self.seats.insert(Seat { bell: bell.clone(), hand: None });
        calls.push(Call::Hire(number, bell));
        self.started += 1;
        self.peak = self.peak.max(self.seats.len());
        number
    }
}

//! The waiting jobs of one class: lanes take turns, and inside a lane the first come is the first
//! served, as far as its medium has a worker to spare.
//!
//! ```text
//!            turn   medium 0     medium 1
//!   lane 2     7    a -> d       c            the lane with the lowest turn and a job for a medium
//!   lane 0     8                 b -> e       that has room is next, with the oldest of these jobs;
//!   lane 5     9    f                         then it gets a turn higher than all others
//! ```
//!
//! A lane that comes to have work gets the highest turn. So between two jobs of a lane at most
//! one of each other lane is served, however many they have.

use std::collections::{BTreeMap, HashMap};

use super::slab::{NIL, Slab};
use super::{Lane, Medium};

/// Where a job stands in its line.
#[derive(Clone, Copy, Debug)]
pub(super) struct Links {
    prev: u32,
    next: u32,
    /// Counts the jobs as they came to stand in a line; those put back to the front count down.
    arrival: i64,
}

impl Default for Links {
    fn default() -> Self {
        Self { prev: NIL, next: NIL, arrival: 0 }
    }
}

/// A job that can stand in a line.
pub(super) trait Linked {
    /// Where it stands.
    fn links(&self) -> &Links;
    /// The same, to change it.
    fn links_mut(&mut self) -> &mut Links;
}

/// The jobs of one lane for one medium.
#[derive(Clone, Copy, Debug)]
struct Line {
    head: u32,
    tail: u32,
}

const EMPTY: Line = Line { head: NIL, tail: NIL };

#[derive(Debug)]
struct LaneState {
    turn: u64,
    jobs: usize,
    /// By medium.
    lines: Box<[Line]>,
}

/// All lanes of a class.
#[derive(Debug)]
pub(super) struct Lines {
    /// Every lane that ever had a job: there are not many, and they come back.
    lanes: HashMap<Lane, LaneState>,
    /// By medium: the lanes that have a job for it, by turn.
    order: Box<[BTreeMap<u64, Lane>]>,
    next_turn: u64,
    /// The next arrival at the end of a line, and the next one at the front.
    arrivals: (i64, i64),
}

impl Lines {
    pub(super) fn new(media: u8) -> Self {
        let order = (0..media).map(|_| BTreeMap::new()).collect();
        Self { lanes: HashMap::new(), order, next_turn: 0, arrivals: (0, -1) }
    }

    /// The job that is next of those whose medium is `open`: its lane and medium.
    pub(super) fn next<T: Linked>(
        &self,
        slab: &Slab<T>,
        open: impl Fn(Medium) -> bool,
    ) -> Option<(Lane, Medium)> {
        let first = |(number, lanes): (u8, &BTreeMap<u64, Lane>)| {
            let (&turn, &lane) = lanes.first_key_value()?;
            let medium = Medium(number);
            open(medium).then(|| (turn, self.first_arrival(slab, lane, medium), lane, medium))
        };
        let (.., lane, medium) = (0..).zip(&self.order).filter_map(first).min()?;
        Some((lane, medium))
    }

    fn first_arrival<T: Linked>(&self, slab: &Slab<T>, lane: Lane, medium: Medium) -> Option<i64> {
        let head = self.lanes.get(&lane)?.lines[usize::from(medium.0)].head;
        Some(slab.get(head)?.links().arrival)
    }

    /// Takes the first job of a line that has one; the lane has had its turn.
    pub(super) fn serve<T: Linked>(
        &mut self,
        slab: &mut Slab<T>,
        lane: Lane,
        medium: Medium,
    ) -> Option<u32> {
        let number = self.lanes.get(&lane)?.lines[usize::from(medium.0)].head;
        if number == NIL {
            return None;
        }
        self.unlink(slab, number, lane, medium);
        self.move_to_end(lane);
        Some(number)
    }

    /// Puts a job at the end of its line.
    pub(super) fn push_back<T: Linked>(
        &mut self,
        slab: &mut Slab<T>,
        number: u32,
        lane: Lane,
        medium: Medium,
    ) {
        let arrival = self.arrivals.0;
        self.arrivals.0 += 1;
        let line = self.enter(lane, medium);
        let last = std::mem::replace(&mut line.tail, number);
        if last == NIL {
            line.head = number;
        }
        set(slab, number, Links { prev: last, next: NIL, arrival });
        if let Some(node) = slab.get_mut(last) {
            node.links_mut().next = number;
        }
    }

    /// Puts a job that was served back to the front of its line.
    pub(super) fn push_front<T: Linked>(
        &mut self,
        slab: &mut Slab<T>,
        number: u32,
        lane: Lane,
        medium: Medium,
    ) {
        let arrival = self.arrivals.1;
        self.arrivals.1 -= 1;
        let line = self.enter(lane, medium);
        let first = std::mem::replace(&mut line.head, number);
        if first == NIL {
            line.tail = number;
        }
        set(slab, number, Links { prev: NIL, next: first, arrival });
        if let Some(node) = slab.get_mut(first) {
            node.links_mut().prev = number;
        }
    }

    /// Takes a job out of its line, wherever it stands; the lane keeps its turn.
    pub(super) fn unlink<T: Linked>(
        &mut self,
        slab: &mut Slab<T>,
        number: u32,
        lane: Lane,
        medium: Medium,
    ) {
        let Some(Links { prev, next, .. }) = slab.get(number).map(|node| *node.links()) else {
            return;
        };
        let Some(state) = self.lanes.get_mut(&lane) else { return };
        let line = &mut state.lines[usize::from(medium.0)];
        match slab.get_mut(prev) {
            Some(node) => node.links_mut().next = next,
            None => line.head = next,
        }
        match slab.get_mut(next) {
            Some(node) => node.links_mut().prev = prev,
            None => line.tail = prev,
        }
        state.jobs -= 1;
        if line.head == NIL {
            self.order[usize::from(medium.0)].remove(&state.turn);
        }
    }

    /// The line that a job is about to enter.
    fn enter(&mut self, lane: Lane, medium: Medium) -> &mut Line {
        let media = self.order.len();
        let state = self.lanes.entry(lane).or_insert_with(|| LaneState {
            turn: 0,
            jobs: 0,
            lines: vec![EMPTY; media].into_boxed_slice(),
        });
        if state.jobs == 0 {
            state.turn = self.next_turn;
            self.next_turn += 1;
        }
        state.jobs += 1;
        let line = &mut state.lines[usize::from(medium.0)];
        if line.head == NIL {
            self.order[usize::from(medium.0)].insert(state.turn, lane);
        }
        line
    }

    fn move_to_end(&mut self, lane: Lane) {
        let Some(state) = self.lanes.get_mut(&lane) else { return };
        let old = std::mem::replace(&mut state.turn, self.next_turn);
        self.next_turn += 1;
        for (line, lanes) in state.lines.iter().zip(&mut self.order) {
            if line.head != NIL {
                lanes.remove(&old);
                lanes.insert(state.turn, lane);
            }
        }
    }
}

fn set<T: Linked>(slab: &mut Slab<T>, number: u32, links: Links) {
    if let Some(node) = slab.get_mut(number) {
        *node.links_mut() = links;
    }
}

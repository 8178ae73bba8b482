//! The queue against a model that is slow and plain: one list, searched from the front.

use std::collections::HashMap;
use std::time::Duration;

use proptest::prelude::*;

use super::{Grant, JobId, Queue, Taken};
use crate::pool::{Class, Key, Lane, Medium, PoolConfig, Promoted, Ticket, Why};

/// A job of the model.
#[derive(Clone, Debug)]
struct Waiting {
    job: u32,
    id: JobId,
    ticket: Ticket,
    due: Option<Duration>,
}

/// The model: what waits, in the order in which it may begin; whose turn it is; what runs.
struct Model {
    config: PoolConfig,
    waiting: Vec<Waiting>,
    turns: [Vec<Lane>; Class::COUNT],
    running: Vec<Ticket>,
    /// The latest with this key that came to wait; it may not wait any more.
    keys: HashMap<Key, JobId>,
}

impl Model {
    fn depth(&self, class: Class) -> usize {
        self.waiting.iter().filter(|waiting| waiting.ticket.class == class).count()
    }

    fn has_ready(&self, class: Class, lane: Lane) -> bool {
        let mut all = self.waiting.iter();
        all.any(|w| w.due.is_none() && w.ticket.class == class && w.ticket.lane == lane)
    }

    /// A lane that has work now is the last in turn; one without is not in turn.
    fn see_to_turn(&mut self, class: Class, lane: Lane) {
        let ready = self.has_ready(class, lane);
        let turns = &mut self.turns[class.index()];
        match ready {
            true if turns.contains(&lane) => {}
            true => turns.push(lane),
            false => turns.retain(|other| *other != lane),
        }
    }

    fn runs(&self, medium: Medium, class: Option<Class>) -> usize {
        let same = |t: &&Ticket| t.medium == medium && class.is_none_or(|class| t.class == class);
        self.running.iter().filter(same).count()
    }

    /// By definition: the bounds of the medium, and what is kept for all media once it runs.
    fn admits(&mut self, ticket: Ticket) -> bool {
        let config = self.config.clone();
        self.running.push(ticket);
        let (medium, class) = (ticket.medium, ticket.class);
        let class_max = match class {
            Class::Fault => usize::MAX,
            Class::Prefetch => config.prefetch_workers_max,
            Class::WriteBack => config.write_back_workers_max,
        };
        let min = config.medium_workers_min;
        let kept = |medium| {
            let others = min.saturating_sub(self.runs(medium, None));
            others.max((min / 2).saturating_sub(self.runs(medium, Some(Class::Fault))))
        };
        let kept: usize = (0..config.media).map(|medium| kept(Medium(medium))).sum();
        let admitted = self.runs(medium, None) <= config.medium_workers_max
            && self.runs(medium, Some(class)) <= class_max
            && self.running.len() + kept <= config.workers_max;
        self.running.pop();
        admitted
    }

    fn take(&mut self) -> Option<u32> {
        for class in Class::ALL {
            for lane in self.turns[class.index()].clone() {
                let found = (0..self.waiting.len()).find(|place| {
                    let Waiting { ticket, due, .. } = self.waiting[*place];
                    let mine = due.is_none() && ticket.class == class && ticket.lane == lane;
                    mine && self.admits(ticket)
                });
                let Some(place) = found else { continue };
                let Waiting { job, ticket, .. } = self.waiting.remove(place);
                self.running.push(ticket);
                self.turns[class.index()].retain(|other| *other != lane);
                self.see_to_turn(class, lane);
                return Some(job);
            }
        }
        None
    }

    fn ripen(&mut self, now: Duration) {
        let (mut due, rest): (Vec<_>, _) = std::mem::take(&mut self.waiting)
            .into_iter()
            .partition(|waiting| waiting.due.is_some_and(|due| due <= now));
        self.waiting = rest;
        due.sort_by_key(|waiting| (waiting.due, waiting.id));
        for waiting in due {
            let Ticket { class, lane, .. } = waiting.ticket;
            self.waiting.push(Waiting { due: None, ..waiting });
            self.see_to_turn(class, lane);
        }
    }

    fn promote(&mut self, key: Key, class: Class, lane: Lane) -> Promoted {
        let latest = self.keys.get(&key);
        let Some(place) = self.waiting.iter().position(|w| Some(&w.id) == latest) else {
            return Promoted::NotWaiting;
        };
        let old = self.waiting[place].ticket;
        if old.class <= class {
            return Promoted::Already;
        }
        if self.depth(class) >= self.config.queue_max[class.index()] {
            return Promoted::Full;
        }
        let mut moved = self.waiting.remove(place);
        moved.ticket = Ticket { class, lane, ..old };
        self.waiting.push(moved);
        self.see_to_turn(old.class, old.lane);
        self.see_to_turn(class, lane);
        Promoted::Moved
    }
}

/// What can happen to a queue.
#[derive(Clone, Debug)]
enum Step {
    Insert(Ticket),
    InsertAfter(u64, Ticket),
    Take,
    Finish(prop::sample::Index),
    PutBack,
    Promote(Key, Class, Lane),
    Withdraw(prop::sample::Index),
    Pass(u64),
}

fn class() -> impl Strategy<Value = Class> {
    prop::sample::select(Class::ALL.to_vec())
}

fn ticket() -> impl Strategy<Value = Ticket> {
    (class(), 0..4_u16, 0..4_u8).prop_map(|(class, lane, medium)| {
        // Medium 3 does not exist.
        Ticket::new(class, Lane(lane), Medium(medium))
    })
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => ticket().prop_map(Step::Insert),
        2 => (0..5_u64, ticket()).prop_map(|(delay, ticket)| Step::InsertAfter(delay, ticket)),
        6 => Just(Step::Take),
        4 => any::<prop::sample::Index>().prop_map(Step::Finish),
        1 => Just(Step::PutBack),
        2 => (0..80_u64, class(), 0..4_u16).prop_map(|(k, c, l)| Step::Promote(Key(k), c, Lane(l))),
        1 => any::<prop::sample::Index>().prop_map(Step::Withdraw),
        2 => (0..4_u64).prop_map(Step::Pass),
    ]
}

fn config() -> impl Strategy<Value = PoolConfig> {
    (7..20_usize, 2..12_usize).prop_map(|(workers, queue_max)| PoolConfig {
        queue_max: [queue_max, queue_max + 1, queue_max + 2],
        ..PoolConfig::sized(workers, 3)
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn the_queue_does_what_the_model_does(
        config in config(),
        steps in prop::collection::vec(step(), 0..200),
    ) {
        config.check().unwrap();
        let mut queue = Queue::new(&config);
        let turns = [(); Class::COUNT].map(|()| Vec::new());
        let mut model = Model { config, waiting: Vec::new(), turns, running: Vec::new(), keys: HashMap::new() };
        let mut taken: Vec<(u32, Grant)> = Vec::new();
        let (mut now, mut jobs) = (Duration::ZERO, 0_u32);
        for step in steps {
            match step {
                Step::Insert(_) | Step::InsertAfter(..) => {
                    jobs += 1;
                    let (due, ticket) = match step {
                        Step::InsertAfter(ms, ticket) => (Some(now + Duration::from_millis(ms)), ticket),
                        Step::Insert(ticket) => (None, ticket),
                        _ => unreachable!(),
                    };
                    // Keys are used twice now and then.
                    let ticket = ticket.with_key(Key(u64::from(jobs * 7 % 80)));
                    let outcome = match due {
                        Some(due) => queue.insert_at(due, ticket, jobs),
                        None => queue.insert(now, ticket, jobs),
                    };
                    let expected = if ticket.medium.0 >= model.config.media {
                        Some(Why::NoSuchMedium)
                    } else {
                        let full = model.depth(ticket.class) >= model.config.queue_max[ticket.class.index()];
                        full.then_some(Why::Full)
                    };
                    prop_assert_eq!(outcome.as_ref().err().map(|rejected| rejected.why), expected);
                    if let Ok(id) = outcome {
                        model.waiting.push(Waiting { job: jobs, id, ticket, due });
                        model.keys.insert(ticket.key.unwrap(), id);
                        model.see_to_turn(ticket.class, ticket.lane);
                    }
                }
                Step::Take => {
                    let got = queue.take(now).map(|Taken { job, grant }| (job, grant));
                    prop_assert_eq!(got.as_ref().map(|(job, _)| *job), model.take());
                    taken.extend(got);
                }
                Step::Finish(index) => {
                    if !taken.is_empty() {
                        let place = index.index(taken.len());
                        let (_, grant) = taken.swap_remove(place);
                        model.running.swap_remove(place);
                        queue.finish(grant, false);
                    }
                }
                Step::PutBack => {
                    if let Some((job, grant)) = taken.pop() {
                        let ticket = model.running.pop().unwrap();
                        model.waiting.insert(0, Waiting { job, id: grant.id, ticket, due: None });
                        model.keys.insert(ticket.key.unwrap(), grant.id);
                        model.see_to_turn(ticket.class, ticket.lane);
                        queue.put_back(Taken { job, grant });
                    }
                }
                Step::Promote(key, class, lane) => {
                    prop_assert_eq!(queue.promote(key, class, lane), model.promote(key, class, lane));
                }
                Step::Withdraw(index) => {
                    if !model.waiting.is_empty() {
                        let gone = model.waiting.remove(index.index(model.waiting.len()));
                        model.see_to_turn(gone.ticket.class, gone.ticket.lane);
                        prop_assert_eq!(queue.withdraw(gone.id), Some(gone.job));
                        prop_assert_eq!(queue.withdraw(gone.id), None);
                    }
                }
                Step::Pass(ms) => {
                    now += Duration::from_millis(ms);
                    queue.ripen(now);
                    model.ripen(now);
                }
            }
            prop_assert_eq!(queue.depth(), Class::ALL.map(|class| model.depth(class)));
            prop_assert_eq!(queue.next_due(), model.waiting.iter().filter_map(|w| w.due).min());
            prop_assert_eq!(queue.running().total(), model.running.len());
        }
        let mut rest = queue.close();
        prop_assert_eq!(rest.len(), model.waiting.iter().filter(|w| w.due.is_some()).count());
        rest.extend(queue.drain());
        rest.sort_unstable();
        let mut expected: Vec<_> = model.waiting.iter().map(|waiting| waiting.job).collect();
        expected.sort_unstable();
        prop_assert_eq!(rest, expected);
        prop_assert_eq!(queue.depth(), [0; 3]);
        prop_assert!(queue.take(now).is_none());
        let refused = queue.insert(now, Ticket::new(Class::Fault, Lane(0), Medium(0)), 0);
        prop_assert_eq!(refused.unwrap_err().why, Why::Closed);
    }

    /// However many jobs the other lanes have, and whenever they come.
    #[test]
    fn between_two_jobs_of_a_lane_each_other_lane_has_one_at_most(
        others in prop::collection::vec((1..6_u16, 0..3_u8, any::<bool>()), 0..200),
        mine in 2..20_usize,
    ) {
        let mut queue = Queue::new(&PoolConfig::default());
        let insert = |queue: &mut Queue<Lane>, lane, medium| {
            queue.insert(Duration::ZERO, Ticket::new(Class::Fault, lane, medium), lane).unwrap();
        };
        let mut others = others.into_iter();
        // Those up to the first `true` were there before.
        for (lane, medium, _) in others.by_ref().take_while(|(.., stop)| !stop) {
            insert(&mut queue, Lane(lane), Medium(medium));
        }
        (0..mine).for_each(|_| insert(&mut queue, Lane(0), Medium(0)));
        let (mut between, mut left) = (Vec::new(), mine);
        while left > 0 {
            let Taken { job: lane, grant } = queue.take(Duration::ZERO).unwrap();
            queue.finish(grant, false);
            if lane == Lane(0) {
                left -= 1;
                between.clear();
            } else {
                prop_assert!(!between.contains(&lane), "{lane:?} twice");
                between.push(lane);
            }
            for (lane, medium, _) in others.by_ref().take_while(|(.., stop)| !stop) {
                insert(&mut queue, Lane(lane), Medium(medium));
            }
        }
    }

    /// A fault finds a worker on a medium that has fewer than are kept for it, whatever else runs;
    /// so does one job of the other classes.
    #[test]
    fn every_medium_has_its_least(
        config in config(),
        load in prop::collection::vec(ticket(), 0..300),
        medium in 0..3_u8,
    ) {
        let config = PoolConfig { queue_max: [1000; 3], ..config };
        let mut queue = Queue::new(&config);
        for ticket in load.into_iter().filter(|ticket| ticket.medium.0 < 3 && ticket.medium.0 != medium) {
            queue.insert(Duration::ZERO, ticket, 0).unwrap();
        }
        let mut count = 0;
        while queue.take(Duration::ZERO).is_some() {
            count += 1;
        }
        prop_assert!(count <= config.workers_max - config.medium_workers_min);
        for class in [Class::WriteBack, Class::Prefetch, Class::Fault] {
            let ticket = Ticket::new(class, Lane(0), Medium(medium));
            (0..config.workers_max).for_each(|_| drop(queue.insert(Duration::ZERO, ticket, 1)));
            let mut begun = 0;
            while queue.take(Duration::ZERO).is_some() {
                begun += 1;
            }
            let least = if class == Class::Fault { config.medium_workers_min / 2 } else { 0 };
            let first = class == Class::WriteBack;
            prop_assert!(begun >= least && (begun >= 1 || !first), "{class:?}: {begun}");
        }
    }
}

//! Who may have a worker: the bounds by class and medium, and what is kept free. Only numbers.

use super::{Class, Medium, PoolConfig};

/// The workers in use.
#[derive(Debug)]
pub(super) struct Running {
    bounds: Bounds,
    workers_max: usize,
    total: usize,
    media: Box<[InUse]>,
    /// The sum of what is [kept](InUse::kept): `total + kept <= workers_max`, always.
    kept: usize,
}

/// What each medium may have.
#[derive(Clone, Copy, Debug)]
struct Bounds {
    max: usize,
    max_by_class: [usize; Class::COUNT],
    min: usize,
    /// The part of `min` that is for faults only.
    min_faults: usize,
}

/// The workers that one medium occupies, by class.
#[derive(Clone, Copy, Debug, Default)]
struct InUse([usize; Class::COUNT]);

impl InUse {
    fn all(self) -> usize {
        self.0.iter().sum()
    }

    /// Workers that must stay free for the medium.
    fn kept(self, bounds: &Bounds) -> usize {
        let faults = self.0[Class::Fault.index()];
        bounds.min.saturating_sub(self.all()).max(bounds.min_faults.saturating_sub(faults))
    }

    fn with(mut self, class: Class) -> Self {
        self.0[class.index()] += 1;
        self
    }

    fn without(mut self, class: Class) -> Self {
        self.0[class.index()] -= 1;
        self
    }
}

impl Running {
    pub(super) fn new(config: &PoolConfig) -> Self {
        let max = config.medium_workers_max;
        let bounds = Bounds {
            max,
            max_by_class: [max, config.prefetch_workers_max, config.write_back_workers_max],
            min: config.medium_workers_min,
            min_faults: config.medium_workers_min / 2,
        };
        let media = vec![InUse::default(); usize::from(config.media)].into_boxed_slice();
        let kept = media.len() * bounds.min;
        Self { bounds, workers_max: config.workers_max, total: 0, media, kept }
    }

    /// There is no worker left for anything.
    pub(super) fn all_busy(&self) -> bool {
        self.total >= self.workers_max
    }

    /// May such a job begin?
    pub(super) fn admits(&self, class: Class, medium: Medium) -> bool {
        let now = self.media[usize::from(medium.0)];
        now.all() < self.bounds.max
            && now.0[class.index()] < self.bounds.max_by_class[class.index()]
            && self.total + 1 + self.kept_with(now, now.with(class)) <= self.workers_max
    }

    /// Such a job begins. Only if it is admitted.
    pub(super) fn begin(&mut self, class: Class, medium: Medium) {
        self.total += 1;
        self.set(medium, self.media[usize::from(medium.0)].with(class));
    }

    /// Such a job is over.
    pub(super) fn end(&mut self, class: Class, medium: Medium) {
        self.total -= 1;
        self.set(medium, self.media[usize::from(medium.0)].without(class));
    }

    fn set(&mut self, medium: Medium, to: InUse) {
        let place = usize::from(medium.0);
        self.kept = self.kept_with(self.media[place], to);
        self.media[place] = to;
    }

    /// What is kept when one medium changes.
    fn kept_with(&self, from: InUse, to: InUse) -> usize {
        self.kept - from.kept(&self.bounds) + to.kept(&self.bounds)
    }

    pub(super) fn total(&self) -> usize {
        self.total
    }

    pub(super) fn by_class(&self) -> [usize; Class::COUNT] {
        Class::ALL.map(|class| self.media.iter().map(|in_use| in_use.0[class.index()]).sum())
    }

    /// By medium.
    pub(super) fn by_medium(&self) -> Vec<usize> {
        self.media.iter().map(|in_use| in_use.all()).collect()
    }
}

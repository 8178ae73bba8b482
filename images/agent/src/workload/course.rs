//! Which page a thread touches next.
//!
//! ```text
//!   Pressure::Evict   one permutation of all pages, shared by all threads; then it is over
//!   Pressure::Limit   for each thread an endless sequence of its own, made from the seed
//!                     (with Access::Phases also from how much of the run is over)
//! ```

use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

use nowait_wire::agent::{Access, Pressure};

use super::pattern::{self, Xorshift};

/// Parts of a run with [`Access::Phases`], and of its pages: each has a working set of its own.
pub(super) const PHASES: u32 = 4;

/// The way of all threads of a run through its pages.
pub(super) struct Course {
    /// All pages, shuffled: for an endless course the most popular one first.
    order: Vec<u32>,
    kind: CourseKind,
    /// Which part of the run this is.
    phase: AtomicU32,
}

enum CourseKind {
    /// Every page once; the next entry of `order` that a thread takes.
    Once(AtomicUsize),
    Endless(Access, u64),
}

impl Course {
    /// The course for a run with this many pages.
    pub(super) fn new(pages: u32, pressure: Pressure) -> Self {
        let kind = match pressure {
            Pressure::Evict => CourseKind::Once(AtomicUsize::new(0)),
            Pressure::Limit { access, seed } => CourseKind::Endless(access, seed),
        };
        Self { order: pattern::order(pages), kind, phase: AtomicU32::new(0) }
    }

    /// So much of the run is over, of all of it.
    pub(super) fn at(&self, elapsed_ns: u64, duration_ns: u64) {
        let phase = elapsed_ns.saturating_mul(PHASES.into()) / duration_ns.max(1);
        self.phase.store(phase.min(u64::from(PHASES) - 1) as u32, Ordering::Relaxed);
    }

    /// The pages of one thread.
    pub(super) fn of_thread(&self, thread: u32) -> Box<dyn Iterator<Item = usize> + '_> {
        match &self.kind {
            CourseKind::Once(next) => Box::new(std::iter::from_fn(|| {
                let taken = next.fetch_add(1, Ordering::Relaxed);
                self.order.get(taken).map(|&page| page as usize)
            })),
            &CourseKind::Endless(access, seed) => {
                let mut random = Xorshift::new(seed, u64::from(thread));
                let pages = self.order.len();
                if access == Access::Sequential {
                    // In the order of their addresses.
                    let first = (random.next() % pages as u64) as usize;
                    return Box::new((0..pages).cycle().skip(first));
                }
                let ranks = std::iter::repeat_with(move || {
                    rank(access, self.phase.load(Ordering::Relaxed), random.next(), pages)
                });
                Box::new(ranks.map(|rank| self.order[rank] as usize))
            }
        }
    }
}

/// Turns a random number into the rank of a page among `pages`.
fn rank(access: Access, phase: u32, random: u64, pages: usize) -> usize {
    match access {
        Access::Random | Access::Sequential => (random % pages as u64) as usize,
        Access::Phases => {
            let set = pages.div_ceil(PHASES as usize);
            (phase as usize * set + (random % set as u64) as usize) % pages
        }
        Access::Zipf => {
            // The k-th rank has the share ln((k + 2) / (k + 1)) / ln(pages + 1), which is about 1 / k:
            // the inverse of its sum is a power.
            let uniform = (random >> 11) as f64 / (1_u64 << 53) as f64;
            let rank = (pages as f64 + 1.0).powf(uniform) - 1.0;
            (rank as usize).min(pages - 1)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: fn(Access) -> Pressure = |access| Pressure::Limit { access, seed: 7 };

    fn counts(access: Access, pages: u32, touches: usize) -> Vec<usize> {
        let course = Course::new(pages, LIMIT(access));
        let mut counts = vec![0; pages as usize];
        course.of_thread(0).take(touches).for_each(|page| counts[page] += 1);
        counts.sort_unstable_by(|a, b| b.cmp(a));
        counts
    }

    #[test]
    fn once_is_every_page_whoever_takes_it() {
        let course = Course::new(100, Pressure::Evict);
        let mut all: Vec<usize> = course.of_thread(0).take(30).collect();
        all.extend(course.of_thread(1));
        all.sort_unstable();
        assert!(all.into_iter().eq(0..100));
    }

    #[test]
    fn the_same_seed_gives_the_same_course_and_threads_have_their_own() {
        let first = |thread| -> Vec<usize> {
            let course = Course::new(1000, LIMIT(Access::Random));
            course.of_thread(thread).take(50).collect()
        };
        assert_eq!(first(3), first(3));
        assert_ne!(first(3), first(4));
    }

    #[test]
    fn random_touches_all_alike_and_zipf_a_few_often() {
        let even = counts(Access::Random, 100, 100_000);
        assert!(even[0] < 1200 && even[99] > 800, "{even:?}");
        let zipf = counts(Access::Zipf, 1000, 100_000);
        let share = |pages: usize| zipf[..pages].iter().sum::<usize>() as f64 / 100_000.0;
        // ln(2) / ln(1001) and ln(101) / ln(1001).
        assert!((share(1) - 0.100).abs() < 0.01, "{}", share(1));
        assert!((share(100) - 0.668).abs() < 0.02, "{}", share(100));
        assert!(zipf[900] > 0);
    }

    #[test]
    fn sequential_goes_round_and_threads_begin_elsewhere() {
        let course = Course::new(100, LIMIT(Access::Sequential));
        let pages: Vec<usize> = course.of_thread(0).take(250).collect();
        assert!(pages.windows(2).all(|pair| pair[1] == (pair[0] + 1) % 100));
        assert_ne!(course.of_thread(1).next(), Some(pages[0]));
    }

    #[test]
    fn each_phase_has_a_working_set_of_its_own() {
        let course = Course::new(100, LIMIT(Access::Phases));
        let mut all = Vec::new();
        for phase in 0..4 {
            course.at(phase * 25 + 1, 100);
            let mut set: Vec<usize> = course.of_thread(0).take(2000).collect();
            set.sort_unstable();
            set.dedup();
            assert_eq!(set.len(), 25);
            all.extend(set);
        }
        all.sort_unstable();
        assert!(all.into_iter().eq(0..100));
        course.at(u64::MAX, 1);
        course.at(1, 0);
    }

    #[test]
    fn ranks_stay_within_the_pages() {
        for random in [0, 1, u64::MAX] {
            for pages in [1, 2, 65_536] {
                for access in [Access::Zipf, Access::Random, Access::Phases] {
                    assert!(rank(access, PHASES - 1, random, pages) < pages);
                }
            }
        }
    }
}

//! Traces of page numbers with a fixed seed.

use rand::rngs::SmallRng;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use rand_distr::{Distribution, Zipf};

/// Pages of the Zipf traces.
pub(super) const PAGES: u32 = 1 << 14;
/// Accesses of a trace, half of them warm-up.
pub(super) const ACCESSES: usize = 1 << 19;

/// Zipf accesses with this exponent to pages in random order.
pub(super) fn zipf(exponent: f64, seed: u64) -> Vec<u32> {
    let mut rng = SmallRng::seed_from_u64(seed);
    zipf_part(&mut rng, exponent, ACCESSES)
}

fn zipf_part(rng: &mut SmallRng, exponent: f64, accesses: usize) -> Vec<u32> {
    let mut pages: Vec<u32> = (0..PAGES).collect();
    pages.shuffle(rng);
    let zipf = Zipf::new(f64::from(PAGES), exponent).unwrap();
    (0..accesses).map(|_| pages[zipf.sample(rng) as usize - 1]).collect()
}

/// The hot pages are others after each quarter of the trace.
pub(super) fn phases(exponent: f64, seed: u64) -> Vec<u32> {
    let mut rng = SmallRng::seed_from_u64(seed);
    (0..4).flat_map(|_| zipf_part(&mut rng, exponent, ACCESSES / 4)).collect()
}

/// Zipf accesses, and a scan of pages that are never used again between them: one access in
/// `every`.
pub(super) fn zipf_with_scan(exponent: f64, every: usize, seed: u64) -> Vec<u32> {
    let mut scan = PAGES..;
    let mixed = |(at, page): (usize, u32)| {
        if at.is_multiple_of(every) { scan.next().unwrap_or(page) } else { page }
    };
    zipf(exponent, seed).into_iter().enumerate().map(mixed).collect()
}

/// Zipf accesses with bursts of a scan between them: `burst` pages in a row, twice as many accesses
/// without.
pub(super) fn zipf_with_bursts(exponent: f64, burst: usize, seed: u64) -> Vec<u32> {
    let mut scan = PAGES..;
    let mixed = |(at, page): (usize, u32)| {
        if (at / burst).is_multiple_of(3) { scan.next().unwrap_or(page) } else { page }
    };
    zipf(exponent, seed).into_iter().enumerate().map(mixed).collect()
}

/// The same pages in the same order again and again.
pub(super) fn cycle(pages: u32) -> Vec<u32> {
    (0..pages).cycle().take(ACCESSES).collect()
}

/// A loop over `pages` pages, and as many Zipf accesses.
pub(super) fn cycle_with_zipf(pages: u32, exponent: f64, seed: u64) -> Vec<u32> {
    let mut cycle = (PAGES..PAGES + pages).cycle();
    let mixed = |(at, page): (usize, u32)| {
        if at.is_multiple_of(2) { cycle.next().unwrap_or(page) } else { page }
    };
    zipf(exponent, seed).into_iter().enumerate().map(mixed).collect()
}

/// A walk: each access is close to the one before, and now and then somewhere else. What a guest
/// does that runs one program after the other.
pub(super) fn working_sets(set: u32, stay: usize, seed: u64) -> Vec<u32> {
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut first = 0;
    let mut step = |at: usize| {
        if at.is_multiple_of(stay) {
            first = rng.random_range(0..PAGES - set);
        }
        // The smaller of three: towards the set's beginning.
        let near = (0..3).map(|_| rng.random_range(0..set)).min().unwrap_or(0);
        first + near
    };
    (0..ACCESSES).map(&mut step).collect()
}

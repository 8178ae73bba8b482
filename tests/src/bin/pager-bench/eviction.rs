//! What the eviction policy keeps: its hit ratio on a trace beside those of the optimum, FIFO and CLOCK,
//! with a quarter of the pages in memory. The trace comes from a file, as it was recorded in a guest, or
//! else is generated, another one in each round.

use std::collections::HashMap;
use std::num::NonZeroU32;
use std::path::Path;
use std::rc::Rc;

use anyhow::{Context, Result, bail};
use guest_memory::simulate::Run;
use nowait_tests::figures::Figure;

use crate::probe::{Probe, Samples};

/// At least this part of the optimum's hits.
const OPTIMUM_BAR: f64 = 0.85;
/// Pages of a generated trace.
const PAGES: u32 = 1 << 14;
/// Accesses of a generated trace; the first half of any trace is warm-up.
const ACCESSES: usize = 1 << 19;
/// The exponent of the generated trace.
const EXPONENT: f64 = 1.0;
/// One page in this many is in memory.
const RESIDENT: u32 = 4;
/// Pages that are evicted at a time, as in the pager.
const BATCH: usize = 64;

/// The pages of a recorded trace: decimal numbers, separated by white space.
pub(crate) fn read(path: &Path) -> Result<Vec<u32>> {
    let text = std::fs::read_to_string(path)?;
    let trace: Result<Vec<u64>, _> = text.split_whitespace().map(str::parse).collect();
    let trace = dense(&trace.context("page numbers")?);
    if trace.len() < 2 {
        bail!("no trace: fewer than two page numbers");
    }
    Ok(trace)
}

/// The same trace with the pages numbered in the order of their first access.
fn dense(trace: &[u64]) -> Vec<u32> {
    let mut numbers = HashMap::new();
    trace
        .iter()
        .map(|page| {
            let next = numbers.len() as u32;
            *numbers.entry(*page).or_insert(next)
        })
        .collect()
}

/// Zipf's law over pages in random order.
fn zipf(seed: u64) -> Vec<u32> {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut pages: Vec<u32> = (0..PAGES).collect();
    random.shuffle(&mut pages);
    let mut sum = 0.0;
    let weight = |rank: u32| f64::from(rank + 1).powf(-EXPONENT);
    let sums: Vec<f64> = (0..PAGES)
        .map(|rank| {
            sum += weight(rank);
            sum
        })
        .collect();
    let mut access = || {
        let at = random.f64() * sum;
        let rank = sums.partition_point(|below| *below <= at);
        pages[rank.min(pages.len() - 1)]
    };
    (0..ACCESSES).map(|_| access()).collect()
}

pub(crate) fn probes(trace: Option<Vec<u32>>) -> Vec<Probe> {
    let trace: Option<Rc<[u32]>> = trace.map(Into::into);
    let ratio = |name: &'static str, policy: fn(&Run<'_>) -> Result<f64>| {
        let recorded = trace.clone();
        Probe::new(format!("hit ratio: {name}"), "hits per access", move |round| {
            let trace = recorded.clone().unwrap_or_else(|| zipf(round.into()).into());
            let pages = trace.iter().max().map_or(0, |page| page + 1);
            let capacity = NonZeroU32::new(pages / RESIDENT).context("a trace of too few pages")?;
            policy(&Run { trace: &trace, capacity, warm_up: trace.len() / 2 })
        })
    };
    vec![
        ratio("ours", |run| Ok(run.ours(BATCH)?.hit_ratio())),
        ratio("faults on idle pages", |run| Ok(run.ours(BATCH)?.idle_fault_ratio())),
        ratio("optimum", |run| Ok(run.belady().hit_ratio())),
        ratio("fifo", |run| Ok(run.fifo().hit_ratio())),
        ratio("clock", |run| Ok(run.clock().hit_ratio())),
        ratio("lru", |run| Ok(run.lru().hit_ratio())),
    ]
}

pub(crate) fn figures(samples: &Samples) -> Vec<Figure> {
    let over = |other: &str, bar: Option<f64>| {
        let ratio = samples.ratio("hit ratio: ours", &format!("hit ratio: {other}"))?;
        let name = format!("policy.hits_over_{other}");
        Some(match bar {
            Some(bar) => Figure::at_least(&name, ratio, "ratio", bar),
            None => Figure::information(&name, ratio, "ratio"),
        })
    };
    [
        over("optimum", Some(OPTIMUM_BAR)),
        over("fifo", Some(1.0)),
        over("clock", Some(1.0)),
        over("lru", None),
    ]
    .into_iter()
    .flatten()
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_numbered_as_they_come() {
        assert_eq!(dense(&[7, 1 << 40, 7, 0]), [0, 1, 0, 2]);
    }

    #[test]
    fn half_of_zipf_s_accesses_are_to_few_pages() {
        let trace = zipf(1);
        let mut counts = vec![0_usize; PAGES as usize];
        trace.iter().for_each(|page| counts[*page as usize] += 1);
        counts.sort_unstable();
        // The sum of 1/n up to 73 is half of that up to 16384, nearly.
        let top: usize = counts.iter().rev().take(73).sum();
        let share = top as f64 / ACCESSES as f64;
        assert!((share - 0.474).abs() < 0.01, "{share}");
    }
}

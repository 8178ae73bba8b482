//! What slow pages cost the others: eight threads that fault, one page in ten comes after 20 ms. The
//! fast pages' 99th percentile beside that of a run in which all pages are fast; and, to compare, that
//! of one handler that waits for each slow page itself.

use std::time::Duration;

use anyhow::{Result, bail};
use nowait_tests::figures::Figure;

use crate::machine::Machine;
use crate::probe::{Probe, Samples};
use crate::rates::{Size, bare_with, incompressible, same_filled};
use crate::uffd::{Answer, Waiting};

/// The fast pages' p99 at most this many times that without slow pages.
const BAR: f64 = 2.0;
const FAULTS: Size = Size { pages: 100_000, threads: 8 };
/// One handler for all takes 20 ms for each slow page, one after the other: fewer of them.
const FAULTS_SYNCHRONOUS: Size = Size { pages: 3_000, threads: 8 };
const SLOW_EVERY: u32 = 10;
const SLOW: Duration = Duration::from_millis(20);
/// A slow page of which no read took this long was not slow.
const SLOW_AT_LEAST_US: f64 = 19_000.0;

pub(crate) fn probes() -> Vec<Probe> {
    let p99 = |name: &str, run: fn() -> Result<f64>| {
        Probe::new(format!("slow pages: p99 of fast faults, {name}"), "us", move |_| run())
    };
    vec![
        p99("pager, none slow", || pager(|_| false)),
        p99("pager, a tenth slow", || pager(is_slow)),
        p99("synchronous handler, none slow", || synchronous(|_| false)),
        p99("synchronous handler, a tenth slow", || synchronous(is_slow)),
    ]
}

pub(crate) fn figures(samples: &Samples) -> Vec<Figure> {
    let ratio = |who: &str| {
        let name = |what| format!("slow pages: p99 of fast faults, {who}, {what}");
        samples.ratio(&name("a tenth slow"), &name("none slow"))
    };
    [
        ratio("pager")
            .map(|ratio| Figure::at_most("pager.fast_p99_beside_slow_pages", ratio, "ratio", BAR)),
        ratio("synchronous handler").map(|ratio| {
            Figure::information("synchronous.fast_p99_beside_slow_pages", ratio, "ratio")
        }),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn is_slow(page: u32) -> bool {
    page.is_multiple_of(SLOW_EVERY)
}

fn is_fast(page: u32) -> bool {
    !is_slow(page)
}

/// The same pages are fast in both runs; the others are slow or not.
fn pager(slow: fn(u32) -> bool) -> Result<f64> {
    let store = format!("delay={}ms", SLOW.as_millis());
    let machine = Machine::stored(FAULTS.pages, &store, |page, bytes| match slow(page) {
        true => incompressible(page, bytes),
        false => same_filled(page, bytes),
    })?;
    let touched = FAULTS.touch(machine.memory()?);
    if slow(0) && touched.quantile_us(0.0, slow) < SLOW_AT_LEAST_US {
        bail!("a slow page was fast");
    }
    Ok(touched.quantile_us(0.99, is_fast))
}

fn synchronous(slow: fn(u32) -> bool) -> Result<f64> {
    let delay = |page| if slow(page) { SLOW } else { Duration::ZERO };
    let touched = bare_with(FAULTS_SYNCHRONOUS, Answer::Copy, Waiting::Sleeps, delay)?;
    Ok(touched.quantile_us(0.99, is_fast))
}

//! What a fault costs the thread that meets it: a page that is compressed in memory beside one that is
//! in the RAM file and only not mapped.

use anyhow::Result;
use nowait_tests::figures::Figure;

use crate::machine::Machine;
use crate::probe::{Probe, Samples};
use crate::rates::{Size, compressible};

/// At most this many times a cached hit.
const BAR: f64 = 3.0;
const FAULTS: Size = Size { pages: 20_000, threads: 1 };
const COMPRESSED: &str = "latency: compressed";
const CACHED: &str = "latency: cached";

pub(crate) fn probes() -> Vec<Probe> {
    // The few pages that could not be made idle do not move the median.
    let median = |machine: Result<Machine>| {
        let machine = machine?;
        Ok(FAULTS.touch(machine.memory()?).quantile_us(0.5, |_| true))
    };
    vec![
        Probe::new(COMPRESSED, "us", move |_| {
            median(Machine::stored(FAULTS.pages, "lz4=1G", compressible))
        }),
        Probe::new(CACHED, "us", move |_| median(Machine::idle(FAULTS.pages))),
    ]
}

pub(crate) fn figures(samples: &Samples) -> Vec<Figure> {
    let ratio = samples.ratio(COMPRESSED, CACHED);
    let figure = |ratio| Figure::at_most("pager.compressed_over_cached_hit", ratio, "ratio", BAR);
    ratio.map(figure).into_iter().collect()
}

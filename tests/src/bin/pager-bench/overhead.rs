//! What it costs to write a stall down, and to trace it: the same faults with and without, by turns.
//!
//! A thread touches pages that are in memory and not mapped, as a vCPU does. Around each touch it tells the
//! stall's recorder what a vCPU's thread tells it. Blocks with and without follow each other in one round, so
//! that both meet the same machine; a sample is the median over their pairs.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use guest_memory::Gfn;
use nowait_tests::figures::Figure;
use nowait_tests::stats::median;
use nowait_wire::agent::Cause;
use vmm::stalls::Stalls;
use vmm::trace::{MAX_STEPS, Tracer};

use crate::machine::Machine;
use crate::memory::Pages;
use crate::probe::{Probe, Samples};

/// Measuring with histograms costs at most this share of the fault rate.
const BAR: f64 = 0.02;
const PAGES: u32 = 2000;
/// Pairs of blocks in a sample.
const PAIRS: usize = 60;
const HISTOGRAMS: &str = "overhead: histograms";
const TRACE: &str = "overhead: histograms and trace";
/// A run that no sample outlasts.
const WINDOW_MS: u32 = 600_000;

pub(crate) fn probes() -> Vec<Probe> {
    [(HISTOGRAMS, false), (TRACE, true)]
        .map(|(name, traced)| Probe::new(name, "share", move |round| sample(traced, round)))
        .into()
}

/// By which share the rate is lower with measuring.
fn sample(traced: bool, round: u32) -> Result<f64> {
    let machine = Machine::zero(PAGES)?;
    let tracer = traced.then(|| Arc::new(Tracer::new(MAX_STEPS)));
    let stalls = Arc::new(Stalls::new(1, true, tracer));
    stalls.mark(WINDOW_MS, Duration::ZERO, &machine.pager.stats());
    let gfns: Vec<Gfn> = (0..u64::from(PAGES)).map(Gfn).collect();
    let memory = machine.memory()?;
    // Made, and warm.
    plain(memory);
    let unmap = || -> Result<()> {
        let unmapped = machine.pager.unmap(&gfns)?;
        ensure!(unmapped == PAGES, "{unmapped} of {PAGES} pages were unmapped");
        Ok(())
    };
    let mut shares = Vec::with_capacity(PAIRS);
    for pair in 0..PAIRS {
        let with_first = (pair + round as usize).is_multiple_of(2);
        let mut times = [Duration::ZERO; 2];
        for turn in 0..2 {
            unmap()?;
            let with = (turn == 0) == with_first;
            times[usize::from(with)] = if with { measured(memory, &stalls) } else { plain(memory) };
        }
        // Rates are as one over times.
        shares.push(1.0 - times[0].as_secs_f64() / times[1].as_secs_f64());
    }
    Ok(median(&shares))
}

fn plain(memory: Pages<'_>) -> Duration {
    let began = Instant::now();
    for page in 0..PAGES {
        memory.touch(page);
    }
    began.elapsed()
}

fn measured(memory: Pages<'_>, stalls: &Arc<Stalls>) -> Duration {
    let mut stall = stalls.of(0);
    let began = Instant::now();
    for page in 0..PAGES {
        stall.begin();
        memory.touch(page);
        stall.end(Some((Cause::Resident, page.into())));
    }
    began.elapsed()
}

pub(crate) fn figures(samples: &Samples) -> Vec<Figure> {
    let histograms = samples.estimate(HISTOGRAMS);
    let histograms =
        histograms.map(|e| Figure::at_most("stall.overhead_histograms", e, "share", BAR));
    let trace = samples.estimate(TRACE);
    let trace = trace.map(|e| Figure::information("stall.overhead_trace", e, "share"));
    histograms.into_iter().chain(trace).collect()
}

//! Threads that touch pages, and how long that takes.

use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use crate::memory::Pages;

/// What came of touching pages.
pub(crate) struct Touched {
    /// From the start to the last page.
    pub(crate) took: Duration,
    /// Touches that were faults: all of them, unless somebody knows better.
    pub(crate) faults: u64,
    /// For each page touched, in no order: the page, and how long it took.
    pub(crate) each: Vec<(u32, Duration)>,
}

impl Touched {
    /// Faults in a second.
    pub(crate) fn rate(&self) -> f64 {
        self.faults as f64 / self.took.as_secs_f64()
    }

    /// This quantile of the touches of the pages that are `wanted`, in microseconds.
    pub(crate) fn quantile_us(&self, quantile: f64, wanted: impl Fn(u32) -> bool) -> f64 {
        let of = self.each.iter().filter(|(page, _)| wanted(*page));
        let mut sorted: Vec<_> = of.map(|(_, took)| *took).collect();
        sorted.sort_unstable();
        let last = sorted.len().saturating_sub(1) as f64;
        let at = (last * quantile).round() as usize;
        sorted.get(at).map_or(f64::NAN, |took| took.as_secs_f64() * 1e6)
    }
}

/// Touches these pages, each once, with so many threads that share them out evenly.
pub(crate) fn touch(memory: Pages<'_>, pages: &[u32], threads: usize) -> Touched {
    let start = Barrier::new(threads + 1);
    let one = |first: usize| {
        let mut each = Vec::with_capacity(pages.len() / threads + 1);
        start.wait();
        for page in pages.iter().skip(first).step_by(threads) {
            let began = Instant::now();
            std::hint::black_box(memory.touch(*page));
            each.push((*page, began.elapsed()));
        }
        each
    };
    thread::scope(|scope| {
        let one = &one;
        let spawn = |first| {
            let thread = thread::Builder::new().name("vcpu".into());
            thread.spawn_scoped(scope, move || one(first)).expect("a thread starts")
        };
        let threads: Vec<_> = (0..threads).map(spawn).collect();
        start.wait();
        let began = Instant::now();
        let each = threads.into_iter().flat_map(|t| t.join().expect("a touch does not panic"));
        let each: Vec<_> = each.collect();
        Touched { took: began.elapsed(), faults: each.len() as u64, each }
    })
}

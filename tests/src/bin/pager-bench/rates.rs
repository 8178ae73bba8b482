//! How many faults are resolved in a second: the pager beside a bare userfaultfd loop with the same
//! number of threads, the same polling and the same kinds of pages, and beside a handler that sleeps.

use std::time::Duration;

use anyhow::{Result, anyhow, ensure};
use guest_memory::PageBytes;
use nowait_tests::figures::Figure;

use crate::faulting::{Touched, touch};
use crate::machine::Machine;
use crate::memory::Pages;
use crate::probe::{Probe, Samples};
use crate::uffd::{Answer, Bare, Waiting};

/// At least this part of the bare loop's rate.
const BARE_BAR: f64 = 0.9;
/// At least this many times the sleeping handler's rate.
const SLEEPING_BAR: f64 = 1.5;

/// How much is touched.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Size {
    /// Pages, each touched once.
    pub(crate) pages: u32,
    /// Threads that touch them.
    pub(crate) threads: usize,
}

impl Size {
    /// The pages in an order that is always the same.
    pub(crate) fn order(&self) -> Vec<u32> {
        let mut order: Vec<u32> = (0..self.pages).collect();
        fastrand::Rng::with_seed(7).shuffle(&mut order);
        order
    }

    pub(crate) fn touch(&self, memory: Pages<'_>) -> Touched {
        touch(memory, &self.order(), self.threads)
    }
}

/// A page of one word, which the store keeps at hand.
pub(crate) fn same_filled(page: u32, bytes: &mut PageBytes) {
    bytes.as_chunks_mut().0.fill(u64::from(page % 251 + 1).to_ne_bytes());
}

/// A page that compresses to about a third: text-like, and its own.
pub(crate) fn compressible(page: u32, bytes: &mut PageBytes) {
    let mut random = fastrand::Rng::with_seed(page.into());
    for line in bytes.chunks_mut(32) {
        line.fill(b' ');
        line[..8].fill_with(|| random.alphanumeric() as u8);
    }
}

/// A page of noise.
pub(crate) fn incompressible(page: u32, bytes: &mut PageBytes) {
    fastrand::Rng::with_seed(page.into()).fill(bytes);
}

/// One thread that faults: all that counts is how soon it runs again.
const ALONE: Size = Size { pages: 20_000, threads: 1 };
/// More threads than there are CPUs, most likely: all that counts is what a fault costs the handler.
const BUSY: Size = Size { pages: 40_000, threads: 8 };

type Measure = fn(Size) -> Result<Touched>;

const KINDS: [(&str, Measure); 8] = [
    ("zero", |size| Ok(size.touch(Machine::zero(size.pages)?.memory()?))),
    ("zero, bare", |size| bare(size, Answer::Zero, Waiting::Spins)),
    ("cached", cached),
    ("cached, bare", |size| bare(size, Answer::Map, Waiting::Spins)),
    ("filled", |size| stored(size, "memory", same_filled)),
    ("filled, bare", |size| bare(size, Answer::Fill, Waiting::Spins)),
    ("lz4", |size| stored(size, "lz4=1G", compressible)),
    ("copy, sleeping", |size| bare(size, Answer::Copy, Waiting::Sleeps)),
];

pub(crate) fn probes() -> Vec<Probe> {
    let probe = |size: Size| {
        KINDS.map(|(kind, run)| {
            Probe::new(name(size, kind), "faults/s", move |_| Ok(run(size)?.rate()))
        })
    };
    [ALONE, BUSY].into_iter().flat_map(probe).collect()
}

fn name(size: Size, kind: &str) -> String {
    format!("rate, {} faulting: {kind}", size.threads)
}

pub(crate) fn figures(samples: &Samples) -> Vec<Figure> {
    let over = |size: Size, figure: &str, of: &str, over: &str, bar: Option<f64>| {
        let ratio = samples.ratio(&name(size, of), &name(size, over))?;
        let figure = match size.threads {
            1 => format!("pager.rate_{figure}"),
            threads => format!("pager.rate_{figure}_{threads}_threads"),
        };
        Some(match bar {
            Some(bar) => Figure::at_least(&figure, ratio, "ratio", bar),
            None => Figure::information(&figure, ratio, "ratio"),
        })
    };
    let all = |size: Size, bare: Option<f64>, sleeping: Option<f64>| {
        [
            over(size, "zero_over_bare", "zero", "zero, bare", bare),
            over(size, "cached_over_bare", "cached", "cached, bare", bare),
            over(size, "filled_over_bare", "filled", "filled, bare", bare),
            over(size, "filled_over_sleeping_copy", "filled", "copy, sleeping", sleeping),
            over(size, "lz4_over_bare_fill", "lz4", "filled, bare", None),
            over(size, "lz4_over_sleeping_copy", "lz4", "copy, sleeping", None),
        ]
    };
    let alone = all(ALONE, Some(BARE_BAR), Some(SLEEPING_BAR));
    alone.into_iter().chain(all(BUSY, None, None)).flatten().collect()
}

fn cached(size: Size) -> Result<Touched> {
    let machine = Machine::idle(size.pages)?;
    let touched = size.touch(machine.memory()?);
    let hits = machine.pager.stats().hits_idle;
    ensure!(hits * 10 >= u64::from(size.pages) * 9, "only {hits} of {} were idle", size.pages);
    // Without those that were no fault.
    Ok(Touched { faults: hits, ..touched })
}

fn stored(size: Size, store: &str, content: fn(u32, &mut PageBytes)) -> Result<Touched> {
    let machine = Machine::stored(size.pages, store, content)?;
    let touched = size.touch(machine.memory()?);
    let stats = machine.pager.stats();
    match stats.fetched_pages {
        0 => Ok(touched),
        fetched => Err(anyhow!("{fetched} pages of {store} were not at hand")),
    }
}

/// Touches pages that a bare handler answers.
pub(crate) fn bare(size: Size, answer: Answer, waiting: Waiting) -> Result<Touched> {
    bare_with(size, answer, waiting, |_| Duration::ZERO)
}

/// The same with bytes that take a while to come.
pub(crate) fn bare_with(
    size: Size,
    answer: Answer,
    waiting: Waiting,
    delay: impl Fn(u32) -> Duration + Sync,
) -> Result<Touched> {
    let bare = Bare::new(size.pages, answer)?;
    std::thread::scope(|scope| {
        let handler = std::thread::Builder::new()
            .name("bare".into())
            .spawn_scoped(scope, || bare.serve(waiting, &delay))?;
        let touched = size.touch(bare.pages());
        bare.stop();
        handler.join().map_err(|_| anyhow!("the bare handler panicked"))??;
        Ok(touched)
    })
}

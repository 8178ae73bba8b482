//! A store that is slower than it is: for measurements.

use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use fastrand::Rng;

use super::meter::{Meter, TierReport};
use super::spec::{DelaySpec, Distribution, MAX_DELAY};
use super::{Read, Slot, Store, StoreError, Write};
use crate::address::PageBytes;
use crate::pass::{MayWait, NoWait};

/// Another store whose second-pass reads, and writes if that is wanted, last longer. A batch waits
/// as long as the longest of its pages' delays, as if the medium served them side by side. What is
/// at hand in the store behind stays at hand.
pub(crate) struct Delay {
    behind: Arc<dyn Store>,
    spec: DelaySpec,
    reads: Mutex<Rng>,
    writes: Mutex<Rng>,
    gate: Gate,
    meter: Meter,
}

impl Delay {
    /// Makes `behind` slower.
    pub(crate) fn new(behind: Arc<dyn Store>, spec: DelaySpec) -> Self {
        let expected = spec.read.mean().saturating_add(behind.expected_read());
        Self {
            behind,
            spec,
            reads: Mutex::new(Rng::with_seed(spec.seed)),
            writes: Mutex::new(Rng::with_seed(spec.seed.wrapping_add(1))),
            gate: Gate::default(),
            meter: Meter::new(expected),
        }
    }
}

/// The longest of `pages` delays.
fn longest(distribution: Distribution, random: &Mutex<Rng>, pages: usize) -> Duration {
    let mut random = random.lock().expect("nothing panics with this lock held");
    (0..pages).map(|_| sample(distribution, &mut random)).max().unwrap_or_default()
}

/// One delay, at most [`MAX_DELAY`].
fn sample(distribution: Distribution, random: &mut Rng) -> Duration {
    match distribution {
        Distribution::Fixed(delay) => delay,
        Distribution::Uniform { from, to } => from + (to - from).mul_f64(random.f64()),
        Distribution::Lognormal { median, sigma_milli } => {
            let sigma = f64::from(sigma_milli) / 1000.0;
            let seconds = median.as_secs_f64() * (sigma * standard_normal(random)).exp();
            Duration::from_secs_f64(seconds.min(MAX_DELAY.as_secs_f64()))
        }
    }
}

/// Box and Muller's way to a normally distributed number.
fn standard_normal(random: &mut Rng) -> f64 {
    let (radius, angle) = (1.0 - random.f64(), std::f64::consts::TAU * random.f64());
    (-2.0 * radius.ln()).sqrt() * angle.cos()
}

impl Store for Delay {
    fn read_now(
        &self,
        pass: &NoWait,
        slot: Slot,
        page: &mut PageBytes,
    ) -> Result<bool, StoreError> {
        self.behind.read_now(pass, slot, page)
    }

    fn at_hand(&self, slot: Slot) -> bool {
        self.behind.at_hand(slot)
    }

    fn read(&self, pass: &MayWait, reads: &mut [Read<'_>]) {
        let start = Instant::now();
        match self.gate.wait(longest(self.spec.read, &self.reads, reads.len())) {
            Ok(()) => self.behind.read(pass, reads),
            Err(Closed) => reads.iter_mut().for_each(|read| read.result = Err(StoreError::Closed)),
        }
        self.meter.count_reads(start, reads);
    }

    fn write(&self, pass: &MayWait, writes: &mut [Write<'_>]) {
        let Some(delay) = self.spec.write else {
            return self.behind.write(pass, writes);
        };
        let start = Instant::now();
        match self.gate.wait(longest(delay, &self.writes, writes.len())) {
            Ok(()) => self.behind.write(pass, writes),
            Err(Closed) => {
                writes.iter_mut().for_each(|write| write.result = Err(StoreError::Closed));
            }
        }
        self.meter.count_writes(start, writes);
    }

    fn free(&self, slot: Slot) -> Result<(), StoreError> {
        self.behind.free(slot)
    }

    fn expected_read(&self) -> Duration {
        self.meter.expected_read()
    }

    fn memory_bytes(&self) -> u64 {
        self.behind.memory_bytes()
    }

    /// Its own tier holds no pages: it has the latencies with the delay.
    fn report(&self) -> Vec<TierReport> {
        let report = self.meter.report(self.spec.to_string());
        let mut tiers = vec![TierReport { pages: 0, ..report }];
        tiers.extend(self.behind.report());
        tiers
    }

    fn close(&self) {
        self.gate.close();
        self.behind.close();
    }
}

/// A wait that [`Gate::close`] ends.
#[derive(Debug, Default)]
struct Gate {
    closed: Mutex<bool>,
    changed: Condvar,
}

/// The wait was ended.
#[derive(Debug)]
struct Closed;

impl Gate {
    fn wait(&self, delay: Duration) -> Result<(), Closed> {
        let closed = self.closed.lock().expect("nothing panics with this lock held");
        let waited = self.changed.wait_timeout_while(closed, delay, |closed| !*closed);
        if *waited.expect("nothing panics with this lock held").0 { Err(Closed) } else { Ok(()) }
    }

    fn close(&self) {
        *self.closed.lock().expect("nothing panics with this lock held") = true;
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stores::memory::Memory;
    use crate::stores::testing;

    fn delayed(text: &str) -> Arc<dyn Store> {
        testing::open(&format!("raw+{text}")).unwrap()
    }

    #[test]
    fn a_batch_waits_once_and_the_report_has_it() {
        let store = delayed("delay=100ms,write=5ms");
        let start = Instant::now();
        let pages = [testing::page(2), testing::page(3), testing::page(4)];
        let mut writes = pages.each_ref().map(Write::new);
        store.write(&testing::may_wait(), &mut writes);
        assert!(start.elapsed() >= Duration::from_millis(5));
        let slots = writes.map(|write| write.result.unwrap());
        let mut buffers = [[0; 4096]; 3];
        let start = Instant::now();
        let mut reads: Vec<_> =
            slots.iter().zip(&mut buffers).map(|(slot, page)| Read::new(*slot, page)).collect();
        store.read(&testing::may_wait(), &mut reads);
        let took = start.elapsed();
        assert!(
            took >= Duration::from_millis(100) && took < Duration::from_millis(300),
            "{took:?}"
        );
        assert!(reads.iter().all(|read| read.result.is_ok()));
        assert_eq!(buffers, pages);
        assert!(store.expected_read() >= Duration::from_millis(99));
        let report = &store.report()[0];
        assert_eq!((report.name.as_str(), report.reads), ("delay=100ms,write=5ms", 3));
        assert!(report.read_latency.p50_us >= 100_000.0);
    }

    #[test]
    fn closing_ends_the_wait() {
        let store = delayed("delay=60s");
        let slot = testing::write(&*store, &testing::page(2)).unwrap();
        let start = Instant::now();
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| testing::read(&*store, slot));
            std::thread::sleep(Duration::from_millis(20));
            store.close();
            assert!(matches!(reader.join().unwrap(), Err(StoreError::Closed)));
        });
        assert!(matches!(testing::read(&*store, slot), Err(StoreError::Closed)));
        assert!(start.elapsed() < Duration::from_secs(10));
    }

    #[test]
    fn delays_have_their_distribution_and_their_seed() {
        let ms = Duration::from_millis;
        let draw = |distribution, seed| {
            let mut random = Rng::with_seed(seed);
            let mut delays: Vec<_> = (0..2001).map(|_| sample(distribution, &mut random)).collect();
            let first = delays[0];
            delays.sort_unstable();
            (first, delays)
        };
        let uniform = Distribution::Uniform { from: ms(1), to: ms(5) };
        let (first, delays) = draw(uniform, 7);
        assert!(delays[0] >= ms(1) && delays[0] < ms(2));
        assert!(delays[2000] <= ms(5) && delays[2000] > ms(4));
        assert_eq!(first, draw(uniform, 7).0);
        assert_ne!(first, draw(uniform, 8).0);

        let lognormal = Distribution::Lognormal { median: ms(2), sigma_milli: 500 };
        let (_, delays) = draw(lognormal, 7);
        let ratio = |index: usize| delays[index].as_secs_f64() / 0.002;
        assert!((ratio(1000) - 1.0).abs() < 0.1, "the median is {:?}", delays[1000]);
        // One sigma above the median.
        assert!((ratio(1683) - 0.5_f64.exp()).abs() < 0.15, "p84 is {:?}", delays[1683]);
        let mean = delays.iter().sum::<Duration>().div_f64(2001.0);
        let expected = lognormal.mean();
        assert!(mean > expected.mul_f64(0.9) && mean < expected.mul_f64(1.1), "{mean:?}");
        let wide = Distribution::Lognormal { median: MAX_DELAY, sigma_milli: 3000 };
        assert_eq!(draw(wide, 7).1[2000], MAX_DELAY);
    }

    #[test]
    fn what_is_at_hand_is_not_slowed_down() {
        let memory: Arc<dyn Store> = Arc::new(Memory::new(None).unwrap());
        let spec = DelaySpec::fixed(Duration::from_secs(60));
        let store = Delay::new(Arc::new(super::super::same::Same::new(memory)), spec);
        let slot = testing::write(&store, &[3; 4096]).unwrap();
        assert!(store.at_hand(slot));
        assert!(store.read_now(&testing::no_wait(), slot, &mut [0; 4096]).unwrap());
    }
}

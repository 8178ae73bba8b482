//! vCPU stalls as the host sees them: how long a vCPU's thread could not run guest code because of a page,
//! from the return of KVM_RUN with the fault to the next entry, by cause. docs/measurement.md has the
//! definition.
//!
//! ```text
//!   vCPU thread                          mark port (guest agent)      main loop
//!   begin -> the fault is served -> end  start: a window opens        result of a run:
//!            (a lock of its own,         end: it closes                what the window has
//!             which only readers contend)
//! ```
//!
//! Totals are kept all the time; histograms and time lines in a window only.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use guest_memory::PagerStats;
use hdrhistogram::Histogram;
use hdrhistogram::serialization::{Serializer, V2Serializer};
use nowait_wire::agent::{
    Cause, CauseStalls, HostStalls, MAX_OVERRUN_US, OVERRUN_DIGITS, SLICES, TierCounts, VcpuStalls,
};

use crate::trace::Tracer;

/// The stalls of all vCPUs.
#[derive(Debug)]
pub struct Stalls {
    /// Faults come to the vCPUs' threads.
    visible: bool,
    base: Instant,
    vcpus: Box<[VcpuRecord]>,
    window: Mutex<Window>,
    /// Where each of them is written down, too.
    tracer: Option<Arc<Tracer>>,
}

/// The stalls of one vCPU.
#[derive(Debug, Default)]
struct VcpuRecord {
    record: Mutex<Record>,
    /// When the stall began that it is in now, in nanoseconds since the base, and 1 more; 0: none.
    since: AtomicU64,
}

#[derive(Debug, Default)]
struct Record {
    totals: [Total; Cause::ALL.len()],
    window: Option<Box<Measured>>,
}

/// How many stalls of a cause there were, and how long they took in all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Total {
    /// How many.
    pub count: u64,
    /// In all, in nanoseconds.
    pub ns: u64,
}

/// What is written down of one vCPU in a window.
#[derive(Debug)]
struct Measured {
    start: Instant,
    /// The end has been marked: what comes now does not count.
    closed: bool,
    slice: Duration,
    totals: [Total; Cause::ALL.len()],
    /// In microseconds; made with the first stall of the cause.
    histograms: [Option<Histogram<u64>>; Cause::ALL.len()],
    slices: [Duration; SLICES],
}

/// The window that was opened last.
#[derive(Debug, Default)]
struct Window {
    started: Option<(Instant, TierCounts)>,
    ended: Option<(Duration, TierCounts)>,
}

/// A number of a cause.
fn index(cause: Cause) -> usize {
    // In the order of ALL.
    cause as usize
}

impl Stalls {
    /// None yet. `visible`: faults come to the vCPUs' threads. With a `tracer` it hears of each.
    #[must_use]
    pub fn new(vcpus: u32, visible: bool, tracer: Option<Arc<Tracer>>) -> Self {
        Self {
            visible,
            base: Instant::now(),
            vcpus: (0..vcpus).map(|_| VcpuRecord::default()).collect(),
            window: Mutex::default(),
            tracer,
        }
    }

    /// For the thread of one vCPU.
    ///
    /// # Panics
    /// When there is no such vCPU.
    #[must_use]
    pub fn of(self: &Arc<Self>, vcpu: u32) -> Stall {
        assert!((vcpu as usize) < self.vcpus.len(), "vCPU {vcpu} of {}", self.vcpus.len());
        Stall { stalls: Arc::clone(self), vcpu: vcpu as usize, gfn: 0, began: None, halted: None }
    }

    /// The guest says that a run begins after `lead` which is to last so long, or with 0 that it is over.
    pub fn mark(&self, duration_ms: u32, lead: Duration, stats: &PagerStats) {
        let (now, tiers) = (Instant::now(), tiers(stats));
        let mut window = lock(&self.window);
        if duration_ms == 0 {
            if let (Some((start, _)), None) = (&window.started, &window.ended) {
                window.ended = Some((now.duration_since(*start), tiers));
                for vcpu in &self.vcpus {
                    if let Some(measured) = &mut lock(&vcpu.record).window {
                        measured.closed = true;
                    }
                }
            }
            return;
        }
        let start = now + lead;
        *window = Window { started: Some((start, tiers)), ended: None };
        let slice = Duration::from_millis(duration_ms.into()) / SLICES as u32;
        for vcpu in &self.vcpus {
            lock(&vcpu.record).window = Some(Box::new(Measured::new(start, slice)));
        }
    }

    /// Closes the window and says what it has.
    #[must_use]
    pub fn take(&self) -> HostStalls {
        let window = std::mem::take(&mut *lock(&self.window));
        let mut stalls = HostStalls { visible: self.visible, ..HostStalls::default() };
        let mut causes: [(Total, Option<Histogram<u64>>); Cause::ALL.len()] = Default::default();
        for vcpu in &self.vcpus {
            let measured = lock(&vcpu.record).window.take();
            stalls.vcpus.push(measured.map_or_else(VcpuStalls::default, |measured| {
                measured.add_to(&mut causes);
                measured.vcpu()
            }));
        }
        for (cause, (total, histogram)) in Cause::ALL.into_iter().zip(causes) {
            if let Some(us_hdr) = histogram.and_then(|histogram| encode(&histogram)) {
                stalls.causes.push(CauseStalls { cause, total_us: total.ns / 1000, us_hdr });
            }
        }
        if let (Some((_, before)), Some((elapsed, after))) = (window.started, window.ended) {
            stalls.marked = true;
            stalls.elapsed_us = micros(elapsed);
            stalls.tiers = difference(&after, &before);
        }
        stalls
    }

    /// Do faults come to the vCPUs' threads? If not, there are no stalls to see.
    #[must_use]
    pub fn visible(&self) -> bool {
        self.visible
    }

    /// How many vCPUs there are.
    #[must_use]
    pub fn vcpus(&self) -> u32 {
        u32::try_from(self.vcpus.len()).unwrap_or(u32::MAX)
    }

    /// The totals of one vCPU since the start, in the order of [`Cause::ALL`].
    #[must_use]
    pub fn totals(&self, vcpu: u32) -> [Total; Cause::ALL.len()] {
        self.vcpus.get(vcpu as usize).map_or_else(Default::default, |v| lock(&v.record).totals)
    }

    /// For how long a vCPU has been in the stall that it is in, if it is in one.
    #[must_use]
    pub fn current(&self, vcpu: u32) -> Option<Duration> {
        let since = self.vcpus.get(vcpu as usize)?.since.load(Ordering::Relaxed).checked_sub(1)?;
        Some(self.base.elapsed().saturating_sub(Duration::from_nanos(since)))
    }
}

/// The stalls of one vCPU, as its thread tells them.
#[derive(Debug)]
pub struct Stall {
    stalls: Arc<Stalls>,
    vcpu: usize,
    /// The frame of the stall that it was in last.
    gfn: u64,
    began: Option<Instant>,
    /// When the artificial halt began that the vCPU is in.
    halted: Option<Instant>,
}

impl Stall {
    /// KVM_RUN came back, maybe with a fault.
    pub fn begin(&mut self) {
        let now = Instant::now();
        self.began = Some(now);
        self.set_since(Some(now));
    }

    /// The guest is about to be entered: the stall had this cause and frame, or was none.
    pub fn end(&mut self, fault: Option<(Cause, u64)>) {
        let began = self.began.take();
        if let Some((_, gfn)) = fault {
            self.gfn = gfn;
        }
        match (began, fault.map(|(cause, _)| cause)) {
            // It goes on until the halt ends.
            (began, Some(Cause::Halted)) => self.halted = began,
            (Some(began), Some(cause)) => {
                self.set_since(None);
                self.record(cause, began);
            }
            _ => self.set_since(None),
        }
    }

    /// KVM_RUN came back: an artificial halt is over, if there was one.
    pub fn end_halt(&mut self) {
        if let Some(began) = self.halted.take() {
            self.set_since(None);
            self.record(Cause::Halted, began);
        }
    }

    fn set_since(&self, since: Option<Instant>) {
        let ns = since.map_or(0, |since| nanos(since - self.stalls.base) + 1);
        self.stalls.vcpus[self.vcpu].since.store(ns, Ordering::Relaxed);
    }

    fn record(&self, cause: Cause, began: Instant) {
        let now = Instant::now();
        let mut record = lock(&self.stalls.vcpus[self.vcpu].record);
        record.totals[index(cause)].add(now - began);
        if let Some(measured) = record.window.as_mut().filter(|measured| !measured.closed) {
            measured.record(cause, began, now);
        }
        drop(record);
        if let Some(tracer) = &self.stalls.tracer {
            tracer.stall(self.vcpu, cause, self.gfn, began, now);
        }
    }
}

impl Total {
    fn add(&mut self, took: Duration) {
        self.count += 1;
        self.ns = self.ns.saturating_add(nanos(took));
    }
}

impl Measured {
    fn new(start: Instant, slice: Duration) -> Self {
        Self {
            start,
            closed: false,
            slice: slice.max(Duration::from_micros(1)),
            totals: Default::default(),
            histograms: Default::default(),
            slices: [Duration::ZERO; SLICES],
        }
    }

    /// One that began before the window counts from the window's start, and one that was over by then not at all.
    fn record(&mut self, cause: Cause, began: Instant, ended: Instant) {
        if ended < self.start {
            return;
        }
        let began = began.max(self.start);
        let took = ended.saturating_duration_since(began);
        self.totals[index(cause)].add(took);
        if let Some(histogram) = self.histograms[index(cause)].get_or_insert_with_option(empty) {
            histogram.saturating_record(micros(took));
        }
        let (mut at, end) = (began - self.start, ended.saturating_duration_since(self.start));
        while at < end {
            let slice = (at.as_nanos() / self.slice.as_nanos()) as usize;
            let Some(sum) = self.slices.get_mut(slice) else { break };
            let until = end.min(self.slice * (slice as u32 + 1));
            *sum += until - at;
            at = until;
        }
    }

    fn add_to(&self, causes: &mut [(Total, Option<Histogram<u64>>); Cause::ALL.len()]) {
        for ((sum, all), (total, histogram)) in
            causes.iter_mut().zip(self.totals.iter().zip(&self.histograms))
        {
            sum.count += total.count;
            sum.ns = sum.ns.saturating_add(total.ns);
            if let Some(histogram) = histogram
                && let Some(all) = all.get_or_insert_with_option(empty)
            {
                // Of the same bounds.
                let _ = all.add(histogram);
            }
        }
    }

    fn vcpu(&self) -> VcpuStalls {
        VcpuStalls {
            count: self.totals.iter().map(|total| total.count).sum(),
            total_us: self.totals.iter().map(|total| total.ns / 1000).sum(),
            slices_us: self.slices.iter().map(|slice| micros(*slice)).collect(),
        }
    }
}

/// [`Option::get_or_insert_with`] for what may not be had.
trait OrInsert<T> {
    fn get_or_insert_with_option(&mut self, make: impl FnOnce() -> Option<T>) -> Option<&mut T>;
}

impl<T> OrInsert<T> for Option<T> {
    fn get_or_insert_with_option(&mut self, make: impl FnOnce() -> Option<T>) -> Option<&mut T> {
        if self.is_none() {
            *self = make();
        }
        self.as_mut()
    }
}

/// Its bounds are right.
fn empty() -> Option<Histogram<u64>> {
    Histogram::new_with_bounds(1, MAX_OVERRUN_US, OVERRUN_DIGITS).ok()
}

fn encode(histogram: &Histogram<u64>) -> Option<String> {
    let mut bytes = Vec::new();
    V2Serializer::new().serialize(histogram, &mut bytes).ok()?;
    Some(STANDARD.encode(bytes))
}

fn tiers(stats: &PagerStats) -> TierCounts {
    TierCounts {
        zero: stats.zero_faults,
        resident: stats.hits_idle,
        at_hand: stats.hits_stored,
        fetched: stats.fetched_pages,
        prefetched: stats.prefetched_pages,
    }
}

fn difference(after: &TierCounts, before: &TierCounts) -> TierCounts {
    TierCounts {
        zero: after.zero.saturating_sub(before.zero),
        resident: after.resident.saturating_sub(before.resident),
        at_hand: after.at_hand.saturating_sub(before.at_hand),
        fetched: after.fetched.saturating_sub(before.fetched),
        prefetched: after.prefetched.saturating_sub(before.prefetched),
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// Nothing panics with one of these held.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use hdrhistogram::serialization::Deserializer;

    fn histogram(stalls: &CauseStalls) -> Histogram<u64> {
        let bytes = STANDARD.decode(&stalls.us_hdr).unwrap();
        Deserializer::new().deserialize(&mut bytes.as_slice()).unwrap()
    }

    #[test]
    fn stalls_of_a_window_have_their_cause_length_and_place() {
        let stalls = Arc::new(Stalls::new(2, true, None));
        let (mut first, mut second) = (stalls.of(0), stalls.of(1));
        // Before the mark, and between the mark and the start: in the totals only.
        first.begin();
        first.end(Some((Cause::Zero, 7)));
        let mut stats = PagerStats { fetched_pages: 5, ..PagerStats::default() };
        let lead = Duration::from_millis(200);
        let marked = Instant::now();
        stalls.mark(1000, lead, &stats);
        first.begin();
        first.end(Some((Cause::Zero, 7)));
        while marked.elapsed() < lead + Duration::from_millis(1) {
            std::thread::sleep(Duration::from_micros(100));
        }
        first.begin();
        assert!(stalls.current(0).is_some() && stalls.current(1).is_none());
        std::thread::sleep(Duration::from_millis(25));
        first.end(Some((Cause::Waited, 7)));
        assert!(stalls.current(0).is_none());
        // No fault at all.
        second.begin();
        second.end(None);
        second.begin();
        second.end(Some((Cause::Halted, 7)));
        std::thread::sleep(Duration::from_millis(5));
        assert!(stalls.current(1).unwrap() >= Duration::from_millis(5));
        second.end_halt();
        second.end_halt();
        stats.fetched_pages = 7;
        stalls.mark(0, Duration::ZERO, &stats);
        // After the end.
        second.begin();
        second.end(Some((Cause::Waited, 7)));
        let took = stalls.take();
        assert!(took.visible && took.marked && took.elapsed_us >= 30_000);
        assert_eq!(took.tiers.fetched, 2);
        let causes: Vec<Cause> = took.causes.iter().map(|stalls| stalls.cause).collect();
        assert_eq!(causes, [Cause::Waited, Cause::Halted]);
        for (stalls, least_us) in took.causes.iter().zip([25_000, 5_000]) {
            let histogram = histogram(stalls);
            assert_eq!(histogram.len(), 1);
            assert!(histogram.max() >= least_us && stalls.total_us >= least_us);
        }
        assert_eq!((took.vcpus[0].count, took.vcpus[1].count), (1, 1));
        // 25 ms in slices of 10 ms: the second one is full.
        assert_eq!(took.vcpus[0].slices_us[1], 10_000);
        // Each slice is rounded.
        let sum: u64 = took.vcpus[0].slices_us.iter().sum();
        assert!(sum.abs_diff(took.vcpus[0].total_us) <= 3, "{sum}");
        assert_eq!(stalls.totals(0)[index(Cause::Zero)].count, 2);
        assert_eq!(stalls.totals(0)[index(Cause::Waited)].count, 1);
        assert_eq!(stalls.totals(1)[index(Cause::Waited)].count, 1);
        // Nothing twice.
        assert_eq!(stalls.take().causes, []);
    }

    #[test]
    fn a_stall_over_the_start_counts_from_there_and_one_over_the_end_does_not_wrap() {
        let stalls = Arc::new(Stalls::new(1, true, None));
        let mut stall = stalls.of(0);
        stall.begin();
        std::thread::sleep(Duration::from_millis(20));
        stalls.mark(1, Duration::ZERO, &PagerStats::default());
        std::thread::sleep(Duration::from_millis(5));
        stall.end(Some((Cause::Waited, 7)));
        let took = stalls.take();
        assert!(!took.marked);
        let longest = histogram(&took.causes[0]).max();
        assert!((5_000..20_000).contains(&longest), "{longest}");
        // The run was to last 1 ms: all slices are full, and no more.
        assert_eq!(took.vcpus[0].slices_us, [10; SLICES]);
    }

    #[test]
    fn marks_of_a_guest_that_says_anything() {
        let stalls = Arc::new(Stalls::new(1, false, None));
        let stats = PagerStats::default();
        for duration in [0, u32::MAX, 1, 0, 0, 7] {
            stalls.mark(duration, Duration::ZERO, &stats);
        }
        assert!(!stalls.take().marked);
        assert_eq!(Cause::ALL.map(index), [0, 1, 2, 3, 4, 5, 6]);
    }
}

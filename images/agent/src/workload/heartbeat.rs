//! The heartbeat: how late a thread that must run every millisecond does run.
//!
//! ```text
//!   deadline   d1        d2        d3        d4        d5
//!   time  -----|---------|---------|---------|---------|----->
//!   runs       x                             .  x      x
//!   samples    0                    (d4+late)-d2, -d3, -d4   0
//! ```
//!
//! Deadlines are absolute and none is skipped: when the thread wakes up late, each deadline that
//! has passed meanwhile gets its own sample, from that deadline to the wake-up. A stall of 20 ms
//! therefore counts as 20 late beats of 1 ms and not as one, which is what corrects the histogram
//! for coordinated omission (Gil Tene, "How NOT to Measure Latency"); nothing may correct it again.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hdrhistogram::Histogram;
use hdrhistogram::serialization::{Serializer, V2Serializer};
use nowait_wire::agent::{self, MAX_OVERRUN_US, OVERRUN_DIGITS, SLICES};

use super::gate::Gate;
use crate::sys;

/// The end of a run before it is known.
pub(super) const RUNNING: u64 = u64::MAX;

/// The `SCHED_FIFO` priority of heartbeats: above all else that the guest runs, below the kernel's
/// own threads of the highest priority.
const PRIORITY: i32 = 50;
/// Samples held back so that those after the end of a run, which becomes known a little later, can
/// still be dropped.
const HELD_BACK: usize = 256;

/// The samples of one heartbeat.
pub(super) struct Samples {
    histogram: Histogram<u64>,
    /// Deadline in nanoseconds and overrun in microseconds, not yet in the histogram.
    held_back: VecDeque<(u64, u64)>,
    /// The longest overrun in each slice of the run, in microseconds.
    slices_us: Vec<u64>,
    start_ns: u64,
    slice_ns: u64,
}

impl Samples {
    /// No samples, with memory for all that can come in a run of this length.
    fn new(duration_ns: u64) -> Result<Self, String> {
        let mut histogram = Histogram::new_with_bounds(1, MAX_OVERRUN_US, OVERRUN_DIGITS)
            .map_err(|e| format!("cannot make a histogram: {e}"))?;
        // Writes to all of its memory, so that no page of it is absent during the run.
        histogram.reset();
        Ok(Self {
            histogram,
            held_back: VecDeque::with_capacity(HELD_BACK),
            slices_us: vec![0; SLICES],
            start_ns: 0,
            slice_ns: (duration_ns / SLICES as u64).max(1),
        })
    }

    fn count(&mut self, deadline_ns: u64, overrun_us: u64) {
        self.histogram.saturating_record(overrun_us);
        let slice = deadline_ns.saturating_sub(self.start_ns) / self.slice_ns;
        // The last deadline is the end of the last slice.
        let slice = (slice as usize).min(SLICES - 1);
        self.slices_us[slice] = self.slices_us[slice].max(overrun_us);
    }

    fn push(&mut self, deadline_ns: u64, overrun_us: u64) {
        if self.held_back.len() == HELD_BACK
            && let Some((deadline_ns, overrun_us)) = self.held_back.pop_front()
        {
            self.count(deadline_ns, overrun_us);
        }
        self.held_back.push_back((deadline_ns, overrun_us));
    }

    /// Counts what was held back, as far as it was due by the end.
    fn finish(&mut self, end_ns: u64) {
        while let Some((deadline_ns, overrun_us)) = self.held_back.pop_front() {
            if deadline_ns <= end_ns {
                self.count(deadline_ns, overrun_us);
            }
        }
    }

    /// Encodes the samples for the host.
    pub(super) fn encode(&self, cpu: u32) -> Result<agent::Heartbeat, String> {
        let mut bytes = Vec::new();
        V2Serializer::new()
            .serialize(&self.histogram, &mut bytes)
            .map_err(|e| format!("cannot encode the histogram of CPU {cpu}: {e}"))?;
        Ok(agent::Heartbeat {
            cpu,
            deadlines: self.histogram.len(),
            overrun_us_hdr: STANDARD.encode(bytes),
            slices_us: self.slices_us.clone(),
        })
    }
}

/// The body of a heartbeat thread: one sample for each deadline from the start to `end_ns`, which
/// is [`RUNNING`] until the end is known. `None` when there was no run.
pub(super) fn run(
    cpu: u32,
    (period_us, duration_ns): (u32, u64),
    gate: &Gate,
    end_ns: &AtomicU64,
) -> Option<Samples> {
    let set_up = sys::pin_fifo(cpu, PRIORITY)
        .map_err(|e| format!("cannot pin the heartbeat to CPU {cpu} with SCHED_FIFO: {e}"))
        .and_then(|()| Samples::new(duration_ns));
    let (set_up, samples) = match set_up {
        Ok(samples) => (Ok(()), Some(samples)),
        Err(message) => (Err(message), None),
    };
    let start_ns = gate.arrive(set_up)?;
    let mut samples = samples?;
    samples.start_ns = start_ns;
    beat(&mut samples, start_ns, period_us, end_ns);
    samples.finish(end_ns.load(Ordering::Acquire));
    Some(samples)
}

fn beat(samples: &mut Samples, start_ns: u64, period_us: u32, end_ns: &AtomicU64) {
    let period_ns = u64::from(period_us) * 1000;
    let mut deadline_ns = start_ns + period_ns;
    while deadline_ns <= end_ns.load(Ordering::Acquire) {
        sys::sleep_until(deadline_ns);
        let now_ns = sys::now_ns();
        // Stalled over the end, it finds that known; more deadlines may have passed since than are held back.
        let last_ns = now_ns.min(end_ns.load(Ordering::Acquire));
        while deadline_ns <= last_ns {
            samples.push(deadline_ns, (now_ns - deadline_ns) / 1000);
            deadline_ns += period_ns;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hdrhistogram::serialization::Deserializer;

    #[test]
    fn each_deadline_of_the_span_has_one_sample() {
        let mut samples = Samples::new(100_000_000).unwrap();
        let start = sys::now_ns();
        samples.start_ns = start;
        // The beat starts late by 50 periods: each of them counts.
        let end = AtomicU64::new(start + 100_000_000);
        sys::sleep_until(start + 50_500_000);
        beat(&mut samples, start, 1000, &end);
        samples.finish(end.into_inner());
        assert_eq!(samples.histogram.len(), 100);
        assert!(samples.histogram.max() >= 49_000);
        assert!(samples.histogram.count_between(20_000, MAX_OVERRUN_US) >= 29);
        // One deadline in each slice: the first is the latest.
        assert!(samples.slices_us[1] >= 48_000 && samples.slices_us[1] >= samples.slices_us[40]);
    }

    #[test]
    fn a_stall_over_the_end_counts_no_deadline_behind_it() {
        let mut samples = Samples::new(100_000_000).unwrap();
        let start = sys::now_ns() - 900_000_000;
        let end = AtomicU64::new(start + 400_000_000);
        beat(&mut samples, start, 1000, &end);
        samples.finish(end.into_inner());
        assert_eq!(samples.histogram.len(), 400);
        assert!(samples.histogram.max() >= 890_000);
    }

    #[test]
    fn samples_after_the_end_are_dropped() {
        let mut samples = Samples::new(1).unwrap();
        for deadline in 1..=1000 {
            samples.push(deadline, deadline);
        }
        samples.finish(900);
        assert_eq!(samples.histogram.len(), 900);
    }

    #[test]
    fn an_encoded_histogram_comes_back() {
        let mut samples = Samples::new(1).unwrap();
        for overrun in [0, 1, 999, 20_000, 10 * MAX_OVERRUN_US] {
            samples.push(0, overrun);
        }
        samples.finish(0);
        let heartbeat = samples.encode(3).unwrap();
        assert_eq!((heartbeat.cpu, heartbeat.deadlines), (3, 5));
        let bytes = STANDARD.decode(heartbeat.overrun_us_hdr).unwrap();
        let back: Histogram<u64> = Deserializer::new().deserialize(&mut bytes.as_slice()).unwrap();
        assert_eq!(back, samples.histogram);
        assert_eq!(back.count_between(900, 1100), 1);
        assert!(back.equivalent(back.max(), MAX_OVERRUN_US));
    }
}

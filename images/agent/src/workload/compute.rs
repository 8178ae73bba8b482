//! Threads that compute and need no page: what the guest still gets done while others wait for theirs.

use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};

use super::gate::Gate;
use super::pattern::Xorshift;
use crate::sys;

/// Steps of a generator in one unit of work: short beside a time slice, long beside a look at the clock.
const STEPS_PER_UNIT: u32 = 10_000;

/// The body of a computing thread: how many units it did by the end of the run, `None` when there was
/// no run.
pub(super) fn run(thread: u32, duration_ns: u64, gate: &Gate, end_ns: &AtomicU64) -> Option<u64> {
    let mut generator = Xorshift::new(0, u64::from(thread));
    let start_ns = gate.arrive(Ok(()))?;
    sys::sleep_until(start_ns);
    let mut units = 0;
    while sys::now_ns() < end_ns.load(Ordering::Acquire).min(start_ns + duration_ns) {
        for _ in 0..STEPS_PER_UNIT {
            black_box(generator.next());
        }
        units += 1;
    }
    Some(units)
}

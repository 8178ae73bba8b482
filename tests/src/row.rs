//! What one run of the agent gave, in the numbers that benchmarks compare.

use anyhow::{Result, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hdrhistogram::Histogram;
use hdrhistogram::serialization::Deserializer;
use nowait_wire::agent::RunResult;

/// What one run gave.
#[derive(Clone, Debug)]
pub struct Row {
    /// Median of the wake-up overrun of all vCPUs, in microseconds; at least 1.
    pub p50_us: f64,
    /// Its 99th percentile, likewise.
    pub p99_us: f64,
    /// All overruns.
    pub overruns: Histogram<u64>,
    /// Heartbeats.
    pub beats: u64,
    /// Pages touched and verified a second.
    pub pages_per_s: f64,
    /// Units of the computing threads a second.
    pub units_per_s: f64,
}

impl Row {
    /// The numbers of one result.
    ///
    /// # Errors
    /// When a page had wrong bytes, or a histogram is none.
    pub fn of(result: &RunResult) -> Result<Self> {
        ensure!(result.data_errors == 0, "data errors: {result:?}");
        let mut overruns = Histogram::<u64>::new(3)?;
        for heartbeat in &result.heartbeats {
            let bytes = STANDARD.decode(&heartbeat.overrun_us_hdr)?;
            let histogram: Histogram<u64> =
                Deserializer::new().deserialize(&mut bytes.as_slice())?;
            overruns.add(histogram)?;
        }
        let seconds = result.elapsed_us as f64 / 1e6;
        let percentile = |q| overruns.value_at_quantile(q).max(1) as f64;
        Ok(Self {
            p50_us: percentile(0.50),
            p99_us: percentile(0.99),
            beats: overruns.len(),
            pages_per_s: result.pages_touched as f64 / seconds,
            units_per_s: result.compute_units as f64 / seconds,
            overruns,
        })
    }
}

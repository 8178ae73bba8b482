//! The result that the pages are of: `sample.json`, which a test of the VMM's writes and reads.

use anyhow::{Context, Result};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hdrhistogram::Histogram;
use hdrhistogram::serialization::Deserializer;
use serde_json::Value;

/// A result as JSON.
pub(crate) struct Sample(pub(crate) Value);

impl Sample {
    pub(crate) fn load() -> Result<Self> {
        Ok(Self(serde_json::from_str(include_str!("sample.json"))?))
    }

    fn each(&self, key: &str) -> impl Iterator<Item = &Value> {
        self.0[key].as_array().into_iter().flatten()
    }

    /// The modes of all groups in their order.
    pub(crate) fn modes(&self) -> impl Iterator<Item = &Value> {
        self.each("summary").flat_map(|group| group["modes"].as_array().into_iter().flatten())
    }

    /// The modes of a workload.
    pub(crate) fn group(&self, workload: &str) -> &Value {
        self.each("summary")
            .find(|group| group["workload"] == workload)
            .map_or(&Value::Null, |g| &g["modes"])
    }

    /// One run.
    pub(crate) fn run(&self, apf: &str, workload: &str, round: u64) -> &Value {
        let is = |run: &&Value| {
            run["apf"] == apf && run["workload"] == workload && run["round"] == round
        };
        self.each("runs").find(is).unwrap_or(&Value::Null)
    }

    /// The overruns of all rounds.
    pub(crate) fn overruns(
        &self,
        apf: &str,
        workload: &str,
        threads: u64,
    ) -> Result<Histogram<u64>> {
        let mut all = Histogram::new_with_bounds(1, 60_000_000, 3)?;
        let is = |run: &&Value| {
            run["apf"] == apf && run["workload"] == workload && run["threads"] == threads
        };
        for run in self.each("runs").filter(is) {
            let bytes = STANDARD.decode(run["overrun_us_hdr"].as_str().context("a histogram")?)?;
            let one: Histogram<u64> = Deserializer::new().deserialize(&mut bytes.as_slice())?;
            all.add(one)?;
        }
        Ok(all)
    }
}

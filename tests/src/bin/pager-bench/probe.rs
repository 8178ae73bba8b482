//! What is measured once in each round, and what came of it.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use nowait_tests::stats::{Estimate, median, median_estimate, median_ratio};

/// One measurement.
pub(crate) struct Probe {
    /// Its name in the report.
    pub(crate) name: String,
    /// The unit of what it gives.
    pub(crate) unit: &'static str,
    run: Box<dyn Fn(u32) -> Result<f64>>,
}

impl Probe {
    /// `run` is given the round's number.
    pub(crate) fn new(
        name: impl Into<String>,
        unit: &'static str,
        run: impl Fn(u32) -> Result<f64> + 'static,
    ) -> Self {
        Self { name: name.into(), unit, run: Box::new(run) }
    }
}

/// The values of all rounds by probe.
#[derive(Default)]
pub(crate) struct Samples {
    values: BTreeMap<String, Vec<f64>>,
}

impl Samples {
    /// Runs all probes in a random order. Round 0 warms up and does not count.
    pub(crate) fn round(
        &mut self,
        probes: &[Probe],
        random: &mut fastrand::Rng,
        round: u32,
    ) -> Result<()> {
        let mut order: Vec<_> = probes.iter().collect();
        random.shuffle(&mut order);
        for probe in order {
            let value = (probe.run)(round).with_context(|| format!("measuring {}", probe.name))?;
            if round > 0 {
                self.values.entry(probe.name.clone()).or_default().push(value);
            }
        }
        Ok(())
    }

    /// The ratio of two probes' medians.
    pub(crate) fn ratio(&self, of: &str, over: &str) -> Option<Estimate> {
        Some(median_ratio(self.values.get(of)?, self.values.get(over)?))
    }

    /// The median of one probe.
    pub(crate) fn estimate(&self, name: &str) -> Option<Estimate> {
        self.values.get(name).map(|values| median_estimate(values))
    }

    /// All medians, for the reader.
    pub(crate) fn details(&self, probes: &[Probe]) -> Vec<(String, f64, &'static str)> {
        let of = |probe: &Probe| {
            Some((probe.name.clone(), median(self.values.get(&probe.name)?), probe.unit))
        };
        probes.iter().filter_map(of).collect()
    }
}

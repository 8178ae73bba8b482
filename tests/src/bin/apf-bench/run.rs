//! One boot of a guest in one mode, and what its runs gave.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hdrhistogram::Histogram;
use nowait_tests::guest::{End, Guest};
pub(crate) use nowait_tests::row::Row;
use nowait_wire::agent::{Request, TierCounts, Workload};

/// The modes, in the order of the tables.
pub(crate) const MODES: [&str; 4] = ["off", "host", "kernel", "user"];

/// What a plot shows; with 10,000 heartbeats there is no more to say.
const QUANTILES: [f64; 12] =
    [0.0, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995];

/// What one boot may take on a busy machine.
const LIMIT: Duration = Duration::from_secs(400);
/// How many guests of one mode may be lost before the benchmark gives up.
const LOST_MAX: u32 = 2;

/// A boot: its rows in the order of the workloads, and its summary.
pub(crate) struct Boot {
    pub(crate) rows: Vec<Row>,
    pub(crate) end: End,
}

/// Boots a guest with these arguments in `mode`, and makes the runs.
pub(crate) fn boot(mode: &str, args: &[&str], workloads: &[Workload]) -> Result<Boot> {
    boot_of(Guest::linux(), mode, args, workloads)
}

/// The same with a guest of another kernel.
pub(crate) fn boot_of(
    guest: Guest,
    mode: &str,
    args: &[&str],
    workloads: &[Workload],
) -> Result<Boot> {
    let mut guest = guest.limit(LIMIT).args(["--apf", mode, "--console", "none"]).args(args);
    for workload in workloads {
        guest = guest.request(Request::Run(workload.clone()));
    }
    let end = guest.try_run().map_err(|stuck| Lost { mode: mode.into(), stuck })?;
    ensure!(
        end.code() == 0,
        "--apf {mode} {args:?}: exit code {}: {}",
        end.code(),
        end.stderr.trim()
    );
    let results = end.results();
    ensure!(results.len() == workloads.len(), "{} of {} runs", results.len(), workloads.len());
    let rows = results.into_iter().map(Row::of).collect::<Result<_>>();
    let rows = rows.with_context(|| format!("--apf {mode} {args:?}"))?;
    Ok(Boot { rows, end })
}

/// A guest that did not come to its end.
#[derive(Debug, thiserror::Error)]
#[error("a guest with --apf {mode} did not end within {LIMIT:?}:\n{stuck}")]
struct Lost {
    mode: String,
    stuck: String,
}

/// Interleaved rounds of all modes.
pub(crate) struct Rounds {
    modes: Vec<&'static str>,
    boots: Vec<Vec<Boot>>,
    /// Guests that did not come to their end, by mode.
    lost: Vec<u32>,
}

impl Rounds {
    /// Boots a guest in each of `modes`, so many times; not always the same one first.
    pub(crate) fn run(
        name: &str,
        runs: u32,
        modes: &[&'static str],
        args: &[&str],
        workloads: &[Workload],
    ) -> Result<Self> {
        Self::of(name, runs, modes, |mode| boot(mode, args, workloads))
    }

    /// Has each of `modes` its turn with `boot`, so many times; not always the same one first.
    pub(crate) fn of(
        name: &str,
        runs: u32,
        modes: &[&'static str],
        boot: impl Fn(&str) -> Result<Boot>,
    ) -> Result<Self> {
        let mut boots: Vec<Vec<Boot>> = modes.iter().map(|_| Vec::new()).collect();
        let mut lost = vec![0; modes.len()];
        for round in 0..runs {
            eprintln!("apf-bench: {name}: round {} of {runs}", round + 1);
            for turn in 0..modes.len() {
                let mode = (turn + round as usize) % modes.len();
                boots[mode].push(loop {
                    match boot(modes[mode]) {
                        Err(error) if error.is::<Lost>() && lost[mode] < LOST_MAX => {
                            eprintln!("apf-bench: {error}");
                            lost[mode] += 1;
                        }
                        other => break other?,
                    }
                });
            }
        }
        Ok(Self { modes: modes.to_vec(), boots, lost })
    }

    fn boots(&self, mode: &str) -> &[Boot] {
        let index = self.modes.iter().position(|each| *each == mode);
        &self.boots[index.expect("a mode that was run")]
    }

    /// A number of the `row`-th workload in `mode`, one for each round.
    pub(crate) fn values(&self, mode: &str, row: usize, number: fn(&Row) -> f64) -> Vec<f64> {
        self.boots(mode).iter().map(|boot| number(&boot.rows[row])).collect()
    }

    /// A number of the summary, by its JSON pointer, likewise.
    pub(crate) fn numbers(&self, mode: &str, pointer: &str) -> Vec<f64> {
        self.boots(mode).iter().map(|boot| boot.end.number(pointer) as f64).collect()
    }

    /// How many of the faults that the store answered in the last workload hit the compressed tier, in percent,
    /// one for each round.
    pub(crate) fn hit_percent(&self, mode: &str) -> Vec<f64> {
        let percent = |boot: &Boot| {
            let seen = boot.end.host_stalls();
            seen.last().map_or(f64::NAN, |seen| {
                let TierCounts { at_hand, fetched, prefetched, .. } = seen.tiers;
                100.0 * at_hand as f64 / (at_hand + fetched - prefetched) as f64
            })
        };
        self.boots(mode).iter().map(percent).collect()
    }

    /// Guests that did not come to their end and were booted again, in this mode.
    pub(crate) fn lost(&self, mode: &str) -> u32 {
        let each = self.modes.iter().zip(&self.lost);
        each.filter(|(other, _)| **other == mode).map(|(_, lost)| lost).sum()
    }

    /// The percentiles of the `row`-th workload in `mode`, over all rounds.
    pub(crate) fn percentiles(&self, mode: &str, row: usize) -> Result<Vec<(f64, f64)>> {
        let mut all = Histogram::<u64>::new(3)?;
        for boot in self.boots(mode) {
            all.add(&boot.rows[row].overruns)?;
        }
        let at = |quantile| (quantile, all.value_at_quantile(quantile).max(1) as f64);
        Ok(QUANTILES.map(at).to_vec())
    }

    /// Heartbeats of the `row`-th workload in all rounds of the mode that had the fewest.
    pub(crate) fn beats(&self, row: usize) -> u64 {
        let sum = |boots: &Vec<Boot>| boots.iter().map(|boot| boot.rows[row].beats).sum();
        self.boots.iter().map(sum).min().unwrap_or(0)
    }
}

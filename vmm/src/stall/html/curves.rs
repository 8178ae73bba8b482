//! Percentile curves: histograms of all rounds merged, and their quantiles on a scale of nines.
//!
//! ```text
//!   x = -log10(1 - quantile)     0 %   50 %  90 %  99 %  99.9 % …  max
//!                                0     0.3   1     2     3         nines + 1
//! ```

use nowait_wire::agent::Kind;
use serde::Serialize;

use super::super::document::{Document, Run};
use super::super::overrun::{self, HistogramError, Overruns};
use super::super::summary::Group;
use crate::kvm::cpuid::Apf;

/// From one point of a curve to the next.
const STEP: f64 = 0.1;
/// The most nines that a scale has: one of a million, which few results have the samples for.
const MAX_NINES: u32 = 6;
/// What a histogram cannot tell from nothing, in microseconds: a logarithmic scale begins here.
const LEAST_US: u64 = 1;

/// Which times a plot is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Quantity {
    /// Wake-up overruns.
    Overrun,
    /// vCPU stalls, as the host saw them.
    Stall,
    /// Accesses.
    Access,
}

/// One plot.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Plot {
    /// What the times are.
    pub(super) quantity: Quantity,
    /// What it says, in a sentence.
    pub(super) title: String,
    /// The last power of ten on the scale before the maximum.
    pub(super) nines: u32,
    /// Where the points are.
    pub(super) x: Vec<f64>,
    /// The indices of points with a mark and a label: 50 %, 90 %, 99 % … and the maximum.
    pub(super) marks: Vec<usize>,
    /// The modes' curves, and that of an idle guest.
    pub(super) curves: Vec<Curve>,
}

/// One line.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Curve {
    /// The mode, or `idle`.
    pub(super) name: String,
    /// How many samples.
    pub(super) count: u64,
    /// The quantiles in microseconds; none where a curve has too few samples for it.
    pub(super) us: Vec<Option<u64>>,
}

/// The runs of one group and mode that count.
pub(super) fn runs<'a>(
    document: &'a Document,
    group: &'a Group,
    apf: Apf,
) -> impl Iterator<Item = &'a Run> {
    document.runs.iter().filter(move |run| {
        run.complete
            && run.apf == apf
            && (run.vcpus, run.workload, run.threads)
                == (group.vcpus, group.workload, group.threads)
    })
}

impl Plot {
    /// The plot of a group; none where nothing was seen.
    pub(super) fn new(
        document: &Document,
        group: &Group,
        quantity: Quantity,
    ) -> Result<Option<Self>, HistogramError> {
        let mut merged = Vec::new();
        for mode in &group.modes {
            let runs = runs(document, group, mode.apf);
            merged.push((mode.apf.to_string(), merge(runs, quantity)?));
        }
        if quantity == Quantity::Overrun && group.workload != Kind::Idle {
            let idle =
                |run: &&Run| run.complete && run.workload == Kind::Idle && run.vcpus == group.vcpus;
            merged.push(("idle".to_owned(), merge(document.runs.iter().filter(idle), quantity)?));
        }
        let merged: Vec<(String, Overruns)> = merged
            .into_iter()
            .filter_map(|(name, histogram)| Some((name, histogram.filter(|all| !all.is_empty())?)))
            .collect();
        let most = merged.iter().map(|(_, histogram)| histogram.len()).max();
        let Some(nines) = most.map(nines) else { return Ok(None) };
        let (mut x, marks) = scale(nines);
        let curves = merged.iter().map(|(name, all)| Curve::new(name, all, &x)).collect();
        // The maximum has a place behind all quantiles.
        x.push(f64::from(nines + 1));
        Ok(Some(Self { quantity, title: String::new(), nines, x, marks, curves }))
    }
}

impl Curve {
    fn new(name: &str, histogram: &Overruns, x: &[f64]) -> Self {
        // A quantile of fewer samples than one is the maximum, which has its own place.
        let last = (histogram.len() as f64).log10() + 1e-9;
        let quantile = |x: &f64| {
            (*x <= last).then(|| {
                let quantile = 1.0 - 10_f64.powf(-x);
                histogram.value_at_quantile(quantile).max(LEAST_US)
            })
        };
        let us = x.iter().map(quantile).chain([Some(histogram.max().max(LEAST_US))]).collect();
        Self { name: name.to_owned(), count: histogram.len(), us }
    }
}

/// The samples of some runs together; none without any.
fn merge<'a>(
    runs: impl Iterator<Item = &'a Run>,
    quantity: Quantity,
) -> Result<Option<Overruns>, HistogramError> {
    let mut merged: Option<Overruns> = None;
    let mut add = |histogram: Overruns| match &mut merged {
        None => {
            merged = Some(histogram);
            Ok(())
        }
        Some(merged) => {
            merged.add(&histogram).map_err(|error| HistogramError::Library(error.to_string()))
        }
    };
    for run in runs {
        match quantity {
            Quantity::Overrun => add(overrun::decode(&run.overrun_us_hdr)?)?,
            Quantity::Stall if run.stall.visible => {
                for cause in &run.stall.causes {
                    add(overrun::decode(&cause.us_hdr)?)?;
                }
            }
            Quantity::Access if !run.access_us_hdr.is_empty() => {
                add(overrun::decode_accesses(&run.access_us_hdr)?)?;
            }
            Quantity::Stall | Quantity::Access => {}
        }
    }
    Ok(merged)
}

/// How many nines this many samples have something for.
fn nines(samples: u64) -> u32 {
    samples.checked_ilog10().unwrap_or_default().clamp(1, MAX_NINES)
}

/// The points before the maximum, and which of all have a mark.
fn scale(nines: u32) -> (Vec<f64>, Vec<usize>) {
    let labels = || [2_f64.log10()].into_iter().chain((1..=nines).map(f64::from));
    let steps = (f64::from(nines) / STEP).round() as u32;
    let between = (0..=steps).map(|step| f64::from(step) * STEP);
    let apart = |x: &f64| labels().all(|label| (label - x).abs() > STEP / 4.0);
    let mut x: Vec<f64> = between.filter(apart).chain(labels()).collect();
    x.sort_by(f64::total_cmp);
    let at = |label: f64| x.iter().position(|x| *x == label);
    let marks = labels().filter_map(at).chain([x.len()]).collect();
    (x, marks)
}

#[cfg(test)]
mod tests {
    use super::super::super::document::tests::{BOOT, host, planned, result, workload};
    use super::*;
    use nowait_wire::agent::{Cause, CauseStalls, HostStalls};

    #[test]
    fn the_scale_has_the_labels_and_the_maximum() {
        let (x, marks) = scale(3);
        let labels: Vec<f64> = marks.iter().filter_map(|mark| x.get(*mark)).copied().collect();
        assert_eq!(labels, [2_f64.log10(), 1.0, 2.0, 3.0]);
        assert_eq!(marks.last(), Some(&x.len()));
        assert!(x.windows(2).all(|pair| pair[0] < pair[1]) && x[0] == 0.0);
        assert_eq!([0, 5, 99, 100, 20_000, u64::MAX].map(nines), [1, 1, 1, 2, 4, 6]);
    }

    #[test]
    fn curves_are_the_quantiles_of_all_rounds_together() {
        let (plan, mut document) = planned(&[]);
        let mut stalls = overrun::empty().unwrap();
        stalls.record_n(300, 3).unwrap();
        let us_hdr = overrun::encode(&stalls).unwrap();
        let cause = |cause| CauseStalls { cause, total_us: 900, us_hdr: us_hdr.clone() };
        for round in 1..=2 {
            for kind in [Kind::Idle, Kind::User] {
                let boot = super::super::super::plan::Boot { round, ..BOOT };
                let causes = vec![cause(Cause::Zero), cause(Cause::Waited)];
                let host = HostStalls { visible: round == 1, causes, ..host() };
                document.runs.push(Run::new(boot, result(&workload(kind), 2), host).unwrap());
            }
        }
        document.judge(&plan);
        let plot = |group: usize, quantity| {
            Plot::new(&document, &document.summary[group], quantity).unwrap()
        };
        let overruns = plot(1, Quantity::Overrun).unwrap();
        let names: Vec<_> = overruns.curves.iter().map(|curve| curve.name.as_str()).collect();
        assert_eq!(names, ["host", "idle"]);
        // Of 40 samples half are 0, which a logarithmic scale shows as 1 us; the others are 1 ms.
        let curve = &overruns.curves[0];
        assert_eq!((curve.count, overruns.nines, overruns.x.len()), (40, 1, curve.us.len()));
        let marked: Vec<_> = overruns.marks.iter().map(|mark| curve.us[*mark]).collect();
        assert_eq!(marked, [Some(1), Some(1000), Some(1000)]);
        // Only where the host sees them; both causes of one round.
        let stalls = plot(1, Quantity::Stall).unwrap();
        assert_eq!((stalls.curves[0].count, stalls.curves[0].us[0]), (6, Some(300)));
        assert!(plot(1, Quantity::Access).is_none());
        assert_eq!(plot(0, Quantity::Overrun).unwrap().curves.len(), 1);
    }

    #[test]
    fn a_curve_ends_where_its_samples_do() {
        let mut few = overrun::empty().unwrap();
        few.record_n(10, 9).unwrap();
        let (x, marks) = scale(3);
        let curve = Curve::new("user", &few, &x);
        let marked: Vec<_> = marks.iter().map(|mark| curve.us[*mark]).collect();
        assert_eq!(marked, [Some(10), None, None, None, Some(10)]);
    }
}

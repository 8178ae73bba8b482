//! The last minute of a run: snapshots by their own time, and the rates between them. No clock here.

use std::collections::VecDeque;

use super::snapshot::Snapshot;

/// What is kept, in seconds.
pub(super) const SPAN: f64 = 60.0;
/// Snapshots a second.
pub(super) const HZ: usize = 4;
/// Snapshots that are kept: a minute, and the one that it begins with.
const POINTS: usize = SPAN as usize * HZ + 1;

/// Of a text that makes no sense.
const MAX_RATE: f64 = 1e18;

/// Snapshots, the newest last, their times rising.
#[derive(Clone, Debug, Default)]
pub(super) struct History {
    points: VecDeque<Snapshot>,
}

impl History {
    /// One more. One that is older than the last is of another run, with which the history begins anew.
    pub(super) fn push(&mut self, snapshot: Snapshot) {
        match self.points.back() {
            Some(last) if snapshot.uptime < last.uptime => self.points.clear(),
            // Twice the same moment: the newer one counts.
            Some(last) if snapshot.uptime == last.uptime => drop(self.points.pop_back()),
            _ => {}
        }
        let oldest = snapshot.uptime - SPAN;
        self.points.push_back(snapshot);
        // One that is older than the span has to stay, so that the span has a beginning.
        while self.points.len() > POINTS || self.points.get(1).is_some_and(|p| p.uptime <= oldest) {
            self.points.pop_front();
        }
    }

    /// The newest.
    pub(super) fn last(&self) -> Option<&Snapshot> {
        self.points.back()
    }

    /// How much a number that only grows grew over the last so many seconds, or over what there is of
    /// them; and over how many seconds that was.
    pub(super) fn growth(&self, span: f64, of: impl Fn(&Snapshot) -> f64) -> Option<(f64, f64)> {
        let last = self.points.back()?;
        let since = last.uptime - span;
        let first = self.points.iter().rev().skip(1).find(|point| point.uptime <= since);
        let first = first.or_else(|| self.points.front())?;
        let seconds = last.uptime - first.uptime;
        (seconds > 0.0).then(|| ((of(last) - of(first)).max(0.0), seconds))
    }

    /// The same for each second.
    pub(super) fn rate(&self, span: f64, of: impl Fn(&Snapshot) -> f64) -> Option<f64> {
        self.growth(span, of).map(|(growth, seconds)| (growth / seconds).min(MAX_RATE))
    }

    /// The last minute in so many equal parts, the newest last: how much a number grew for each second of
    /// each part; `None` before the first snapshot.
    pub(super) fn series(&self, parts: usize, of: impl Fn(&Snapshot) -> f64) -> Vec<Option<f64>> {
        let Some(last) = self.points.back() else { return vec![None; parts] };
        let width = SPAN / parts.max(1) as f64;
        let at = |part: usize| self.at(last.uptime - SPAN + part as f64 * width, &of);
        let rate = |part| Some((at(part + 1)? - at(part)?).max(0.0) / width);
        (0..parts).map(rate).collect()
    }

    /// What a number was at some time, between snapshots in proportion.
    fn at(&self, time: f64, of: impl Fn(&Snapshot) -> f64) -> Option<f64> {
        let after = self.points.partition_point(|point| point.uptime < time);
        let Some(next) = self.points.get(after) else {
            // By a rounding error later than the last one.
            return self.points.back().map(of);
        };
        if next.uptime == time {
            return Some(of(next));
        }
        let before = self.points.get(after.checked_sub(1)?)?;
        let share = (time - before.uptime) / (next.uptime - before.uptime);
        Some(of(before) + share * (of(next) - of(before)))
    }

    /// How long fetches of the last minute took: an upper bound of the share `quantile` of them, in
    /// seconds. `None` without any; infinite when there is no bound.
    pub(super) fn fetch_quantile(&self, quantile: f64) -> Option<f64> {
        let bounds: Vec<f64> = self.last()?.fetches.iter().map(|(bound, _)| *bound).collect();
        let within = |bucket: usize| {
            let count = |snapshot: &Snapshot| snapshot.fetches.get(bucket).map_or(0.0, |b| b.1);
            self.growth(SPAN, count).map_or(0.0, |(growth, _)| growth)
        };
        let all = within(bounds.len().checked_sub(1)?);
        if all <= 0.0 {
            return None;
        }
        let bucket = (0..bounds.len()).find(|bucket| within(*bucket) >= quantile * all)?;
        Some(if bucket + 1 == bounds.len() { f64::INFINITY } else { bounds[bucket] })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn point(uptime: f64, fetched: f64) -> Snapshot {
        Snapshot { uptime, faults: [0.0, 0.0, 0.0, fetched, 0.0], ..Snapshot::default() }
    }

    fn fetched(snapshot: &Snapshot) -> f64 {
        snapshot.faults[3]
    }

    /// Two a second, from 0 on, at 4 Hz.
    fn steady(seconds: usize) -> History {
        let mut history = History::default();
        for tick in 0..=seconds * HZ {
            let time = tick as f64 / HZ as f64;
            history.push(point(time, 2.0 * time));
        }
        history
    }

    #[test]
    fn rates_are_by_the_time_of_the_snapshots() {
        let history = steady(10);
        assert_eq!(history.rate(1.0, fetched), Some(2.0));
        assert_eq!(history.rate(SPAN, fetched), Some(2.0));
        assert_eq!(history.growth(4.0, fetched), Some((8.0, 4.0)));
        let mut one = History::default();
        assert_eq!(one.rate(1.0, fetched), None);
        one.push(point(3.0, 7.0));
        one.push(point(3.0, 9.0));
        assert_eq!((one.rate(1.0, fetched), one.last().map(fetched)), (None, Some(9.0)));
    }

    #[test]
    fn a_minute_is_kept_and_no_more() {
        let history = steady(300);
        assert_eq!(history.points.len(), POINTS);
        assert_eq!(history.growth(SPAN, fetched), Some((120.0, SPAN)));
        // Seldom answers: the minute still has a beginning.
        let mut seldom = History::default();
        for minute in 0..5 {
            seldom.push(point(f64::from(minute) * 45.0, 0.0));
        }
        assert_eq!(seldom.points.len(), 3);
    }

    #[test]
    fn another_run_begins_anew() {
        let mut history = steady(10);
        history.push(point(1.0, 0.0));
        assert_eq!(history.points.len(), 1);
    }

    #[test]
    fn a_series_has_the_part_in_which_something_grew() {
        let mut history = History::default();
        history.push(point(0.0, 0.0));
        history.push(point(50.0, 0.0));
        history.push(point(60.0, 30.0));
        let series = history.series(6, fetched);
        assert_eq!(series, [0.0, 0.0, 0.0, 0.0, 0.0, 3.0].map(Some));
        let young = steady(30).series(6, fetched);
        assert_eq!(young[..3], [None, None, None]);
        assert_eq!(young[3..], [2.0, 2.0, 2.0].map(Some));
        assert_eq!(History::default().series(3, fetched), [None; 3]);
    }

    #[test]
    fn quantiles_are_of_the_last_minute() {
        let mut history = History::default();
        let with = |uptime, counts: [f64; 3]| Snapshot {
            uptime,
            fetches: [0.01, 0.1, 1e18].into_iter().zip(counts).collect(),
            ..Snapshot::default()
        };
        history.push(with(0.0, [100.0, 100.0, 100.0]));
        assert_eq!(history.fetch_quantile(0.5), None);
        history.push(with(10.0, [100.0, 199.0, 200.0]));
        assert_eq!(history.fetch_quantile(0.5), Some(0.1));
        assert_eq!(history.fetch_quantile(1.0), Some(f64::INFINITY));
    }

    proptest! {
        #[test]
        fn any_snapshots_give_finite_rates(points in prop::collection::vec((0.0..1e18_f64, 0.0..1e18_f64), 0..40), parts in 0..200_usize, span in 0.0..100.0_f64) {
            let mut history = History::default();
            for (time, value) in points {
                history.push(point(time, value));
                prop_assert!(history.rate(span, fetched).is_none_or(|rate| rate.is_finite() && rate >= 0.0));
            }
            let series = history.series(parts, fetched);
            prop_assert_eq!(series.len(), parts);
            prop_assert!(series.into_iter().flatten().all(|rate| rate.is_finite() && rate >= 0.0));
        }
    }
}

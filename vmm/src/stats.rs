//! Medians, and how sure one may be of them.

/// The seed of the resampling: the same numbers give the same interval.
const SEED: u64 = 0x6e6f_7761_6974;
/// How often the samples are resampled.
const RESAMPLES: usize = 10_000;

/// The median of some numbers; the mean of the middle two when their count is even.
///
/// # Panics
/// When there is no number, or one is not a number.
#[must_use]
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(|a, b| a.partial_cmp(b).expect("a number"));
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 {
        sorted[middle]
    } else {
        f64::midpoint(sorted[middle - 1], sorted[middle])
    }
}

/// A statistic with its bootstrap 95 % interval.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Estimate {
    /// The statistic of the samples themselves.
    pub value: f64,
    /// The lower end of the interval.
    pub low: f64,
    /// The upper end of the interval.
    pub high: f64,
}

impl Estimate {
    /// The same in a unit that is so many times as large.
    #[must_use]
    pub fn over(self, unit: f64) -> Self {
        Self { value: self.value / unit, low: self.low / unit, high: self.high / unit }
    }

    /// Whether a value of at most `bar` is shown: `None` when the bar lies inside the interval.
    #[must_use]
    pub fn at_most(&self, bar: f64) -> Option<bool> {
        if self.high <= bar {
            Some(true)
        } else if self.low > bar {
            Some(false)
        } else {
            None
        }
    }

    /// Whether a value of at least `bar` is shown: `None` when the bar lies inside the interval.
    #[must_use]
    pub fn at_least(&self, bar: f64) -> Option<bool> {
        if self.low >= bar {
            Some(true)
        } else if self.high < bar {
            Some(false)
        } else {
            None
        }
    }
}

/// The ratio of the medians of `a` and `b`, measured in pairs (interleaved runs).
///
/// # Panics
/// When the two differ in length or are empty.
#[must_use]
pub fn median_ratio(a: &[f64], b: &[f64]) -> Estimate {
    assert_eq!(a.len(), b.len(), "interleaved runs come in pairs");
    bootstrap(a.len(), |picks| {
        let pick = |from: &[f64]| median(&picks.iter().map(|i| from[*i]).collect::<Vec<_>>());
        pick(a) / pick(b)
    })
}

/// The median of the ratios of `a` to `b`, round by round: what slows a whole round down, as a machine
/// that does other work meanwhile, is in both and cancels out.
///
/// # Panics
/// When the two differ in length or are empty.
#[must_use]
pub fn median_of_ratios(a: &[f64], b: &[f64]) -> Estimate {
    assert_eq!(a.len(), b.len(), "rounds have one of each");
    median_estimate(&a.iter().zip(b).map(|(a, b)| a / b).collect::<Vec<_>>())
}

/// The median of some runs.
///
/// # Panics
/// When there are none.
#[must_use]
pub fn median_estimate(values: &[f64]) -> Estimate {
    bootstrap(values.len(), |picks| median(&picks.iter().map(|i| values[*i]).collect::<Vec<_>>()))
}

/// A statistic of `runs` runs with its percentile interval; runs measured together are resampled
/// together (Efron, "Bootstrap Methods", 1979).
fn bootstrap(runs: usize, statistic: impl Fn(&[usize]) -> f64) -> Estimate {
    let value = statistic(&(0..runs).collect::<Vec<_>>());
    if runs == 1 {
        // One sample says nothing about another.
        return Estimate { value, low: value, high: value };
    }
    let (mut random, mut picks) = (SplitMix64(SEED), vec![0; runs]);
    let mut values: Vec<f64> = (0..RESAMPLES)
        .map(|_| {
            picks.fill_with(|| random.below(runs));
            statistic(&picks)
        })
        .collect();
    values.sort_by(|x, y| x.partial_cmp(y).expect("a number"));
    let at = |share: f64| values[((RESAMPLES - 1) as f64 * share).round() as usize];
    Estimate { value, low: at(0.025), high: at(0.975) }
}

/// Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", 2014.
#[derive(Clone, Debug)]
pub struct SplitMix64(pub u64);

impl SplitMix64 {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`.
    ///
    /// # Panics
    /// When `bound` is 0.
    pub fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    /// Puts items into a random order (Fisher and Yates).
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last + 1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
    }

    #[test]
    fn what_slows_whole_rounds_down_cancels_out() {
        let rounds = [1.0, 4.0, 1.5, 2.0, 9.0, 1.0, 3.0];
        let ours = rounds.map(|round| 0.7 * round);
        let by_round = median_of_ratios(&ours, &rounds);
        assert!((by_round.low - 0.7).abs() < 1e-9 && (by_round.high - 0.7).abs() < 1e-9);
    }

    #[test]
    fn every_order_comes_up() {
        let mut random = SplitMix64(2);
        let mut orders = std::collections::BTreeSet::new();
        for _ in 0..200 {
            let mut items = [1, 2, 3];
            random.shuffle(&mut items);
            orders.insert(items);
        }
        assert_eq!(orders.len(), 6);
    }

    #[test]
    fn a_clear_ratio_is_decided_and_a_noisy_one_is_not() {
        let fast = [1.0, 1.01, 0.99, 1.0, 1.02];
        let slow = [2.0, 2.02, 1.98, 2.01, 2.0];
        let clear = median_ratio(&fast, &slow);
        assert!(clear.low <= clear.value && clear.value <= clear.high);
        assert_eq!(clear.at_most(0.8), Some(true));
        assert_eq!(clear.at_most(0.3), Some(false));
        assert_eq!(clear.at_least(0.3), Some(true));
        assert_eq!(clear.at_least(0.8), Some(false));
        let noisy = median_ratio(&[1.0, 3.0, 0.5, 2.0, 0.7], &[1.0, 1.0, 1.0, 1.0, 1.0]);
        assert_eq!(noisy.at_most(1.0), None);
        assert_eq!(noisy.at_least(1.0), None);
    }

    #[test]
    fn the_interval_covers_the_truth_about_as_often_as_it_says() {
        let mut random = SplitMix64(1);
        // Skewed, positive, median ln 2.
        let mut sample = || -(1.0 - random.below(1 << 30) as f64 / f64::from(1 << 30)).ln();
        let covered = (0..60)
            .filter(|_| {
                let a: Vec<f64> = (0..31).map(|_| sample() + 1.0).collect();
                let b: Vec<f64> = (0..31).map(|_| sample() + 1.0).collect();
                let ratio = median_ratio(&a, &b);
                ratio.low <= 1.0 && 1.0 <= ratio.high
            })
            .count();
        assert!((50..=60).contains(&covered), "{covered} of 60");
    }
}

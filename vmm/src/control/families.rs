//! Metrics from a snapshot: families of samples, as the crate `prometheus` encodes them.

use prometheus::proto::{
    Bucket, Counter, Gauge, Histogram, LabelPair, Metric, MetricFamily, MetricType,
};

/// Labels of one sample, name and value.
pub(super) type Labels<'a> = &'a [(&'a str, &'a str)];

/// Families in the order in which they are shown.
#[derive(Default)]
pub(super) struct Families(Vec<MetricFamily>);

/// A distribution: how many were at most each bound, and their sum.
pub(super) struct Distribution {
    /// Upper bounds, rising, in seconds; and how many lie between each and the one before.
    pub(super) buckets: Vec<(f64, u64)>,
    /// How many lie above the last one.
    pub(super) above: u64,
    /// All values together, in seconds.
    pub(super) sum: f64,
}

impl Families {
    /// A number that only grows.
    pub(super) fn counter(&mut self, name: &str, help: &str, value: u64) {
        self.counters(name, help, [(&[][..], value)]);
    }

    /// The same with labels.
    pub(super) fn counters<'a>(
        &mut self,
        name: &str,
        help: &str,
        samples: impl IntoIterator<Item = (Labels<'a>, u64)>,
    ) {
        let samples = samples.into_iter().map(|(labels, value)| (labels, value as f64));
        self.seconds(name, help, samples);
    }

    /// The same of time, in seconds.
    pub(super) fn seconds<'a>(
        &mut self,
        name: &str,
        help: &str,
        samples: impl IntoIterator<Item = (Labels<'a>, f64)>,
    ) {
        let samples = samples.into_iter().map(|(labels, value)| {
            let mut counter = Counter::default();
            counter.set_value(value);
            let mut metric = Metric::from_label(pairs(labels));
            metric.set_counter(counter);
            metric
        });
        self.add(name, help, MetricType::COUNTER, samples.collect());
    }

    /// A number that goes up and down.
    pub(super) fn gauge(&mut self, name: &str, help: &str, value: f64) {
        self.gauges(name, help, [(&[][..], value)]);
    }

    /// The same with labels.
    pub(super) fn gauges<'a>(
        &mut self,
        name: &str,
        help: &str,
        samples: impl IntoIterator<Item = (Labels<'a>, f64)>,
    ) {
        let samples = samples.into_iter().map(|(labels, value)| {
            let mut gauge = Gauge::default();
            gauge.set_value(value);
            let mut metric = Metric::from_label(pairs(labels));
            metric.set_gauge(gauge);
            metric
        });
        self.add(name, help, MetricType::GAUGE, samples.collect());
    }

    /// Distributions with labels.
    pub(super) fn histograms<'a>(
        &mut self,
        name: &str,
        help: &str,
        samples: impl IntoIterator<Item = (Labels<'a>, Distribution)>,
    ) {
        let samples = samples.into_iter().map(|(labels, distribution)| {
            let mut metric = Metric::from_label(pairs(labels));
            metric.set_histogram(distribution.encode());
            metric
        });
        self.add(name, help, MetricType::HISTOGRAM, samples.collect());
    }

    /// All of them; the encoder refuses families without samples, which are none here.
    pub(super) fn into_vec(self) -> Vec<MetricFamily> {
        self.0
    }

    fn add(&mut self, name: &str, help: &str, kind: MetricType, metrics: Vec<Metric>) {
        if metrics.is_empty() {
            return;
        }
        let mut family = MetricFamily::default();
        family.set_name(format!("nowait_{name}"));
        family.set_help(help.to_owned());
        family.set_field_type(kind);
        family.set_metric(metrics);
        self.0.push(family);
    }
}

impl Distribution {
    fn encode(&self) -> Histogram {
        let mut cumulative = 0;
        let buckets = self.buckets.iter().map(|(bound, count)| {
            cumulative += count;
            let mut bucket = Bucket::default();
            bucket.set_upper_bound(*bound);
            bucket.set_cumulative_count(cumulative);
            bucket
        });
        let mut histogram = Histogram::default();
        histogram.set_bucket(buckets.collect());
        histogram.set_sample_count(cumulative + self.above);
        histogram.set_sample_sum(self.sum);
        histogram
    }
}

fn pairs(labels: Labels<'_>) -> Vec<LabelPair> {
    let pair = |(name, value): &(&str, &str)| {
        let mut pair = LabelPair::default();
        pair.set_name((*name).to_owned());
        pair.set_value((*value).to_owned());
        pair
    };
    labels.iter().map(pair).collect()
}

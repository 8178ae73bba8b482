//! `GET /metrics` as numbers: what the screen shows of one moment. Whatever the text says, numbers here are
//! finite and not negative, lists are bounded, and names can be printed.

use nowait_wire::agent::Cause;
use prometheus_parse::{Sample, Scrape, Value};

/// Causes of stalls.
pub(super) const CAUSES: usize = Cause::ALL.len();
/// More vCPUs than a guest of nowait has.
const MAX_VCPUS: usize = 64;
/// More tiers than anybody stacks.
const MAX_TIERS: usize = 16;
/// More buckets than a histogram of nowait has.
const MAX_BUCKETS: usize = 64;
/// Names are cut after so many characters.
const MAX_NAME: usize = 40;
/// Larger numbers are taken as this one: sums of them are finite.
const MAX_NUMBER: f64 = 1e18;

/// Faults by where the page was: the name that is shown, and the metric.
pub(super) const FAULTS: [(&str, &str); 5] = [
    ("zero", "nowait_zero_faults_total"),
    ("resident", "nowait_hits_idle_total"),
    ("at hand", "nowait_hits_stored_total"),
    ("fetched", "nowait_fetched_pages_total"),
    ("prefetched", "nowait_prefetched_pages_total"),
];

/// Outcomes of async page faults: the name that is shown, and the label.
pub(super) const OUTCOMES: [(&str, &str); 4] =
    [("injected", "notified"), ("halted", "halted"), ("waited", "waited"), ("avoided", "avoided")];

/// Ages of outstanding pages: the name that is shown, and the label.
pub(super) const AGES: [(&str, &str); 6] = [
    ("<1 ms", "0.001"),
    ("<10 ms", "0.01"),
    ("<100 ms", "0.1"),
    ("<1 s", "1"),
    ("more", "+Inf"),
    ("unknown", "unknown"),
];

/// A run at one moment.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Snapshot {
    pub(super) version: String,
    pub(super) apf: String,
    pub(super) fault_source: String,
    /// Seconds since the start: the time of this snapshot.
    pub(super) uptime: f64,
    pub(super) vcpus: f64,
    /// Reasons for which the guest is paused.
    pub(super) paused: Vec<String>,
    pub(super) memory: Memory,
    /// In the order of [`FAULTS`], since the start.
    pub(super) faults: [f64; FAULTS.len()],
    pub(super) outstanding: f64,
    /// In the order of [`AGES`].
    pub(super) ages: [f64; AGES.len()],
    /// The age of the oldest fetch, in seconds.
    pub(super) oldest: f64,
    /// By vCPU; empty where faults do not come to their threads.
    pub(super) stalls: Vec<Stalls>,
    pub(super) async_pf: Option<AsyncPf>,
    /// The front one first.
    pub(super) tiers: Vec<Tier>,
    /// How long fetches took: upper bounds in seconds, and how many took at most that.
    pub(super) fetches: Vec<(f64, f64)>,
}

/// Guest RAM, in bytes.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Memory {
    pub(super) total: f64,
    pub(super) resident: f64,
    /// Host memory that holds stored pages; counts towards the limit.
    pub(super) store: f64,
    pub(super) limit: Option<f64>,
    pub(super) exceeded: bool,
}

/// The stalls of a vCPU, since the start and in the order of [`Cause::ALL`].
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Stalls {
    /// Seconds that the stall has lasted that it is in; 0 in none.
    pub(super) now: f64,
    pub(super) counts: [f64; CAUSES],
    /// Of stalls that are over.
    pub(super) seconds: [f64; CAUSES],
}

impl Stalls {
    /// Seconds in stalls, the one that goes on included.
    pub(super) fn stalled(&self) -> f64 {
        self.seconds.iter().sum::<f64>() + self.now
    }

    /// How many are over.
    pub(super) fn count(&self) -> f64 {
        self.counts.iter().sum()
    }
}

/// What async page faults of nowait's own did.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct AsyncPf {
    /// In seconds.
    pub(super) threshold: f64,
    pub(super) outstanding: f64,
    /// In the order of [`OUTCOMES`], since the start.
    pub(super) outcomes: [f64; OUTCOMES.len()],
}

/// A tier of the store.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Tier {
    pub(super) name: String,
    pub(super) pages: f64,
    /// Bytes that it holds for them.
    pub(super) stored: f64,
    /// Pages read by workers, since the start.
    pub(super) reads: f64,
    /// Pages read without waiting, since the start.
    pub(super) hits: f64,
    pub(super) errors: f64,
    /// Quantiles 0.5, 0.99 and 1 of its reads since the start, in seconds.
    pub(super) read: [f64; 3],
    /// The same of its writes.
    pub(super) write: [f64; 3],
}

/// Why a text is no snapshot.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum BadMetrics {
    /// It cannot be read at all.
    #[error("its metrics cannot be read: {0}")]
    Unreadable(String),
    /// It is somebody else's.
    #[error("its metrics have no nowait_info")]
    NotNowait,
}

impl Snapshot {
    /// Reads the text.
    ///
    /// # Errors
    /// When it is not nowait's. What is missing in one that is, is 0.
    pub(super) fn parse(text: &str) -> Result<Self, BadMetrics> {
        let ours = text
            .lines()
            .filter(|line| line.starts_with("nowait_") || line.starts_with("# TYPE nowait_"));
        let scrape = Scrape::parse(ours.map(|line| Ok(shield(line))))
            .map_err(|error| BadMetrics::Unreadable(error.to_string()))?;
        let mut snapshot = Self::default();
        let mut is_ours = false;
        for sample in &scrape.samples {
            is_ours |= sample.metric == "nowait_info";
            snapshot.take(sample);
        }
        snapshot.paused.sort();
        snapshot.fetches.sort_by(|a, b| a.0.total_cmp(&b.0));
        if is_ours { Ok(snapshot) } else { Err(BadMetrics::NotNowait) }
    }

    fn take(&mut self, sample: &Sample) {
        let label = |name: &str| sample.labels.get(name).unwrap_or("");
        let value = number(&sample.value);
        let metric = sample.metric.as_str();
        let memory = &mut self.memory;
        match metric {
            "nowait_info" => {
                self.version = name(label("version"));
                self.apf = name(label("apf"));
                self.fault_source = name(label("fault_source"));
            }
            "nowait_uptime_seconds" => self.uptime = value,
            "nowait_vcpus" => self.vcpus = value,
            "nowait_paused" if value > 0.0 && self.paused.len() < 3 => {
                self.paused.push(name(label("reason")));
            }
            "nowait_total_bytes" => memory.total = value,
            "nowait_resident_bytes" => memory.resident = value,
            "nowait_store_memory_bytes" => memory.store = value,
            "nowait_resident_limit_bytes" => memory.limit = Some(value),
            "nowait_limit_exceeded" => memory.exceeded = value > 0.0,
            "nowait_outstanding" => self.outstanding = value,
            "nowait_outstanding_oldest_seconds" => self.oldest = value,
            "nowait_outstanding_by_age" => put(&mut self.ages, &AGES, label("below"), value),
            "nowait_fetch_seconds" => self.fetches = buckets(&sample.value),
            _ if metric.starts_with("nowait_vcpu_stall") => self.take_stalls(sample, value),
            _ if metric.starts_with("nowait_async_pf_") => self.take_async_pf(sample, value),
            _ if metric.starts_with("nowait_tier_") => self.take_tier(sample, value),
            _ => {
                let at = FAULTS.iter().position(|(_, fault)| *fault == metric);
                if let Some(fault) = at.and_then(|at| self.faults.get_mut(at)) {
                    *fault = value;
                }
            }
        }
    }

    fn take_stalls(&mut self, sample: &Sample, value: f64) {
        let Some(vcpu) = at(&mut self.stalls, sample.labels.get("vcpu"), MAX_VCPUS) else { return };
        let cause = sample.labels.get("cause");
        let cause = Cause::ALL.iter().position(|known| cause == Some(known.name()));
        match (sample.metric.as_str(), cause) {
            ("nowait_vcpu_stalled_seconds", _) => vcpu.now = value,
            ("nowait_vcpu_stalls_total", Some(cause)) => vcpu.counts[cause] = value,
            ("nowait_vcpu_stall_seconds_total", Some(cause)) => vcpu.seconds[cause] = value,
            _ => {}
        }
    }

    fn take_async_pf(&mut self, sample: &Sample, value: f64) {
        let async_pf = self.async_pf.get_or_insert_default();
        match sample.metric.as_str() {
            "nowait_async_pf_threshold_seconds" => async_pf.threshold = value,
            "nowait_async_pf_outstanding" => async_pf.outstanding = value,
            "nowait_async_pf_faults_total" => {
                let outcome = sample.labels.get("outcome").unwrap_or("");
                // One for each mode of the guest.
                put(&mut async_pf.outcomes, &OUTCOMES, outcome, value);
            }
            _ => {}
        }
    }

    fn take_tier(&mut self, sample: &Sample, value: f64) {
        let Some(tier) = at(&mut self.tiers, sample.labels.get("level"), MAX_TIERS) else { return };
        if let Some(shown) = sample.labels.get("tier") {
            tier.name = name(shown);
        }
        let quantile = match sample.labels.get("quantile") {
            Some("0.5") => Some(0),
            Some("0.99") => Some(1),
            Some("1") => Some(2),
            _ => None,
        };
        match (sample.metric.as_str(), quantile) {
            ("nowait_tier_pages", _) => tier.pages = value,
            ("nowait_tier_stored_bytes", _) => tier.stored = value,
            ("nowait_tier_reads_total", _) => tier.reads = value,
            ("nowait_tier_hits_total", _) => tier.hits = value,
            ("nowait_tier_read_errors_total" | "nowait_tier_write_errors_total", _) => {
                tier.errors += value;
            }
            ("nowait_tier_read_seconds", Some(quantile)) => tier.read[quantile] = value,
            ("nowait_tier_write_seconds", Some(quantile)) => tier.write[quantile] = value,
            _ => {}
        }
    }
}

/// Adds a value to that of its label.
fn put(values: &mut [f64], labels: &[(&str, &str)], label: &str, value: f64) {
    let at = labels.iter().position(|(_, known)| *known == label);
    if let Some(sum) = at.and_then(|at| values.get_mut(at)) {
        *sum += value;
    }
}

/// The entry of a list that a label numbers; the list grows up to a bound.
fn at<'a, T: Default>(list: &'a mut Vec<T>, label: Option<&str>, most: usize) -> Option<&'a mut T> {
    let index: usize = label?.parse().ok().filter(|index| *index < most)?;
    while list.len() <= index {
        list.push(T::default());
    }
    list.get_mut(index)
}

fn number(value: &Value) -> f64 {
    match value {
        Value::Counter(value) | Value::Gauge(value) | Value::Untyped(value) => sane(*value),
        Value::Histogram(_) | Value::Summary(_) => 0.0,
    }
}

fn sane(value: f64) -> f64 {
    if value.is_nan() { 0.0 } else { value.clamp(0.0, MAX_NUMBER) }
}

fn buckets(value: &Value) -> Vec<(f64, f64)> {
    let Value::Histogram(buckets) = value else { return Vec::new() };
    let buckets = buckets.iter().take(MAX_BUCKETS);
    buckets.map(|bucket| (sane(bucket.less_than), sane(bucket.count))).collect()
}

/// What the parser takes for the end of a label, wherever it stands, and what stands for it within quotes.
const SHIELDS: [(char, char); 5] =
    [('=', '\u{1}'), (',', '\u{2}'), ('{', '\u{3}'), ('}', '\u{4}'), ('"', '\u{5}')];

/// A line whose labels' values have nothing in them that the parser would stumble over.
fn shield(line: &str) -> String {
    let (mut quoted, mut escaped) = (false, false);
    let sign = |sign: char| {
        let is_escaped = std::mem::take(&mut escaped);
        match sign {
            '\\' if quoted && !is_escaped => {
                escaped = true;
                return None;
            }
            '"' if !is_escaped => {
                quoted = !quoted;
                return Some('"');
            }
            'n' if is_escaped => return Some(' '),
            _ => {}
        }
        let shield = SHIELDS.iter().find(|(known, _)| quoted && *known == sign);
        Some(shield.map_or(sign, |(_, shield)| *shield))
    };
    line.chars().filter_map(sign).collect()
}

/// A name that can be printed.
fn name(text: &str) -> String {
    let unshield = |sign| SHIELDS.iter().find(|(_, shield)| *shield == sign).map_or(sign, |s| s.0);
    text.chars().map(unshield).filter(|c| !c.is_control()).take(MAX_NAME).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn text_of_somebody_else_is_refused() {
        for text in ["", "hello", "go_goroutines 7\n", "nowait_vcpus 2\n"] {
            assert_eq!(Snapshot::parse(text), Err(BadMetrics::NotNowait), "{text}");
        }
    }

    #[test]
    fn numbers_find_their_place() {
        let text = r#"
# TYPE nowait_info gauge
nowait_info{version="0.1.0",apf="user",fault_source="marker"} 1
nowait_uptime_seconds 12.5
nowait_paused{reason="user"} 1
nowait_paused{reason="store"} 0
nowait_resident_limit_bytes 4194304
nowait_hits_stored_total 7
nowait_outstanding_by_age{below="0.1"} 3
nowait_vcpu_stalls_total{vcpu="1",cause="waited"} 5
nowait_vcpu_stall_seconds_total{vcpu="1",cause="waited"} 0.5
nowait_vcpu_stalled_seconds{vcpu="1"} 0.25
nowait_async_pf_faults_total{outcome="notified",mode="user"} 2
nowait_async_pf_faults_total{outcome="notified",mode="kernel"} 3
nowait_async_pf_threshold_seconds 0.0005
nowait_tier_pages{level="1",tier="delay=20ms"} 9
nowait_tier_read_seconds{level="1",tier="delay",quantile="0.99"} 0.02
# TYPE nowait_fetch_seconds histogram
nowait_fetch_seconds_bucket{le="0.1"} 2
nowait_fetch_seconds_bucket{le="+Inf"} 3
"#;
        let snapshot = Snapshot::parse(text).unwrap();
        assert_eq!((&*snapshot.apf, snapshot.uptime), ("user", 12.5));
        assert_eq!(snapshot.paused, ["user"]);
        assert_eq!(snapshot.memory.limit, Some(4_194_304.0));
        assert_eq!(snapshot.faults, [0.0, 0.0, 7.0, 0.0, 0.0]);
        assert_eq!(snapshot.ages, [0.0, 0.0, 3.0, 0.0, 0.0, 0.0]);
        assert_eq!(snapshot.stalls.len(), 2);
        assert_eq!((snapshot.stalls[1].count(), snapshot.stalls[1].stalled()), (5.0, 0.75));
        let async_pf = snapshot.async_pf.unwrap();
        assert_eq!((async_pf.outcomes[0], async_pf.threshold), (5.0, 0.0005));
        assert_eq!((snapshot.tiers[1].pages, snapshot.tiers[1].read[1]), (9.0, 0.02));
        assert_eq!(snapshot.fetches, [(0.1, 2.0), (MAX_NUMBER, 3.0)]);
    }

    #[test]
    fn names_may_have_anything_in_them() {
        let text = "nowait_info{apf=\"user\"} 1\n\
                    nowait_tier_pages{level=\"0\",tier=\"delay=20ms, {\\\"x\\\"}\\\\\"} 3\n";
        let snapshot = Snapshot::parse(text).unwrap();
        assert_eq!(snapshot.tiers[0].name, r#"delay=20ms, {"x"}\"#);
        assert_eq!(snapshot.tiers[0].pages, 3.0);
    }

    #[test]
    fn hostile_numbers_are_bounded() {
        let text = "nowait_info{apf=\"\x1b[2Jx\"} 1\nnowait_uptime_seconds NaN\nnowait_vcpus -7\n\
                    nowait_total_bytes +Inf\nnowait_outstanding 1e300\n\
                    nowait_vcpu_stalled_seconds{vcpu=\"4294967295\"} 1\n\
                    nowait_tier_pages{level=\"-1\"} 1\n";
        let snapshot = Snapshot::parse(text).unwrap();
        assert_eq!(snapshot.apf, "[2Jx");
        assert_eq!((snapshot.uptime, snapshot.vcpus), (0.0, 0.0));
        assert_eq!((snapshot.memory.total, snapshot.outstanding), (MAX_NUMBER, MAX_NUMBER));
        assert!(snapshot.stalls.is_empty() && snapshot.tiers.is_empty());
    }

    proptest! {
        #[test]
        fn any_text_comes_to_an_end(text in r#"(# TYPE |nowait_|info|vcpu_stalls_total|tier_|fetch_seconds_bucket|[{}=," \n]|le|vcpu|level|[0-9.e+-]{0,12}|\PC){0,80}"#) {
            let _ = Snapshot::parse(&text);
        }
    }
}

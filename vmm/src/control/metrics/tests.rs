//! The text as another implementation's parser reads it, and against `--json`.

use std::collections::HashSet;

use crate::paging::Costs;
use async_pf::protocol::ProtocolStats;
use prometheus_parse::{Scrape, Value};

use super::*;

fn snapshot() -> Snapshot {
    let tier = |name: &str, pages| TierReport {
        name: name.into(),
        pages,
        stored_bytes: pages * 1024,
        hits: 5,
        ..TierReport::default()
    };
    let mut pager = PagerStats { evicted_pages: 3, ..PagerStats::default() };
    pager.tiers = vec![tier("lz4", 7), tier("odd \"name\"\\", 0), tier("lz4", 1)];
    pager.fetch_latency.counts[0] = 2;
    pager.fetch_latency.counts[12] = 1;
    pager.fetch_latency.sum_us = 20_000_000;
    let mut pool = PoolStats { workers: 4, ..PoolStats::default() };
    pool.waited[Class::Prefetch.index()][3] = 6;
    pool.waited_us[Class::Prefetch.index()] = 42;
    Snapshot {
        facts: Facts {
            apf: Apf::Kernel,
            fault_source: FaultSource::Uffd,
            cpus: 2,
            started: Instant::now(),
        },
        uptime: Duration::from_millis(1500),
        pauses: Pauses { store: true, ..Pauses::default() },
        vcpus_waiting: 2,
        health: Health { reads: Some("why".into()), ..Health::default() },
        pager,
        pool,
        async_pf: Some(async_pf_stats()),
        fetch_ages: FetchAges {
            counts: [1, 0, 2, 0, 4],
            unknown: 5,
            oldest: Duration::from_secs(3),
        },
        stalls: Some(vec![
            vcpu(0, 0, None),
            vcpu(7, 1_500_000_000, Some(Duration::from_millis(250))),
        ]),
    }
}

/// A vCPU whose stalls were all waits.
fn vcpu(count: u64, ns: u64, current: Option<Duration>) -> VcpuSnapshot {
    let mut totals = [Total::default(); Cause::ALL.len()];
    totals[Cause::Waited as usize] = Total { count, ns };
    VcpuSnapshot { totals, current }
}

fn async_pf_stats() -> AsyncPfStats {
    let mut protocol = ProtocolStats { ready_sent: 9, ..ProtocolStats::default() };
    protocol.notified[Mode::User as usize] = 8;
    protocol.refused[Mode::Kernel as usize][Refusal::KernelMode as usize] = 2;
    AsyncPfStats { threshold_us: 50, exit_ns: 0, costs: Costs::default(), outstanding: 3, protocol }
}

fn parse(text: &str) -> Scrape {
    Scrape::parse(text.lines().map(|line| Ok(line.to_owned()))).unwrap()
}

fn value<'a>(scrape: &'a Scrape, name: &str, labels: &[(&str, &str)]) -> &'a Value {
    let mut found = scrape.samples.iter().filter(|sample| {
        sample.metric == name
            && labels.iter().all(|(name, value)| sample.labels.get(name) == Some(value))
    });
    let first = found.next().unwrap_or_else(|| panic!("no {name} {labels:?}"));
    assert!(found.next().is_none(), "more than one {name} {labels:?}");
    &first.value
}

#[test]
fn values_arrive_with_their_types_and_labels() {
    let text = render(&snapshot());
    let scrape = parse(&text);
    let get = |name, labels: &[_]| value(&scrape, name, labels).clone();
    assert_eq!(get("nowait_uptime_seconds", &[]), Value::Gauge(1.5));
    assert_eq!(
        get("nowait_info", &[("apf", "kernel"), ("fault_source", "uffd")]),
        Value::Gauge(1.0)
    );
    assert_eq!(get("nowait_paused", &[("reason", "store")]), Value::Gauge(1.0));
    assert_eq!(get("nowait_paused", &[("reason", "user")]), Value::Gauge(0.0));
    assert_eq!(get("nowait_vcpus_paused", &[]), Value::Gauge(2.0));
    assert_eq!(get("nowait_store_failing", &[("operation", "read")]), Value::Gauge(1.0));
    assert_eq!(get("nowait_evicted_pages_total", &[]), Value::Counter(3.0));
    assert_eq!(
        get("nowait_tier_hits_total", &[("level", "2"), ("tier", "lz4")]),
        Value::Counter(5.0)
    );
    let ratio = get("nowait_tier_compression_ratio", &[("level", "0")]);
    assert_eq!(ratio, Value::Gauge(4.0));
    assert_eq!(get("nowait_workers", &[]), Value::Gauge(4.0));
    let labels = [("outcome", "notified"), ("mode", "user")];
    assert_eq!(get("nowait_async_pf_faults_total", &labels), Value::Counter(8.0));
    let labels = [("reason", "kernel_mode"), ("mode", "kernel")];
    assert_eq!(get("nowait_async_pf_refused_total", &labels), Value::Counter(2.0));
    assert_eq!(get("nowait_async_pf_threshold_seconds", &[]), Value::Gauge(0.000_05));
    assert!(text.contains(r#"tier="odd \"name\"\\""#), "{text}");
    assert!(!text.contains("nowait_resident_limit_bytes"), "there is none");
}

#[test]
fn stalls_are_shown_by_vcpu_and_cause_and_ages_by_bound() {
    let text = render(&snapshot());
    let scrape = parse(&text);
    let get = |name, labels: &[_]| value(&scrape, name, labels).clone();
    let waited = [("vcpu", "1"), ("cause", "waited")];
    assert_eq!(get("nowait_vcpu_stalls_total", &waited), Value::Counter(7.0));
    assert_eq!(get("nowait_vcpu_stall_seconds_total", &waited), Value::Counter(1.5));
    let told = [("vcpu", "1"), ("cause", "told")];
    assert_eq!(get("nowait_vcpu_stalls_total", &told), Value::Counter(0.0));
    assert_eq!(get("nowait_vcpu_stalled_seconds", &[("vcpu", "0")]), Value::Gauge(0.0));
    assert_eq!(get("nowait_vcpu_stalled_seconds", &[("vcpu", "1")]), Value::Gauge(0.25));
    for (below, count) in
        [("0.001", 1.0), ("0.1", 2.0), ("1", 0.0), ("+Inf", 4.0), ("unknown", 5.0)]
    {
        assert_eq!(get("nowait_outstanding_by_age", &[("below", below)]), Value::Gauge(count));
    }
    assert_eq!(get("nowait_outstanding_oldest_seconds", &[]), Value::Gauge(3.0));
    // Where faults do not come to the vCPUs' threads, no stall is not the same as none seen.
    let blind = render(&Snapshot { stalls: None, ..snapshot() });
    assert!(!blind.contains("vcpu_stall"), "{blind}");
}

#[test]
fn histograms_are_cumulative() {
    let text = render(&snapshot());
    let scrape = parse(&text);
    let Value::Histogram(buckets) = value(&scrape, "nowait_fetch_seconds", &[]) else {
        panic!("no histogram in {text}");
    };
    let ends = (&buckets[0], buckets.last().unwrap());
    assert_eq!((ends.0.less_than, ends.0.count), (0.000_01, 2.0));
    assert_eq!((ends.1.less_than, ends.1.count), (f64::INFINITY, 3.0));
    assert!(text.contains("nowait_fetch_seconds_sum 20\n"), "{text}");
    assert!(text.contains("nowait_fetch_seconds_count 3\n"), "{text}");
    let line = |bound, count| {
        format!(r#"nowait_work_wait_seconds_bucket{{class="prefetch",le="{bound}"}} {count}"#)
    };
    for line in [line("0.000004", 0), line("0.000008", 6), line("+Inf", 6)] {
        assert!(text.contains(&line), "{line} is not in\n{text}");
    }
}

#[test]
fn the_text_keeps_to_the_format() {
    let text = render(&snapshot());
    assert!(text.ends_with('\n'));
    let (mut families, mut series, mut family) = (HashSet::new(), HashSet::new(), "");
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            family = rest.split(' ').next().unwrap();
            assert!(families.insert(family), "{family} comes twice");
            assert!(rest.ends_with('.'), "{line}");
        } else if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').unwrap();
            assert_eq!(name, family);
            assert_eq!(kind == "counter", name.ends_with("_total"), "{line}");
        } else {
            let (name, number) = line.rsplit_once(' ').unwrap();
            assert!(name.starts_with(family) && name.starts_with("nowait_"), "{line}");
            assert!(series.insert(name), "{name} comes twice");
            assert!(number.parse::<f64>().is_ok(), "{line}");
        }
    }
    assert!(families.len() > 50, "{families:?}");
}

#[test]
fn every_number_of_the_summary_is_shown() {
    let mut pager = PagerStats { resident_limit_bytes: Some(1 << 30), ..PagerStats::default() };
    pager.tiers =
        vec![TierReport { capacity_bytes: Some(1), stored_bytes: 1, ..TierReport::default() }];
    let text = render(&Snapshot { pager: pager.clone(), ..snapshot() });
    let shown = |name: &str| {
        ["", "_total"].iter().any(|end| text.contains(&format!("# TYPE nowait_{name}{end} ")))
    };
    let json = serde_json::to_value(&pager).unwrap();
    for (key, value) in json.as_object().unwrap() {
        assert!(value.is_array() || value.is_object() || shown(key), "{key} is not in /metrics");
    }
    for (key, value) in json["tiers"][0].as_object().unwrap() {
        let name = format!("tier_{key}");
        assert!(!value.is_number() || shown(&name), "{name} is not in /metrics");
    }
}

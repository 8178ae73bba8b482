//! What `GET /metrics` shows: a snapshot of a run as Prometheus text. No sockets and no pager here.
//!
//! Names follow the fields of `--json`; counters end in `_total`, and units are seconds and bytes.

use std::time::{Duration, Instant};

use async_pf::protocol::{Mode, Refusal};
use async_pf::{Class, PoolStats};
use guest_memory::stores::{LatencyReport, TierReport};
use guest_memory::{AGE_BOUNDS_US, FetchAges, Health, LATENCY_BOUNDS_US, PAGE_BYTES, PagerStats};
use nowait_wire::agent::Cause;
use prometheus::TextEncoder;

use super::families::{Distribution, Families};
use crate::kvm::cpuid::Apf;
use crate::paging::{AsyncPfStats, FaultSource};
use crate::stalls::Total;
use crate::threads::Pauses;

/// What does not change during a run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Facts {
    /// Who handles async page faults.
    pub(crate) apf: Apf,
    /// How faults come to the pager.
    pub(crate) fault_source: FaultSource,
    /// Processors.
    pub(crate) cpus: u32,
    /// When the first of them was started.
    pub(crate) started: Instant,
}

/// A run at one moment, nearly.
#[derive(Debug)]
pub(super) struct Snapshot {
    pub(super) facts: Facts,
    /// Since the start.
    pub(super) uptime: Duration,
    pub(super) pauses: Pauses,
    /// vCPUs that are kept out of the guest.
    pub(super) vcpus_waiting: u32,
    pub(super) health: Health,
    pub(super) pager: PagerStats,
    pub(super) pool: PoolStats,
    pub(super) async_pf: Option<AsyncPfStats>,
    pub(super) fetch_ages: FetchAges,
    /// By vCPU; `None` where faults do not come to the vCPUs' threads.
    pub(super) stalls: Option<Vec<VcpuSnapshot>>,
}

/// The stalls of one vCPU.
#[derive(Debug)]
pub(super) struct VcpuSnapshot {
    /// In the order of [`Cause::ALL`].
    pub(super) totals: [Total; Cause::ALL.len()],
    /// How long the stall has lasted that it is in.
    pub(super) current: Option<Duration>,
}

/// Shows it.
pub(super) fn render(snapshot: &Snapshot) -> String {
    let mut families = Families::default();
    run(&mut families, snapshot);
    if let Some(vcpus) = &snapshot.stalls {
        stalls(&mut families, vcpus);
    }
    pager(&mut families, &snapshot.pager);
    ages(&mut families, &snapshot.fetch_ages);
    tiers(&mut families, &snapshot.pager);
    pool(&mut families, &snapshot.pool);
    if let Some(stats) = &snapshot.async_pf {
        async_pf(&mut families, stats);
    }
    // It refuses only families without name or samples, and there are none.
    TextEncoder::new().encode_to_string(&families.into_vec()).unwrap_or_default()
}

fn run(families: &mut Families, snapshot: &Snapshot) {
    let Snapshot { facts, pauses, health, .. } = snapshot;
    let (apf, source) = (facts.apf.to_string(), facts.fault_source.to_string());
    let version = env!("CARGO_PKG_VERSION");
    let labels = [("version", version), ("apf", &apf), ("fault_source", &source)];
    families.gauges("info", "The run.", [(&labels[..], 1.0)]);
    families.gauge("uptime_seconds", "Time since the start.", snapshot.uptime.as_secs_f64());
    families.gauge("vcpus", "Processors of the guest.", facts.cpus.into());
    let help = "Processors that are kept out of the guest because it is paused.";
    families.gauge("vcpus_paused", help, snapshot.vcpus_waiting.into());
    families.gauges(
        "paused",
        "Whether the guest is paused for this reason.",
        [
            (&[("reason", "memory")][..], flag(pauses.memory)),
            (&[("reason", "store")][..], flag(pauses.store)),
            (&[("reason", "user")][..], flag(pauses.user)),
        ],
    );
    let help = "Whether pages wait for memory of the host again and again.";
    families.gauge("memory_failing", help, flag(health.memory.is_some()));
    families.gauges(
        "store_failing",
        "Whether the store fails reads or writes again and again.",
        [
            (&[("operation", "read")][..], flag(health.reads.is_some())),
            (&[("operation", "write")][..], flag(health.writes.is_some())),
        ],
    );
}

/// Where faults come to the vCPUs' threads: how long pages kept each of them from its guest.
fn stalls(families: &mut Families, vcpus: &[VcpuSnapshot]) {
    let names: Vec<String> = (0..vcpus.len()).map(|vcpu| vcpu.to_string()).collect();
    let totals: Vec<_> = names
        .iter()
        .zip(vcpus)
        .flat_map(|(name, vcpu)| {
            let causes = Cause::ALL.iter().zip(&vcpu.totals);
            causes.map(move |(cause, total)| ([("vcpu", &**name), ("cause", cause.name())], total))
        })
        .collect();
    let samples = totals.iter().map(|(labels, total)| (&labels[..], total.count));
    families.counters("vcpu_stalls_total", "Stalls of a vCPU by a page that are over.", samples);
    let samples = totals.iter().map(|(labels, total)| (&labels[..], total.ns as f64 / 1e9));
    let help = "How long the stalls of a vCPU took that are over.";
    families.seconds("vcpu_stall_seconds_total", help, samples);
    let labels: Vec<_> = names.iter().map(|name| [("vcpu", &**name)]).collect();
    let now = |vcpu: &VcpuSnapshot| vcpu.current.unwrap_or_default().as_secs_f64();
    let samples = labels.iter().zip(vcpus).map(|(labels, vcpu)| (&labels[..], now(vcpu)));
    let help = "How long the stall has lasted that a vCPU is in; 0 in none.";
    families.gauges("vcpu_stalled_seconds", help, samples);
}

/// Fetches that are under way.
fn ages(families: &mut Families, ages: &FetchAges) {
    let bounds = AGE_BOUNDS_US.iter().map(|us| (*us as f64 / 1e6).to_string());
    let bounds: Vec<String> = bounds.chain(["+Inf".to_owned()]).collect();
    let labels: Vec<_> = bounds.iter().map(|bound| [("below", &**bound)]).collect();
    let counts = ages.counts.map(|count| count as f64);
    let known = labels.iter().zip(counts).map(|(labels, count)| (&labels[..], count));
    let unknown = [(&[("below", "unknown")][..], ages.unknown as f64)];
    let help =
        "Fetches under way by their age: below so many seconds, but not below the bound before.";
    families.gauges("outstanding_by_age", help, known.chain(unknown));
    let help = "The age of the oldest fetch that is under way.";
    families.gauge("outstanding_oldest_seconds", help, ages.oldest.as_secs_f64());
}

/// A number of [`PagerStats`], under its own name.
struct Field {
    name: &'static str,
    help: &'static str,
    read: fn(&PagerStats) -> u64,
}

macro_rules! fields {
    ($($name:ident: $help:literal,)*) => {
        &[$(Field { name: stringify!($name), help: $help, read: |stats| stats.$name },)*]
    };
}

const GAUGES: &[Field] = fields! {
    total_bytes: "Guest RAM.",
    resident_bytes: "Guest RAM that is in memory.",
    store_memory_bytes: "Host memory that holds stored pages; counts towards the resident limit.",
    stored_bytes: "Bytes of guest pages that are in the store only.",
    mapped_pages: "Pages that the guest can access, as far as a resident limit has them counted.",
    idle_pages: "Pages in memory that the guest has to fault on, likewise.",
    pager_bytes_per_page: "What the pager keeps for each page that was touched or stored.",
    outstanding: "Fetches under way.",
    outstanding_max: "The most fetches that were under way at once.",
};

const COUNTERS: &[Field] = fields! {
    pages_touched: "Pages that were ever installed.",
    pages_loaded: "Pages that the loader wrote before the start.",
    messages_missing: "userfaultfd messages about pages that are not in memory.",
    messages_minor: "userfaultfd messages about pages in memory that are not mapped (minor faults).",
    messages_joined: "userfaultfd messages about pages that were on their way already.",
    messages_duplicate: "userfaultfd messages about pages that were mapped already.",
    zero_faults: "Faults answered with a zero page.",
    fault_around_pages: "Zero pages installed along with another page's fault.",
    hits_idle: "Faults on pages that were in memory.",
    hits_stored: "Faults on pages that the store had at hand.",
    joined: "Faults on pages that another thread was at.",
    retries: "Faults that were left to a worker.",
    remapped_pages: "Pages whose mapping the host had taken.",
    fetched_pages: "Pages that workers fetched from the store.",
    prefetched_pages: "Of these, pages fetched ahead of a fault.",
    refaults: "Pages that came back so soon that they should not have been evicted.",
    unmapped_pages: "Pages taken out of the guest mapping.",
    evicted_pages: "Pages moved to the store.",
    clean_pages: "Of these, pages whose older copy in the store was still good.",
    late_stores: "Pages that were used while they were written to the store.",
    install_retries: "Installations that the kernel put off.",
    memory_waits: "Tries to fill or map a page that the host had no memory for.",
    markers: "Poison markers put on pages.",
    marker_errors: "Poison markers that the kernel refused.",
    read_errors: "Reads of the store that failed; each was tried again.",
    write_errors: "Pages that the store did not take.",
    free_errors: "Slots that the store would not free.",
};

fn pager(families: &mut Families, stats: &PagerStats) {
    for field in GAUGES {
        families.gauge(field.name, field.help, (field.read)(stats) as f64);
    }
    let limit = stats.resident_limit_bytes.map(|bytes| (&[][..], bytes as f64));
    families.gauges("resident_limit_bytes", "The resident limit; absent without one.", limit);
    let help = "Whether the resident limit may be exceeded because evictions fail.";
    families.gauge("limit_exceeded", help, flag(stats.limit_exceeded));
    for field in COUNTERS {
        families.counter(&format!("{}_total", field.name), field.help, (field.read)(stats));
    }
    let latency = &stats.fetch_latency;
    let fetches = distribution(&LATENCY_BOUNDS_US, &latency.counts, latency.sum_us);
    let help = "How long fetches took, from the worker's start to the bytes.";
    families.histograms("fetch_seconds", help, [(&[][..], fetches)]);
}

/// Our async page faults.
fn async_pf(families: &mut Families, stats: &AsyncPfStats) {
    let AsyncPfStats { threshold_us, outstanding, protocol, .. } = stats;
    let help = "Pages that are outstanding or whose page-ready is unacknowledged.";
    families.gauge("async_pf_outstanding", help, *outstanding as f64);
    let help = "A page that is expected sooner is waited for.";
    families.gauge("async_pf_threshold_seconds", help, *threshold_us as f64 / 1e6);
    let by_outcome = [
        ("avoided", &protocol.avoided),
        ("notified", &protocol.notified),
        ("halted", &protocol.halted),
        ("waited", &protocol.waited),
    ];
    let labels: Vec<_> = by_outcome
        .iter()
        .flat_map(|(outcome, by_mode)| {
            let modes = Mode::ALL.iter().zip(by_mode.iter());
            modes.map(move |((_, mode), count)| ([("outcome", *outcome), ("mode", *mode)], *count))
        })
        .collect();
    families.counters(
        "async_pf_faults_total",
        "Faults on pages that were not at hand, by what became of them.",
        labels.iter().map(|(labels, count)| (&labels[..], *count)),
    );
    let labels: Vec<_> = Mode::ALL
        .iter()
        .zip(&protocol.refused)
        .flat_map(|((_, mode), by_reason)| {
            let reasons = Refusal::ALL.iter().zip(by_reason);
            reasons.map(move |((_, why), count)| ([("reason", *why), ("mode", *mode)], *count))
        })
        .collect();
    families.counters(
        "async_pf_refused_total",
        "Why page-not-present was not sent.",
        labels.iter().map(|(labels, count)| (&labels[..], *count)),
    );
    for (name, help, count) in [
        ("ready_sent", "page-ready that were sent, wake-alls included.", protocol.ready_sent),
        ("ready_acknowledged", "page-ready that were acknowledged.", protocol.ready_acknowledged),
        ("wake_alls", "page-ready that woke every task.", protocol.wake_alls),
        ("cancelled", "Announced pages whose page-ready is never sent.", protocol.cancelled),
        ("interrupts_refused", "Interrupts that no APIC took.", protocol.interrupts_refused),
        ("resets", "INITs that were noticed.", protocol.resets),
    ] {
        families.counter(&format!("async_pf_{name}_total"), help, count);
    }
}

/// A number of [`TierReport`].
type TierField = (&'static str, &'static str, fn(&TierReport) -> u64);

const TIER_GAUGES: &[TierField] = &[
    ("tier_pages", "Pages that the tier holds.", |t| t.pages),
    ("tier_stored_bytes", "Bytes that the tier holds for its pages.", |t| t.stored_bytes),
    ("tier_memory_bytes", "Host memory that the tier takes for them.", |t| t.memory_bytes),
    ("tier_metadata_bytes", "Host memory for the tier's tables.", |t| t.metadata_bytes),
];

const TIER_COUNTERS: &[TierField] = &[
    ("tier_hits_total", "Pages read from the tier without waiting.", |t| t.hits),
    ("tier_reads_total", "Pages read from the tier by workers.", |t| t.reads),
    ("tier_writes_total", "Pages written to the tier.", |t| t.writes),
    ("tier_demotions_total", "Pages that moved on to the tier behind.", |t| t.demotions),
    ("tier_read_errors_total", "Reads of the tier that failed.", |t| t.read_errors),
    ("tier_write_errors_total", "Writes to the tier that failed.", |t| t.write_errors),
];

/// Latencies of [`TierReport`].
type TierLatency = (&'static str, &'static str, fn(&TierReport) -> LatencyReport);

/// Quantiles, since that is what tiers keep: upper bounds, at most an eighth too large.
const TIER_LATENCIES: &[TierLatency] = &[
    ("tier_read_seconds", "How long reads of the tier took, batches as a whole.", |t| {
        t.read_latency
    }),
    ("tier_write_seconds", "How long writes to the tier took, batches as a whole.", |t| {
        t.write_latency
    }),
];

fn tiers(families: &mut Families, stats: &PagerStats) {
    // Two tiers may have one name, but not one level; 0 is the front one.
    let levels: Vec<String> = (0..stats.tiers.len()).map(|level| level.to_string()).collect();
    let labels = |(level, tier)| {
        let (level, tier): (&String, &TierReport) = (level, tier);
        [("level", level.as_str()), ("tier", tier.name.as_str())]
    };
    let tiers: Vec<_> =
        levels.iter().zip(&stats.tiers).map(|both| (labels(both), both.1)).collect();
    for (name, help, read) in TIER_GAUGES {
        let samples = tiers.iter().map(|(labels, tier)| (&labels[..], read(tier) as f64));
        families.gauges(name, help, samples);
    }
    let bounded = tiers
        .iter()
        .filter_map(|(labels, tier)| tier.capacity_bytes.map(|bytes| (&labels[..], bytes as f64)));
    families.gauges(
        "tier_capacity_bytes",
        "What the tier may hold; absent without bound.",
        bounded,
    );
    let ratios = tiers.iter().filter(|(_, tier)| tier.stored_bytes > 0).map(|(labels, tier)| {
        (&labels[..], (tier.pages * PAGE_BYTES) as f64 / tier.stored_bytes as f64)
    });
    families.gauges("tier_compression_ratio", "Bytes of pages for each byte that is held.", ratios);
    for (name, help, read) in TIER_COUNTERS {
        families.counters(name, help, tiers.iter().map(|(labels, tier)| (&labels[..], read(tier))));
    }
    for (name, help, read) in TIER_LATENCIES {
        let quantiles = tiers.iter().flat_map(|(labels, tier)| {
            let LatencyReport { p50_us, p99_us, max_us, .. } = read(tier);
            [("0.5", p50_us), ("0.99", p99_us), ("1", max_us)]
                .map(|(quantile, us)| ([labels[0], labels[1], ("quantile", quantile)], us / 1e6))
        });
        let quantiles: Vec<_> = quantiles.collect();
        let samples = quantiles.iter().map(|(labels, seconds)| (&labels[..], *seconds));
        families.gauges(name, help, samples);
    }
}

fn pool(families: &mut Families, stats: &PoolStats) {
    for (name, help, value) in [
        ("workers", "Threads of the pool.", stats.workers),
        ("workers_idle", "Threads of the pool without work.", stats.workers_idle),
        ("workers_peak", "The most threads that the pool had at once.", stats.workers_peak),
        ("work_delayed", "Pieces of work that wait for their time.", stats.delayed),
    ] {
        families.gauge(name, help, value as f64);
    }
    let refused = stats.workers_refused;
    families.counter("workers_refused_total", "Threads that the host did not give.", refused);
    families.counter("work_promoted_total", "Prefetches that became faults.", stats.promoted);
    families.counter("work_panicked_total", "Pieces of work that panicked.", stats.panicked);
    let labels = Class::ALL.map(|class| [("class", name(class))]);
    for (name, help, values) in [
        ("work_queued", "Pieces of work that wait, by class.", stats.depth),
        ("work_running", "Pieces of work that run, by class.", stats.running),
    ] {
        let samples = labels.iter().zip(values).map(|(labels, n)| (&labels[..], n as f64));
        families.gauges(name, help, samples);
    }
    for (name, help, values) in [
        ("work_done_total", "Pieces of work that were done, by class.", stats.executed),
        ("work_rejected_total", "Pieces of work that were not taken, by class.", stats.rejected),
    ] {
        families.counters(name, help, labels.iter().map(|labels| &labels[..]).zip(values));
    }
    let waits = stats.waited.iter().zip(stats.waited_us).map(|(counts, sum_us)| {
        // Bucket n has less than 2^n us, and whole microseconds are counted.
        let bounds: Vec<u64> = (0..counts.len() - 1).map(|n| 1 << n).collect();
        distribution(&bounds, counts, sum_us)
    });
    let help = "How long work that is done had waited for a worker, by class.";
    let labels = labels.iter().map(|labels| &labels[..]);
    families.histograms("work_wait_seconds", help, labels.zip(waits));
}

fn name(class: Class) -> &'static str {
    match class {
        Class::Fault => "fault",
        Class::Prefetch => "prefetch",
        Class::WriteBack => "write_back",
    }
}

/// Counts by upper bound in microseconds, with one count more for what lies above.
fn distribution(bounds_us: &[u64], counts: &[u64], sum_us: u64) -> Distribution {
    Distribution {
        buckets: bounds_us.iter().map(|us| *us as f64 / 1e6).zip(counts.iter().copied()).collect(),
        above: counts.get(bounds_us.len()).copied().unwrap_or(0),
        sum: sum_us as f64 / 1e6,
    }
}

fn flag(value: bool) -> f64 {
    f64::from(u8::from(value))
}

#[cfg(test)]
mod tests;

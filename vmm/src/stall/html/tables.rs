//! The tables: medians with their intervals, and all runs.

use maud::{Markup, html};
use nowait_wire::agent::Kind;

use super::super::document::{Document, Run};
use super::super::summary::{Estimate, ModeSummary, workload_name};
use super::{finding, units};
use crate::size;

/// The most runs that the page lists.
const MAX_RUNS: usize = 400;

/// The medians over the rounds.
pub(super) fn summary(document: &Document) -> Markup {
    let work = document.config.scenario.compute_per_cpu > 0;
    let command = !document.config.command.is_empty();
    let baseline = document.config.baseline.to_string();
    let caption = format!(
        "Medians over the rounds with bootstrap 95 % intervals; × is the ratio to {baseline}, round by round"
    );
    let columns = 9 + 2 * usize::from(work);
    html! {
        div.scroll tabindex="0" role="region" aria-label=(caption) {
            table #summary-table {
                caption { (caption) }
                thead { tr {
                    th scope="col" { "mode" }
                    th.number scope="col" { "overrun p50" }
                    th.number scope="col" { "× " (baseline) }
                    th.number scope="col" { "overrun p99" }
                    th.number scope="col" { "× " (baseline) }
                    th.number scope="col" { "stalled" }
                    th.number scope="col" { "access p50" }
                    th.number scope="col" { (if command { "time" } else { "pages/s" }) }
                    th.number scope="col" { "× " (baseline) }
                    @if work {
                        th.number scope="col" { "work/s" }
                        th.number scope="col" { "× " (baseline) }
                    }
                } }
                @for group in &document.summary {
                    tbody {
                        tr { th.group scope="rowgroup" colspan=(columns) { (finding::name(group)) } }
                        @for mode in &group.modes { (row(group.workload, mode, work)) }
                    }
                }
            }
        }
    }
}

fn row(workload: Kind, mode: &ModeSummary, work: bool) -> Markup {
    let touches = matches!(workload, Kind::User | Kind::Copy);
    let ratios = mode.over_baseline;
    html! {
        tr {
            th scope="row" { (mode.apf) }
            (cell(Some(mode.overrun_us.p50), units::time))
            (cell(ratios.map(|ratios| ratios.overrun_p50), units::digits))
            (cell(Some(mode.overrun_us.p99), units::time))
            (cell(ratios.map(|ratios| ratios.overrun_p99), units::digits))
            (cell(mode.stall_share, units::percent))
            (cell(mode.access_us.map(|access| access.p50), units::time))
            @if mode.elapsed_us.is_some() {
                (cell(mode.elapsed_us, units::time))
                (cell(ratios.and_then(|ratios| ratios.elapsed), units::digits))
            } @else {
                (cell(Some(mode.pages_per_s).filter(|_| touches), units::digits))
                (cell(ratios.and_then(|ratios| ratios.pages_per_s).filter(|_| touches), units::digits))
            }
            @if work {
                (cell(mode.units_per_s, units::digits))
                (cell(ratios.and_then(|ratios| ratios.units_per_s), units::digits))
            }
        }
    }
}

/// A median, and below it its interval if it has one.
fn cell(estimate: Option<Estimate>, show: fn(f64) -> String) -> Markup {
    html! {
        td.number {
            @match estimate {
                None => "–",
                Some(Estimate { value, low, high }) => {
                    (show(value))
                    @if low != high { small { (show(low)) " – " (show(high)) } }
                }
            }
        }
    }
}

/// Each run.
pub(super) fn runs(document: &Document) -> Markup {
    let left_out = document.runs.len().saturating_sub(MAX_RUNS);
    let caption = "All runs in their order";
    let done = if document.config.command.is_empty() { "pages/s" } else { "time" };
    html! {
        div.scroll tabindex="0" role="region" aria-label=(caption) {
            table #runs-table {
                caption { (caption) }
                thead { tr {
                    @for title in ["round", "mode", "workload"] { th scope="col" { (title) } }
                    @for title in [
                        "threads", "vCPUs", "overrun p50", "p90", "p99", "max", "stalled", done, "work/s", "data errors",
                    ] { th.number scope="col" { (title) } }
                    th scope="col" { "complete" }
                } }
                tbody { @for run in document.runs.iter().take(MAX_RUNS) { (run_row(run)) } }
            }
        }
        @if left_out > 0 { p.note { (size::count(left_out as u64, "more run")) " are in the JSON." } }
    }
}

fn run_row(run: &Run) -> Markup {
    let time = |us: u64| units::time(us as f64);
    let overrun = run.overrun_us;
    let optional = |value: Option<f64>, show: fn(f64) -> String| value.map_or("–".into(), show);
    html! {
        tr {
            td { (run.round) }
            td { (run.apf) }
            td { (workload_name(run.workload)) }
            td.number { (run.threads) }
            td.number { (run.vcpus) }
            @for us in [overrun.p50, overrun.p90, overrun.p99, overrun.max] { td.number { (time(us)) } }
            td.number { (optional(run.stall.share, units::percent)) }
            td.number { (match run.workload {
                Kind::Idle => "–".to_owned(),
                Kind::User | Kind::Copy => units::digits(run.pages_per_s),
                Kind::Command => time(run.elapsed_us),
            }) }
            td.number { (optional(run.units_per_s, units::digits)) }
            td.number { (run.data_errors) }
            td.said { @match &run.problem {
                None => "yes",
                Some(problem) => { "no: " (problem) }
            } }
        }
    }
}

//! What stands around the plots: head, warnings, gates, what is missing, terms, and what was measured where.

use maud::{Markup, html};
use serde::Serialize;
use serde_json::Value;

use super::super::document::Document;
use super::super::missing;
use super::super::summary::workload_name;
use super::finding;
use crate::kvm::cpuid::Apf;
use crate::size;

/// The longest part of a command's output that the page has, in characters.
const OUTPUT_CHARS: usize = 2000;
/// The most failures, and the most runs with a problem, that the page lists.
const MAX_LINES: usize = 100;

/// The terms, and what they mean.
const TERMS: [(&str, &str); 5] = [
    (
        "Wake-up overrun",
        "On each vCPU a heartbeat wakes up at absolute deadlines, 1 ms apart unless the scenario says otherwise. \
         The overrun is how late it is. A deadline that passes while the vCPU is stalled counts with its whole \
         delay, so that a long stall is not one late sample but many (no coordinated omission).",
    ),
    (
        "vCPU stall",
        "Seen from the host: from the fault to the next entry into the guest, as long as a page is the reason. The \
         vCPU runs no guest code meanwhile. In the modes host and kernel this stays inside KVM, and only the overrun \
         shows it.",
    ),
    (
        "Fault latency, or access",
        "From an access to the completion of its instruction (user), or of read(2) (copy), as a thread of the guest \
         sees it. It is long whenever a page needs I/O; with async page faults other threads run meanwhile.",
    ),
    (
        "Progress",
        "What gets done: pages touched per second by all threads together, and units of work per second of the \
         computing tasks beside them, if the scenario has some.",
    ),
    (
        "Modes",
        "Who handles async page faults. off: nobody, the vCPU waits. host: KVM halts the vCPU, interrupts get \
         through. kernel: KVM tells the guest, which runs another task. user: the same, by the VMM.",
    ),
];

/// Title and what was measured, in two lines.
pub(super) fn head(document: &Document) -> Markup {
    let scenario = &document.config.scenario;
    html! {
        p.kind { "nowait stall" }
        h1 { (scenario.name) }
        @if !scenario.about.is_empty() { p.about { (scenario.about) } }
        p.note { (finding::subtitle(document)) }
    }
}

/// What a reader has to know first.
pub(super) fn warnings(document: &Document) -> Markup {
    let failed = document.gates.iter().filter(|gate| !gate.passed).count();
    let complete = document.runs.iter().filter(|run| run.complete).count();
    let errors = document.data_errors();
    html! {
        @if !document.complete {
            div.banner.bad role="status" {
                p {
                    strong { "Partial result." } " "
                    (size::count(complete as u64, "run")) " of " (missing::planned(document)) " complete: "
                    a href="#missing" { "what is missing" } "."
                }
            }
        }
        @if errors > 0 {
            div.banner.bad role="status" {
                p { strong { "Wrong data." } " " (size::count(errors, "page")) " did not hold what was written." }
            }
        }
        @if failed > 0 {
            div.banner.bad role="status" {
                p {
                    strong { (failed) " of " (size::count(document.gates.len() as u64, "gate")) " failed." } " "
                    a href="#gates" { "See which" } "."
                }
            }
        }
        @if !document.warnings.is_empty() {
            div.banner {
                p { strong { "Keep in mind" } }
                ul { @for warning in &document.warnings { li.said { (warning) } } }
            }
        }
    }
}

/// The modes of this result in a line each, for whoever reads no further than the first plot.
pub(super) fn modes(document: &Document) -> Markup {
    let what = |apf| match apf {
        Apf::Off => "the vCPU waits for it, and everything on it",
        Apf::Host => "KVM halts the vCPU; interrupts still get through",
        Apf::Kernel => "KVM tells the guest, which runs another task",
        Apf::User => "nowait tells the guest, only of pages that need I/O",
    };
    let modes = &document.config.scenario.modes;
    html! {
        p.note {
            "A heartbeat on every vCPU shows what paging does to everything else in the guest. When a page is absent, in \
             the mode"
        }
        dl.modes {
            @for apf in modes { div { dt { (apf) } dd { (what(*apf)) } } }
        }
    }
}

/// Gates, if there are some.
pub(super) fn gates(document: &Document) -> Markup {
    html! {
        @if !document.gates.is_empty() {
            section #gates {
                h2 { "Gates" }
                div.scroll tabindex="0" role="region" aria-label="Gates" {
                    table #gates-table {
                        caption { "Each gate, and where it failed" }
                        thead { tr {
                            th scope="col" { "result" }
                            th scope="col" { "fail if" }
                            th.number scope="col" { "comparisons" }
                            th scope="col" { "where it failed" }
                        } }
                        tbody { @for gate in &document.gates { tr {
                            td { @if gate.passed { span.good { "✓ passed" } } @else { span.bad { "✗ failed" } } }
                            td.said { code { (gate.gate) } }
                            td.number { (gate.compared) }
                            td.said { @if gate.failures.is_empty() { "–" } @else {
                                ul { @for failure in &gate.failures { li { (failure) } } }
                            } }
                        } } }
                    }
                }
            }
        }
    }
}

/// Boots and runs that are missing or incomplete.
pub(super) fn not_there(document: &Document) -> Markup {
    let problems: Vec<_> =
        document.runs.iter().filter_map(|run| Some((run, run.problem.as_ref()?))).collect();
    let not_made = missing::few(document, MAX_LINES);
    html! {
        @if !document.complete || !document.failures.is_empty() {
            section #missing {
                h2 { "What is missing" }
                ul {
                    @for line in &not_made { li { (line) } }
                    @for failure in document.failures.iter().take(MAX_LINES) { li.said {
                        "Mode " (failure.apf) ", " (size::count(failure.vcpus.into(), "vCPU")) ", round "
                        (failure.round) ": " (failure.message)
                    } }
                    @for (run, problem) in problems.iter().take(MAX_LINES) { li.said {
                        "Mode " (run.apf) ", " (workload_name(run.workload)) ", "
                        (size::count(run.threads.into(), "thread")) ", " (size::count(run.vcpus.into(), "vCPU"))
                        ", round " (run.round) ", incomplete: " (problem)
                    } }
                }
                @if document.failures.len().max(problems.len()) > MAX_LINES {
                    p.note { "The first " (MAX_LINES) " of each; the JSON has all." }
                }
                @if !not_made.is_empty() {
                    p.note { "Runs were not made where the measurement ended before them, or their guest did." }
                }
            }
        }
    }
}

/// What the terms mean.
pub(super) fn terms() -> Markup {
    html! { dl { @for (term, meaning) in TERMS { dt { (term) } dd { (meaning) } } } }
}

/// The scenario, the rest of what was asked for, and the host.
pub(super) fn conditions(document: &Document) -> Result<Markup, String> {
    let scenario = fields(&document.config.scenario)?;
    let mut config = fields(&document.config)?;
    // It has a table of its own.
    config.retain(|(name, _)| name != "scenario");
    let host = fields(&document.host)?;
    let ends = document.runs.iter().filter_map(|run| Some((run, run.command.as_ref()?)));
    Ok(html! {
        div.columns {
            (pairs("scenario-table", "Scenario", &scenario))
            div {
                (pairs("config-table", "As it was run", &config))
                (pairs("host-table", "Host", &host))
            }
        }
        @for (run, end) in ends.take(1) {
            details {
                summary { "Output of the command, first run (" (run.apf) ", status " (end.status) ")" }
                pre.said { (end.output.chars().take(OUTPUT_CHARS).collect::<String>()) }
            }
        }
    })
}

fn pairs(id: &str, caption: &str, fields: &[(String, String)]) -> Markup {
    html! {
        table.pairs id=(id) {
            caption { (caption) }
            tbody { @for (name, value) in fields { tr {
                th scope="row" { (name) }
                td.said { (value) }
            } } }
        }
    }
}

/// All fields by their names in JSON.
fn fields<T: Serialize>(of: &T) -> Result<Vec<(String, String)>, String> {
    let value = serde_json::to_value(of).map_err(|error| error.to_string())?;
    let fields = value.as_object().into_iter().flatten();
    Ok(fields.map(|(name, value)| (name.replace('_', " "), show(value))).collect())
}

fn show(value: &Value) -> String {
    match value {
        Value::Null => "–".to_owned(),
        Value::Bool(true) => "yes".to_owned(),
        Value::Bool(false) => "no".to_owned(),
        Value::String(text) => text.clone(),
        Value::Array(values) => values.iter().map(show).collect::<Vec<_>>().join(", "),
        other => other.to_string(),
    }
}

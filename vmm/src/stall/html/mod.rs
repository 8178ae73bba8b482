//! A result as one page of HTML that needs nothing else: no network, no other file.
//!
//! ```text
//!   Document -> curves, time lines (small arrays) -> JSON in the page -> page.js -> uPlot
//!            -> sections, tables, bars, figures' values (maud escapes) -> page.html
//! ```
//!
//! Whatever can be said in words and tables is in the HTML itself; the script only draws.

mod bars;
mod curves;
mod escape;
mod figures;
mod finding;
mod sections;
mod tables;
mod time_lines;
mod units;

use maud::{Markup, html};
use serde::Serialize;

use super::document::Document;
use super::summary::Group;
use curves::{Plot, Quantity};
use time_lines::TimeLine;

const TEMPLATE: &str = include_str!("page.html");
const STYLE: &str = include_str!("page.css");
const SCRIPT: &str = include_str!("page.js");
const UPLOT: &str = include_str!("vendor/uPlot.iife.min.js");
const UPLOT_STYLE: &str = include_str!("vendor/uPlot.min.css");
const UPLOT_LICENSE: &str = include_str!("vendor/LICENSE");

/// What the script draws.
#[derive(Serialize)]
struct Data {
    /// The group that is shown first.
    headline: usize,
    /// The heartbeat's period, in microseconds.
    heartbeat_us: u32,
    groups: Vec<Plots>,
    time_lines: Vec<TimeLine>,
    /// How many slices each point of a time line stands for.
    slices_per_point: usize,
}

/// The plots of a group.
#[derive(Serialize)]
struct Plots {
    name: String,
    overrun: Option<Plot>,
    stall: Option<Plot>,
    access: Option<Plot>,
}

/// The report.
pub(super) fn render(document: &Document) -> Result<Vec<u8>, String> {
    let mut groups = Vec::new();
    for group in &document.summary {
        groups.push(Plots::new(document, group)?);
    }
    let (time_lines, slices_per_point) = time_lines::all(document);
    let data = Data {
        headline: finding::headline(&document.summary),
        heartbeat_us: document.config.heartbeat_us,
        groups,
        time_lines,
        slices_per_point,
    };
    let json = escape::json(&data)?;
    let conditions = sections::conditions(document)?;
    let part = |name: &str| -> Result<String, String> {
        Ok(match name {
            "title" => html! { (document.config.scenario.name) }.into_string(),
            "style" => [UPLOT_STYLE, STYLE].concat(),
            "head" => sections::head(document).into_string(),
            "warnings" => sections::warnings(document).into_string(),
            "finding" => finding_section(document, &data).into_string(),
            "gates" => sections::gates(document).into_string(),
            "missing" => sections::not_there(document).into_string(),
            "summary" => tables::summary(document).into_string(),
            "detail" => detail(document, &data).into_string(),
            "terms" => sections::terms().into_string(),
            "conditions" => conditions.clone().into_string(),
            "runs" => tables::runs(document).into_string(),
            "version" => env!("CARGO_PKG_VERSION").to_owned(),
            "data" => json.clone(),
            "uplot" => format!("/*! uPlot\n{UPLOT_LICENSE}*/\n{}", without_banner(UPLOT)),
            "script" => SCRIPT.to_owned(),
            other => return Err(format!("the page has no part '{other}'")),
        })
    };
    fill(TEMPLATE, part).map(String::into_bytes)
}

/// Puts parts into the places `{{name}}` of a template. What a part contains is not looked at.
fn fill(template: &str, part: impl Fn(&str) -> Result<String, String>) -> Result<String, String> {
    let mut pieces = template.split("{{");
    let mut page = pieces.next().unwrap_or_default().to_owned();
    for piece in pieces {
        let (name, rest) =
            piece.split_once("}}").ok_or("the page's template has a place without an end")?;
        page.push_str(&part(name)?);
        page.push_str(rest);
    }
    Ok(page)
}

/// A script without its first line, if that is a comment.
fn without_banner(script: &str) -> &str {
    match script.split_once('\n') {
        Some((banner, rest)) if banner.starts_with("/*!") => rest,
        _ => script,
    }
}

impl Plots {
    fn new(document: &Document, group: &Group) -> Result<Self, String> {
        let plot = |quantity| {
            let plot = Plot::new(document, group, quantity).map_err(|error| error.to_string())?;
            Ok::<_, String>(plot.map(|plot| {
                let title = finding::sentence(group, quantity);
                Plot { title, ..plot }
            }))
        };
        Ok(Self {
            name: finding::name(group),
            overrun: plot(Quantity::Overrun)?,
            stall: plot(Quantity::Stall)?,
            access: plot(Quantity::Access)?,
        })
    }
}

/// The first plot: how late each mode's heartbeats are.
fn finding_section(document: &Document, data: &Data) -> Markup {
    html! {
        @if document.summary.is_empty() {
            p { "No run is complete: there is nothing to plot." }
        } @else {
            (sections::modes(document))
            (toolbar(data, "finding-group"))
            @for (index, group) in document.summary.iter().enumerate() {
                div data-group=(index) { (figure(group, data, index, Quantity::Overrun)) }
            }
            p.note {
                "Further down is better. Each line has all heartbeats of its mode, all rounds together; numbers in the \
                 sentence are medians over the rounds, as in the table. Drag to zoom in, double-click to zoom out."
            }
        }
    }
}

/// What is known of one workload at a time.
fn detail(document: &Document, data: &Data) -> Markup {
    html! {
        @if !document.summary.is_empty() {
            section #detail {
                h2 { "One workload in detail" }
                (toolbar(data, "detail-group"))
                @for (index, group) in document.summary.iter().enumerate() {
                    div data-group=(index) {
                        div.columns {
                            (figure(group, data, index, Quantity::Stall))
                            (figure(group, data, index, Quantity::Access))
                        }
                        (bars::breakdown(document, group))
                    }
                }
                div #time-lines {
                    h3 { "Time lines" }
                    p.note {
                        "One round, " (match data.slices_per_point {
                            1 => "slice by slice: the".to_owned(),
                            thin => format!("{thin} slices a point: the"),
                        })
                        " longest overrun in each, and the share of it in which the vCPU was stalled, where the host \
                         sees that. Drag to zoom in, double-click to zoom out."
                    }
                    div.toolbar {
                        label { "Round " select #round {} }
                        label { "vCPUs " select #vcpus {} }
                    }
                    div #time-line-plots {}
                }
            }
        }
    }
}

fn toolbar(data: &Data, id: &str) -> Markup {
    html! {
        div.toolbar {
            label {
                "Workload "
                select.group-select id=(id) autocomplete="off" {
                    @for (index, group) in data.groups.iter().enumerate() {
                        option value=(index) selected[index == data.headline] { (group.name) }
                    }
                }
            }
        }
    }
}

fn figure(group: &Group, data: &Data, index: usize, quantity: Quantity) -> Markup {
    let plots = &data.groups[index];
    let (plot, name) = match quantity {
        Quantity::Overrun => (&plots.overrun, "overrun"),
        Quantity::Stall => (&plots.stall, "stall"),
        Quantity::Access => (&plots.access, "access"),
    };
    match plot {
        Some(plot) => {
            let more = finding::progress(group).filter(|_| quantity == Quantity::Overrun);
            figures::figure(plot, &format!("{index}/{name}"), more.as_deref())
        }
        None => figures::nothing(group, quantity, &finding::sentence(group, quantity)),
    }
}

#[cfg(test)]
mod sample;
#[cfg(test)]
mod tests;

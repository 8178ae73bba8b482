//! Figures: a sentence, a place for the plot, and the same numbers as a table.

use maud::{Markup, html};

use super::super::summary::Group;
use super::curves::{Plot, Quantity};
use super::units;

/// A figure; `key` tells the script which plot of the data belongs into it, `more` stands below the sentence.
pub(super) fn figure(plot: &Plot, key: &str, more: Option<&str>) -> Markup {
    let alternative = format!("{}. The table below has the values.", plot.title);
    html! {
        figure {
            h3 { (plot.title) }
            @if let Some(more) = more { p.progress { (more) } }
            div.plot data-plot=(key) role="img" aria-label=(alternative) {}
            details {
                summary { "Values" }
                (values(plot))
            }
        }
    }
}

/// In the place of a figure about which nothing is known.
pub(super) fn nothing(group: &Group, quantity: Quantity, sentence: &str) -> Markup {
    let why = match quantity {
        Quantity::Stall if group.modes.iter().all(|mode| mode.stall_share.is_none()) => {
            "In the modes host and kernel vCPU stalls stay inside KVM, where only the overrun shows them."
        }
        _ => "There is nothing to plot.",
    };
    html! { figure { h3 { (sentence) } p.note { (why) } } }
}

fn values(plot: &Plot) -> Markup {
    let samples = match plot.quantity {
        Quantity::Overrun => "heartbeats",
        Quantity::Stall => "stalls",
        Quantity::Access => "accesses",
    };
    let caption = match plot.quantity {
        Quantity::Overrun => "Wake-up overrun at percentiles, all rounds together",
        Quantity::Stall => "vCPU stalls at percentiles, all rounds together",
        Quantity::Access => "Access latency at percentiles, all rounds together",
    };
    html! {
        div.scroll tabindex="0" role="region" aria-label=(caption) {
            table {
                caption { (caption) }
                thead { tr {
                    th scope="col" { "mode" }
                    @for mark in &plot.marks { th.number scope="col" { (label(plot, *mark)) } }
                    th.number scope="col" { (samples) }
                } }
                tbody { @for curve in &plot.curves { tr {
                    th scope="row" { (curve.name) }
                    @for mark in &plot.marks {
                        td.number { (match curve.us.get(*mark) {
                            Some(Some(us)) => units::time(*us as f64),
                            _ => "–".to_owned(),
                        }) }
                    }
                    td.number { (units::count(curve.count)) }
                } } }
            }
        }
    }
}

/// The percentile of a marked point.
fn label(plot: &Plot, mark: usize) -> String {
    match plot.x.get(mark) {
        Some(x) if *x <= f64::from(plot.nines) => {
            let nines = (x.round() as usize).saturating_sub(2);
            let percent = 100.0 * (1.0 - 10_f64.powf(-x));
            format!("{percent:.nines$}\u{a0}%")
        }
        _ => "max".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_have_as_many_nines_as_they_need() {
        let plot = Plot {
            quantity: Quantity::Stall,
            title: String::new(),
            nines: 4,
            x: vec![2_f64.log10(), 1.0, 2.0, 3.0, 4.0, 5.0],
            marks: Vec::new(),
            curves: Vec::new(),
        };
        let labels: Vec<_> = (0..6).map(|mark| label(&plot, mark).replace('\u{a0}', " ")).collect();
        assert_eq!(labels, ["50 %", "90 %", "99 %", "99.9 %", "99.99 %", "max"]);
    }
}

//! Where the vCPUs' time and the pages went: a bar for each mode, and its numbers.

use maud::{Markup, html};
use nowait_wire::agent::{Cause, TierCounts};

use super::super::document::{Document, Run};
use super::super::summary::Group;
use super::curves;
use super::units;
use crate::kvm::cpuid::Apf;

/// A part of a bar.
struct Part {
    /// What selects its pattern.
    class: &'static str,
    name: &'static str,
    /// Its share of the bar's whole width.
    width: f64,
    text: String,
}

/// The stalls of all rounds of a mode.
struct Stalled {
    apf: Apf,
    /// The vCPUs' time in all, in microseconds.
    time_us: f64,
    /// For each cause its time in microseconds, and how many there were.
    causes: Vec<(Cause, u64, u64)>,
}

/// What a cause is, in a few words.
fn cause_name(cause: Cause) -> &'static str {
    match cause {
        Cause::Zero => "zero page made",
        Cause::Resident => "page in memory mapped",
        Cause::AtHand => "page unpacked",
        Cause::Joined => "someone else was at the page",
        Cause::Waited => "waited for I/O",
        Cause::Told => "guest was told",
        Cause::Halted => "halted during I/O",
    }
}

/// Both breakdowns of a group.
pub(super) fn breakdown(document: &Document, group: &Group) -> Markup {
    html! {
        div.columns {
            div {
                h3 { "Where the vCPUs’ time went: stalls by cause" }
                (causes(document, group))
            }
            div {
                h3 { "Where pages came from" }
                (tiers(document, group))
            }
        }
    }
}

fn causes(document: &Document, group: &Group) -> Markup {
    let stalled: Vec<Result<Stalled, Apf>> = group
        .modes
        .iter()
        .map(|mode| {
            let runs: Vec<&Run> = curves::runs(document, group, mode.apf).collect();
            let visible = !runs.is_empty() && runs.iter().all(|run| run.stall.visible);
            if visible { Ok(Stalled::new(mode.apf, &runs)) } else { Err(mode.apf) }
        })
        .collect();
    let longest = stalled.iter().flatten().map(Stalled::share).fold(0.0, f64::max);
    html! {
        @for of in &stalled {
            @match of {
                Ok(of) => (bar(&of.apf.to_string(), &of.parts(longest), &format!(
                    "{} of the vCPUs’ time", units::percent(of.share())
                ))),
                Err(apf) => (hidden(*apf)),
            }
        }
        p.note { "Bars are drawn to one scale, the longest is as wide as the box." }
    }
}

fn hidden(apf: Apf) -> Markup {
    html! {
        div.bar-row {
            p.bar-title { b { (apf) } " not visible to the host" }
            p.note { "Stalls stay inside KVM." }
        }
    }
}

impl Stalled {
    fn new(apf: Apf, runs: &[&Run]) -> Self {
        let time_us =
            runs.iter().map(|run| run.elapsed_us as f64 * f64::from(run.vcpus)).sum::<f64>();
        let all = || runs.iter().flat_map(|run| &run.stall.causes);
        let causes = Cause::ALL.into_iter().filter_map(|cause| {
            let of = || all().filter(move |of| of.cause == cause);
            let total = of().fold(0, |sum: u64, of| sum.saturating_add(of.total_us));
            let count = of().fold(0, |sum: u64, of| sum.saturating_add(of.us.count));
            (count > 0).then_some((cause, total, count))
        });
        Self { apf, time_us, causes: causes.collect() }
    }

    fn share_of(&self, us: u64) -> f64 {
        if self.time_us > 0.0 { us as f64 / self.time_us } else { 0.0 }
    }

    fn share(&self) -> f64 {
        self.causes.iter().map(|(_, us, _)| self.share_of(*us)).sum()
    }

    fn parts(&self, longest: f64) -> Vec<Part> {
        let part = |&(cause, us, count): &(Cause, u64, u64)| Part {
            class: cause.name(),
            name: cause_name(cause),
            width: if longest > 0.0 { self.share_of(us) / longest } else { 0.0 },
            text: format!(
                "{}, {} in {} stalls",
                units::percent(self.share_of(us)),
                units::time(us as f64),
                units::count(count)
            ),
        };
        self.causes.iter().map(part).collect()
    }
}

fn tiers(document: &Document, group: &Group) -> Markup {
    html! {
        @for mode in &group.modes {
            @let runs = curves::runs(document, group, mode.apf);
            @let sum = runs.map(|run| run.stall.tiers).fold(TierCounts::default(), add);
            (tier_bar(mode.apf, sum))
        }
        p.note { "Each bar is all pages of its mode that a fault or a prefetch brought in." }
    }
}

fn add(a: TierCounts, b: TierCounts) -> TierCounts {
    TierCounts {
        zero: a.zero.saturating_add(b.zero),
        resident: a.resident.saturating_add(b.resident),
        at_hand: a.at_hand.saturating_add(b.at_hand),
        fetched: a.fetched.saturating_add(b.fetched),
        prefetched: a.prefetched.saturating_add(b.prefetched),
    }
}

fn tier_bar(apf: Apf, tiers: TierCounts) -> Markup {
    let parts = [
        ("zero", "never touched: zero", tiers.zero),
        ("resident", "in memory, not mapped", tiers.resident),
        ("at_hand", "compressed or same-filled", tiers.at_hand),
        ("waited", "fetched on a fault", tiers.fetched.saturating_sub(tiers.prefetched)),
        ("halted", "fetched ahead", tiers.prefetched.min(tiers.fetched)),
    ];
    let all = parts.iter().fold(0, |sum: u64, (.., pages)| sum.saturating_add(*pages));
    let parts = parts.into_iter().filter(|(.., pages)| *pages > 0).map(|(class, name, pages)| {
        let share = pages as f64 / all as f64;
        let text = format!("{} pages, {}", units::count(pages), units::percent(share));
        Part { class, name, width: share, text }
    });
    bar(&apf.to_string(), &parts.collect::<Vec<_>>(), &format!("{} pages", units::count(all)))
}

fn bar(mode: &str, parts: &[Part], total: &str) -> Markup {
    html! {
        div.bar-row {
            p.bar-title { b { (mode) } " " (total) }
            @if !parts.is_empty() {
                div.bar aria-hidden="true" {
                    @for Part { class, width, .. } in parts {
                        span.(class) style={ "width:" (format!("{:.2}", width.clamp(0.0, 1.0) * 100.0)) "%" } {}
                    }
                }
                ul.bar-parts { @for Part { class, name, text, .. } in parts {
                    li { span.swatch.(class) aria-hidden="true" {} (name) ": " (text) }
                } }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::document::tests::{BOOT, host, planned, result, workload};
    use super::super::super::overrun;
    use super::*;
    use nowait_wire::agent::{CauseStalls, HostStalls, Kind};

    #[test]
    fn rounds_are_summed_up_and_each_part_has_its_numbers() {
        let (plan, mut document) = planned(&[]);
        let mut stalls = overrun::empty().unwrap();
        stalls.record_n(500, 4).unwrap();
        let us_hdr = overrun::encode(&stalls).unwrap();
        let cause = |cause| CauseStalls { cause, total_us: 2100, us_hdr: us_hdr.clone() };
        for (round, visible) in [(1, true), (2, true)] {
            let boot = super::super::super::plan::Boot { round, ..BOOT };
            let tiers = TierCounts { fetched: 30, prefetched: 10, zero: 10, ..Default::default() };
            let causes = vec![cause(Cause::Waited), cause(Cause::AtHand)];
            let host = HostStalls { visible, causes, tiers, ..host() };
            document.runs.push(Run::new(boot, result(&workload(Kind::User), 2), host).unwrap());
        }
        document.judge(&plan);
        let html = breakdown(&document, &document.summary[0]).into_string();
        let html = html.replace('\u{a0}', " ");
        for part in [
            "<b>host</b> 20 % of the vCPUs’ time",
            "waited for I/O: 10 %, 4.2 ms in 8 stalls",
            "class=\"at_hand\" style=\"width:50.00%\"",
            "<b>host</b> 80 pages",
            "fetched on a fault: 40 pages, 50 %",
            "fetched ahead: 20 pages, 25 %",
        ] {
            assert!(html.contains(part), "no '{part}' in\n{html}");
        }
        document.runs[1].stall.visible = false;
        let html = breakdown(&document, &document.summary[0]).into_string();
        assert!(html.contains("<b>host</b> not visible to the host"), "{html}");
    }
}

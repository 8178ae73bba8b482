//! The stalls of each vCPU: now, and over the last minute by cause.

use nowait_wire::agent::Cause;
use ratatui::style::{Color, Style};
use ratatui::text::{Line, Span};

use super::{Wide, format, heading};
use crate::top::history::{History, SPAN};
use crate::top::snapshot::{CAUSES, Snapshot, Stalls};

/// A stall that lasts this long, in seconds, is shown in red.
const LONG: f64 = 0.1;
/// A cause that took so little of the time is not worth a word.
const LEAST_SHARE: f64 = 0.0005;
/// Columns of the last minute.
const SPARKS: usize = 16;
const SPARKS_WIDE: usize = 20;
/// A bar for each eighth; a little is not nothing.
const BARS: [char; 9] = [' ', '▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// The heading and at most so many rows.
pub(super) fn lines(history: &History, rows: usize, wide: Wide) -> Vec<Line<'static>> {
    let mut lines = vec![head(wide)];
    let Some(last) = history.last() else { return lines };
    if last.stalls.is_empty() {
        let text =
            format!("  not seen with --apf {}: faults do not come to the vCPUs' threads", last.apf);
        lines.push(Line::from(text));
        return lines;
    }
    let vcpus = last.stalls.len();
    let shown = if vcpus <= rows { vcpus } else { rows.saturating_sub(1) };
    lines.extend((0..shown).map(|vcpu| row(history, last, vcpu, wide)));
    if shown < vcpus {
        lines.push(Line::from(format!("  … and {} more vCPUs", vcpus - shown)));
    }
    lines
}

/// How many rows they would like.
pub(super) fn wanted(history: &History) -> usize {
    history.last().map_or(1, |last| last.stalls.len()).max(1)
}

/// The share of the last minute's parts in which any vCPU was stalled, added up over vCPUs and divided by
/// their number.
pub(super) fn together(history: &History, parts: usize) -> Vec<Option<f64>> {
    let vcpus = wanted(history) as f64;
    let stalled = |snapshot: &Snapshot| snapshot.stalls.iter().map(Stalls::stalled).sum();
    let series = history.series(parts, stalled);
    series.into_iter().map(|share| share.map(|share| share / vcpus)).collect()
}

fn head(wide: Wide) -> Line<'static> {
    let mut text = format!("{:>8}{:>8}{:>10}  ", "now", "per s", "stalled %");
    match wide {
        Wide::No => text.push_str(&format!("{:<w$} by", "last minute", w = SPARKS)),
        Wide::Yes => {
            text.push_str(&format!("{:<w$}", "last minute", w = SPARKS_WIDE));
            for cause in Cause::ALL {
                text.push_str(&format!("{:>9}", name(cause)));
            }
        }
    }
    heading("Stalls", 7, text)
}

fn row(history: &History, last: &Snapshot, vcpu: usize, wide: Wide) -> Line<'static> {
    let of =
        |snapshot: &Snapshot, read: fn(&Stalls) -> f64| snapshot.stalls.get(vcpu).map_or(0.0, read);
    let now = of(last, |stalls| stalls.now);
    let rate = history.rate(SPAN, |snapshot| of(snapshot, Stalls::count));
    let stalled = |snapshot: &Snapshot| of(snapshot, Stalls::stalled);
    let share = history.rate(SPAN, stalled);
    let style = match now {
        now if now >= LONG => Style::new().fg(Color::Red),
        now if now > 0.0 => Style::new().fg(Color::Yellow),
        _ => Style::new(),
    };
    let now = if now > 0.0 { format::seconds(now) } else { "-".to_owned() };
    let share = share.map_or_else(|| "-".to_owned(), format::percent);
    let sparks = history.series(if wide == Wide::Yes { SPARKS_WIDE } else { SPARKS }, stalled);
    let sparks: String = sparks.into_iter().map(spark).collect();
    let mut spans = vec![
        Span::from(format!("  {vcpu:<5}")),
        Span::styled(format!("{now:>8}"), style),
        Span::from(format!("{:>8}{share:>10}  ", format::rate(rate))),
        Span::styled(sparks, Style::new().fg(Color::Yellow)),
    ];
    let shares: [f64; CAUSES] = std::array::from_fn(|cause| {
        let of = |s: &Snapshot| s.stalls.get(vcpu).map_or(0.0, |stalls| stalls.seconds[cause]);
        history.rate(SPAN, of).unwrap_or(0.0)
    });
    match wide {
        Wide::Yes => spans.extend(shares.iter().map(|share| {
            let text = if *share > 0.0 { format::percent(*share) } else { "-".to_owned() };
            Span::from(format!("{text:>9}"))
        })),
        Wide::No => spans.push(Span::from(format!(" {}", most(&shares)))),
    }
    Line::from(spans)
}

/// The two causes that took most.
fn most(shares: &[f64; CAUSES]) -> String {
    let mut causes: Vec<_> = Cause::ALL.iter().zip(shares).collect();
    causes.sort_by(|a, b| b.1.total_cmp(a.1));
    let worth = causes.into_iter().filter(|(_, share)| **share >= LEAST_SHARE).take(2);
    let worth = worth.map(|(cause, share)| format!("{} {}", name(*cause), format::percent(*share)));
    worth.collect::<Vec<_>>().join(", ")
}

fn name(cause: Cause) -> &'static str {
    match cause {
        Cause::AtHand => "at hand",
        cause => cause.name(),
    }
}

fn spark(share: Option<f64>) -> char {
    let Some(share) = share else { return ' ' };
    match (share * 8.0).round() as usize {
        0 if share > 0.0 => BARS[1],
        eighths => BARS[eighths.min(8)],
    }
}

//! Faults by where their pages were, what is outstanding, the store, and async page faults.

use ratatui::style::{Color, Style};
use ratatui::text::{Line, Span};

use super::{RATE_SPAN, Wide, format, heading};
use crate::top::history::History;
use crate::top::snapshot::{AGES, FAULTS, OUTCOMES, Snapshot, Tier};

/// Of [`AGES`], from here on they are shown in red if there are any.
const OLD: usize = 3;

/// A heading and two rows.
pub(super) fn faults(history: &History, last: &Snapshot) -> [Line<'static>; 3] {
    let names: String = FAULTS.iter().map(|(name, _)| format!("{name:>12}")).collect();
    let rates: String = (0..FAULTS.len())
        .map(|fault| history.rate(RATE_SPAN, |snapshot| snapshot.faults[fault]))
        .map(|rate| format!("{:>12}", format::rate(rate)))
        .collect();
    let totals: String =
        last.faults.iter().map(|total| format!("{:>12}", format::count(*total))).collect();
    [
        heading("Faults", 13, names),
        Line::from(format!("  per second {rates}")),
        Line::from(format!("  in total   {totals}")),
    ]
}

/// A heading and one row.
pub(super) fn outstanding(history: &History, last: &Snapshot) -> [Line<'static>; 2] {
    let quantile = |quantile| match history.fetch_quantile(quantile) {
        None => "-".to_owned(),
        Some(seconds) if seconds.is_finite() => format!("<{}", format::seconds(seconds)),
        Some(_) => "more".to_owned(),
    };
    let text = format!(
        "{:>6}, the oldest {}; fetches: p50 {}, p99 {}",
        format::count(last.outstanding),
        format::seconds(last.oldest),
        quantile(0.5),
        quantile(0.99),
    );
    let ages = AGES.iter().zip(&last.ages).enumerate();
    // That it is unknown is worth a word when it is so.
    let ages = ages.filter(|(_, ((name, _), count))| *name != "unknown" || **count > 0.0);
    let ages = ages.flat_map(|(at, ((name, _), count))| {
        let style = match *count > 0.0 {
            true if at >= OLD => Style::new().fg(Color::Red),
            true => Style::new().fg(Color::Yellow),
            false => Style::new(),
        };
        let count = format!("{:<6}", format::count(*count));
        [Span::from(format!("{name} ")), Span::styled(count, style)]
    });
    let row = Line::from_iter(std::iter::once(Span::from("  ")).chain(ages));
    [heading("Outstanding", 12, text), row]
}

/// A heading and at most so many rows, one for each tier of the store.
pub(super) fn store(
    history: &History,
    last: &Snapshot,
    rows: usize,
    wide: Wide,
) -> Vec<Line<'static>> {
    let (name, column) = if wide == Wide::Yes { (18, 10) } else { (14, 9) };
    let mut titles = vec!["pages", "held", "reads/s", "hits/s", "errors", "read p50", "p99"];
    if wide == Wide::Yes {
        titles.extend(["max", "write p50", "p99"]);
    }
    let titles: String = titles.iter().map(|title| format!("{title:>column$}")).collect();
    let mut lines = vec![heading("Store", name + 2, titles)];
    if last.tiers.is_empty() {
        lines.push(Line::from("  no tiers"));
        return lines;
    }
    let row = |(at, tier): (usize, &Tier)| {
        let rate = |read: fn(&Tier) -> f64| {
            let of = |snapshot: &Snapshot| snapshot.tiers.get(at).map_or(0.0, read);
            format::rate(history.rate(RATE_SPAN, of))
        };
        let mut values = vec![
            format::count(tier.pages),
            format::bytes(tier.stored),
            rate(|tier| tier.reads),
            rate(|tier| tier.hits),
            format::count(tier.errors),
            format::seconds(tier.read[0]),
            format::seconds(tier.read[1]),
        ];
        if wide == Wide::Yes {
            let more = [tier.read[2], tier.write[0], tier.write[1]];
            values.extend(more.map(format::seconds));
        }
        let values: String = values.iter().map(|value| format!("{value:>column$}")).collect();
        let short: String = tier.name.chars().take(name).collect();
        Line::from(format!("  {short:<name$}{values}"))
    };
    lines.extend(last.tiers.iter().enumerate().take(rows).map(row));
    lines
}

/// A heading and two rows.
pub(super) fn async_pf(history: &History, last: &Snapshot) -> [Line<'static>; 3] {
    let Some(stats) = &last.async_pf else {
        let text = format!("  not by nowait (--apf {})", last.apf);
        return [heading("Async faults", 13, text), Line::default(), Line::default()];
    };
    let names: String = OUTCOMES.iter().map(|(name, _)| format!("{name:>11}")).collect();
    let rates: String = (0..OUTCOMES.len())
        .map(|outcome| {
            let of = |snapshot: &Snapshot| {
                snapshot.async_pf.as_ref().map_or(0.0, |async_pf| async_pf.outcomes[outcome])
            };
            format!("{:>11}", format::rate(history.rate(RATE_SPAN, of)))
        })
        .collect();
    let totals: String =
        stats.outcomes.iter().map(|total| format!("{:>11}", format::count(*total))).collect();
    let (threshold, outstanding) =
        (format::seconds(stats.threshold), format::count(stats.outstanding));
    [
        heading("Async faults", 13, format!("{names}{:>11}{:>12}", "threshold", "outstanding")),
        Line::from(format!("  per second {rates}{threshold:>11}{outstanding:>12}")),
        Line::from(format!("  in total   {totals}")),
    ]
}

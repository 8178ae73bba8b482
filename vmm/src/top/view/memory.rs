//! Guest RAM: how much of the limit is used, and where its pages are.

use ratatui::style::{Color, Style};
use ratatui::text::{Line, Span};

use super::{format, heading};
use crate::top::pages::{Pages, STATES, State};
use crate::top::snapshot::Memory;

/// Bytes of a page.
const PAGE: f64 = guest_memory::PAGE_BYTES as f64;
/// Of the limit; from here on the gauge is yellow.
const NEARLY_FULL: f64 = 0.9;

/// Heading and gauge.
pub(super) fn gauge(memory: &Memory, width: usize) -> [Line<'static>; 2] {
    let used = memory.resident + memory.store;
    let (of, what) = match memory.limit {
        Some(limit) => (limit, format!("of limit {}", format::bytes(limit))),
        None => (memory.total, "without a limit".to_owned()),
    };
    let text = format!(
        "  {}{} resident + {} store = {} {what}; guest RAM {}",
        if memory.exceeded { "STORE TAKES NOTHING: " } else { "" },
        format::bytes(memory.resident),
        format::bytes(memory.store),
        format::bytes(used),
        format::bytes(memory.total),
    );
    let share = if of > 0.0 { used / of } else { 0.0 };
    let colour = match share {
        _ if memory.exceeded => Color::Red,
        share if share > 1.0 => Color::Red,
        share if share > NEARLY_FULL => Color::Yellow,
        _ => Color::Green,
    };
    let cells = width.saturating_sub(11);
    let full = ((share * cells as f64).round() as usize).min(cells);
    let bar = Line::from(vec![
        Span::from(format!("  {:>4} % [", format::percent(share))),
        Span::styled("█".repeat(full), Style::new().fg(colour)),
        Span::from(" ".repeat(cells - full)),
        Span::from("]"),
    ]);
    [heading("Memory", 7, text), bar]
}

/// The strip: so many rows of so many cells, from the first page to the last.
pub(super) fn strip(pages: Option<&Pages>, rows: usize, width: usize) -> Vec<Line<'static>> {
    let Some(pages) = pages else {
        return std::iter::once(Line::from("  (no answer yet)")).collect();
    };
    let cells = strip_cells(1, width) as usize;
    let row = |cells: &[crate::top::pages::Cell]| {
        let signs = cells.iter().map(|cell| {
            let (sign, style) = sign(cell.shown());
            Span::styled(sign.to_string(), style)
        });
        Line::from_iter(std::iter::once(Span::from("  ")).chain(signs))
    };
    pages.cells.chunks(cells).take(rows).map(row).collect()
}

/// How many cells a strip of so many rows has.
pub(super) fn strip_cells(rows: usize, width: usize) -> u32 {
    (rows * width.saturating_sub(4).max(1)).clamp(1, 1024) as u32
}

/// What the signs mean, with how much there is of each: two lines.
pub(super) fn legend(pages: Option<&Pages>, width: usize) -> Vec<Line<'static>> {
    let about = if pages.is_some_and(|pages| pages.sampled) { "~" } else { "" };
    let column = width.saturating_sub(4) / 4;
    let entry = |(state, name, _): &(State, &str, char)| {
        let (sign, style) = sign(*state);
        let total = pages.map_or_else(String::new, |pages| {
            format!(" {about}{}", format::bytes(pages.total(*state) * PAGE))
        });
        let text = format!(" {name}{total}");
        let space = " ".repeat(column.saturating_sub(text.chars().count() + 1));
        [Span::styled(sign.to_string(), style), Span::from(text + &space)]
    };
    let line = |states: &[(State, &str, char)]| {
        let entries = states.iter().flat_map(entry);
        Line::from_iter(std::iter::once(Span::from("  ")).chain(entries))
    };
    STATES.chunks(4).map(line).collect()
}

fn sign(state: State) -> (char, Style) {
    let colour = match state {
        State::Mapped => Color::Green,
        State::Idle => Color::Cyan,
        State::AtHand => Color::Blue,
        State::Stored => Color::Magenta,
        State::Absent => Color::DarkGray,
        State::UnderWay => Color::Yellow,
        State::Pinned => Color::White,
        State::Lost => Color::Red,
    };
    let sign = STATES.iter().find(|(known, ..)| *known == state).map_or('?', |(.., sign)| *sign);
    (sign, Style::new().fg(colour))
}

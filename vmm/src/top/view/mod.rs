//! The screen, drawn from the model alone.
//!
//! ```text
//!   header        which run, how long, whether it is paused
//!   Stalls        a row a vCPU
//!   (a chart      of all vCPUs together, if there is room)
//!   Faults, Outstanding
//!   Memory        gauge, strip, legend
//!   Store         a row a tier
//!   Async page faults
//!   status        what became of the last key
//!   keys
//! ```
//!
//! Rows that are left go to vCPUs, tiers, the strip and the chart, in this order.

mod faults;
mod format;
mod memory;
mod stalls;
#[cfg(test)]
mod tests;

use ratatui::Frame;
use ratatui::layout::Rect;
use ratatui::style::{Color, Style, Stylize};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Clear, Paragraph, Sparkline, Wrap};

use super::model::Model;
use super::snapshot::Snapshot;

/// The smallest screen.
pub(super) const MIN_COLUMNS: u16 = 80;
pub(super) const MIN_ROWS: u16 = 24;
/// From here on tables have all their columns.
const WIDE_COLUMNS: u16 = 120;
/// Over how many seconds rates are taken that are not of the last minute.
const RATE_SPAN: f64 = 1.0;
/// Rows that are always there: header, headings, what has one size, status and keys.
const FIXED_ROWS: usize = 17;
/// vCPUs and tiers that come before a second row of the strip, and the most rows of the strip.
const FIRST_VCPUS: usize = 4;
const FIRST_TIERS: usize = 2;
const STRIP_ROWS: usize = 8;
/// Rows of the chart with its heading.
const CHART_ROWS: std::ops::RangeInclusive<usize> = 4..=7;

/// What each key does.
const HELP: &[&str] = &[
    "+ l     a tenth more of the resident limit",
    "- L     a tenth less of it, 4 MiB at least; sets one where there is none",
    "t T     double the async page fault threshold, halve it",
    "a       the threshold as measured on this host",
    "p r     pause the guest, resume it",
    "e       move all of guest RAM to the store, once",
    "q       quit; the guest goes on",
    "Ctrl-L  draw the screen anew",
    "",
    "Stalled: a vCPU could not run its guest because of a page. Bars show the",
    "last minute, a full one all of the time. Each sign of the strip is a share",
    "of RAM: what most of its pages are, but * P ! if any page is that.",
];
const KEYS: &str = " q quit  ? help  p pause  r resume  e evict  +/- limit  t/T threshold  a auto";

/// Is there room for tables with all columns?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wide {
    Yes,
    No,
}

/// Rows of what has no fixed size.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Rows {
    vcpus: usize,
    tiers: usize,
    strip: usize,
    /// With its heading; 0: no chart.
    chart: usize,
}

/// In how many cells the pages are wanted for a screen of this size.
pub(super) fn cells(model: &Model, columns: u16, rows: u16) -> u32 {
    memory::strip_cells(share(model, rows.into()).strip, columns.into())
}

/// Draws all of it.
pub(super) fn draw(frame: &mut Frame<'_>, model: &Model) {
    let area = frame.area();
    let Some(last) = model.history.last() else { return };
    if area.width < MIN_COLUMNS || area.height < MIN_ROWS {
        return draw_too_small(frame, area);
    }
    let width = usize::from(area.width);
    let wide = if area.width >= WIDE_COLUMNS { Wide::Yes } else { Wide::No };
    let rows = share(model, area.height.into());
    let mut lines = vec![header(model, last)];
    lines.extend(stalls::lines(&model.history, rows.vcpus, wide));
    let chart_at = lines.len() as u16;
    lines.extend(std::iter::repeat_n(Line::default(), rows.chart));
    lines.extend(faults::faults(&model.history, last));
    lines.extend(faults::outstanding(&model.history, last));
    lines.extend(memory::gauge(&last.memory, width));
    let strip = memory::strip(model.pages.as_ref(), rows.strip, width);
    let missing = rows.strip.saturating_sub(strip.len());
    lines.extend(strip);
    lines.extend(memory::legend(model.pages.as_ref(), width));
    lines.extend(std::iter::repeat_n(Line::default(), missing));
    lines.extend(faults::store(&model.history, last, rows.tiers, wide));
    lines.extend(faults::async_pf(&model.history, last));
    lines.truncate(usize::from(area.height - 2));
    frame.render_widget(Paragraph::new(lines), area);
    let bottom = |up| Rect { y: area.bottom() - up, height: 1, ..area };
    frame.render_widget(status(model), bottom(2));
    frame.render_widget(Line::from(KEYS).dark_gray(), bottom(1));
    if rows.chart > 0 {
        let area = Rect { y: area.y + chart_at, height: rows.chart as u16, ..area };
        draw_chart(frame, area, model);
    }
    if model.shows_help {
        draw_help(frame, area);
    }
}

/// Shares the rows of a screen out.
fn share(model: &Model, height: usize) -> Rows {
    let vcpus = stalls::wanted(&model.history);
    let tiers = model.history.last().map_or(1, |last| last.tiers.len()).max(1);
    let mut rows = Rows { vcpus: 1, tiers: 1, strip: 1, chart: 0 };
    let mut left = height.saturating_sub(FIXED_ROWS + 3);
    let mut give = |row: &mut usize, up_to: usize| {
        let given = up_to.saturating_sub(*row).min(left);
        *row += given;
        left -= given;
    };
    give(&mut rows.vcpus, vcpus.min(FIRST_VCPUS));
    give(&mut rows.tiers, tiers.min(FIRST_TIERS));
    give(&mut rows.strip, 2);
    give(&mut rows.vcpus, vcpus);
    give(&mut rows.tiers, tiers);
    give(&mut rows.strip, STRIP_ROWS);
    if left >= *CHART_ROWS.start() {
        rows.chart = left.min(*CHART_ROWS.end());
    }
    rows
}

fn header(model: &Model, last: &Snapshot) -> Line<'static> {
    let name = std::path::Path::new(&model.socket).file_name();
    let name =
        name.map_or_else(|| model.socket.clone(), |name| name.to_string_lossy().into_owned());
    let name: String = name.chars().filter(|c| !c.is_control()).take(24).collect();
    let mut spans = vec![Span::from(" nowait top ").bold().reversed(), Span::from(" ")];
    if !last.paused.is_empty() {
        let text = format!(" PAUSED: {} ", last.paused.join(", "));
        spans.push(Span::from(text).bold().fg(Color::Black).bg(Color::Yellow));
        spans.push(Span::from(" "));
    }
    spans.push(Span::from(format!(
        "{name}  {} up {}  --apf {} ({})  {}",
        crate::size::count(last.vcpus as u64, "vCPU"),
        format::clock(last.uptime),
        last.apf,
        last.fault_source,
        last.version,
    )));
    Line::from(spans)
}

fn status(model: &Model) -> Line<'static> {
    let red = Style::new().fg(Color::Red);
    if model.asks_to_evict {
        return Line::from(" move all of guest RAM to the store? y/n").yellow().bold();
    }
    match (&model.trouble, &model.status) {
        (Some(trouble), _) => Line::styled(format!(" {trouble}"), red),
        (None, Some(status)) if status.is_error => Line::styled(format!(" {}", status.text), red),
        (None, Some(status)) => Line::from(format!(" {}", status.text)),
        (None, None) => Line::default(),
    }
}

/// A heading of a section: its name in so many columns, and what stands beside it.
fn heading(name: &str, columns: usize, text: String) -> Line<'static> {
    let name = Span::from(format!("{name:<columns$}")).bold().fg(Color::Cyan);
    Line::from(vec![name, Span::from(text).fg(Color::Cyan)])
}

fn draw_chart(frame: &mut Frame<'_>, area: Rect, model: &Model) {
    let text = "  of all vCPUs' time, over the last minute; a full bar is all of it".to_owned();
    frame.render_widget(heading("Stalled", 7, text), Rect { height: 1, ..area });
    let area = Rect { x: area.x + 2, width: area.width - 4, ..area };
    let bars = Rect { y: area.y + 1, height: area.height - 1, ..area };
    let series = stalls::together(&model.history, bars.width.into());
    // In thousandths; a little is not nothing.
    let data = series.into_iter().map(|share| (share.unwrap_or(0.0) * 1000.0).ceil() as u64);
    let data: Vec<u64> = data.collect();
    let chart = Sparkline::default().data(data).max(1000).style(Style::new().fg(Color::Yellow));
    frame.render_widget(chart, bars);
}

fn draw_help(frame: &mut Frame<'_>, area: Rect) {
    let lines: Vec<Line<'_>> = HELP.iter().map(|line| Line::from(*line)).collect();
    let width = HELP.iter().map(|line| line.chars().count()).max().unwrap_or(0) as u16 + 4;
    let height = HELP.len() as u16 + 2;
    let area = area.centered(
        ratatui::layout::Constraint::Length(width),
        ratatui::layout::Constraint::Length(height),
    );
    frame.render_widget(Clear, area);
    let block = Block::bordered().title(" keys ").padding(ratatui::widgets::Padding::horizontal(1));
    frame.render_widget(Paragraph::new(lines).block(block), area);
}

fn draw_too_small(frame: &mut Frame<'_>, area: Rect) {
    let text = format!(
        "This terminal has {} columns and {} rows. nowait top needs {MIN_COLUMNS} and {MIN_ROWS}: make \
         it larger, or quit with q.",
        area.width, area.height
    );
    frame.render_widget(Paragraph::new(text).wrap(Wrap { trim: true }), area);
}

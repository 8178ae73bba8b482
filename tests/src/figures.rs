//! What a benchmark concludes: figures against bars, as a table and as `nowait.bench/1` JSON.

use std::borrow::Cow;
use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::stats::Estimate;

/// The schema of [`Report`].
pub const SCHEMA: &str = "nowait.bench/1";

/// On which side of its bar a value is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Side {
    /// The bar or less.
    #[serde(rename = "at most")]
    AtMost,
    /// The bar or more.
    #[serde(rename = "at least")]
    AtLeast,
}

/// One number that an issue or a document sets a bar for.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Figure {
    /// Its name, with dots between its parts.
    pub name: String,
    /// The measured value.
    pub value: f64,
    /// The unit of the value and the bar; "ratio" has none.
    pub unit: Cow<'static, str>,
    /// The value is to be at most this, or at least; without one the figure is for information.
    pub bar: Option<f64>,
    /// On which side of the bar the value is to be.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub side: Option<Side>,
    /// Whether the bar is held for certain. Undecided is not held.
    pub holds: bool,
    /// The 95 % interval of the value, where runs vary.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub interval: Option<[f64; 2]>,
    /// "held", "missed", "undecided" (the bar lies inside the interval) or "information".
    pub verdict: Cow<'static, str>,
}

impl Figure {
    /// A figure that is to be at most `bar`.
    #[must_use]
    pub fn at_most(name: &str, estimate: Estimate, unit: &'static str, bar: f64) -> Self {
        Self::information(name, estimate, unit).barred(Side::AtMost, bar, estimate.at_most(bar))
    }

    /// A figure that is to be at least `bar`.
    #[must_use]
    pub fn at_least(name: &str, estimate: Estimate, unit: &'static str, bar: f64) -> Self {
        Self::information(name, estimate, unit).barred(Side::AtLeast, bar, estimate.at_least(bar))
    }

    fn barred(self, side: Side, bar: f64, holds: Option<bool>) -> Self {
        let verdict = match holds {
            Some(true) => "held",
            Some(false) => "missed",
            None => "undecided",
        };
        let holds = holds == Some(true);
        Self { bar: Some(bar), side: Some(side), holds, verdict: verdict.into(), ..self }
    }

    fn bar_text(&self) -> String {
        let sign = if self.side == Some(Side::AtLeast) { '≥' } else { '≤' };
        self.bar.map_or_else(String::new, |bar| format!("{sign} {bar}"))
    }

    /// A figure without a bar.
    #[must_use]
    pub fn information(name: &str, estimate: Estimate, unit: &'static str) -> Self {
        Self {
            name: name.into(),
            value: estimate.value,
            unit: unit.into(),
            bar: None,
            side: None,
            holds: true,
            interval: Some([estimate.low, estimate.high]),
            verdict: "information".into(),
        }
    }
}

/// Everything that one benchmark says.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// [`SCHEMA`].
    pub schema: &'static str,
    /// The command that gives it.
    pub command: String,
    /// What it ran on.
    pub host: String,
    /// The figures.
    pub figures: Vec<Figure>,
    /// Medians behind the figures, for the reader: name, value, unit.
    pub details: Vec<(String, f64, &'static str)>,
    /// Lines for a plot.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub series: Vec<Series>,
}

/// One line of a plot.
#[derive(Clone, Debug, Serialize)]
pub struct Series {
    /// What it shows.
    pub name: String,
    /// Its points: quantile, and the value there in microseconds.
    pub points: Vec<(f64, f64)>,
}

impl Report {
    /// A table for the terminal.
    #[must_use]
    pub fn table(&self) -> String {
        let mut text = table(&self.figures);
        for (name, value, unit) in &self.details {
            let digits = if value.abs() < 10.0 { 3 } else { 1 };
            text.push_str(&format!("  {name}: {value:.digits$} {unit}\n"));
        }
        text
    }

    /// Writes the JSON.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        let mut bytes = serde_json::to_vec_pretty(self)?;
        bytes.push(b'\n');
        std::fs::write(path, bytes)
    }
}

/// The figures alone.
#[must_use]
pub fn table(figures: &[Figure]) -> String {
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::ASCII_BORDERS_ONLY_CONDENSED);
    table.set_header(["figure", "value", "95 % interval", "bar", "verdict"]);
    for figure in figures {
        let interval =
            figure.interval.map_or_else(String::new, |[low, high]| format!("{low:.3} – {high:.3}"));
        table.add_row([
            figure.name.clone(),
            format!("{:.3} {}", figure.value, figure.unit),
            interval,
            figure.bar_text(),
            figure.verdict.clone().into_owned(),
        ]);
    }
    format!("{table}\n")
}

//! What a benchmark concludes: figures against bars, as a table and as `nowait.bench/1` JSON.

use std::io;
use std::path::Path;

use serde::Serialize;

use crate::stats::Estimate;

/// The schema of [`Report`].
pub const SCHEMA: &str = "nowait.bench/1";

/// One number that an issue or a document sets a bar for.
#[derive(Clone, Debug, Serialize)]
pub struct Figure {
    /// Its name, with dots between its parts.
    pub name: String,
    /// The measured value.
    pub value: f64,
    /// The unit of the value and the bar; "ratio" has none.
    pub unit: &'static str,
    /// The value is to be at most this; without one the figure is for information.
    pub bar: Option<f64>,
    /// Whether the bar is held for certain. Undecided is not held.
    pub holds: bool,
    /// The 95 % interval of the value, where runs vary.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub interval: Option<[f64; 2]>,
    /// "held", "missed", "undecided" (the bar lies inside the interval) or "information".
    pub verdict: &'static str,
}

impl Figure {
    /// A figure that is to be at most `bar`.
    #[must_use]
    pub fn at_most(name: &str, estimate: Estimate, unit: &'static str, bar: f64) -> Self {
        let verdict = match estimate.at_most(bar) {
            Some(true) => "held",
            Some(false) => "missed",
            None => "undecided",
        };
        Self {
            bar: Some(bar),
            holds: verdict == "held",
            verdict,
            ..Self::information(name, estimate, unit)
        }
    }

    /// A figure without a bar.
    #[must_use]
    pub fn information(name: &str, estimate: Estimate, unit: &'static str) -> Self {
        Self {
            name: name.into(),
            value: estimate.value,
            unit,
            bar: None,
            holds: true,
            interval: Some([estimate.low, estimate.high]),
            verdict: "information",
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
}

impl Report {
    /// A table for the terminal.
    #[must_use]
    pub fn table(&self) -> String {
        let mut table = comfy_table::Table::new();
        table.load_style(comfy_table::presets::ASCII_BORDERS_ONLY_CONDENSED);
        table.set_header(["figure", "value", "95 % interval", "bar", "verdict"]);
        for figure in &self.figures {
            let interval = figure
                .interval
                .map_or_else(String::new, |[low, high]| format!("{low:.3} – {high:.3}"));
            table.add_row([
                figure.name.clone(),
                format!("{:.3} {}", figure.value, figure.unit),
                interval,
                figure.bar.map_or_else(String::new, |bar| format!("≤ {bar}")),
                figure.verdict.into(),
            ]);
        }
        let mut text = format!("{table}\n");
        for (name, value, unit) in &self.details {
            text.push_str(&format!("  {name}: {value:.1} {unit}\n"));
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

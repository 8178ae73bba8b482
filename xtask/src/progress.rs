//! What the user sees of a step: a spinner with the step's last line on a terminal, plain lines
//! elsewhere, and always one line with the time it took.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// How often the spinner moves.
const TICK: Duration = Duration::from_millis(100);
/// Longest line shown beside the spinner, in characters.
const NOTE_CHARS: usize = 70;

/// A running step. Dropped without [`Step::done`], it disappears.
pub(crate) struct Step {
    bar: Option<ProgressBar>,
    name: String,
    start: Instant,
}

impl Step {
    /// Begins a step.
    pub(crate) fn begin(name: impl Into<String>, what: &str) -> Step {
        let name = name.into();
        let bar = spinner(&name, what);
        if bar.is_none() {
            eprintln!("xtask: {name}: {what} ...");
        }
        Step { bar, name, start: Instant::now() }
    }

    /// Shows `line` beside the spinner.
    pub(crate) fn note(&self, line: &str) {
        if let Some(bar) = &self.bar {
            bar.set_message(line.trim().chars().take(NOTE_CHARS).collect::<String>());
        }
    }

    /// Ends the step with one line.
    pub(crate) fn done(self, what: &str) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        eprintln!("xtask: {}: {what} ({})", self.name, seconds(self.start.elapsed()));
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// A step that is only worth a line when it takes long: building what is mostly up to date.
pub(crate) struct Quiet {
    bar: Option<ProgressBar>,
    name: String,
    start: Instant,
    said: bool,
}

impl Quiet {
    /// Time below which nothing is said.
    const SILENT: Duration = Duration::from_secs(2);

    /// Begins a step.
    pub(crate) fn begin(name: &str) -> Quiet {
        let bar = spinner(name, "building");
        Quiet { bar, name: name.to_owned(), start: Instant::now(), said: false }
    }

    /// Time goes by: where no spinner shows it, a line says once what takes so long.
    pub(crate) fn tick(&mut self) {
        if self.bar.is_none() && !self.said && self.start.elapsed() >= Quiet::SILENT {
            self.said = true;
            eprintln!("xtask: {}: building ...", self.name);
        }
    }

    /// Ends the step.
    pub(crate) fn done(self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        if self.start.elapsed() >= Quiet::SILENT {
            eprintln!("xtask: {}: built ({})", self.name, seconds(self.start.elapsed()));
        }
    }
}

impl Drop for Quiet {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// A spinner, if there is a terminal to show it on.
fn spinner(name: &str, what: &str) -> Option<ProgressBar> {
    if !std::io::stderr().is_terminal() {
        return None;
    }
    let bar = ProgressBar::new_spinner();
    if let Ok(style) = ProgressStyle::with_template("{spinner} {prefix} [{elapsed}] {msg}") {
        bar.set_style(style);
    }
    bar.set_prefix(name.to_owned());
    bar.set_message(what.to_owned());
    bar.enable_steady_tick(TICK);
    Some(bar)
}

/// One plain line.
pub(crate) fn line(name: &str, what: &str) {
    eprintln!("xtask: {name}: {what}");
}

/// A duration for people.
pub(crate) fn seconds(time: Duration) -> String {
    let total = time.as_secs();
    if total < 60 {
        format!("{:.1} s", time.as_secs_f64())
    } else {
        format!("{} min {:02} s", total / 60, total % 60)
    }
}

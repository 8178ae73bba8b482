//! The result: checks, the verdict that follows from them, and the two forms it is shown in.

use std::fmt::Write as _;

use comfy_table::{ContentArrangement, Table, presets};
use serde::Serialize;

use super::checks;
use super::facts::Facts;
use crate::probe::ProbeReport;

/// The name of the JSON form; later versions only add fields.
pub const SCHEMA: &str = "nowait.doctor/1";
/// Columns of the table: wide enough for most findings on one line, and for most terminals.
const TABLE_WIDTH_COLUMNS: u16 = 120;
/// The check that only another KVM can help.
const GUEST_CHECK: &str = "kvm.guest";

/// How a check came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// As it should be.
    Pass,
    /// Guests run, with less: a mode, a measurement or a comfort is missing.
    Warn,
    /// No guest can run like this.
    Fail,
    /// Could not be looked at, because of another check.
    Skip,
}

impl Status {
    fn word(self) -> &'static str {
        match self {
            Self::Pass => "pass",
            Self::Warn => "WARN",
            Self::Fail => "FAIL",
            Self::Skip => "skip",
        }
    }
}

/// One requirement.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// Dotted name, e.g. `kvm.cap.irqchip`.
    pub name: String,
    /// How it came out.
    pub status: Status,
    /// What was found.
    pub found: String,
    /// What it is needed for.
    pub needed_for: &'static str,
    /// What to do; `None` where there is nothing to do.
    pub remedy: Option<String>,
}

/// What follows from the checks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Verdict {
    /// Whether this host can run a guest directly.
    pub host: bool,
    /// Whether it has what the nested machine needs.
    pub nested: bool,
    /// The same in a sentence.
    pub summary: String,
}

/// The result of `nowait doctor`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Always [`SCHEMA`].
    pub schema: &'static str,
    /// All checks, grouped by the first part of their names.
    pub checks: Vec<Check>,
    /// The steps of the probe guest.
    pub probe: ProbeReport,
    /// What follows.
    pub verdict: Verdict,
}

impl Report {
    /// Evaluates `facts`. Pure.
    #[must_use]
    pub fn new(facts: &Facts) -> Self {
        let mut checks = checks::of_this_host(facts);
        let first_failure = checks.iter().find(|check| check.status == Status::Fail);
        let failed = first_failure.map(|check| check.name.clone());
        checks.push(checks::nested_qemu(facts, failed.is_none()));
        let nested = facts.qemu.is_some();
        let summary = match &failed {
            None => "This host can run nowait directly.".to_owned(),
            Some(name) if name == GUEST_CHECK => format!(
                "This host cannot run guests directly ({name}): use `cargo xtask demo --nested`."
            ),
            Some(name) => format!(
                "This host cannot run guests directly ({name}): follow the remedy, or use `cargo \
                 xtask demo --nested`."
            ),
        };
        let verdict = Verdict { host: failed.is_none(), nested, summary };
        Self { schema: SCHEMA, checks, probe: facts.probe.clone(), verdict }
    }

    /// The check of that name.
    #[must_use]
    pub fn check(&self, name: &str) -> Option<&Check> {
        self.checks.iter().find(|check| check.name == name)
    }

    /// The JSON form, with a newline at its end.
    #[must_use]
    pub fn to_json(&self) -> String {
        // Strings, booleans and unit variants only: there is nothing that could fail.
        let mut json = serde_json::to_string_pretty(self).unwrap_or_default();
        json.push('\n');
        json
    }

    /// The form for people: a table of all checks, what to do about those that did not pass, and
    /// the verdict.
    #[must_use]
    pub fn to_table(&self) -> String {
        let mut table = Table::new();
        table
            .load_style(presets::NOTHING)
            .set_content_arrangement(ContentArrangement::Dynamic)
            .set_width(TABLE_WIDTH_COLUMNS)
            .set_header(["", "check", "found", "needed for"]);
        for check in &self.checks {
            let status = check.status.word();
            table.add_row([status, &check.name, &check.found, check.needed_for]);
        }
        let mut text = table.trim_fmt();
        text.push('\n');
        let mut heading = "\nWhat to do\n";
        for check in &self.checks {
            if let Some(remedy) = &check.remedy {
                // Writing to a String cannot fail.
                let _ = writeln!(text, "{heading}  {}: {remedy}", check.name);
                heading = "";
            }
        }
        let _ = writeln!(text, "\n{}", self.verdict.summary);
        text
    }
}

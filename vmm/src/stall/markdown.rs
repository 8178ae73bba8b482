//! The summary as Markdown, for a pull request's comment or a job's summary.

use super::document::Document;
use super::table::{self, MISSING_LINES};
use super::{missing, verdict};

/// The report.
pub(super) fn render(document: &Document) -> Result<Vec<u8>, String> {
    let scenario = &document.config.scenario;
    let mut text = format!("## nowait stall: {}\n\n", scenario.name);
    if !scenario.about.is_empty() {
        text.push_str(&format!("{}\n\n", scenario.about));
    }
    if !document.complete {
        text.push_str("**Partial: runs are missing or incomplete.**\n\n");
    }
    if document.data_errors() > 0 {
        let errors = document.data_errors();
        text.push_str(&format!("**{errors} pages did not hold what was written to them.**\n\n"));
    }
    for gate in &document.gates {
        let mark = if gate.passed { "passed" } else { "**failed**" };
        text.push_str(&format!("- gate `{}`: {mark}\n", gate.gate));
        for failure in &gate.failures {
            text.push_str(&format!("  - {}\n", escape(failure)));
        }
    }
    if !document.gates.is_empty() {
        text.push('\n');
    }
    if !document.summary.is_empty() {
        text.push_str(&format!("{}\n\n", table::summary(document)));
        text.push_str(
            "Overrun: how late a heartbeat on each vCPU wakes up. Stalled: the share of the vCPUs' time, as \
             the host sees it (not with `host` and `kernel`). Medians over the rounds, with bootstrap 95 % \
             intervals.\n\n",
        );
    }
    let verdict = verdict::lines(document);
    if !verdict.is_empty() {
        text.push_str(&format!("```\n{}\n```\n\n", verdict.join("\n")));
    }
    for warning in &document.warnings {
        text.push_str(&format!("> {}\n", escape(warning)));
    }
    for failure in &document.failures {
        let message = escape(&failure.message);
        text.push_str(&format!("> missing: {}, {} vCPUs: {message}\n", failure.apf, failure.vcpus));
    }
    for line in missing::few(document, MISSING_LINES) {
        text.push_str(&format!("> missing: {line}\n"));
    }
    text.push_str(&format!("\n`{}`\n", table::conditions(document)));
    Ok(text.into_bytes())
}

/// What a guest or a host said, as plain text in Markdown: no tags, links or code.
fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '&' => escaped.push_str("&amp;"),
            '\\' | '`' | '*' | '_' | '[' | ']' | '|' | '#' | '!' | '@' => {
                escaped.push('\\');
                escaped.push(c);
            }
            c if c.is_control() => escaped.push(' '),
            c => escaped.push(c),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::super::document::Failure;
    use super::super::document::tests::{BOOT, host, planned, result, workload};
    use super::super::{Gate, Run};
    use super::*;
    use nowait_wire::agent::Kind;

    #[test]
    fn it_has_gates_medians_and_warnings_and_a_guest_writes_no_markup() {
        let (plan, mut document) = planned(&["--scenario", "quick"]);
        document.runs.push(Run::new(BOOT, result(&workload(Kind::User), 2), host()).unwrap());
        document.failures.push(Failure::new(BOOT, "<img src=x> @all `x`\n# y".into()));
        document.runs[0].data_errors = 3;
        document.judge(&plan);
        let gate: Gate = "host.overrun.max > 1us".parse().unwrap();
        document.gates.push(gate.judge(&document.summary));
        let text = String::from_utf8(render(&document).unwrap()).unwrap();
        for part in [
            "## nowait stall: quick",
            "**Partial",
            "**3 pages did not hold what was written to them.**",
            "- gate `host.overrun.max > 1us`: **failed**\n  - 2 vCPUs, user, 1 thread",
            "| 2     | user     | 1       | host |",
            "&lt;img src=x&gt; \\@all \\`x\\` \\# y",
        ] {
            assert!(text.contains(part), "no '{part}' in\n{text}");
        }
    }
}

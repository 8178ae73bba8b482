//! The table: a row as soon as its run is over; at the end the medians, and what they say.

use std::io::{self, Write};

use comfy_table::Table;
use comfy_table::presets::ASCII_MARKDOWN;
use nowait_wire::agent::Kind;

use super::document::{Document, Run};
use super::summary::{Estimate, Group, ModeSummary, workload_name};
use super::{missing, verdict};
use crate::size;

/// A column: title, width, whether it holds numbers, and what it shows.
struct Column {
    title: &'static str,
    width: usize,
    number: bool,
    cell: fn(&Run) -> String,
}

const fn column(
    title: &'static str,
    width: usize,
    number: bool,
    cell: fn(&Run) -> String,
) -> Column {
    Column { title, width, number, cell }
}

const ROUND: Column = column("round", 5, true, |run| run.round.to_string());
const FRONT: [Column; 8] = [
    column("apf", 6, false, |run| run.apf.to_string()),
    column("workload", 8, false, |run| workload_name(run.workload).to_owned()),
    column("threads", 7, true, |run| run.threads.to_string()),
    column("vcpus", 5, true, |run| run.vcpus.to_string()),
    column("p50 us", 8, true, |run| run.overrun_us.p50.to_string()),
    column("p90 us", 8, true, |run| run.overrun_us.p90.to_string()),
    column("p99 us", 8, true, |run| run.overrun_us.p99.to_string()),
    column("max us", 8, true, |run| run.overrun_us.max.to_string()),
];
const PAGES: Column = column("pages/s", 8, true, |run| match run.workload {
    Kind::Idle | Kind::Command => "-".to_owned(),
    _ => format!("{:.0}", run.pages_per_s),
});
/// How long a guest command took, in the place of the pages that nobody counts.
const TIME: Column = column("time s", 8, true, |run| match run.workload {
    Kind::Command => format!("{:.2}", run.elapsed_us as f64 / 1e6),
    _ => "-".to_owned(),
});
const WORK: Column = column("work/s", 8, true, |run| {
    run.units_per_s.map_or("-".into(), |units| format!("{units:.0}"))
});
const STALLED: Column = column("stalled", 7, true, |run| match run.stall.share {
    Some(share) => format!("{:.1} %", share * 100.0),
    None => "-".to_owned(),
});
const ERRORS: Column = column("data errors", 11, true, |run| run.data_errors.to_string());

/// The columns that this document has something for.
fn columns(document: &Document) -> Vec<Column> {
    let scenario = &document.config.scenario;
    let mut columns = Vec::from_iter((scenario.rounds > 1).then_some(ROUND));
    columns.extend(FRONT);
    columns.push(if document.config.command.is_empty() { PAGES } else { TIME });
    columns.extend((scenario.compute_per_cpu > 0).then_some(WORK));
    columns.extend([STALLED, ERRORS]);
    columns
}

fn line(
    out: &mut dyn Write,
    columns: &[Column],
    cell: impl Fn(&Column) -> String,
) -> io::Result<()> {
    let cells = columns.iter().map(|column| {
        let (cell, width) = (cell(column), column.width);
        if column.number { format!("{cell:>width$}") } else { format!("{cell:<width$}") }
    });
    let line = cells.collect::<Vec<_>>().join("  ");
    writeln!(out, "{}", line.trim_end())?;
    out.flush()
}

/// Prints what the numbers are, and the titles.
pub(super) fn head(out: &mut dyn Write, document: &Document) -> io::Result<()> {
    let config = &document.config;
    writeln!(
        out,
        "By how much a heartbeat of {} ms on each vCPU wakes up late, beside {}",
        f64::from(config.heartbeat_us) / 1000.0,
        match (&config.command, &config.resident_limit) {
            (command, _) if !command.is_empty() => format!("`{command}`"),
            (_, Some(_)) => "threads that touch more than fits".to_owned(),
            (_, None) => "threads that touch evicted pages".to_owned(),
        }
    )?;
    if document.is_nested() {
        writeln!(out, "(an emulated machine: compare rows with each other, never with hardware)")?;
    }
    writeln!(out)?;
    let columns = columns(document);
    line(out, &columns, |column| column.title.to_owned())?;
    line(out, &columns, |column| "-".repeat(column.width))
}

/// Prints one run.
pub(super) fn row(out: &mut dyn Write, document: &Document, run: &Run) -> io::Result<()> {
    line(out, &columns(document), |column| (column.cell)(run))?;
    if let Some(problem) = &run.problem {
        writeln!(out, "  incomplete: {problem}")?;
    }
    Ok(())
}

/// Prints what the rows were measured with, what they come to, and what went wrong, if anything did. The
/// document has been judged.
pub(super) fn foot(out: &mut dyn Write, document: &Document) -> io::Result<()> {
    if !document.runs.is_empty() {
        writeln!(out)?;
        writeln!(out, "{}", conditions(document))?;
    }
    if document.config.scenario.rounds > 1 && !document.summary.is_empty() {
        writeln!(out)?;
        writeln!(out, "{}", summary(document))?;
    }
    let verdict = verdict::lines(document);
    if !verdict.is_empty() {
        writeln!(out)?;
        verdict.iter().try_for_each(|line| writeln!(out, "{line}"))?;
    }
    for gate in document.gates.iter().filter(|_| !document.runs.is_empty()) {
        writeln!(out, "gate {}: {}", if gate.passed { "passed" } else { "FAILED" }, gate.gate)?;
        gate.failures.iter().try_for_each(|failure| writeln!(out, "  {failure}"))?;
    }
    for warning in document.warnings.iter().filter(|_| !document.runs.is_empty()) {
        writeln!(out, "note: {warning}")?;
    }
    for failure in &document.failures {
        writeln!(out, "  missing: {failure}")?;
    }
    for line in missing::few(document, MISSING_LINES).iter().filter(|_| !document.runs.is_empty()) {
        writeln!(out, "  missing: {line}")?;
    }
    out.flush()
}

/// How many boots without all of their runs are told one by one.
pub(super) const MISSING_LINES: usize = 8;

/// The medians over the rounds, as a table that Markdown reads, too.
pub(super) fn summary(document: &Document) -> Table {
    let work = document.config.scenario.compute_per_cpu > 0;
    let baseline = document.config.baseline;
    let mut table = Table::new();
    table.load_style(ASCII_MARKDOWN);
    let mut titles = vec![
        "vcpus".to_owned(),
        "workload".to_owned(),
        "threads".to_owned(),
        "apf".to_owned(),
        "overrun p50".to_owned(),
        "overrun p99".to_owned(),
        "stalled".to_owned(),
    ];
    titles.extend(match document.config.command.is_empty() {
        true => ["pages/s".to_owned(), format!("pages/s over {baseline}")],
        false => ["time".to_owned(), format!("time over {baseline}")],
    });
    if work {
        titles.extend(["work/s".to_owned(), format!("work over {baseline}")]);
    }
    table.set_header(titles);
    for group in &document.summary {
        for mode in &group.modes {
            table.add_row(summary_row(group, mode, work));
        }
    }
    table
}

fn summary_row(group: &Group, mode: &ModeSummary, work: bool) -> Vec<String> {
    let touches = matches!(group.workload, Kind::User | Kind::Copy);
    let none = || "-".to_owned();
    let of_touches = |text: String| if touches { text } else { none() };
    let ratios = mode.over_baseline;
    let over = |estimate: Option<Estimate>| estimate.map_or_else(none, |e| interval(e, 2));
    let done = match mode.elapsed_us {
        Some(elapsed_us) => [
            format!("{} s", interval(elapsed_us.over(1e6), 2)),
            over(ratios.and_then(|ratios| ratios.elapsed)),
        ],
        None => [
            of_touches(interval(mode.pages_per_s, 0)),
            of_touches(over(ratios.and_then(|ratios| ratios.pages_per_s))),
        ],
    };
    let mut row = vec![
        group.vcpus.to_string(),
        workload_name(group.workload).to_owned(),
        group.threads.to_string(),
        mode.apf.to_string(),
        format!("{} us", interval(mode.overrun_us.p50, 0)),
        format!("{} us", interval(mode.overrun_us.p99, 0)),
        mode.stall_share.map_or_else(none, |share| format!("{:.1} %", share.value * 100.0)),
    ];
    row.extend(done);
    if work {
        row.push(mode.units_per_s.map_or_else(none, |units| interval(units, 0)));
        row.push(over(ratios.and_then(|ratios| ratios.units_per_s)));
    }
    row
}

/// A median with its interval, if it has one.
pub(super) fn interval(estimate: Estimate, digits: usize) -> String {
    let Estimate { value, low, high } = estimate;
    match low == high {
        true => format!("{value:.digits$}"),
        false => format!("{value:.digits$} ({low:.digits$} – {high:.digits$})"),
    }
}

/// What limits the guest's memory, and where its pages go.
pub(super) fn conditions(document: &Document) -> String {
    let config = &document.config;
    let Some(limit) = &config.resident_limit else {
        return format!("pages evicted before each run, to --store {}", config.store);
    };
    let pages = document.runs.iter().map(|run| run.pages).max().unwrap_or_default();
    let buffer = match u64::from(pages) * guest_memory::PAGE_SIZE as u64 {
        0 => String::new(),
        bytes => format!("; the threads share a buffer of {}", size::show(bytes)),
    };
    format!(
        "--resident-limit {limit} of {} guest RAM, --store {}{buffer}",
        config.memory, config.store
    )
}

#[cfg(test)]
mod tests {
    use super::super::document::tests::{BOOT, host, planned, result, workload};
    use super::super::document::{ACCEL_NESTED, Failure};
    use super::super::gate::GateResult;
    use super::super::plan::Boot;
    use super::*;
    use crate::kvm::cpuid::Apf;

    #[test]
    fn the_table_as_it_is_printed() {
        let mut out = Vec::new();
        let (plan, mut document) = planned(&["--cpus", "2", "--apf", "host"]);
        document.host.accel = ACCEL_NESTED;
        head(&mut out, &document).unwrap();
        for kind in [Kind::Idle, Kind::User] {
            let run = Run::new(BOOT, result(&workload(kind), 2), host()).unwrap();
            row(&mut out, &document, &run).unwrap();
            document.runs.push(run);
        }
        let mut short = result(&workload(Kind::Copy), 2);
        short.heartbeats.pop();
        let short = Run::new(BOOT, short, host()).unwrap();
        row(&mut out, &document, &short).unwrap();
        document.failures.push(Failure::new(BOOT, "the guest kernel panicked".into()));
        document.judge(&plan);
        foot(&mut out, &document).unwrap();
        let expected = "\
By how much a heartbeat of 1 ms on each vCPU wakes up late, beside threads that touch evicted pages
(an emulated machine: compare rows with each other, never with hardware)

apf     workload  threads  vcpus    p50 us    p90 us    p99 us    max us   pages/s  stalled  data errors
------  --------  -------  -----  --------  --------  --------  --------  --------  -------  -----------
host    idle            0      2         0      1000      1000      1000         -        -            0
host    user            1      2         0      1000      1000      1000      2000        -            0
host    copy            1      2         0         0         0         0      2000        -            0
  incomplete: 1 heartbeat of 2 vCPUs

pages evicted before each run, to --store delay=20ms
note: measured in an emulated machine: compare rows with each other, never with hardware
note: partial: runs are missing or incomplete
note: one boot of each mode: differences are hints (--rounds 5 and more gives intervals)
  missing: host with 2 vCPUs: the guest kernel panicked
";
        assert_eq!(String::from_utf8(out).unwrap(), expected);
        document.config.resident_limit = Some("24M".into());
        let expected = "--resident-limit 24M of 128M guest RAM, --store delay=20ms; the threads share \
            a buffer of 400 KiB";
        assert_eq!(conditions(&document), expected);
    }

    #[test]
    fn several_rounds_end_in_their_medians() {
        let (plan, mut document) = planned(&["--scenario", "overcommit", "--rounds", "2"]);
        for round in 1..=2 {
            for apf in [Apf::Off, Apf::User] {
                let boot = Boot { round, apf, ..BOOT };
                let mut run = Run::new(boot, result(&workload(Kind::User), 2), host()).unwrap();
                run.units_per_s = Some(if apf == Apf::Off { 10.0 } else { 30.0 });
                document.runs.push(run);
            }
        }
        document.judge(&plan);
        let gate = "user.work < 4 * off.work".parse::<super::super::gate::Gate>().unwrap();
        let gate: GateResult = gate.judge(&document.summary);
        document.gates.push(gate);
        let mut out = Vec::new();
        head(&mut out, &document).unwrap();
        foot(&mut out, &document).unwrap();
        let text = String::from_utf8(out).unwrap();
        for part in [
            "round  apf ",
            "work/s  stalled  data errors",
            "| work over off |",
            "| user | 0 us ",
            "| 3.00 ",
            "gate FAILED: user.work < 4 * off.work\n  2 vCPUs, user, 1 thread: 30.0/s against 40.0/s\n",
            "note: 2 boots of each mode",
        ] {
            assert!(text.contains(part), "no '{part}' in\n{text}");
        }
    }
}

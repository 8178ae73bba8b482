//! The table: a row as soon as its run is over.

use std::io::{self, Write};

use nowait_wire::agent::Kind;

use super::document::{Document, Run};
use crate::size;

/// The columns: title, width, whether they are numbers.
const COLUMNS: [(&str, usize, bool); 10] = [
    ("apf", 6, false),
    ("workload", 8, false),
    ("threads", 7, true),
    ("vcpus", 5, true),
    ("p50 us", 8, true),
    ("p90 us", 8, true),
    ("p99 us", 8, true),
    ("max us", 8, true),
    ("pages/s", 8, true),
    ("data errors", 11, true),
];

fn cells(out: &mut dyn Write, cells: [&str; COLUMNS.len()]) -> io::Result<()> {
    let line = COLUMNS.iter().zip(cells).map(|((_, width, number), cell)| {
        if *number { format!("{cell:>width$}") } else { format!("{cell:<width$}") }
    });
    let line = line.collect::<Vec<_>>().join("  ");
    writeln!(out, "{}", line.trim_end())?;
    out.flush()
}

/// Prints what the numbers are, and the titles.
pub(super) fn head(out: &mut dyn Write, document: &Document) -> io::Result<()> {
    let config = &document.config;
    writeln!(
        out,
        "By how much a heartbeat of {} ms on each vCPU wakes up late, beside threads that touch {}",
        f64::from(config.heartbeat_us) / 1000.0,
        if config.resident_limit.is_some() { "more than fits" } else { "evicted pages" },
    )?;
    if document.host.accel == super::document::ACCEL_NESTED {
        writeln!(out, "(an emulated machine: compare rows with each other, never with hardware)")?;
    }
    writeln!(out)?;
    cells(out, COLUMNS.map(|(title, ..)| title))?;
    let rules = COLUMNS.map(|(_, width, _)| "-".repeat(width));
    cells(out, rules.each_ref().map(String::as_str))
}

/// Prints one run.
pub(super) fn row(out: &mut dyn Write, run: &Run) -> io::Result<()> {
    let pages_per_s = match run.workload {
        Kind::Idle => "-".to_owned(),
        _ => format!("{:.0}", run.pages_per_s),
    };
    let workload = match run.workload {
        Kind::Idle => "idle",
        Kind::User => "user",
        Kind::Copy => "copy",
    };
    let texts = [
        run.apf.to_string(),
        workload.to_owned(),
        run.threads.to_string(),
        run.vcpus.to_string(),
        run.overrun_us.p50.to_string(),
        run.overrun_us.p90.to_string(),
        run.overrun_us.p99.to_string(),
        run.overrun_us.max.to_string(),
        pages_per_s,
        run.data_errors.to_string(),
    ];
    cells(out, texts.each_ref().map(String::as_str))?;
    if let Some(problem) = &run.problem {
        writeln!(out, "  incomplete: {problem}")?;
    }
    Ok(())
}

/// Prints what the rows were measured with, and what went wrong, if anything did.
pub(super) fn foot(out: &mut dyn Write, document: &Document) -> io::Result<()> {
    if !document.runs.is_empty() {
        writeln!(out)?;
        writeln!(out, "{}", conditions(document))?;
    }
    let verdict = super::verdict::lines(document);
    if !verdict.is_empty() {
        writeln!(out)?;
        verdict.iter().try_for_each(|line| writeln!(out, "{line}"))?;
        writeln!(out, "(one boot of each mode: no more than a hint where they differ by little)")?;
    }
    for failure in &document.failures {
        writeln!(
            out,
            "  missing: {} with {}: {}",
            failure.apf,
            size::count(failure.vcpus.into(), "vCPU"),
            failure.message
        )?;
    }
    out.flush()
}

/// What limits the guest's memory, and where its pages go.
fn conditions(document: &Document) -> String {
    let config = &document.config;
    let Some(limit) = &config.resident_limit else {
        return format!("pages evicted before each run, to --store {}", config.store);
    };
    let pages = document.runs.iter().map(|run| run.pages).max().unwrap_or_default();
    format!(
        "--resident-limit {limit} of {} guest RAM, --store {}; the threads share a buffer of {}",
        config.memory,
        config.store,
        size::show(u64::from(pages) * guest_memory::PAGE_SIZE as u64),
    )
}

#[cfg(test)]
mod tests {
    use super::super::document::tests::{BOOT, result, workload};
    use super::super::document::{ACCEL_NESTED, Failure};
    use super::*;

    #[test]
    fn the_table_as_it_is_printed() {
        let mut out = Vec::new();
        let args = super::super::plan::tests::parse(&[]).unwrap();
        let mut document = Document::new(&args);
        document.host.accel = ACCEL_NESTED;
        head(&mut out, &document).unwrap();
        for kind in [Kind::Idle, Kind::User] {
            let run = Run::new(BOOT, result(&workload(kind), 2)).unwrap();
            row(&mut out, &run).unwrap();
            document.runs.push(run);
        }
        let mut short = result(&workload(Kind::Copy), 2);
        short.heartbeats.pop();
        row(&mut out, &Run::new(BOOT, short).unwrap()).unwrap();
        document.failures.push(Failure::new(BOOT, "the guest kernel panicked".into()));
        foot(&mut out, &document).unwrap();
        let expected = "\
By how much a heartbeat of 1 ms on each vCPU wakes up late, beside threads that touch evicted pages
(an emulated machine: compare rows with each other, never with hardware)

apf     workload  threads  vcpus    p50 us    p90 us    p99 us    max us   pages/s  data errors
------  --------  -------  -----  --------  --------  --------  --------  --------  -----------
host    idle            0      2         0      1000      1000      1000         -            0
host    user            1      2         0      1000      1000      1000      2000            0
host    copy            1      2         0         0         0         0      2000            0
  incomplete: 1 heartbeat of 2 vCPUs

pages evicted before each run, to --store delay=20ms
  missing: host with 2 vCPUs: the guest kernel panicked
";
        assert_eq!(String::from_utf8(out).unwrap(), expected);
        document.config.resident_limit = Some("24M".into());
        let expected = "--resident-limit 24M of 128M guest RAM, --store delay=20ms; the threads share \
            a buffer of 400 KiB";
        assert_eq!(conditions(&document), expected);
    }
}

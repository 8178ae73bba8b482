//! What the rows say about the modes: work and lateness of each over one of them. Pure. The work is pages touched
//! per second, or of a guest command how fast it was over.
//!
//! Rows of the same workload, threads and processors are compared with each other, and the geometric
//! mean of their ratios is taken. One boot of a mode is one sample: what differs by little is the same.

use nowait_wire::agent::Kind;

use super::document::{Document, Run};
use crate::kvm::cpuid::Apf;
use crate::size;

/// Modes within this factor of each other are told as alike.
const ALIKE: f64 = 1.1;

/// A mode over the baseline, by the geometric mean over the rows under pressure.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Ratios {
    pub(super) apf: Apf,
    /// Rows that both have.
    pub(super) rows: usize,
    /// Pages per second, or commands.
    pub(super) work: f64,
    pub(super) p50: f64,
    pub(super) p99: f64,
}

/// The modes over the baseline, in the order in which they were measured.
pub(super) fn ratios(document: &Document, vcpus: u32, baseline: Apf) -> Vec<Ratios> {
    let mut modes = Vec::new();
    for run in &document.runs {
        if run.vcpus == vcpus && run.apf != baseline && !modes.contains(&run.apf) {
            modes.push(run.apf);
        }
    }
    modes.into_iter().filter_map(|apf| ratios_of(document, vcpus, baseline, apf)).collect()
}

fn ratios_of(document: &Document, vcpus: u32, baseline: Apf, apf: Apf) -> Option<Ratios> {
    let rows = |mode: Apf| {
        let under_pressure = move |run: &&Run| {
            run.apf == mode && run.vcpus == vcpus && run.workload != Kind::Idle && run.complete
        };
        document.runs.iter().filter(under_pressure)
    };
    let row = |run: &Run| (run.round, run.workload, run.threads);
    let alike = |a: &Run, b: &Run| row(a) == row(b);
    let pairs: Vec<(&Run, &Run)> = rows(apf)
        .filter_map(|run| Some((run, rows(baseline).find(|other| alike(run, other))?)))
        .collect();
    // No overrun at all counts as one of a microsecond.
    let mean = |value: fn(&Run) -> f64| {
        let logarithms = pairs.iter().map(|(a, b)| (value(a).max(1.0) / value(b).max(1.0)).ln());
        (logarithms.sum::<f64>() / pairs.len() as f64).exp()
    };
    (!pairs.is_empty()).then(|| Ratios {
        apf,
        rows: pairs.len(),
        work: mean(|run| match run.workload {
            Kind::Command => 1e12 / run.elapsed_us.max(1) as f64,
            _ => run.pages_per_s,
        }),
        p50: mean(|run| run.overrun_us.p50 as f64),
        p99: mean(|run| run.overrun_us.p99 as f64),
    })
}

/// The lines below the table; none when there is nothing to compare.
pub(super) fn lines(document: &Document) -> Vec<String> {
    let baseline = document.config.baseline;
    let mut processors: Vec<u32> = document.runs.iter().map(|run| run.vcpus).collect();
    processors.sort_unstable();
    processors.dedup();
    let mut lines = Vec::new();
    for vcpus in processors {
        let ratios = ratios(document, vcpus, baseline);
        let Some(first) = ratios.first() else { continue };
        let what = size::count(vcpus.into(), "vCPU");
        let rows = size::count(first.rows as u64, "row");
        lines.push(format!("{what}: over `{baseline}`, mean of {rows} under pressure"));
        let command = !document.config.command.is_empty();
        for Ratios { apf, work, p50, p99, .. } in &ratios {
            let apf = format!("{apf}");
            let work = match command {
                true => format!("time x {:<6.2}", 1.0 / work),
                false => format!("pages/s x {work:<6.2}"),
            };
            lines.push(format!("  {apf:<6}  {work} overrun p50 x {p50:<6.3} p99 x {p99:.3}"));
        }
        let most = if command { "done first" } else { "most work" };
        lines.push(format!("  {most}: {}", sentence(&ratios, baseline)));
    }
    lines
}

/// Who gets the most work done, and whose heartbeat is late least.
fn sentence(ratios: &[Ratios], baseline: Apf) -> String {
    // The baseline itself takes part.
    let own = Ratios { apf: baseline, rows: 0, work: 1.0, p50: 1.0, p99: 1.0 };
    let all: Vec<Ratios> = ratios.iter().copied().chain([own]).collect();
    let work = best(&all, |ratios| 1.0 / ratios.work);
    let [median, tail] = [best(&all, |ratios| ratios.p50), best(&all, |ratios| ratios.p99)];
    if median == tail {
        return format!("{work}; heartbeat late least: {median}");
    }
    format!("{work}; heartbeat late least: {median} at p50, {tail} at p99")
}

/// Those whose value is smallest, or larger by little.
fn best(ratios: &[Ratios], value: fn(&Ratios) -> f64) -> String {
    let least = ratios.iter().map(value).fold(f64::INFINITY, f64::min);
    let names: Vec<String> = ratios
        .iter()
        .filter(|each| value(each) <= least * ALIKE)
        .map(|each| format!("`{}`", each.apf))
        .collect();
    match names.split_last() {
        Some((last, [])) => last.clone(),
        Some((last, others)) => format!("{} and {last}, within 10 %", others.join(", ")),
        None => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::document::tests::{BOOT, host, result, workload};
    use super::super::plan::Boot;
    use super::*;

    fn document(modes: &[(Apf, f64, u64)]) -> Document {
        let (_, mut document) = super::super::document::tests::planned(&[]);
        document.config.baseline = modes.first().map_or(Apf::Off, |(apf, ..)| *apf);
        for &(apf, pages_per_s, p50) in modes {
            for kind in [Kind::Idle, Kind::User, Kind::Copy] {
                let mut run =
                    Run::new(Boot { apf, ..BOOT }, result(&workload(kind), 2), host()).unwrap();
                run.pages_per_s = pages_per_s;
                (run.overrun_us.p50, run.overrun_us.p99) = (p50, 10 * p50);
                if kind == Kind::Copy {
                    // Ratios, not values, are averaged.
                    run.pages_per_s *= 100.0;
                }
                document.runs.push(run);
            }
        }
        document
    }

    #[test]
    fn modes_are_compared_with_off_row_by_row() {
        let document =
            document(&[(Apf::Off, 100.0, 8000), (Apf::Kernel, 380.0, 400), (Apf::User, 400.0, 0)]);
        assert_eq!(
            lines(&document),
            [
                "2 vCPUs: over `off`, mean of 2 rows under pressure",
                "  kernel  pages/s x 3.80   overrun p50 x 0.050  p99 x 0.050",
                "  user    pages/s x 4.00   overrun p50 x 0.000  p99 x 0.000",
                "  most work: `kernel` and `user`, within 10 %; heartbeat late least: `user`",
            ]
        );
    }

    #[test]
    fn commands_are_compared_by_their_time() {
        let mut document = document(&[(Apf::Off, 1.0, 100), (Apf::User, 1.0, 100)]);
        document.config.command = "make".to_owned();
        document.runs.retain(|run| run.workload != Kind::Copy);
        for run in document.runs.iter_mut().filter(|run| run.workload == Kind::User) {
            run.workload = Kind::Command;
            run.elapsed_us = if run.apf == Apf::User { 1_000_000 } else { 4_000_000 };
        }
        let lines = lines(&document);
        assert_eq!(lines[1], "  user    time x 0.25   overrun p50 x 1.000  p99 x 1.000");
        assert!(lines[2].starts_with("  done first: `user`; heartbeat"), "{lines:?}");
    }

    #[test]
    fn without_a_second_mode_there_is_no_verdict() {
        assert!(lines(&document(&[(Apf::User, 1.0, 1)])).is_empty());
        assert!(lines(&document(&[])).is_empty());
    }

    #[test]
    fn an_incomplete_row_is_left_out_and_the_baseline_may_win() {
        let mut document = document(&[(Apf::Host, 100.0, 10), (Apf::User, 50.0, 20)]);
        document.runs[5].complete = false;
        let ratios = ratios(&document, 2, Apf::Host);
        assert_eq!((ratios.len(), ratios[0].rows), (1, 1));
        assert!((ratios[0].work - 0.5).abs() < 1e-9);
        assert!(lines(&document)[2].contains("most work: `host`; heartbeat late least: `host`"));
        document.runs.truncate(4);
        assert!(lines(&document).is_empty());
    }

    #[test]
    fn who_is_late_least_is_said_of_the_median_and_of_the_tail() {
        let mut document =
            document(&[(Apf::Off, 1.0, 100), (Apf::Host, 1.0, 10), (Apf::User, 1.0, 20)]);
        for run in document.runs.iter_mut().filter(|run| run.apf == Apf::Host) {
            run.overrun_us.p99 = 900;
        }
        let last = lines(&document).pop().unwrap();
        assert!(last.ends_with("heartbeat late least: `host` at p50, `user` at p99"), "{last}");
    }
}

//! Pages that the guest's own kernel writes to (copy_to_user), where it takes no page-not-present: the vCPU is
//! halted artificially, interrupts run, and whether another task runs is up to how preemptible the guest's
//! kernel is. Measured with a distribution's kernel, which has all models (CONFIG_PREEMPT_DYNAMIC).

use anyhow::Result;
use nowait_tests::figures::{Figure, Report};
use nowait_tests::guest::Guest;
use nowait_tests::stats::{median, median_of_ratios};
use nowait_tests::{image, initramfs};
use nowait_wire::agent::{Kind, Workload};

use super::Args;
use super::run::{Rounds, Row, boot_of};

/// `preempt=` of the guest's command line (Documentation/admin-guide/kernel-parameters.txt).
const MODELS: [&str; 3] = ["none", "voluntary", "full"];
const THREADS: u32 = 8;
const SLOW_MS: u32 = 20;

pub(crate) fn run(args: &Args, report: &mut Report) -> Result<()> {
    let row = |kind| Workload {
        kind,
        threads: THREADS,
        duration_ms: args.duration_ms,
        pages: THREADS * (args.duration_ms / SLOW_MS + 1) * 5 / 4,
        compute: 1,
        ..Workload::IDLE
    };
    // In the first one a distribution's kernel has things of its own to do: heartbeats up to 0.1 s late.
    let workloads = [row(Kind::User), row(Kind::User), row(Kind::Copy)];
    let rounds = Rounds::of("preemption", args.runs, &MODELS, |model| {
        let initrd = initramfs();
        let guest = Guest::kernel(&image("debian-vmlinuz"))
            .args(["--initrd".as_ref(), initrd.as_os_str()])
            .args(["--cmdline", &format!("preempt={model}")]);
        let more = ["--memory", "256M", "--store", "delay=20ms", "--no-prefetch"];
        boot_of(guest, "user", &more, &workloads)
    })?;
    let ratio = |model, row, number: fn(&Row) -> f64| {
        median_of_ratios(&rounds.values(model, row, number), &rounds.values("none", row, number))
    };
    for (row, kind) in [(1, "user"), (2, "copy")] {
        for model in ["voluntary", "full"] {
            let mut push = |what: &str, number| {
                let name = format!("apf.preempt_{model}_{kind}_{what}_over_none");
                report.figures.push(Figure::information(&name, ratio(model, row, number), "ratio"));
            };
            push("p99", |row| row.p99_us);
            push("pages", |row| row.pages_per_s);
            push("units", |row| row.units_per_s);
        }
        for model in MODELS {
            let mut push = |what: &str, number: fn(&Row) -> f64, unit| {
                let value = median(&rounds.values(model, row, number));
                report.details.push((format!("{kind}, preempt={model}{what}"), value, unit));
            };
            push(": p50", |row| row.p50_us, "us");
            push(": p99", |row| row.p99_us, "us");
            push("", |row| row.pages_per_s, "pages/s");
            push(": computing", |row| row.units_per_s, "units/s");
        }
    }
    Ok(())
}

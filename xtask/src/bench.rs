//! `cargo xtask bench`: measurements, side by side in one run, as a table and as JSON.
//!
//! The measuring is done by a program of the tests crate, on the host or in the nested machine; it
//! prints the table and writes `{"schema":"nowait.bench/1","figures":[…]}` (tests/src/figures.rs).

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::Result;
use clap::{Args, Subcommand};

use crate::accel::{self, Accel, Force};
use crate::test::on_host_command;
use crate::{binaries, child, images, nested, paths, plot, setup};

/// Memory of the nested machine when QEMU, its libraries and its guests live in it, in MiB.
const MEMORY_MIB: u32 = 1536;
/// Time after which a benchmark in the nested machine is ended.
const TIMEOUT: Duration = Duration::from_secs(5400);

/// What can be measured.
#[derive(Subcommand)]
pub(crate) enum Bench {
    /// From exec of the VMM to the agent's first line, beside QEMU's microvm
    Boot(Options),
    /// Async page faults in all four modes side by side: the heartbeat, work, and what telling costs
    Apf(ApfOptions),
    /// Stalls and work beside QEMU under a memory cgroup with swap, with and without KVM's async page faults
    Peers(Options),
    /// Faults per second beside a bare userfaultfd loop, slow pages, stores, the eviction policy; on the
    /// host, without a guest; and what a hit costs in a guest
    Pager(PagerOptions),
    /// What measuring stalls costs, and tracing faults: the fault rate with and without, on the host
    Overhead(OverheadOptions),
}

/// The command line of every benchmark.
#[derive(Args, Default)]
pub(crate) struct Options {
    #[command(flatten)]
    force: Force,
    /// Write the numbers as JSON too
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Further options for the measuring program, after `--`
    #[arg(last = true)]
    rest: Vec<String>,
    /// See [`nested::Run::counts`].
    #[arg(skip)]
    counts: bool,
}

/// The command line of async page faults'.
#[derive(Args)]
pub(crate) struct ApfOptions {
    #[command(flatten)]
    common: Options,
    /// Draw the heartbeat's percentiles beside 8 faulting threads, as SVG
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// In the emulated machine: let its clock be the host's, not one that counts instructions
    #[arg(long)]
    wall_clock: bool,
}

impl ApfOptions {
    fn run(mut self) -> Result<u8> {
        if let Some(file) = &self.svg {
            paths::check_writable(file)?;
        }
        let json = self.common.json.get_or_insert(paths::target().join("bench-apf.json")).clone();
        self.common.counts = !self.wall_clock;
        let code = self.common.run("apf", None)?;
        if let (0, Some(svg)) = (code, &self.svg) {
            plot::percentiles(
                &json,
                svg,
                "how late a heartbeat of 1 ms is beside 8 faulting threads",
            )?;
        }
        Ok(code)
    }
}

/// The command line of measuring's own costs.
#[derive(Args)]
pub(crate) struct OverheadOptions {
    /// Write the numbers as JSON too
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Further options for the measuring program, after `--`
    #[arg(last = true)]
    rest: Vec<String>,
}

impl OverheadOptions {
    fn run(self) -> Result<u8> {
        let mut rest: Vec<String> = ["--only", "overhead"].map(str::to_owned).into();
        rest.extend(self.rest);
        let force = Force::default();
        PagerOptions { force, no_guests: true, json: self.json, rest }.run()
    }
}

/// The command line of the pager's.
#[derive(Args)]
pub(crate) struct PagerOptions {
    #[command(flatten)]
    force: Force,
    /// Leave the part with guests out
    #[arg(long)]
    no_guests: bool,
    /// Write the numbers as JSON too
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Further options for the measuring program, after `--`
    #[arg(last = true)]
    rest: Vec<String>,
}

impl PagerOptions {
    fn run(&self) -> Result<u8> {
        if let Some(file) = &self.json {
            paths::check_writable(file)?;
        }
        setup::setup()?;
        let program = binaries::tests_binary("pager-bench")?;
        if let Some(code) = check(&program, &self.rest)? {
            return Ok(code);
        }
        let mut command = Command::new(program);
        if !self.no_guests {
            // Before the threads that play vCPUs, not beside them.
            let guests = paths::target().join("bench-hit.json");
            let trace = paths::target().join("bench-hit.trace");
            let options =
                Options { json: Some(guests.clone()), force: self.force, ..Options::default() };
            match options.run("hit", Some(&trace))? {
                0 => command.arg("--with").arg(&guests),
                code => return Ok(code),
            };
            // What a user names comes after it, and has its place.
            if !self.rest.iter().any(|word| word.starts_with("--trace")) {
                command.arg("--trace").arg(&trace);
            }
        }
        if let Some(file) = &self.json {
            command.arg("--json").arg(file);
        }
        child::foreground(command.args(&self.rest))
    }
}

impl Bench {
    /// Runs it; the exit code of the measuring program.
    pub(crate) fn run(self) -> Result<u8> {
        match self {
            Bench::Boot(options) => options.run("boot", None),
            Bench::Apf(options) => options.run(),
            Bench::Peers(options) => options.run("peers", None),
            Bench::Pager(options) => options.run(),
            Bench::Overhead(options) => options.run(),
        }
    }
}

/// Has a measuring program look at its operands before minutes of work: it meets them before a last
/// `--help`. The exit code, if that is all.
fn check(program: &Path, operands: &[String]) -> Result<Option<u8>> {
    let mut command = Command::new(program);
    command.args(operands);
    if operands.iter().any(|word| child::HELP.contains(&word.as_str())) {
        return child::foreground(&mut command).map(Some);
    }
    let code = child::foreground(command.arg("--help").stdout(Stdio::null()))?;
    Ok((code != 0).then_some(code))
}

impl Options {
    /// Runs it; a trace that is wanted is an option of the measuring program, too.
    fn run(&self, bench: &str, trace: Option<&Path>) -> Result<u8> {
        if let Some(file) = &self.json {
            paths::check_writable(file)?;
        }
        setup::setup()?;
        let program = binaries::tests_binary(&format!("{bench}-bench"))?;
        if let Some(code) = check(&program, &self.rest)? {
            return Ok(code);
        }
        let nowait = binaries::nowait()?;
        let images = images::images()?;
        let (code, report) = match accel::choose(self.force, &nowait)? {
            Accel::Host => {
                let report = paths::target().join(format!("{bench}-bench.json"));
                let mut command = on_host_command(&program, &nowait, &images)?;
                command.arg("--json").arg(&report).args(&self.rest);
                trace.iter().for_each(|trace| {
                    command.arg("--trace").arg(trace);
                });
                (child::foreground(&mut command)?, report)
            }
            Accel::Nested => {
                let name = format!("{bench}-bench");
                let inside = format!("bin/{name}");
                let result = format!("/results/{bench}.json");
                let mut words = vec![name.clone(), "--json".to_owned(), result];
                words.extend(self.rest.iter().cloned());
                if trace.is_some() {
                    words.extend(["--trace", "/results/trace"].map(str::to_owned));
                }
                let mut run = nested::Run::new(&name, words);
                run.hold.add(&program, inside);
                run.hold.add(&nowait, "bin/nowait");
                run.hold.images(&images);
                run.hold.qemu()?;
                if bench == "peers" {
                    run.hold.nbd()?;
                }
                run.waits = true;
                run.counts = self.counts;
                run.memory_mib = MEMORY_MIB;
                run.timeout = TIMEOUT;
                let code = run.go()?;
                if let (0, Some(trace)) = (code, trace) {
                    run.bring("trace", trace)?;
                }
                (code, run.out.join("results").join(format!("{bench}.json")))
            }
        };
        if let (0, Some(file)) = (code, &self.json) {
            paths::copy(&report, file)?;
        }
        Ok(code)
    }
}

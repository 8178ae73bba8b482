//! `cargo xtask test`: every check there is, summed up on the last line.

mod browser;
mod guests;
mod libtest;

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::Args;

use crate::accel::Force;
use crate::progress::{self, Step};
use crate::{binaries, child, exit, fuzz, paths, setup, signals, tidy, tools};
use guests::Selection;
pub(crate) use guests::on_host_command;
pub(crate) use libtest::Counts;

/// The command line of `test`.
#[derive(Args)]
pub(crate) struct Options {
    #[command(flatten)]
    force: Force,
    /// Only the guest tests whose names contain TEXT, and nothing else
    #[arg(long, value_name = "TEXT")]
    guests: Option<String>,
}

/// What has been counted so far.
#[derive(Default)]
struct Summary {
    counts: Counts,
    /// The exit code of the first error that has one of its own.
    code: Option<u8>,
    phases: Vec<(String, String, Duration)>,
}

impl Summary {
    /// A phase that passes or fails as a whole: one test.
    fn check(&mut self, name: &str, check: impl FnOnce(&str) -> Result<()>) -> Result<()> {
        let start = Instant::now();
        let outcome = check(name);
        signals::check()?;
        let word = match &outcome {
            Ok(()) => {
                self.counts.passed += 1;
                "ok"
            }
            Err(error) => {
                let failure = self.failure(name, error);
                self.counts.add(failure);
                "FAILED"
            }
        };
        self.phases.push((name.to_owned(), word.to_owned(), start.elapsed()));
        Ok(())
    }

    /// A phase of many tests. An error counts as one failed test.
    fn tests(&mut self, name: &str, run: impl FnOnce() -> Result<Counts>) -> Result<()> {
        let start = Instant::now();
        let outcome = run();
        signals::check()?;
        let counts = outcome.unwrap_or_else(|error| self.failure(name, &error));
        self.phases.push((name.to_owned(), counts.line(), start.elapsed()));
        self.counts.add(counts);
        Ok(())
    }

    /// One failed test.
    fn failure(&mut self, name: &str, error: &anyhow::Error) -> Counts {
        let failure = format!("{name}: {error:#}");
        eprintln!("xtask: {failure}");
        let code = error.downcast_ref::<exit::Exit>().map(|exit| exit.code);
        self.code = self.code.or(code);
        Counts { failed: 1, failures: vec![failure], ..Counts::default() }
    }

    /// Prints everything; the exit code.
    fn finish(self) -> u8 {
        println!();
        for (name, word, time) in &self.phases {
            println!("{name:<14} {:>12}  {word}", progress::seconds(*time));
        }
        for (name, reason) in &self.counts.skips {
            println!("skipped: {name}: {reason}");
        }
        // Once more, and cut: they stand somewhere in a long log, of which one may have the end only.
        for (name, words) in &self.counts.words {
            println!("said by {name}:");
            words.iter().for_each(|line| println!("    {line}"));
        }
        for failure in &self.counts.failures {
            println!("failed: {failure}");
        }
        println!("{}", self.counts.line());
        match self.counts.failed {
            0 => 0,
            1 => self.code.unwrap_or(exit::FAILED),
            _ => exit::FAILED,
        }
    }
}

/// Runs everything, or the guest tests that were asked for; the exit code.
pub(crate) fn test(options: &Options) -> Result<u8> {
    let mut summary = Summary::default();
    if let Some(filter) = &options.guests {
        setup::setup()?;
        summary
            .tests("guest tests", || guests::run(options.force, Selection::new(Some(filter))))?;
        return Ok(summary.finish());
    }
    summary.check("setup", |_| {
        setup::setup()?;
        // Now, while whoever is to give a password for sudo is there.
        crate::browser::browser()?;
        crate::nested::builder()?;
        tools::cargo_deny().map(drop)
    })?;
    if summary.counts.failed > 0 {
        return Ok(summary.finish());
    }
    summary
        .check("fmt", |name| quiet(name, &["fmt", "--all", "--check", "--", "--color", "never"]))?;
    summary.check("clippy", |name| {
        let arguments = [
            "clippy",
            "--workspace",
            "--all-targets",
            "--features",
            "nowait-tests/bench,vmm/bed",
            "--locked",
            "--quiet",
        ];
        quiet(name, &[&arguments[..], &["--", "-D", "warnings"]].concat())
    })?;
    summary.check("deny", |name| {
        let mut deny = Command::new(tools::cargo_deny()?);
        deny.current_dir(paths::root()).args(["--color", "never", "--locked", "check"]);
        deny.args(["--hide-inclusion-graph", "bans", "licenses", "sources"]);
        step(name, &mut deny)
    })?;
    summary.check("tidy", |_| tidy::check())?;
    summary.tests("unit tests", unit_tests)?;
    summary.tests("terminal", terminal)?;
    summary.tests("loom", loom)?;
    summary.tests("browser", browser::run)?;
    summary.tests("fuzz", fuzz::test)?;
    summary.tests("guest tests", || guests::run(options.force, Selection::new(None)))?;
    Ok(summary.finish())
}

/// The command line of `soak`.
#[derive(Args)]
pub(crate) struct SoakOptions {
    #[command(flatten)]
    force: Force,
    /// How long chaos lasts, in seconds
    #[arg(long, value_name = "N", default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    seconds: u64,
}

/// Time for what is not chaos.
const SOAK_TIME: Duration = Duration::from_secs(3600);

/// Chaos for long, and every store in every mode with 1, 2 and 4 vCPUs; the exit code.
pub(crate) fn soak(options: &SoakOptions) -> Result<u8> {
    setup::setup()?;
    let seconds = options.seconds.to_string();
    let environment = [("NOWAIT_CHAOS_SECONDS", seconds.as_str()), ("NOWAIT_MATRIX", "full")];
    let timeout = SOAK_TIME + 2 * Duration::from_secs(options.seconds);
    let mut summary = Summary::default();
    for topic in ["chaos::", "pressure::", "apf::"] {
        let selection = Selection { filter: Some(topic), environment: &environment, timeout };
        summary.tests(topic.trim_end_matches(':'), || guests::run(options.force, selection))?;
    }
    Ok(summary.finish())
}

/// What of the workspace's tests needs no guest and no browser: everything, with the documentation's examples,
/// but these tests themselves.
const UNIT_TESTS: [&[&str]; 2] = [
    &["--workspace", "--exclude", "nowait-tests", "--exclude", "nowait-browser-tests"],
    &["-p", "nowait-tests", "--features", "bench", "--lib", "--bins"],
];

/// Tests that need no guest.
fn unit_tests() -> Result<Counts> {
    let runs = UNIT_TESTS.map(|selection| {
        let mut cargo = binaries::cargo();
        cargo.arg("test").args(selection);
        cargo
    });
    cargo_tests("unit tests", runs.into())
}

/// `nowait top` in tmux, over a control socket without a guest.
fn terminal() -> Result<Counts> {
    let mut cargo = binaries::cargo();
    cargo.args(["test", "-p", "vmm", "--features", "bed", "--test", "terminal"]);
    cargo_tests("terminal", vec![cargo])
}

/// loom's models: every interleaving of a few threads. In a target directory of their own, since
/// the flag is one for all crates.
fn loom() -> Result<Counts> {
    let mut cargo = binaries::cargo();
    cargo.args(["test", "--release", "-p", "async-pf", "--test", "loom_*", "--target-dir"]);
    cargo.arg(paths::target().join("loom"));
    cargo.env_remove("RUSTFLAGS").env("CARGO_ENCODED_RUSTFLAGS", "--cfg\x1floom");
    // Linking would take longer than the models.
    cargo.env("CARGO_PROFILE_RELEASE_LTO", "off");
    cargo.env("CARGO_PROFILE_RELEASE_DEBUG_ASSERTIONS", "true");
    cargo_tests("loom", vec![cargo])
}

/// Runs `cargo test` commands as one step.
fn cargo_tests(name: &str, runs: Vec<Command>) -> Result<Counts> {
    let step = Step::begin(name, "building and running");
    let log = paths::log(&name.replace(' ', "-"))?;
    let mut sum = Counts::default();
    for mut cargo in runs {
        cargo.args(["--locked", "--no-fail-fast", "--color", "never"]);
        // The output of tests that pass is where skips say why.
        cargo.args(["--", "--show-output", "--color", "never"]);
        let mut parser = libtest::Parser::default();
        let mut tail = child::Tail::default();
        let status = child::lines(&mut cargo, &log, |line| {
            step.note(line);
            parser.line(line);
            tail.push(line);
        })?;
        let mut counts = parser.finish();
        if !status.success() {
            eprintln!("{}", tail.text());
            counts
                .note_failure(format!("cargo test ({status}); everything is in {}", log.display()));
        }
        sum.add(counts);
    }
    step.done(&sum.line());
    Ok(sum)
}

/// Runs cargo as one step.
fn quiet(name: &str, arguments: &[&str]) -> Result<()> {
    step(name, binaries::cargo().args(arguments))
}

fn step(name: &str, command: &mut Command) -> Result<()> {
    let step = Step::begin(name, "checking");
    child::run(&step, command, &paths::log(name)?)?;
    step.done("ok");
    Ok(())
}

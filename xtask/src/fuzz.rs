//! `cargo xtask fuzz`: libFuzzer on the targets of `fuzz/`. No cargo-fuzz is needed: what it passes to the
//! compiler without a sanitizer, the stable one takes.
//!
//! New inputs go to `fuzz/corpus` in cargo's target directory; those that are worth keeping are copied to
//! the committed corpus by hand. An input that fails is in `fuzz/artifacts` there.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::exit::{self, Exit};
use crate::progress::Step;
use crate::test::Counts;
use crate::{binaries, child, paths, setup};

/// The targets, by the names of their corpora.
const TARGETS: [&str; 4] = ["nbd_handshake", "nbd_replies", "page_lives", "protocol"];
/// How long each target runs, unless said otherwise.
const SECONDS: u64 = 60;
/// How long each runs in `cargo xtask test`.
const TEST_SECONDS: u64 = 10;
/// After this time one input counts as one that hangs.
const INPUT_SECONDS: u64 = 30;
/// The longest input, in bytes.
const MAX_BYTES: u32 = 4096;
/// What makes a program tell libFuzzer where it has been: as cargo-fuzz has it.
const FLAGS: [&str; 7] = [
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "-Ccodegen-units=1",
    "--cfg=fuzzing",
];

/// The command line of `fuzz`.
#[derive(Args)]
pub(crate) struct Options {
    /// Only this one
    #[arg(value_parser = TARGETS)]
    target: Option<String>,
    /// How long each target runs
    #[arg(long, value_name = "N", default_value_t = SECONDS,
        value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    seconds: u64,
}

/// Runs the targets with their output as ours; the exit code.
pub(crate) fn run(options: &Options) -> Result<u8> {
    setup::setup()?;
    let programs = build()?;
    let wanted = |target: &&&str| options.target.as_deref().is_none_or(|name| name == **target);
    for target in TARGETS.iter().filter(wanted) {
        let code = child::foreground(&mut command(&programs, target, options.seconds)?)?;
        if code != 0 {
            let message = format!("{target} failed: its input is in {}", artifacts().display());
            return Err(Exit::error(exit::FAILED, message));
        }
    }
    Ok(0)
}

/// Runs each for a moment: one test a target.
pub(crate) fn test() -> Result<Counts> {
    let programs = build()?;
    let mut counts = Counts::default();
    for target in TARGETS {
        let step = Step::begin("fuzz", target);
        let log = paths::log(&format!("fuzz-{target}"))?;
        let mut done = None;
        let mut tail = child::Tail::default();
        let mut command = command(&programs, target, TEST_SECONDS)?;
        let status = child::lines(&mut command, &log, |line| {
            tail.push(line);
            // "Done 4711 runs in 11 second(s)"
            done = done.take().or_else(|| line.strip_prefix("Done ").map(str::to_owned));
        })?;
        match done {
            Some(done) if status.success() => {
                counts.passed += 1;
                step.done(&format!("{target}: {done}"));
            }
            _ => {
                eprintln!("{}", tail.text());
                counts.failed += 1;
                let input = artifacts();
                counts.failures.push(format!("fuzz {target} ({status}): {}", input.display()));
            }
        }
    }
    Ok(counts)
}

/// Builds the targets; the directory with their programs.
fn build() -> Result<PathBuf> {
    let step = Step::begin("fuzz", "building");
    let target = paths::target().join("fuzz");
    let mut cargo = binaries::cargo();
    cargo
        .args(["build", "--release", "--locked", "--target", binaries::TARGET, "--target-dir"])
        .arg(&target)
        .arg("--manifest-path")
        .arg(manifest())
        .env_remove("RUSTFLAGS")
        .env("CARGO_ENCODED_RUSTFLAGS", FLAGS.join("\x1f"));
    child::run(&step, &mut cargo, &paths::log("fuzz-build")?)?;
    step.done("built");
    Ok(target.join(binaries::TARGET).join("release"))
}

fn command(programs: &Path, target: &str, seconds: u64) -> Result<Command> {
    let (found, artifacts) = (paths::target().join("fuzz/corpus").join(target), artifacts());
    paths::create_dir(&found)?;
    paths::create_dir(&artifacts)?;
    let committed = paths::root().join("fuzz/corpus").join(target);
    if !committed.is_dir() {
        bail!("{target} has no corpus: {} is missing", committed.display());
    }
    let prefix = artifacts.to_str().context("cargo's target directory is no text")?;
    let mut command = Command::new(programs.join(target));
    // The first corpus is the one that libFuzzer writes to.
    command
        .args([found, committed])
        .arg(format!("-max_total_time={seconds}"))
        .arg(format!("-timeout={INPUT_SECONDS}"))
        .arg(format!("-max_len={MAX_BYTES}"))
        .arg(format!("-artifact_prefix={prefix}/{target}-"));
    Ok(command)
}

fn manifest() -> PathBuf {
    paths::root().join("fuzz/Cargo.toml")
}

fn artifacts() -> PathBuf {
    paths::target().join("fuzz/artifacts")
}

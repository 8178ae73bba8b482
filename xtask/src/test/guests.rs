//! The tests crate: real guests, on the host's KVM or in one boot of the nested machine.

use std::ffi::OsString;
use std::path::Path;
use std::process::Command;
use std::time::Duration;
use std::{env, fs, thread};

use anyhow::{Context, Result, bail};

use super::libtest::{self, Counts, Parser};
use crate::accel::{self, Accel, Force};
use crate::binaries::Executable;
use crate::exit::{self, Exit};
use crate::images::Images;
use crate::{binaries, cache, child, images, nested, paths, progress, signals};

/// Which guest tests, and how.
#[derive(Clone, Copy)]
pub(super) struct Selection<'a> {
    /// Those whose names contain this; without one, all.
    pub(super) filter: Option<&'a str>,
    /// Variables that they find.
    pub(super) environment: &'a [(&'a str, &'a str)],
    /// Time after which the nested machine is ended.
    pub(super) timeout: Duration,
}

impl<'a> Selection<'a> {
    /// In the usual way.
    pub(super) fn new(filter: Option<&'a str>) -> Self {
        Self { filter, environment: &[], timeout: TIMEOUT }
    }
}

/// Runs the tests of the tests crate that are selected.
pub(super) fn run(force: Force, selection: Selection<'_>) -> Result<Counts> {
    let filter = selection.filter;
    let nowait = binaries::nowait()?;
    let images = images::images()?;
    let tests = binaries::guest_tests()?;
    let counts = match accel::choose(force, &nowait)? {
        Accel::Host => on_host(&nowait, &images, &tests, selection)?,
        Accel::Nested => in_nested(&nowait, &images, &tests, selection)?,
    };
    match filter {
        Some(text) if counts.is_empty() => Err(Exit::error(
            exit::OPERAND,
            format!("--guests '{text}': no guest test has this in its name"),
        )),
        None if counts.is_empty() => bail!("no guest test has run"),
        _ => Ok(counts),
    }
}

/// Time after which the nested machine with all guest tests is ended.
const TIMEOUT: Duration = Duration::from_secs(2400);

fn on_host(
    nowait: &Path,
    images: &Images,
    tests: &[Executable],
    selection: Selection<'_>,
) -> Result<Counts> {
    // Not a nested machine's directory, which takes none with files of others.
    let dir = paths::target().join("test-host");
    paths::create_dir(&dir)?;
    let _lock = cache::lock(&dir.join("lock"))?;
    let mut sum = Counts::default();
    for test in tests {
        let log = dir.join(format!("{}.log", test.name));
        let mut command = on_host_command(&test.file, nowait, images)?;
        command.envs(selection.environment.iter().copied());
        // One after the other, as in the nested machine: many measure, and some have the host for themselves.
        command.args(["--color", "never", "--test-threads", "1"]).args(selection.filter);
        let code = child::foreground_logged(&mut command, &log)?;
        let failed = (code != 0).then(|| format!("{} ended with exit code {code}", test.name));
        sum.add(counts(&log, failed)?);
    }
    Ok(sum)
}

/// A program that finds `nowait` and the images where it would find them in the nested machine.
pub(crate) fn on_host_command(program: &Path, nowait: &Path, images: &Images) -> Result<Command> {
    let bin = nowait.parent().context("nowait has no directory")?;
    let path = env::var_os("PATH").unwrap_or_default();
    let path: OsString =
        env::join_paths([bin.to_path_buf()].into_iter().chain(env::split_paths(&path)))?;
    let mut command = Command::new(program);
    command.env("PATH", path).env("NOWAIT_ACCEL", "kvm").env("NOWAIT_IMAGES", &images.dir);
    Ok(command)
}

/// In as many nested machines as there are CPUs for, up to two: each has its share of the tests.
fn in_nested(
    nowait: &Path,
    images: &Images,
    tests: &[Executable],
    selection: Selection<'_>,
) -> Result<Counts> {
    let machines = match selection.filter {
        None => nested::allowed_cpus().len().clamp(1, MACHINES_MAX),
        Some(_) => 1,
    };
    // What they share is made before, once. Many guests: some would meet what the emulator has to be mended for.
    images::distribution_kernel()?;
    if selection.filter.is_none() || !selection.environment.is_empty() {
        nested::mend_usual()?;
    }
    let mut shares = Vec::new();
    thread::scope(|scope| -> Result<()> {
        let running: Vec<_> = (0..machines)
            .map(|number| {
                let run = machine(nowait, images, tests, selection, (number, machines))?;
                Ok(scope.spawn(move || share(run)))
            })
            .collect::<Result<_>>()?;
        for share in running {
            let share = share.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            shares.push(share?);
        }
        Ok(())
    })?;
    let mut sum = Counts::default();
    shares.into_iter().for_each(|share| sum.add(share));
    Ok(sum)
}

/// Machines at once; each has memory of its own.
const MACHINES_MAX: usize = 2;

/// One machine, for one of so many shares of the tests.
fn machine(
    nowait: &Path,
    images: &Images,
    tests: &[Executable],
    selection: Selection<'_>,
    (number, machines): (usize, usize),
) -> Result<nested::Run> {
    const SCRIPT: &str = "status=0; for test in /tests/*; do \
        \"$test\" --color never \"$@\" || status=$?; done; exit $status";
    let words = ["sh", "-c", SCRIPT, "tests"].into_iter().chain(selection.filter);
    let name = if number == 0 { "test".to_owned() } else { format!("test-{}", number + 1) };
    let mut run = nested::Run::new(&name, words.map(str::to_owned).collect());
    run.timeout = selection.timeout;
    run.waits = true;
    run.beside_others = machines > 1;
    run.environment.push(("NOWAIT_SHARE".into(), format!("{}/{machines}", number + 1)));
    let environment = selection.environment.iter();
    run.environment.extend(environment.map(|(name, value)| ((*name).into(), (*value).into())));
    for name in PASSED_ON {
        if let Ok(value) = env::var(name) {
            run.environment.push((name.into(), value));
        }
    }
    run.hold.add(nowait, "bin/nowait");
    run.hold.images(images);
    // Without it the tests of the nbd store are skipped, and say so.
    if paths::program("qemu-nbd").is_some() {
        run.hold.program("qemu-nbd")?;
    }
    for (number, test) in tests.iter().enumerate() {
        run.hold.add(&test.file, format!("tests/{number}-{}", test.name));
    }
    Ok(run)
}

/// What a user may set to repeat a test.
const PASSED_ON: [&str; 2] = ["NOWAIT_CHAOS_SEED", "NOWAIT_CHAOS_GUEST"];

/// How often a machine that its own kernel's death has ended is replaced by a new one. The emulator now
/// and then gives that kernel flags or registers that no instruction made (ARCHITECTURE.md, "The bed").
const REPLACEMENTS: u32 = 1;

/// Runs one share. When the machine dies, which no guest and no test can have it do, its remaining tests run
/// in a new one, the one that it died in included.
fn share(mut run: nested::Run) -> Result<Counts> {
    let log = run.out.join("stdout.log");
    let (mut done, mut sum) = (0, Counts::default());
    let mut outcome = run.go();
    for _ in 0..REPLACEMENTS {
        let Err(error) = &outcome else { break };
        if error.downcast_ref::<Exit>().is_none_or(|exit| exit.code != exit::MACHINE) {
            break;
        }
        signals::check()?;
        let text = fs::read(&log).unwrap_or_default();
        let (counts, ended) = libtest::so_far(&String::from_utf8_lossy(&text));
        done += ended;
        let line = format!("{error:#}; its tests go on after the first {done} in a new one");
        progress::line("guest tests", &line);
        sum.add(counts);
        run.environment.push(("NOWAIT_SKIP".into(), done.to_string()));
        outcome = run.go();
    }
    let failed = match outcome {
        Ok(0) => None,
        Ok(code) => Some(format!("the guest tests ended with exit code {code}")),
        Err(error) => {
            eprintln!("xtask: {error:#}");
            Some(format!("{error:#}"))
        }
    };
    sum.add(counts(&log, failed)?);
    Ok(sum)
}

/// What a log has, of a run that may have failed as a whole.
fn counts(log: &Path, failed: Option<String>) -> Result<Counts> {
    let text = match fs::read(log) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("cannot read {}", log.display()));
        }
        read => read.unwrap_or_default(),
    };
    let text = String::from_utf8_lossy(&text);
    let mut parser = Parser::default();
    text.lines().for_each(|line| parser.line(line));
    if parser.is_open() {
        // It ended in the middle of a test, which has failed; those before it count.
        let (mut counts, _) = libtest::so_far(&text);
        counts.failed += 1;
        let why = failed.unwrap_or_else(|| "it has not summed up".to_owned());
        counts.failures.push(format!("a test program died: {why}"));
        return Ok(counts);
    }
    let mut counts = parser.finish();
    if let Some(what) = failed {
        counts.note_failure(what);
    }
    Ok(counts)
}

#[cfg(test)]
mod tests {
    use super::counts;

    #[test]
    fn what_ended_before_a_death_counts() {
        let log = tempfile::NamedTempFile::new().unwrap();
        let of = |text: &str, failed: Option<&str>| {
            std::fs::write(log.path(), text).unwrap();
            counts(log.path(), failed.map(str::to_owned)).unwrap()
        };
        let died =
            of("running 4 tests\ntest a ... ok\ntest b ... FAILED\ntest c ... ", Some("timeout"));
        assert_eq!(died.line(), "1 passed, 2 failed, 0 skipped");
        assert_eq!(died.failures, ["b", "a test program died: timeout"]);
        let summed_up = "running 1 test\ntest a ... ok\n\ntest result: ok. 1 passed; 0 failed\n";
        assert_eq!(of(summed_up, None).line(), "1 passed, 0 failed, 0 skipped");
        assert_eq!(of(summed_up, Some("died later")).line(), "1 passed, 1 failed, 0 skipped");
        assert_eq!(of("", Some("no machine")).line(), "0 passed, 1 failed, 0 skipped");
    }
}

//! Tests with real guests, on the host's KVM or in the emulated nested machine: one module a topic.
//!
//! `cargo xtask test` builds this program, carries it to where guests run, and counts its results. A
//! test that cannot run here says why and counts as skipped.
#![forbid(unsafe_code)]

mod agent;
mod apf;
mod bad_input;
mod boot;
mod calibration;
mod chaos;
mod control;
mod damaged;
mod doctor;
mod exits;
mod hazards;
mod host_memory;
mod hostile;
mod interactive;
mod kernels;
mod paging;
mod pressure;
mod protocol;
mod reclaim;
mod signals;
mod stall;
mod streams;
mod terminal;

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use libtest_mimic::{Arguments, Completion, Trial};
use nowait_tests::cgroup;

/// A test: a name and a function that panics when it fails.
type Test = (&'static str, fn());

/// As first argument: run the command that follows as an ordinary user without capabilities.
const AS_NOBODY: &str = "--as-nobody";
/// The ordinary user, by number: the nested machine has no list of users.
const NOBODY: u32 = 65534;

fn main() {
    let mut words = std::env::args_os().skip(1);
    if words.next().is_some_and(|first| first == AS_NOBODY) {
        let program = words.next().expect("a program");
        let error = Command::new(program).args(words).uid(NOBODY).gid(NOBODY).exec();
        panic!("cannot start it: {error}");
    }
    let args = Arguments::from_args();
    let no_kvm = (!Path::new("/dev/kvm").exists()).then_some("there is no /dev/kvm here");
    let no_root =
        (!rustix::process::geteuid().is_root()).then_some("needs root: it mounts something");
    let no_nbd = (!in_path("qemu-nbd")).then_some("there is no qemu-nbd here");
    let topics: &[(&'static str, &[Test])] = &[
        ("agent", agent::TESTS),
        ("apf", apf::TESTS),
        ("bad_input", bad_input::TESTS),
        ("boot", boot::TESTS),
        ("calibration", calibration::TESTS),
        ("chaos", chaos::TESTS),
        ("control", control::TESTS),
        ("damaged", damaged::TESTS),
        ("doctor", doctor::TESTS),
        ("exits", exits::TESTS),
        ("hazards", hazards::TESTS),
        ("hostile", hostile::TESTS),
        ("interactive", interactive::TESTS),
        ("paging", paging::TESTS),
        ("pressure", pressure::TESTS),
        ("protocol", protocol::TESTS),
        ("signals", signals::TESTS),
        ("stall", stall::TESTS),
        ("streams", streams::TESTS),
    ];
    let needing: [(&'static str, &[Test], Option<&'static str>); 8] = [
        ("bad_input", bad_input::ROOT_TESTS, no_root),
        ("pressure", pressure::ROOT_TESTS, no_root),
        ("stall", stall::ROOT_TESTS, no_root),
        ("streams", streams::ROOT_TESTS, no_root),
        ("pressure", pressure::NBD_TESTS, no_nbd),
        ("reclaim", reclaim::TESTS, cgroup::missing().or(reclaim::missing())),
        ("host_memory", host_memory::SHORTAGE_TESTS, cgroup::missing()),
        ("host_memory", host_memory::ERROR_TESTS, cgroup::missing().or(host_memory::missing())),
    ];
    let needing = needing.iter().flat_map(|(topic, tests, missing)| {
        tests.iter().map(move |test| trial(topic, *test, no_kvm.or(*missing)))
    });
    let trials: Vec<Trial> = topics
        .iter()
        .flat_map(|(topic, tests)| tests.iter().map(move |test| trial(topic, *test, no_kvm)))
        .chain(needing)
        .collect();
    let filter = args.filter.clone().unwrap_or_default();
    let trials = trials.into_iter().filter(|trial| trial.name().contains(&filter)).collect();
    let conclusion = libtest_mimic::run(&args, share(trials));
    tell_times();
    conclusion.exit();
}

/// How long each test took, in the order in which they ended.
static TIMES: Mutex<Vec<(Duration, String)>> = Mutex::new(Vec::new());
/// How many of the longest are told.
const LONGEST: usize = 12;

/// Notes how long a test took when it is dropped, also by a panic.
struct Timed {
    name: String,
    began: Instant,
}

impl Drop for Timed {
    fn drop(&mut self) {
        let name = std::mem::take(&mut self.name);
        let mut times = TIMES.lock().unwrap_or_else(PoisonError::into_inner);
        times.push((self.began.elapsed(), name));
    }
}

fn tell_times() {
    let mut times = std::mem::take(&mut *TIMES.lock().unwrap_or_else(PoisonError::into_inner));
    let all: Duration = times.iter().map(|(took, _)| *took).sum();
    times.sort_unstable_by(|a, b| b.cmp(a));
    println!("{:.0} s in all; the longest:", all.as_secs_f64());
    for (took, name) in times.iter().take(LONGEST) {
        println!("{:>6.1} s  {name}", took.as_secs_f64());
    }
}

/// `NOWAIT_SHARE=k/n`: the k-th of n shares of the tests, which run side by side.
fn share(trials: Vec<Trial>) -> Vec<Trial> {
    let share = std::env::var("NOWAIT_SHARE").unwrap_or_else(|_| "1/1".into());
    let numbers = share.split_once('/').and_then(|(k, n)| {
        let (k, n): (usize, usize) = (k.parse().ok()?, n.parse().ok()?);
        (1..=n).contains(&k).then_some((k, n))
    });
    let (k, n) = numbers.unwrap_or_else(|| panic!("NOWAIT_SHARE={share} is not k/n"));
    // Those that ended in a machine which then died.
    let skip = std::env::var("NOWAIT_SKIP").ok().and_then(|skip| skip.parse().ok()).unwrap_or(0);
    let mine = |index: &usize| index % n == k - 1;
    let trials = trials.into_iter().enumerate().filter(|(index, _)| mine(index));
    trials.map(|(_, trial)| trial).skip(skip).collect()
}

fn in_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(program).is_file())
}

fn trial(topic: &str, (name, test): Test, skip: Option<&'static str>) -> Trial {
    let name = format!("{topic}::{name}");
    Trial::ignorable_test(name.clone(), move || match skip {
        Some(reason) => Ok(Completion::ignored_with(reason)),
        None => {
            let _timed = Timed { name, began: Instant::now() };
            test();
            Ok(Completion::Completed)
        }
    })
}

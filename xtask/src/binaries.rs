//! Our own programs, built by cargo as static binaries so that they run in any machine.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::{env, io};

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::child::Group;
use crate::{child, paths, signals};

/// The target that makes cargo tell build scripts and programs apart: only programs are static.
pub(crate) const TARGET: &str = "x86_64-unknown-linux-gnu";
/// Static linking against glibc.
const STATIC: &[&str] = &["-Ctarget-feature=+crt-static"];
/// No start files and no loader, at the addresses of a linker script that comes behind.
const BARE: &[&str] = &[
    "-Crelocation-model=static",
    "-Clink-arg=-nostartfiles",
    "-Clink-arg=-static",
    "-Clink-arg=-no-pie",
    "-Clink-arg=-Wl,--build-id=none",
];
/// The test kernel's linker script, in the workspace.
const LINKER_SCRIPT: &str = "images/test-kernel/link.ld";

/// cargo in the workspace's root.
pub(crate) fn cargo() -> Command {
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(paths::root());
    cargo
}

/// The VMM, binary `nowait`.
pub(crate) fn nowait() -> Result<PathBuf> {
    let arguments = ["build", "--release", "-p", "vmm", "--bin", "nowait"];
    only(build("nowait", &arguments, STATIC)?, "nowait")
}

/// The guest agent.
pub(crate) fn agent() -> Result<PathBuf> {
    let arguments = ["build", "--profile", "guest", "-p", "nowait-agent", "--bin", "nowait-agent"];
    only(build("agent", &arguments, STATIC)?, "nowait-agent")
}

/// The bare-metal test kernel, as ELF64.
pub(crate) fn test_kernel() -> Result<PathBuf> {
    const NAME: &str = "nowait-test-kernel";
    let script = paths::root().join(LINKER_SCRIPT);
    let script = format!("-Clink-arg=-Wl,-T,{}", script.display());
    let arguments = ["build", "--profile", "guest", "-p", NAME, "--bin", NAME];
    only(build("test kernel", &arguments, &[BARE, &[script.as_str()]].concat())?, NAME)
}

/// A binary of the tests crate.
pub(crate) fn tests_binary(name: &str) -> Result<PathBuf> {
    let arguments =
        ["build", "--release", "-p", "nowait-tests", "--features", "bench", "--bin", name];
    only(build(name, &arguments, STATIC)?, name)
}

/// The tests crate's programs of guest tests. Its unit tests need no guest and run with the others.
pub(crate) fn guest_tests() -> Result<Vec<Executable>> {
    let mut all = build(
        "guest tests",
        &["test", "--no-run", "--release", "-p", "nowait-tests", "--test", "*"],
        STATIC,
    )?;
    all.retain(|executable| executable.test);
    Ok(all)
}

/// A program that cargo built.
#[derive(Debug)]
pub(crate) struct Executable {
    /// The cargo target's name.
    pub(crate) name: String,
    /// The file.
    pub(crate) file: PathBuf,
    /// It is a program of tests.
    test: bool,
}

/// The part of cargo's JSON messages that we read.
#[derive(Deserialize)]
struct Message {
    executable: Option<PathBuf>,
    target: Option<Target>,
    profile: Option<Profile>,
}

#[derive(Deserialize)]
struct Profile {
    test: bool,
}

#[derive(Deserialize)]
struct Target {
    name: String,
}

fn only(executables: Vec<Executable>, name: &str) -> Result<PathBuf> {
    executables
        .into_iter()
        .find(|executable| executable.name == name)
        .map(|executable| executable.file)
        .with_context(|| format!("cargo built no program {name}"))
}

/// Runs cargo with these flags for rustc, with its own progress on stderr; the programs that came out.
fn build(what: &str, arguments: &[&str], flags: &[&str]) -> Result<Vec<Executable>> {
    let mut command = cargo();
    command
        .args(arguments)
        .args(["--quiet", "--target", TARGET, "--message-format=json-render-diagnostics"])
        // The strongest way to set flags, so that a RUSTFLAGS of the user's does not undo ours.
        .env_remove("RUSTFLAGS")
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"))
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    let mut step = crate::progress::Quiet::begin(what);
    let mut group = Group::spawn(&mut command)?;
    let mut messages = group.child().stdout.take().context("cargo has no output")?;
    let reader = std::thread::spawn(move || io::read_to_string(&mut messages));
    let status = loop {
        signals::check()?;
        if let Some(status) = group.ended()? {
            break status;
        }
        step.tick();
        std::thread::sleep(child::POLL);
    };
    let Ok(messages) = reader.join() else { bail!("cargo's messages cannot be read") };
    let messages = messages.context("cargo's messages cannot be read")?;
    if !status.success() {
        bail!("building {what} failed ({status})");
    }
    step.done();
    let programs = messages.lines().filter_map(|line| serde_json::from_str::<Message>(line).ok());
    Ok(programs
        .filter_map(|message| {
            Some(Executable {
                name: message.target?.name,
                file: message.executable?,
                test: message.profile?.test,
            })
        })
        .collect())
}

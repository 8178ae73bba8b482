//! `cargo xtask`: setup, images, tests, demo and benchmarks of nowait. Exit codes: see `exit`.

mod accel;
mod apt;
mod apt_cache;
mod apt_source;
mod bench;
mod binaries;
mod browser;
mod cache;
mod child;
mod demo;
mod exit;
mod fuzz;
mod images;
mod nested;
mod paths;
mod plot;
mod progress;
mod setup;
mod signals;
mod test;
mod tidy;
mod tools;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use clap::{Args, Parser, Subcommand};

/// Build, test, demo and benchmark commands of nowait.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Set everything up, boot guests under paging pressure, print how their vCPUs stall
    Demo(Box<demo::Options>),
    /// Format, lints, licences, unit tests, page and live view, guest tests; the last line sums them up
    Test(test::Options),
    /// Install what the other commands need (apt packages, cargo-deny, Chromium)
    Setup,
    /// Build nowait, the guest kernel and the initramfs, fetch the distribution's kernel
    Images(ImagesOptions),
    /// Run one command in an emulated machine that has KVM
    Nested(NestedOptions),
    /// Measure
    #[command(subcommand)]
    Bench(bench::Bench),
    /// Feed the fuzz targets, all or one, with inputs that lead to new places
    Fuzz(fuzz::Options),
    /// Chaos for ten minutes, and the full matrix of modes, stores and vCPUs
    Soak(test::SoakOptions),
    /// Check what the repository promises of its own files
    Tidy,
}

#[derive(Args)]
struct ImagesOptions {
    /// Only the guest kernel
    #[arg(long)]
    kernel_only: bool,
}

#[derive(Args)]
struct NestedOptions {
    /// End the machine after this many seconds (exit code 124) [default: 600, at a terminal 86400]
    #[arg(long, value_name = "S", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    timeout: Option<u64>,
    /// The machine's memory in MiB
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u32).range(256..=1_048_576))]
    memory: Option<u32>,
    /// Carry qemu-system-x86_64 into the machine (4096 MiB unless --memory says otherwise)
    #[arg(long)]
    with_qemu: bool,
    /// Let the machine's clock count instructions, as for measurements (builds an emulator once, some minutes)
    #[arg(long)]
    counted: bool,
    /// Carry neither nowait nor its images: busybox only
    #[arg(long)]
    bare: bool,
    /// Where logs and results go [default: nested in cargo's target directory]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Carry a file or a directory into the machine
    #[arg(long, value_name = "SRC:DST")]
    add: Vec<nested::Add>,
    /// The command and its arguments; what it writes into /results is brought out
    #[arg(last = true, required = true)]
    command: Vec<String>,
}

impl NestedOptions {
    fn run(self) -> Result<u8> {
        /// Memory when QEMU and its libraries, unpacked, live in it too.
        const WITH_QEMU_MIB: u32 = 4096;
        self.add.iter().try_for_each(|add| add.source().map(drop))?;
        setup::setup()?;
        let mut run = nested::Run::new("nested", self.command);
        if !self.bare {
            run.hold.add(&binaries::nowait()?, "bin/nowait");
            run.hold.images(&images::images()?);
        }
        if self.with_qemu {
            run.hold.qemu()?;
            run.memory_mib = WITH_QEMU_MIB;
        }
        run.hold.extend(&self.add);
        run.counts = self.counted;
        run.memory_mib = self.memory.unwrap_or(run.memory_mib);
        run.timeout = self.timeout.map_or_else(nested::default_timeout, Duration::from_secs);
        run.out = self.out.unwrap_or(run.out);
        run.terminal = true;
        run.go()
    }
}

fn run(task: Task) -> Result<u8> {
    match task {
        Task::Demo(options) => demo::demo(&options),
        Task::Test(options) => test::test(&options),
        Task::Setup => {
            setup::setup()?;
            tools::cargo_deny()?;
            match browser::browser()? {
                browser::Browser::Program(_) => {
                    progress::line("setup", "everything is there");
                }
                browser::Browser::Missing(why) => progress::line("setup", &why),
            }
            Ok(0)
        }
        Task::Images(options) => {
            setup::setup()?;
            if options.kernel_only {
                println!("{}", images::guest_kernel()?.display());
            } else {
                let nowait = binaries::nowait()?;
                println!("{}", images::images()?.dir.display());
                eprintln!("xtask: the VMM: {}", nowait.display());
            }
            Ok(0)
        }
        Task::Nested(options) => options.run(),
        Task::Bench(bench) => bench.run(),
        Task::Fuzz(options) => fuzz::run(&options),
        Task::Soak(options) => test::soak(&options),
        Task::Tidy => tidy::run(),
    }
}

fn main() -> ExitCode {
    let task = Cli::parse().task;
    let code = signals::install().and_then(|()| run(task));
    ExitCode::from(code.unwrap_or_else(|error| exit::report(&error)))
}

//! `cargo xtask demo`: from nothing to the table of stalls.

use std::path::PathBuf;
use std::process::Command;

use anyhow::Result;
use clap::Args;

use crate::accel::{self, Accel, Force};
use crate::{binaries, child, images, nested, paths, setup};

/// The demo's guest, and how much of it may be in memory: enough for a boot without paging, so that the
/// idle rows are idle, and not enough for the agent's buffer of 60M. With 24M the guest still fetched what
/// its boot had left to the store in its idle row, whose p50 was 44 ms.
const MEMORY: &str = "160M";
const RESIDENT_LIMIT: &str = "40M";
/// Where the rest goes: what compresses stays in memory, all else into a file that is as slow as a disk.
const STORE: &str = "lz4=8M+delay=20ms+file=/tmp";

/// The command line of `demo`.
#[derive(Args)]
pub(crate) struct Options {
    #[command(flatten)]
    force: Force,
    /// Write the table as JSON too
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Numbers of guest CPUs, each 1 to 32
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_value = "1,2",
        value_parser = clap::value_parser!(u32).range(1..=32))]
    cpus: Vec<u32>,
    /// Async page fault modes to compare
    #[arg(long, value_name = "APF,…", value_delimiter = ',', default_value = "off,host,kernel,user",
        value_parser = ["off", "host", "kernel", "user"])]
    apf: Vec<String>,
    /// The guest's memory
    #[arg(long, value_name = "SIZE", default_value = MEMORY)]
    memory: String,
    /// How much of the guest's memory is in memory, compressed pages included
    #[arg(long, value_name = "SIZE", default_value = RESIDENT_LIMIT)]
    resident_limit: String,
    /// Where the rest of it goes
    #[arg(long, value_name = "STORE", default_value = STORE)]
    store: String,
    /// Further options for `nowait stall`, after `--`
    #[arg(last = true)]
    stall: Vec<String>,
}

impl Options {
    /// The `nowait stall` command line, for images in `images`.
    fn stall(&self, nowait: &str, images: &str, json: Option<&str>) -> Vec<String> {
        let mut words = vec![
            nowait.to_owned(),
            "stall".to_owned(),
            "--kernel".to_owned(),
            format!("{images}/vmlinux"),
            "--initrd".to_owned(),
            format!("{images}/initramfs.cpio"),
        ];
        let cpus: Vec<String> = self.cpus.iter().map(u32::to_string).collect();
        for (name, values) in [("--cpus", &cpus), ("--apf", &self.apf)] {
            words.extend([name.to_owned(), values.join(",")]);
        }
        for (name, value) in [
            ("--memory", &self.memory),
            ("--resident-limit", &self.resident_limit),
            ("--store", &self.store),
        ] {
            words.extend([name.to_owned(), value.clone()]);
        }
        words.extend(self.stall.iter().cloned());
        if let Some(file) = json {
            words.extend(["--json".to_owned(), file.to_owned()]);
        }
        words
    }
}

/// The command behind a guest that is not measured. In its first seconds the emulator translates the
/// code of host and guest for the first time: without this the first row, which has no paging, showed a
/// p99 of 267 ms, and behind three such guests one of 0.5 to 1 ms.
fn warmed_up(command: Vec<String>) -> Vec<String> {
    const SCRIPT: &str = "nowait run --kernel /images/vmlinux --initrd /images/initramfs.cpio \
        --cmdline nowait.agent=poweroff --console none 2> /dev/null; exec \"$@\"";
    ["sh", "-c", SCRIPT, "demo"].map(str::to_owned).into_iter().chain(command).collect()
}

/// Runs it; the exit code of `nowait stall`.
pub(crate) fn demo(options: &Options) -> Result<u8> {
    if let Some(file) = &options.json {
        paths::check_writable(file)?;
    }
    setup::setup()?;
    let nowait = binaries::nowait()?;
    let images = images::images()?;
    match accel::choose(options.force, &nowait)? {
        Accel::Host => {
            let json = options.json.as_ref().map(|file| file.to_string_lossy().into_owned());
            let words = options.stall(
                &nowait.to_string_lossy(),
                &images.dir.to_string_lossy(),
                json.as_deref(),
            );
            child::foreground(Command::new(&words[0]).args(&words[1..]))
        }
        Accel::Nested => {
            let json = options.json.is_some().then_some("/results/stall.json");
            let words = options.stall("/bin/nowait", "/images", json);
            let mut run = nested::Run::new("demo", warmed_up(words));
            run.hold.add(&nowait, "bin/nowait");
            run.hold.images(&images);
            let code = run.go()?;
            if let Some(file) = &options.json {
                run.bring("stall.json", file)?;
            }
            Ok(code)
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        options: Options,
    }

    fn parse(words: &[&str]) -> Result<Options, clap::Error> {
        Cli::try_parse_from([&["demo"], words].concat()).map(|cli| cli.options)
    }

    #[test]
    fn wrong_options_are_refused_before_anything_is_set_up() {
        for wrong in ["--apf=fast", "--apf=host,", "--cpus=0", "--cpus=1,33", "--cpus=two"] {
            assert!(parse(&[wrong]).is_err(), "{wrong}");
        }
        assert!(parse(&["--host", "--nested"]).is_err());
    }

    #[test]
    fn options_reach_the_measuring_command() {
        let options =
            parse(&["--apf", "kernel", "--cpus", "1,4", "--", "--duration", "1s"]).unwrap();
        let words = options.stall("nowait", "/images", Some("out.json")).join(" ");
        assert!(
            words.ends_with(
                "--cpus 1,4 --apf kernel --memory 160M --resident-limit 40M --store lz4=8M+delay=20ms+file=/tmp \
                 --duration 1s --json out.json"
            ),
            "{words}"
        );
    }
}

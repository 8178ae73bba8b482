//! `cargo xtask nested`: one command in an emulated machine that has KVM.

mod base;
mod emulator;
mod hold;
mod machine;
mod nudge;
mod stdin;
mod terminal;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;

pub(crate) use emulator::{builder, mend_usual};
pub(crate) use hold::{Add, Hold};
use machine::Machine;
pub(crate) use machine::allowed_cpus;

use crate::exit::{self, Exit};
use crate::{cache, images, paths, progress};

/// Memory of a nested machine in MiB, unless said otherwise.
pub(crate) const MEMORY_MIB: u32 = 2048;
/// Time after which a nested machine is ended, unless said otherwise.
const TIMEOUT: Duration = Duration::from_secs(600);
/// The same with somebody at its terminal.
const SESSION: Duration = Duration::from_secs(86_400);
/// Marks a directory as ours, and locks it.
const MARK: &str = ".nowait-nested";
/// What a run leaves in its directory.
const LEFT: [&str; 5] = ["console.log", "stdout.log", "stderr.log", "results.tar", "status"];

/// One run.
pub(crate) struct Run {
    /// The command and its arguments.
    pub(crate) command: Vec<String>,
    /// What it finds in the machine.
    pub(crate) hold: Hold,
    /// Variables of its environment, beside the usual ones.
    pub(crate) environment: Vec<(String, String)>,
    /// The machine's memory in MiB.
    pub(crate) memory_mib: u32,
    /// Time after which the machine is ended.
    pub(crate) timeout: Duration,
    /// Where results and logs go.
    pub(crate) out: PathBuf,
    /// The user's terminal may become the command's, and otherwise what comes on standard input.
    pub(crate) terminal: bool,
    /// Others run at the same time.
    pub(crate) beside_others: bool,
    /// Another run that writes to the same place is waited for, not refused.
    pub(crate) waits: bool,
    /// After a signal the command gets a SIGTERM and this much time to write its results.
    pub(crate) grace: Duration,
    /// The machine's clock counts instructions.
    pub(crate) counts: bool,
}

impl Run {
    /// A run with the usual machine, its results in `<target>/<name>`.
    pub(crate) fn new(name: &str, command: Vec<String>) -> Run {
        Run {
            command,
            hold: Hold::default(),
            environment: Vec::new(),
            memory_mib: MEMORY_MIB,
            timeout: TIMEOUT,
            out: paths::target().join(name),
            terminal: false,
            beside_others: false,
            waits: false,
            grace: Duration::ZERO,
            counts: false,
        }
    }

    /// Runs it; the command's exit status. What it wrote into /results is in `<out>/results`.
    pub(crate) fn go(&self) -> Result<u8> {
        let emulator = if self.counts { emulator::counting() } else { emulator::usual() }?;
        let _lock = prepare(&self.out, self.waits)?;
        let kernel = images::distribution_kernel()?;
        let base = base::base(&kernel)?;
        let initrd = self.out.join("initrd.cpio");
        let interactive = self.terminal && terminal::interactive();
        let input = self.terminal && !interactive && stdin::is_there();
        let mut environment = self.environment(interactive);
        if input {
            environment.push(("NOWAIT_STDIN".to_owned(), "1".to_owned()));
        }
        self.hold.write(&base, &self.command, &environment, &initrd)?;
        let machine = Machine {
            emulator,
            kernel: &kernel.bzimage,
            initrd: &initrd,
            memory_mib: self.memory_mib,
            timeout: self.timeout,
            grace: self.grace,
            interactive,
            input,
            beside_others: self.beside_others,
            out: &self.out,
        };
        let result = machine.run();
        let _ = std::fs::remove_file(&initrd);
        if result.is_ok() {
            warn_of_trouble(&machine.console_log());
        }
        result
    }

    /// Copies a file that the command wrote into /results to where the user wants it.
    pub(crate) fn bring(&self, name: &str, file: &Path) -> Result<()> {
        let result = self.out.join("results").join(name);
        if !result.is_file() {
            return Err(Exit::error(
                exit::FAILED,
                format!("the command in the nested machine wrote no /results/{name}"),
            ));
        }
        paths::copy(&result, file)
    }

    fn environment(&self, interactive: bool) -> Vec<(String, String)> {
        let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        let term = std::env::var("TERM").unwrap_or_default();
        let term = if interactive && !term.is_empty() { term.as_str() } else { "dumb" };
        let mut all = vec![
            pair("TERM", term),
            pair("NOWAIT_ACCEL", "nested"),
            pair("NOWAIT_IMAGES", "/images"),
        ];
        if self.counts {
            all.push(pair("NOWAIT_CLOCK", "instructions"));
        }
        if interactive {
            let (rows, columns) = terminal::size();
            all.push(pair("LINES", &rows.to_string()));
            all.push(pair("COLUMNS", &columns.to_string()));
        }
        all.extend(self.environment.iter().cloned());
        all
    }
}

/// Time after which the machine of `cargo xtask nested` is ended, unless said otherwise.
pub(crate) fn default_timeout() -> Duration {
    if terminal::interactive() { SESSION } else { TIMEOUT }
}

/// The output directory, empty of an earlier run and locked against another.
fn prepare(out: &Path, waits: bool) -> Result<File> {
    let mark = out.join(MARK);
    let occupied = std::fs::read_dir(out).is_ok_and(|mut entries| entries.next().is_some());
    if occupied && !mark.exists() {
        return Err(Exit::error(
            exit::OPERAND,
            format!(
                "{} has files of somebody else's; name a new or empty directory",
                out.display()
            ),
        ));
    }
    std::fs::create_dir_all(out).map_err(|error| {
        Exit::error(exit::OPERAND, format!("cannot make the directory {}: {error}", out.display()))
    })?;
    let lock = if waits { Some(cache::lock(&mark)?) } else { cache::try_lock(&mark)? };
    let Some(lock) = lock else {
        return Err(Exit::error(
            exit::OPERAND,
            format!(
                "another nested machine is writing to {}; name another with --out",
                out.display()
            ),
        ));
    };
    for file in LEFT {
        let _ = std::fs::remove_file(out.join(file));
    }
    cache::clear(&out.join("results"))?;
    Ok(lock)
}

/// The command ended well enough, but the kernel below it complained.
fn warn_of_trouble(log: &Path) {
    let text = std::fs::read(log).unwrap_or_default();
    if let Some(line) = machine::trouble(&String::from_utf8_lossy(&text)) {
        progress::line("nested machine", &format!("its kernel said: {line} ({})", log.display()));
    }
}

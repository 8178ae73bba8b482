//! The emulated machine: QEMU's TCG with SVM and nested paging, so that a stock kernel inside is a
//! real KVM host. The serial line is the kernel's (to a file); the command's own output, the results
//! and the exit status have a virtio port each, so that nothing gets mixed.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::emulator::Emulator;
use super::nudge::Nudge;
use super::{stdin, terminal};
use crate::child::Group;
use crate::exit::{self, Exit};
use crate::{cache, child, paths, progress, signals};

/// The kernel's command line. An oops is made a panic and a panic ends the machine at once, so that no
/// result comes out of a kernel that has lost its mind.
const CMDLINE: &str =
    "console=ttyS0 mitigations=off nokaslr panic=-1 oops=panic quiet loglevel=5 rdinit=/init";

/// The processor. Its XSAVE is hidden: the emulator (7.2) executes a guest's XSETBV without asking the
/// hypervisor, so that a guest's CPUID never fits its XCR0 and its kernel dumps a page of complaints.
/// So is ERMS: kernels and libraries that see it clear and copy memory with one string instruction a
/// page, which the emulator carries out byte by byte.
const CPU: &str = "max,+svm,+npt,-xsave,-erms";

/// The one CPU that a machine runs on, locked against other machines of this user.
struct OwnCpu {
    number: usize,
    /// Held as long as the machine runs.
    lock: Option<File>,
}

impl OwnCpu {
    /// A CPU that no other nested machine has, or the last; that it is shared is said.
    fn choose() -> Result<Option<Self>> {
        let Some(own) = Self::among(&allowed_cpus(), &paths::cache()?)? else { return Ok(None) };
        if own.lock.is_none() {
            let cpu = own.number;
            progress::line(
                "nested",
                &format!("every CPU has a nested machine already: shares CPU {cpu}, and is slower"),
            );
        }
        Ok(Some(own))
    }

    /// The last of these that nobody has locked in this directory (the first has more of the host's own
    /// work); when there is none the last, shared. `None` when there are none at all.
    fn among(allowed: &[usize], locks: &Path) -> Result<Option<Self>> {
        let Some(&last) = allowed.last() else { return Ok(None) };
        for &number in allowed.iter().rev() {
            let lock = cache::try_lock(&locks.join(format!("nested-cpu{number}.lock")))?;
            if lock.is_some() {
                return Ok(Some(Self { number, lock }));
            }
        }
        Ok(Some(Self { number: last, lock: None }))
    }
}

/// The CPUs that we may run on, ascending.
pub(crate) fn allowed_cpus() -> Vec<usize> {
    let Ok(set) = rustix::thread::sched_getaffinity(None) else { return Vec::new() };
    (0..rustix::thread::CpuSet::MAX_CPU).filter(|&cpu| set.is_set(cpu)).collect()
}

/// One machine to run.
pub(crate) struct Machine<'a> {
    /// What emulates it.
    pub(crate) emulator: Emulator,
    /// The distribution's bzImage.
    pub(crate) kernel: &'a Path,
    /// Its initramfs.
    pub(crate) initrd: &'a Path,
    /// Its memory in MiB.
    pub(crate) memory_mib: u32,
    /// It is ended after this time.
    pub(crate) timeout: Duration,
    /// After a signal it is asked to end, and gets this much time for it.
    pub(crate) grace: Duration,
    /// The user's terminal becomes the command's.
    pub(crate) interactive: bool,
    /// Our standard input becomes the command's.
    pub(crate) input: bool,
    /// Others run at the same time, and write to the same terminal.
    pub(crate) beside_others: bool,
    /// Where everything that comes out goes.
    pub(crate) out: &'a Path,
}

impl Machine<'_> {
    /// The kernel's serial line.
    pub(crate) fn console_log(&self) -> PathBuf {
        self.out.join("console.log")
    }

    fn results_tar(&self) -> PathBuf {
        self.out.join("results.tar")
    }

    fn status_file(&self) -> PathBuf {
        self.out.join("status")
    }

    /// Runs it to its end; the command's exit status.
    pub(crate) fn run(&self) -> Result<u8> {
        let mut nudge = Nudge::new()?;
        let cpu = OwnCpu::choose()?;
        let mut command = self.qemu(&nudge, cpu.as_ref())?;
        let keys = if self.interactive { Stdio::piped() } else { Stdio::null() };
        command.stdin(keys).stdout(Stdio::piped()).stderr(Stdio::piped());
        let start = Instant::now();
        let mut group = Group::spawn(&mut command)?;
        if self.input {
            stdin::forward(nudge.stdin());
        }
        let raw = if self.interactive { Some(terminal::Raw::enter()?) } else { None };
        let leave = group.child().stdin.take().map(terminal::forward_keys);
        let stdout = group.child().stdout.take().context("QEMU has no output")?;
        let stderr = group.child().stderr.take().context("QEMU has no output")?;
        let (out, err): (Box<dyn Write + Send>, Box<dyn Write + Send>) = if self.beside_others {
            let whole = |to: Box<dyn Write + Send>| Box::new(child::WholeLines::new(to));
            (whole(Box::new(io::stdout())), whole(Box::new(io::stderr())))
        } else {
            (Box::new(io::stdout()), Box::new(io::stderr()))
        };
        let pumps = [
            child::pump(stdout, out, &self.out.join("stdout.log"))?,
            child::pump(stderr, err, &self.out.join("stderr.log"))?,
        ];
        let mut stopping: Option<(u8, Instant)> = None;
        let ended = loop {
            if let Some(status) = group.ended()? {
                break Ok(status);
            }
            if self.grace.is_zero() {
                // Others wait beside us: the signal is theirs, too.
                if let Err(stopped) = signals::check() {
                    break Err(stopped);
                }
            } else if let Some(signal) = signals::take() {
                let mut until = Instant::now();
                // With a second one there is no more waiting.
                if stopping.is_none() && nudge.ask_to_stop() {
                    let say = "asking for what there is; a second signal ends it at once";
                    progress::line("nested", say);
                    until += self.grace;
                }
                stopping = Some((signal, until));
            }
            if let Some((signal, until)) = stopping
                && Instant::now() >= until
            {
                break Err(signals::stopped_by(signal));
            }
            if leave.as_ref().is_some_and(|leave| leave.load(Ordering::Relaxed)) {
                break Err(Exit::error(exit::MACHINE, "left the nested machine (Ctrl-A X)"));
            }
            if start.elapsed() > self.timeout {
                break Err(self.timed_out());
            }
            nudge.poll();
            thread::sleep(child::POLL);
        };
        if ended.is_err() {
            group.kill();
        }
        let written = pumps.map(|pump| pump.join().unwrap_or(Ok(())));
        drop(raw);
        if let Some((signal, _)) = stopping {
            signals::put_back(signal);
        }
        let status = ended?;
        self.unpack()?;
        signals::check()?;
        if let Some(code) = self.status()? {
            let logs = ["stdout.log", "stderr.log"].into_iter().zip(written);
            let mut lost = logs.filter_map(|(log, written)| Some((log, written.err()?)));
            let Some((log, lost)) = lost.next() else { return Ok(code) };
            return Err(child::output_lost(code, &lost, &self.out.join(log)));
        }
        if !status.success() {
            return Err(Exit::error(exit::MACHINE, format!("QEMU failed ({status}), see above")));
        }
        Err(self.died())
    }

    /// QEMU's command line. setpriv ends QEMU even when we are killed without a chance to.
    fn qemu(&self, nudge: &Nudge, cpu: Option<&OwnCpu>) -> Result<Command> {
        // On one CPU: there an interrupt is rarely lost, see `nudge`.
        let mut words: Vec<std::ffi::OsString> = Vec::new();
        if let Some(setpriv) = paths::program("setpriv") {
            words.extend([setpriv.into(), "--pdeathsig".into(), "KILL".into(), "--".into()]);
        }
        match (paths::program("taskset"), cpu) {
            (Some(taskset), Some(cpu)) => {
                words.extend([taskset.into(), "-c".into(), cpu.number.to_string().into()]);
            }
            _ => progress::line("nested", "no taskset: the machine may stall now and then"),
        }
        words.push(self.emulator.program.clone().into_os_string());
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]);
        command
            .args(["-M", "q35", "-cpu", CPU, "-smp", "1"])
            .args(&self.emulator.options)
            .args(["-m", &self.memory_mib.to_string()])
            .arg("-kernel")
            .arg(self.kernel)
            .arg("-initrd")
            .arg(self.initrd)
            .args(["-append", CMDLINE])
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
            .args(["-chardev", &self.serial_line(nudge), "-serial", "chardev:serial"])
            .args(["-device", "virtio-serial-pci,id=ports"]);
        if self.interactive {
            command
                .args(["-chardev", "stdio,id=terminal,signal=off"])
                .args(["-device", "virtconsole,bus=ports.0,nr=0,chardev=terminal"]);
        } else {
            // Not stdio: at the end of its input that hangs up on the port.
            command
                .args(["-chardev", "file,id=stdout,path=/dev/stdout,append=on"])
                .args(["-device", "virtserialport,bus=ports.0,nr=1,chardev=stdout"])
                .args(["-chardev", "file,id=stderr,path=/dev/stderr,append=on"])
                .args(["-device", "virtserialport,bus=ports.0,nr=2,chardev=stderr"]);
        }
        if self.input {
            let socket = "socket,id=stdin,server=on,wait=off,path=";
            command
                .args(["-chardev", &file_device(socket, &nudge.stdin())])
                .args(["-device", "virtserialport,bus=ports.0,nr=5,chardev=stdin"]);
        }
        for (number, id, file) in
            [(3, "results", self.results_tar()), (4, "status", self.status_file())]
        {
            command
                .args(["-chardev", &file_device(&format!("file,id={id},path="), &file)])
                .arg("-device")
                .arg(format!("virtserialport,bus=ports.0,nr={number},chardev={id}"));
        }
        Ok(command)
    }

    /// The kernel's serial line: to a log, and to us.
    fn serial_line(&self, nudge: &Nudge) -> String {
        let socket = file_device("socket,id=serial,server=on,wait=off,path=", &nudge.socket());
        file_device(&format!("{socket},logfile="), &self.console_log())
    }

    /// What the command left in /results, as `results/` in the output directory.
    fn unpack(&self) -> Result<()> {
        let results = self.out.join("results");
        paths::create_dir(&results)?;
        let tar = self.results_tar();
        if tar.metadata().is_ok_and(|metadata| metadata.len() > 0) {
            let mut command = Command::new("tar");
            command.arg("--no-same-owner").arg("-xf").arg(&tar).arg("-C").arg(&results);
            child::output(&mut command)
                .context("the nested machine's results cannot be unpacked")?;
        }
        std::fs::remove_file(&tar).with_context(|| format!("cannot remove {}", tar.display()))
    }

    /// The command's exit status, if it got so far.
    fn status(&self) -> Result<Option<u8>> {
        let text = String::from_utf8_lossy(&paths::read(&self.status_file())?).into_owned();
        Ok(text.trim().parse().ok())
    }

    fn timed_out(&self) -> anyhow::Error {
        Exit::error(
            exit::TIMEOUT,
            format!(
                "the nested machine was ended after its {} s (--timeout); its kernel's log is {}",
                self.timeout.as_secs(),
                self.console_log().display()
            ),
        )
    }

    fn died(&self) -> anyhow::Error {
        let log = paths::read(&self.console_log()).unwrap_or_default();
        let log = String::from_utf8_lossy(&log).into_owned();
        let why = trouble(&log).unwrap_or("it ended without an exit status");
        Exit::error(
            exit::MACHINE,
            format!(
                "the nested machine died: {why}; its kernel's log is {}",
                self.console_log().display()
            ),
        )
    }
}

/// The first line of a kernel log that says what went wrong.
pub(crate) fn trouble(log: &str) -> Option<&str> {
    const SIGNS: [&str; 6] =
        ["Oops", "BUG: ", "Kernel panic", "general protection fault", "Out of memory", "nowait: "];
    log.lines().find(|line| SIGNS.iter().any(|sign| line.contains(sign))).map(str::trim)
}

/// A file in a QEMU option, where a comma is written twice.
fn file_device(prefix: &str, file: &Path) -> String {
    format!("{prefix}{}", file.to_string_lossy().replace(',', ",,"))
}

#[cfg(test)]
mod tests {
    use super::{OwnCpu, file_device, trouble};

    #[test]
    fn two_machines_share_a_cpu_only_when_there_is_no_other() {
        let locks = tempfile::tempdir().unwrap();
        let choose = || OwnCpu::among(&[1, 4], locks.path()).unwrap().unwrap();
        let (first, second, third) = (choose(), choose(), choose());
        assert_eq!([first.number, second.number, third.number], [4, 1, 4]);
        assert!(first.lock.is_some() && second.lock.is_some() && third.lock.is_none());
        drop(first);
        assert_eq!(choose().number, 4);
        assert!(OwnCpu::among(&[], locks.path()).unwrap().is_none());
    }

    #[test]
    fn a_panic_is_found() {
        let log = "[    1.0] hello\n[    2.0] Kernel panic - not syncing: x\n---[ end\n";
        assert_eq!(trouble(log), Some("[    2.0] Kernel panic - not syncing: x"));
        assert_eq!(trouble("all well\n"), None);
    }

    #[test]
    fn commas_in_paths() {
        assert_eq!(file_device("file:", "/a,b".as_ref()), "file:/a,,b");
    }
}

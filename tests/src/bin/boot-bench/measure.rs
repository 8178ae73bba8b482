//! One boot, timed; one running VMM, weighed.

use std::fs;
use std::io::Read;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nowait_tests::{initramfs, nowait_bin, vmlinux};
use nowait_wire::agent::READY_LINE;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

/// The longest boot.
const BOOT_LIMIT: Duration = Duration::from_secs(120);
/// How long a guest that is up is left alone before the VMM is weighed.
const SETTLE: Duration = Duration::from_millis(500);
/// Guest RAM of the timed boots, in MiB, as an operand.
const MEMORY: &str = "128";
/// What all guests are told, so that their work is the same; the first part is nowait's default.
const CMDLINE_DEFAULT: &str = "console=ttyS0 panic=-1 swiotlb=noforce";
const CMDLINE: &str = "quiet nowait.agent=poweroff";

/// A way to boot the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Boot {
    /// nowait, RAM absent at start, with this fault-around.
    Nowait(&'static str),
    /// nowait, all RAM present at start.
    NowaitPopulated,
    /// QEMU's microvm, its fastest documented configuration.
    Microvm,
}

impl Boot {
    /// nowait with the default fault-around.
    pub(crate) const NOWAIT: Self = Self::Nowait("1M");

    pub(crate) fn all() -> Vec<Self> {
        vec![
            Self::NOWAIT,
            Self::Microvm,
            Self::NowaitPopulated,
            Self::Nowait("4K"),
            Self::Nowait("64K"),
            Self::Nowait("256K"),
            Self::Nowait("2M"),
        ]
    }

    pub(crate) fn name(self) -> String {
        match self {
            Self::Nowait(around) => format!("nowait, {around} around a fault"),
            Self::NowaitPopulated => "nowait, RAM populated at start".into(),
            Self::Microvm => "QEMU microvm".into(),
        }
    }

    fn command(self) -> Command {
        match self {
            Self::Nowait(around) => nowait(&["--fault-around", around], MEMORY, CMDLINE),
            Self::NowaitPopulated => nowait(&["--populate"], MEMORY, CMDLINE),
            Self::Microvm => microvm(),
        }
    }

    /// From exec of the VMM to the agent's first line on the console.
    pub(crate) fn time(self) -> Result<Duration> {
        let started = Instant::now();
        let mut child = self.command().spawn().context("starting the VMM")?;
        let ready = wait_for_ready(&mut child, started);
        // QEMU without a way to power off stays: it is not needed any more either way.
        let _ = child.kill();
        child.wait().context("waiting for the VMM")?;
        ready
    }
}

fn nowait(args: &[&str], memory_mib: &str, cmdline: &str) -> Command {
    let mut command = Command::new(nowait_bin());
    command.arg("run").arg("--kernel").arg(vmlinux()).arg("--initrd").arg(initramfs());
    command.args(["--memory", &format!("{memory_mib}M"), "--cmdline", cmdline]).args(args);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    command
}

/// As QEMU's documentation (docs/system/i386/microvm.rst) has it for the fastest boot.
fn microvm() -> Command {
    let mut command = Command::new("qemu-system-x86_64");
    command.args(["-M", "microvm,x-option-roms=off,pit=off,pic=off,rtc=off,isa-serial=on"]);
    command.args(["-accel", "kvm", "-cpu", "host", "-smp", "1", "-m", MEMORY]);
    command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
    command.args(["-serial", "stdio", "-append", &format!("{CMDLINE_DEFAULT} {CMDLINE}")]);
    command.arg("-kernel").arg(vmlinux()).arg("-initrd").arg(initramfs());
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::inherit());
    command
}

fn wait_for_ready(child: &mut Child, started: Instant) -> Result<Duration> {
    let mut stdout = child.stdout.take().context("the VMM's standard output")?;
    let mut seen = Vec::new();
    loop {
        let left = BOOT_LIMIT.saturating_sub(started.elapsed());
        let mut fds = [PollFd::new(&stdout, PollFlags::IN)];
        let timeout = Timespec::try_from(left).context("the time left")?;
        if poll(&mut fds, Some(&timeout)).context("waiting for output")? == 0 {
            bail!("no '{READY_LINE}' in {BOOT_LIMIT:?}: {}", String::from_utf8_lossy(&seen));
        }
        let mut chunk = [0; 4096];
        let count = stdout.read(&mut chunk).context("reading the console")?;
        let now = started.elapsed();
        if count == 0 {
            bail!("the console closed before '{READY_LINE}': {}", String::from_utf8_lossy(&seen));
        }
        seen.extend_from_slice(&chunk[..count]);
        if seen.windows(READY_LINE.len()).any(|window| window == READY_LINE.as_bytes()) {
            return Ok(now);
        }
    }
}

/// What a VMM with a booted guest costs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Footprint {
    pub(crate) anon_kib: u64,
    pub(crate) file_kib: u64,
    pub(crate) pages_touched: u64,
}

impl Footprint {
    /// Everything in memory but guest RAM.
    pub(crate) fn mib(&self) -> f64 {
        (self.anon_kib + self.file_kib) as f64 / 1024.0
    }

    /// Boots a guest with this much RAM and weighs nowait when it is up.
    pub(crate) fn of_guest(mib: u64) -> Result<Self> {
        let files = TempDir::new()?;
        let json = files.path().join("run.json");
        let mut command = nowait(&[], &mib.to_string(), "quiet nowait.agent=serve");
        let started = Instant::now();
        let mut child = command.arg("--json").arg(&json).spawn().context("starting nowait")?;
        let weighed = wait_for_ready(&mut child, started).and_then(|_| {
            std::thread::sleep(SETTLE);
            rss(child.id())
        });
        let pid = Pid::from_raw(child.id().cast_signed()).context("a pid")?;
        let _ = kill_process(pid, Signal::TERM);
        child.wait().context("waiting for nowait")?;
        let (anon_kib, file_kib) = weighed?;
        let json: serde_json::Value = serde_json::from_slice(&fs::read(&json)?)?;
        let pages_touched = json
            .pointer("/pager/pages_touched")
            .and_then(serde_json::Value::as_u64)
            .context("pages touched")?;
        Ok(Self { anon_kib, file_kib, pages_touched })
    }
}

/// What a process has in memory, without guest RAM: anonymous memory and mapped files, in KiB. Taken
/// from the mappings, for on a root file system in memory the program's own pages count as RssShmem.
fn rss(pid: u32) -> Result<(u64, u64)> {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    let (mut anon, mut total, mut guest_ram) = (0, 0, false);
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or_default();
        let kib = || words.clone().next().and_then(|word| word.parse::<u64>().ok());
        match first {
            "Rss:" if !guest_ram => total += kib().context("Rss in kB")?,
            "Anonymous:" if !guest_ram => anon += kib().context("Anonymous in kB")?,
            // A mapping begins with its range and ends with its name.
            _ if !first.ends_with(':') => guest_ram = line.contains("/memfd:"),
            _ => {}
        }
    }
    Ok((anon, total - anon))
}

/// The kernel that the VMMs run on, and whether it is emulated.
pub(crate) fn host() -> String {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let accel = std::env::var("NOWAIT_ACCEL").unwrap_or_else(|_| "kvm".into());
    format!("Linux {} ({accel})", release.trim())
}

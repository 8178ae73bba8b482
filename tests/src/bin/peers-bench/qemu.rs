//! QEMU with our guest, in a memory cgroup.
//!
//! A limit on the cgroup is one on all that QEMU has, guest RAM or not. So that the guest gets what
//! nowait's gets, QEMU's own part comes on top of the limit. It is measured more than once: much of what
//! QEMU has when its guest has booted (the images that it loaded, above all) it never touches again, and
//! the host swaps that out first.

use std::fs;
use std::os::unix::net::UnixListener;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nowait_tests::cgroup::Cgroup;
use nowait_tests::{initramfs, vmlinux};
use nowait_wire::agent::Request;
use tempfile::TempDir;

use crate::channel::Channel;
use crate::peer::{CMDLINE, MEMORY_MIB};

/// How long QEMU may take to start.
const CONNECT_LIMIT: Duration = Duration::from_secs(60);
/// How long it may take to end when its guest is told to power off; then it is killed.
const END_LIMIT: Duration = Duration::from_secs(10);
/// A running QEMU; ended when dropped.
pub(crate) struct Qemu {
    child: Child,
    cgroup: Cgroup,
    /// The agent of its guest.
    pub(crate) agent: Channel,
    files: TempDir,
}

/// Guest RAM in memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ram {
    /// All of it.
    pub(crate) bytes: u64,
    /// The part in huge pages.
    pub(crate) huge_bytes: u64,
}

impl Qemu {
    /// Starts it, with KVM's async page faults as a guest gets them by default or without, and waits until
    /// the agent is up.
    pub(crate) fn start(async_page_faults: bool, deadline: Instant) -> Result<Self> {
        let cgroup = Cgroup::new("nowait-peers");
        let files = TempDir::new()?;
        let socket = files.path().join("agent");
        let listener = UnixListener::bind(&socket)?;
        let starter = cgroup.starter();
        let mut command = Command::new(&starter[0]);
        command.args(&starter[1..]).arg("qemu-system-x86_64");
        // As QEMU's documentation (docs/system/i386/microvm.rst) has it for the fastest boot.
        command.args(["-M", "microvm,x-option-roms=off,pit=off,pic=off,rtc=off,isa-serial=on"]);
        let cpu =
            if async_page_faults { "host" } else { "host,kvm-asyncpf=off,kvm-asyncpf-int=off" };
        command.args(["-accel", "kvm", "-cpu", cpu, "-smp", "1", "-m", &format!("{MEMORY_MIB}M")]);
        command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
        command.arg("-serial").arg(format!("file:{}", files.path().join("console").display()));
        command.arg("-chardev").arg(format!("socket,id=agent,path={}", socket.display()));
        command.args(["-device", "isa-serial,index=1,chardev=agent", "-append", CMDLINE]);
        command.arg("-kernel").arg(vmlinux()).arg("-initrd").arg(initramfs());
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::inherit());
        let mut child = command.spawn().context("starting QEMU")?;
        let agent = Channel::accept(&listener, CONNECT_LIMIT, deadline).inspect_err(|_| {
            let _ = child.kill();
            let _ = child.wait();
        })?;
        let mut qemu = Self { child, cgroup, agent, files };
        let greeted = qemu.agent.greeting();
        greeted.with_context(|| format!("its console: {}", qemu.console()))?;
        Ok(qemu)
    }

    /// Lets so much of guest RAM be in memory from now on, in bytes, beside what QEMU itself has now.
    pub(crate) fn limit(&self, bytes: u64) -> Result<()> {
        let limit = self.own_bytes()? + bytes;
        self.cgroup.set("memory.max", &limit.to_string()).context("memory.max")
    }

    /// What QEMU has in memory beside guest RAM, tables of pages included.
    pub(crate) fn own_bytes(&self) -> Result<u64> {
        Ok(self.cgroup.number("memory.current").saturating_sub(self.ram()?.bytes))
    }

    /// Guest RAM in memory: of the mapping that is as large.
    pub(crate) fn ram(&self) -> Result<Ram> {
        let smaps = fs::read_to_string(format!("/proc/{}/smaps", self.child.id()))?;
        let (mut is_ram, mut found) = (false, Vec::new());
        for line in smaps.lines() {
            let mut words = line.split_whitespace();
            let name = words.next();
            let bytes = words.next().and_then(|word| word.parse::<u64>().ok()).unwrap_or(0) << 10;
            match name {
                Some("Size:") => is_ram = bytes == MEMORY_MIB << 20,
                Some("Rss:") if is_ram => found.push(Ram { bytes, huge_bytes: 0 }),
                Some("AnonHugePages:") if is_ram => {
                    found.iter_mut().for_each(|ram| ram.huge_bytes = bytes);
                }
                _ => {}
            }
        }
        ensure!(found.len() == 1, "{} mappings of QEMU may be guest RAM", found.len());
        Ok(found[0])
    }

    /// What the guest's kernel has said, for messages.
    pub(crate) fn console(&self) -> String {
        fs::read_to_string(self.files.path().join("console")).unwrap_or_default()
    }

    /// Has the guest power off, and QEMU end.
    pub(crate) fn end(mut self) -> Result<()> {
        self.agent.send(&Request::PowerOff)?;
        let told = Instant::now();
        while self.child.try_wait()?.is_none() && told.elapsed() < END_LIMIT {
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

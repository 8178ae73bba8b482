//! What PID 1 owes the rest of the guest: file systems, commands, orphans, and the way out.

use std::fs::{self, File, OpenOptions};
use std::io::{self, IsTerminal, Read};
use std::path::Path;
use std::process::Command;

use crate::sys;

/// The file systems that are mounted at start, and whether the agent can do without.
const MOUNTS: [(&str, &str, bool); 5] = [
    ("proc", "/proc", false),
    ("sysfs", "/sys", false),
    ("devtmpfs", "/dev", false),
    ("devpts", "/dev/pts", true),
    ("tmpfs", "/tmp", true),
];
/// The shell and all commands.
const BUSYBOX: &str = "/bin/busybox";
/// Where the links to it are made.
const COMMAND_DIRS: [&str; 4] = ["/bin", "/sbin", "/usr/bin", "/usr/sbin"];
/// What a process of this guest finds in its environment.
const ENVIRONMENT: [(&str, &str); 3] =
    [("PATH", "/bin:/sbin:/usr/bin:/usr/sbin"), ("HOME", "/root"), ("PS1", "guest:\\w# ")];

/// Sees to it that what the agent prints reaches the console: the kernel opens it for PID 1 where
/// the initramfs has `/dev/console`.
pub(crate) fn ensure_console() {
    if io::stdout().is_terminal() {
        return;
    }
    if let Ok(console) = OpenOptions::new().read(true).write(true).open("/dev/console") {
        // If it fails there is nowhere to say so.
        let _ = sys::attach_stdio(&console);
    }
}

/// Prints a line on the console. Unlike `println!` it does not panic when the console is broken,
/// which must not end PID 1.
macro_rules! say {
    ($($arg:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stdout(), $($arg)*);
    }};
}
pub(crate) use say;

/// Mounts what the agent and its commands need.
pub(crate) fn mount_all() -> io::Result<()> {
    for (fstype, target, optional) in MOUNTS {
        let mounted = fs::create_dir_all(target).and_then(|()| sys::mount(fstype, target));
        match mounted {
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {}
            Err(e) if optional => say!("nowait-agent: no {fstype} on {target}: {e}"),
            Err(e) => {
                let message = format!("cannot mount {fstype} on {target}: {e}");
                return Err(io::Error::new(e.kind(), message));
            }
            Ok(()) => {}
        }
    }
    Ok(())
}

/// Makes the links from all command names to busybox, unless there is a shell already.
pub(crate) fn install_busybox() -> io::Result<()> {
    if Path::new("/bin/sh").exists() {
        return Ok(());
    }
    for dir in COMMAND_DIRS {
        fs::create_dir_all(dir)?;
    }
    let explain = |e: io::Error| {
        io::Error::new(e.kind(), format!("cannot run {BUSYBOX} (is it in the initramfs?): {e}"))
    };
    let status = command(BUSYBOX).args(["--install", "-s"]).status().map_err(explain)?;
    if status.success() {
        Ok(())
    } else {
        Err(io::Error::other(format!("{BUSYBOX} --install failed: {status}")))
    }
}

/// A command with the guest's environment.
pub(crate) fn command(program: &str) -> Command {
    let mut command = Command::new(program);
    command.envs(ENVIRONMENT);
    command
}

/// The signals that PID 1 answers, read from a descriptor: the end of children, and what busybox's
/// `poweroff`, `halt` and `reboot` send to it.
pub(crate) struct Signals(File);

/// What a signal to PID 1 asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Asked {
    /// Reap children.
    Reap,
    /// Power the guest off.
    PowerOff,
    /// Restart the guest.
    Reboot,
}

impl Signals {
    /// Blocks the signals in this thread, and in all that it starts from now on.
    pub(crate) fn new() -> io::Result<Self> {
        sys::signal_file(&[libc::SIGCHLD, libc::SIGUSR1, libc::SIGUSR2, libc::SIGTERM]).map(Self)
    }

    /// The descriptor to wait for.
    pub(crate) fn file(&self) -> &File {
        &self.0
    }

    /// The next pending signal, if there is one.
    pub(crate) fn next(&self) -> Option<Asked> {
        let mut record = [0; sys::SIGNAL_RECORD_BYTES];
        (&self.0).read_exact(&mut record).ok()?;
        let number = i32::from_ne_bytes([record[0], record[1], record[2], record[3]]);
        Some(match number {
            libc::SIGTERM => Asked::Reboot,
            libc::SIGUSR1 | libc::SIGUSR2 => Asked::PowerOff,
            _ => Asked::Reap,
        })
    }
}

/// Powers the guest off. Never returns: the end of PID 1 would be a kernel panic.
pub(crate) fn power_off() -> ! {
    leave(true)
}

/// Restarts the guest. Never returns.
pub(crate) fn reboot() -> ! {
    leave(false)
}

fn leave(power_off: bool) -> ! {
    let error = sys::reboot(power_off);
    say!("nowait-agent: the kernel neither powered off nor restarted: {error}");
    loop {
        std::thread::park();
    }
}

/// Makes the kernel panic: by sysrq, or by the end of PID 1 where it is not to be had.
pub(crate) fn panic_kernel() -> ! {
    let _ = fs::write("/proc/sys/kernel/sysrq", "1");
    let error = fs::write("/proc/sysrq-trigger", "c");
    say!("nowait-agent: no panic by sysrq ({error:?}): ending PID 1 instead");
    std::process::exit(1)
}

//! The slow medium: servers of network block devices that take a fixed time for a read. One is nowait's
//! store; another of the same kind is the host's swap, by the kernel's own client.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nowait_tests::process;
use tempfile::TempDir;

/// The size of a medium.
const SIZE: &str = "256M";
/// Requests that a server works on at once: more than there are pages on their way.
const THREADS: &str = "64";
/// How long a server may take until it listens.
const START_LIMIT: Duration = Duration::from_secs(30);
/// How long any other command may take.
const COMMAND_LIMIT: Duration = Duration::from_secs(60);

/// A running server; ended when dropped.
pub(crate) struct Server {
    child: Child,
    files: TempDir,
}

impl Server {
    /// `nbdkit` with memory behind it, whose reads take so many milliseconds.
    pub(crate) fn start(read_ms: u32) -> Result<Self> {
        let files = TempDir::new()?;
        let mut command = Command::new("nbdkit");
        command.args(["--foreground", "--threads", THREADS, "--filter=delay", "--unix"]);
        command.arg(socket(&files)).args(["memory", SIZE, &format!("rdelay={read_ms}ms")]);
        command.stdin(Stdio::null()).stdout(Stdio::null());
        let child = command
            .spawn()
            .context("starting nbdkit; install it: apt-get install nbdkit nbd-client")?;
        let mut server = Self { child, files };
        let began = Instant::now();
        while !server.socket().exists() {
            if let Some(status) = server.child.try_wait()? {
                bail!("nbdkit ended ({status})");
            }
            ensure!(began.elapsed() < START_LIMIT, "nbdkit does not listen");
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(server)
    }

    /// Where it listens.
    pub(crate) fn socket(&self) -> PathBuf {
        socket(&self.files)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn socket(files: &TempDir) -> PathBuf {
    files.path().join("socket")
}

/// The host's only swap, on a medium; off when dropped.
pub(crate) struct Swap {
    device: PathBuf,
    /// After the swap is off.
    _server: Server,
}

impl Swap {
    /// Starts a server, makes a block device of it, and has the host swap there.
    pub(crate) fn on(read_ms: u32) -> Result<Self> {
        let swaps = fs::read_to_string("/proc/swaps")?;
        ensure!(
            swaps.lines().count() <= 1,
            "this host swaps already, and QEMU would swap there: swapoff -a, or run it with --nested"
        );
        let device = free_device()?;
        let server = Server::start(read_ms)?;
        let (socket, path) = (server.socket(), device.to_string_lossy().into_owned());
        // From here on its end undoes what was done.
        let swap = Self { device, _server: server };
        let socket = socket.to_string_lossy();
        command("nbd-client", &["-unix", &socket, &path, "-block-size", "4096"])?;
        command("mkswap", &[&path])?;
        command("swapon", &[&path])?;
        Ok(swap)
    }
}

impl Drop for Swap {
    fn drop(&mut self) {
        let path = self.device.to_string_lossy();
        for (program, arguments) in
            [("swapoff", &[path.as_ref()][..]), ("nbd-client", &["-d", &path])]
        {
            if let Err(error) = command(program, arguments) {
                eprintln!("peers-bench: {error:#}");
            }
        }
    }
}

/// A network block device that nobody uses.
fn free_device() -> Result<PathBuf> {
    let names = (0..16).map(|number| format!("nbd{number}"));
    let free = |name: &String| {
        fs::read_to_string(format!("/sys/block/{name}/size")).is_ok_and(|size| size.trim() == "0")
    };
    let name = { names }.find(free).context("no free /dev/nbdN: modprobe nbd")?;
    Ok(Path::new("/dev").join(name))
}

fn command(program: &str, arguments: &[&str]) -> Result<()> {
    let ended = process::try_run(Command::new(program).args(arguments), COMMAND_LIMIT)
        .map_err(anyhow::Error::msg)?;
    ensure!(ended.code() == 0, "{program} {arguments:?}: {}{}", ended.stdout, ended.stderr);
    Ok(())
}

/// Pages that the host has read from its swap so far.
pub(crate) fn pages_read() -> Result<u64> {
    let counters = fs::read_to_string("/proc/vmstat")?;
    let number = counters.lines().find_map(|line| line.strip_prefix("pswpin "));
    Ok(number.context("pswpin in /proc/vmstat")?.parse()?)
}

//! NBD servers of others, on Unix sockets.

use std::ffi::OsStr;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use guest_memory::PAGE_BYTES;
use tempfile::TempDir;

/// How long a server may take until it listens.
const LIMIT: Duration = Duration::from_secs(10);
/// Room for the store beside the pages, in bytes.
const MARGIN_BYTES: u64 = 16 << 20;

/// A running server; ended when dropped.
pub(crate) struct Server {
    child: Child,
    files: TempDir,
}

impl Server {
    /// `qemu-nbd` with a raw file in this directory.
    pub(crate) fn qemu_nbd(directory: &Path, pages: u32) -> Result<Self> {
        let files = TempDir::new_in(directory)?;
        let disk = files.path().join("disk");
        File::create(&disk)?.set_len(bytes(pages))?;
        let mut command = Command::new("qemu-nbd");
        command.args(["--format", "raw", "--persistent", "--shared", "8", "--discard", "unmap"]);
        command.arg("--socket").arg(socket(&files)).arg(&disk);
        Self::start(command, files, "qemu-utils")
    }

    /// `nbdkit` with its plugin `memory`.
    pub(crate) fn nbdkit(pages: u32) -> Result<Self> {
        let files = TempDir::new()?;
        let mut command = Command::new("nbdkit");
        command.args(["--foreground", "--unix"]).arg(socket(&files));
        command.arg("memory").arg(bytes(pages).to_string());
        Self::start(command, files, "nbdkit")
    }

    /// Where it listens.
    pub(crate) fn socket(&self) -> PathBuf {
        socket(&self.files)
    }

    fn start(mut command: Command, files: TempDir, package: &str) -> Result<Self> {
        let program = Path::new(command.get_program()).display().to_string();
        command.stdin(Stdio::null()).stdout(Stdio::null());
        let child = command.spawn().with_context(|| {
            format!("starting {program}; install it: apt-get install {package}")
        })?;
        let mut server = Self { child, files };
        let began = Instant::now();
        while !socket(&server.files).exists() {
            if let Some(status) = server.child.try_wait()? {
                bail!("{program} ended ({status})");
            }
            if began.elapsed() > LIMIT {
                bail!("{program} does not listen after {LIMIT:?}");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(server)
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
    files.path().join(OsStr::new("socket"))
}

fn bytes(pages: u32) -> u64 {
    u64::from(pages) * PAGE_BYTES + MARGIN_BYTES
}

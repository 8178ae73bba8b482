//! NBD servers as people run them.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// A server that goes with this value.
pub struct Server {
    child: Child,
    dir: tempfile::TempDir,
}

impl Server {
    /// `nbdkit` or `qemu-nbd` with a disk of this many bytes; `None`, with the reason printed, where it
    /// is not installed.
    pub fn start(program: &str, bytes: u64) -> Option<Self> {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let socket = dir.path().join("socket");
        let mut command = Command::new(program);
        if program == "nbdkit" {
            command.args(["--foreground", "--unix"]).arg(&socket);
            command.args(["memory".to_owned(), bytes.to_string()]);
        } else {
            let disk = dir.path().join("disk");
            std::fs::File::create_new(&disk).unwrap().set_len(bytes).unwrap();
            command.args(["--persistent", "--shared=4", "--format=raw", "--discard=unmap"]);
            command.arg("--socket").arg(&socket).arg(&disk);
        }
        let Ok(child) = command.stdin(Stdio::null()).stderr(Stdio::null()).spawn() else {
            println!("SKIP: {program} is not installed");
            return None;
        };
        let server = Self { child, dir };
        super::eventually("the server answers", || UnixStream::connect(&socket).is_ok());
        Some(server)
    }

    /// The store that is this server.
    pub fn store(&self) -> String {
        format!("nbd+unix:///?socket={}", self.socket().display())
    }

    fn socket(&self) -> std::path::PathBuf {
        Path::join(self.dir.path(), "socket")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

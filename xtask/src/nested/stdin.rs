//! Standard input for the command in the machine, where that is a pipe, a file or a socket: through a virtio port of its
//! own, as it comes, and with its end.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{FileType, fstat};

/// How long QEMU may take to listen.
const LISTENS_WITHIN: Duration = Duration::from_secs(20);
/// How often that is looked at.
const AGAIN: Duration = Duration::from_millis(20);

/// Whether somebody may send something. A terminal alone is not enough: without one for the output, too, keys are not
/// passed on.
pub(crate) fn is_there() -> bool {
    let kind = fstat(io::stdin()).map(|found| FileType::from_raw_mode(found.st_mode));
    matches!(kind, Ok(FileType::Fifo | FileType::RegularFile | FileType::Socket))
}

/// Passes it on to QEMU's socket, on a thread that ends with QEMU or with us.
pub(crate) fn forward(socket: PathBuf) {
    forward_from(io::stdin(), socket);
}

fn forward_from(mut from: impl Read + Send + 'static, socket: PathBuf) {
    thread::spawn(move || {
        let Some(mut line) = connect(&socket) else { return };
        if io::copy(&mut from, &mut line).and_then(|_| line.flush()).is_ok() {
            // Only the sending half: closed altogether, QEMU might drop what it has not taken yet.
            let _ = line.shutdown(Shutdown::Write);
        }
        let _until_qemu_ends = io::copy(&mut line, &mut io::sink());
    });
}

fn connect(socket: &PathBuf) -> Option<UnixStream> {
    let deadline = Instant::now() + LISTENS_WITHIN;
    while Instant::now() < deadline {
        if let Ok(line) = UnixStream::connect(socket) {
            return Some(line);
        }
        thread::sleep(AGAIN);
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    #[test]
    fn all_of_it_arrives_and_its_end_hangs_nobody_up() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("stdin");
        let sent: Vec<u8> = (0..1 << 20).map(|n: u32| n.to_le_bytes()[1]).collect();
        // As QEMU does, later than us.
        forward_from(io::Cursor::new(sent.clone()), socket.clone());
        thread::sleep(AGAIN);
        let (mut line, _) = UnixListener::bind(&socket).unwrap().accept().unwrap();
        let mut got = Vec::new();
        line.read_to_end(&mut got).unwrap();
        assert!(got == sent);
        // The other direction is still open.
        line.write_all(&[0; 4096]).unwrap();
    }
}

//! Standard input for the command in the machine, where that is a pipe, a file or a socket: through a virtio port of its
//! own, as it comes, and with its end.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{FileType, fstat};

use crate::progress;

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
        let Some(mut line) = connect(&socket) else {
            return progress::line(
                "nested",
                "QEMU takes no standard input: the command's is empty",
            );
        };
        if let Err(why) = pass_on(&mut from, &mut line) {
            progress::line("nested", &format!("standard input ends here: {why}"));
        }
        // Only the sending half: closed altogether, QEMU might drop what it has not taken yet.
        let _ = line.shutdown(Shutdown::Write);
        let _until_qemu_ends = io::copy(&mut line, &mut io::sink());
    });
}

/// To the end of it, or of QEMU; the error is that of reading.
fn pass_on(from: &mut impl Read, line: &mut UnixStream) -> io::Result<()> {
    let mut buffer = [0; 16 << 10];
    // Before the first byte of it: by this the machine tells "nothing yet" from the end.
    let mut sent = line.write_all(PREAMBLE);
    while sent.is_ok() {
        let count = match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        sent = line.write_all(&buffer[..count]);
    }
    Ok(())
}

/// What init.sh takes off again.
const PREAMBLE: &[u8] = b"\n";

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
        assert_eq!(got.split_off(PREAMBLE.len()), sent);
        assert_eq!(got, PREAMBLE);
        // The other direction is still open.
        line.write_all(&[0; 4096]).unwrap();
    }
}

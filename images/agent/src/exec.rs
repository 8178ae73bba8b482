//! `Request::Exec`: a shell command with a time limit and bounded output.

use std::io::{self, Read};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nowait_wire::agent::Report;

use crate::{init, sys};

/// How much of a command's output is reported, in bytes. JSON writes a byte as at most six, so that
/// a report of this size still fits in a line of the agent channel.
const OUTPUT_BYTES: usize = 10 * 1024;
/// How long a command may take.
const LIMIT: Duration = Duration::from_secs(60);
/// How often a command that has closed its output is looked at.
const LOOK_AGAIN_MS: i32 = 20;

/// Runs a command and says what became of it.
pub(crate) fn exec(command: &str) -> Report {
    let ended = init::install_busybox().map_err(|e| e.to_string());
    match ended.and_then(|()| run_within(command, LIMIT)) {
        Ok((status, output)) => Report::Exec { status, output },
        Err(message) => Report::Error { message },
    }
}

/// Runs a command that ends within this time: its exit status, or 128 and the signal that ended it, and
/// its output.
pub(crate) fn run_within(command: &str, limit: Duration) -> Result<(i32, String), String> {
    let (status, output) = run(command, limit)?;
    let status = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
    Ok((status, String::from_utf8_lossy(&output).into_owned()))
}

fn run(command: &str, limit: Duration) -> Result<(ExitStatus, Vec<u8>), String> {
    let (mut pipe, writer) = io::pipe().map_err(|e| format!("cannot make a pipe: {e}"))?;
    let stderr = writer.try_clone().map_err(|e| format!("cannot make a pipe: {e}"))?;
    let mut child = sys::in_own_session(
        Command::new("/bin/sh")
            .args(["-c", command])
            .stdin(Stdio::null())
            .stdout(writer)
            .stderr(stderr),
        false,
    )
    .spawn()
    .map_err(|e| format!("cannot start /bin/sh: {e}"))?;
    let mut output = Vec::new();
    let ended = collect(&mut child, &mut pipe, &mut output, limit);
    let message = match ended {
        // What it left in the background lives on, as with any shell.
        Ok(Some(status)) => return Ok((status, output)),
        Ok(None) => format!("the command did not end within {} s and was killed", limit.as_secs()),
        Err(e) => format!("cannot wait for the command: {e}"),
    };
    sys::kill_group(child.id());
    let _ = child.wait();
    Err(message)
}

/// Reads a child's output until it ends: its status, `None` when the limit passes before.
fn collect(
    child: &mut Child,
    pipe: &mut io::PipeReader,
    output: &mut Vec<u8>,
    limit: Duration,
) -> io::Result<Option<ExitStatus>> {
    sys::set_nonblocking(pipe)?;
    let deadline = Instant::now() + limit;
    let mut open = true;
    loop {
        // Looked at before the output is read, so that nothing it wrote is missed.
        let status = child.try_wait()?;
        open = open && drain(pipe, output)?;
        if status.is_some() || Instant::now() >= deadline {
            return Ok(status);
        }
        if open {
            sys::wait_readable([&*pipe], Some(LOOK_AGAIN_MS))?;
        } else {
            std::thread::sleep(Duration::from_millis(LOOK_AGAIN_MS as u64));
        }
    }
}

/// Reads what is there and keeps the first part: whether more may come.
fn drain(pipe: &mut io::PipeReader, output: &mut Vec<u8>) -> io::Result<bool> {
    let mut buffer = [0; 4096];
    // A command that writes without end must not keep us here.
    for _ in 0..64 {
        match pipe.read(&mut buffer) {
            Ok(0) => return Ok(false),
            Ok(count) => {
                let room = OUTPUT_BYTES - output.len();
                output.extend_from_slice(&buffer[..count.min(room)]);
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nowait_wire::agent::encode_line;

    const LONG: Duration = Duration::from_secs(20);

    #[test]
    fn status_and_both_outputs() {
        let (status, output) = run("echo out; echo err >&2; exit 3", LONG).unwrap();
        assert_eq!(status.code(), Some(3));
        assert_eq!(output, b"out\nerr\n");
        let (status, _) = run("kill -9 $$", LONG).unwrap();
        assert_eq!(status.signal(), Some(9));
    }

    #[test]
    fn endless_output_is_cut_and_the_command_still_ends() {
        let (status, output) = run("head -c 10000000 /dev/zero; exit 5", LONG).unwrap();
        assert_eq!(status.code(), Some(5));
        assert_eq!(output.len(), OUTPUT_BYTES);
        let report =
            Report::Exec { status: 0, output: String::from_utf8_lossy(&output).into_owned() };
        encode_line(&report).unwrap();
    }

    #[test]
    fn a_command_that_never_ends_is_killed() {
        let message = run("sleep 1000 & yes", Duration::from_millis(300)).unwrap_err();
        assert!(message.contains("did not end"), "{message}");
    }

    #[test]
    fn a_background_process_does_not_hold_the_report_up() {
        let start = Instant::now();
        let (status, output) = run("sleep 5 & echo here", LONG).unwrap();
        assert!(status.success());
        assert_eq!(output, b"here\n");
        assert!(start.elapsed() < Duration::from_secs(4));
    }
}

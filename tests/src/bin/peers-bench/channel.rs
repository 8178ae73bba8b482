//! The host's end of the agent channel, where another VMM has COM2 on a Unix socket.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nowait_wire::agent::{
    MAX_LINE_BYTES, PROTOCOL, Report, Request, RunResult, Workload, decode_line, encode_line,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// A connected channel.
pub(crate) struct Channel {
    stream: UnixStream,
    /// Read and not yet a whole line.
    read: Vec<u8>,
    /// Nothing is waited for beyond this.
    deadline: Instant,
}

impl Channel {
    /// Waits `limit` for the VMM to connect, and until `deadline` for all that comes later.
    pub(crate) fn accept(
        listener: &UnixListener,
        limit: Duration,
        deadline: Instant,
    ) -> Result<Self> {
        let limit = Timespec::try_from(limit).context("a time limit")?;
        let mut fds = [PollFd::new(listener, PollFlags::IN)];
        ensure!(poll(&mut fds, Some(&limit))? > 0, "the VMM does not connect the agent channel");
        let (stream, _) = listener.accept()?;
        Ok(Self { stream, read: Vec::new(), deadline })
    }

    /// Waits for the agent's greeting.
    pub(crate) fn greeting(&mut self) -> Result<()> {
        match self.report()? {
            Report::Hello { protocol: PROTOCOL, .. } => Ok(()),
            other => bail!("not the greeting of an agent of protocol {PROTOCOL}: {other:?}"),
        }
    }

    /// Has the agent make one run, and waits for its result.
    pub(crate) fn run(&mut self, workload: &Workload) -> Result<RunResult> {
        self.send(&Request::Run(workload.clone()))?;
        match self.report()? {
            Report::Result(result) => Ok(result),
            other => bail!("not the result of a run: {other:?}"),
        }
    }

    /// Sends a request.
    pub(crate) fn send(&mut self, request: &Request) -> Result<()> {
        self.stream.set_write_timeout(Some(self.left()?))?;
        self.stream.write_all(&encode_line(request)?).context("sending a request to the agent")
    }

    fn report(&mut self) -> Result<Report> {
        loop {
            if let Some(end) = self.read.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.read.drain(..=end).collect();
                return Ok(decode_line(&line)?);
            }
            ensure!(self.read.len() <= MAX_LINE_BYTES, "a line of the agent that does not end");
            self.stream.set_read_timeout(Some(self.left()?))?;
            let mut chunk = [0; 4096];
            match self.stream.read(&mut chunk) {
                Ok(0) => bail!("the VMM closed the agent channel"),
                Ok(count) => self.read.extend_from_slice(&chunk[..count]),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => return Err(error).context("reading the agent channel"),
            }
        }
    }

    /// The time left, never zero.
    fn left(&self) -> Result<Duration> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        ensure!(!left.is_zero(), "the agent does not report in time");
        Ok(left)
    }
}

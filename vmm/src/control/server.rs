//! The server: one thread, a handful of connections, and no wait for any one of them.
//!
//! ```text
//!   poll -+- wake ---------> the end
//!         +- listener -----> a new connection; when there are too many, the oldest makes way
//!         +- connections --> read what is there -> whole? answer it -> write what fits -> closed
//!         +- a deadline ---> too slow: closed
//! ```

use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::reply::{Reply, Status};
use super::request::{self, Command, Parsed};

/// Connections at once.
pub(super) const MAX_CONNECTIONS: usize = 16;
/// How long one connection may last.
pub(super) const EXCHANGE_LIMIT: Duration = Duration::from_secs(2);
/// After an accept that failed (the process has no descriptors left) nobody is accepted for so long.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Read at once.
const CHUNK_BYTES: usize = 4096;
/// What a client sent beyond its request is read and thrown away, up to so many chunks: closed with
/// unread bytes, the socket would take the answer back.
const DRAIN_CHUNKS: usize = 16;

/// Serves until the other end of `wake` is closed. `answer` must not wait.
///
/// # Errors
/// When the host cannot poll.
pub(super) fn serve(
    listener: &UnixListener,
    wake: &UnixStream,
    mut answer: impl FnMut(Command) -> Reply,
) -> io::Result<()> {
    let mut connections: Vec<Connection> = Vec::new();
    let mut closed_until = None;
    loop {
        closed_until = closed_until.filter(|until| *until > Instant::now());
        let ready = wait(listener, wake, &connections, closed_until)?;
        if ready.wake {
            return Ok(());
        }
        let now = Instant::now();
        let mut moved = ready.connections.into_iter();
        connections.retain_mut(|connection| {
            let next = match moved.next() {
                Some(true) => connection.go_on(&mut answer),
                _ => Next::Wait,
            };
            next == Next::Wait && !connection.is_over(now)
        });
        if ready.listener && accept(listener, &mut connections, &mut answer).is_err() {
            closed_until = Some(now + ACCEPT_PAUSE);
        }
    }
}

/// What there is to do.
struct Ready {
    wake: bool,
    listener: bool,
    /// For each connection.
    connections: Vec<bool>,
}

fn wait(
    listener: &UnixListener,
    wake: &UnixStream,
    connections: &[Connection],
    closed_until: Option<Instant>,
) -> io::Result<Ready> {
    let listening = if closed_until.is_none() { PollFlags::IN } else { PollFlags::empty() };
    let mut fds = vec![PollFd::new(wake, PollFlags::IN), PollFd::new(listener, listening)];
    fds.extend(connections.iter().map(|c| PollFd::new(&c.stream, c.wants())));
    let deadline = connections.iter().map(|c| c.deadline).chain(closed_until).min();
    let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
    let timeout = left.and_then(|left| Timespec::try_from(left).ok());
    match poll(&mut fds, timeout.as_ref()) {
        Ok(_) => {}
        Err(rustix::io::Errno::INTR) => fds.iter_mut().for_each(PollFd::clear_revents),
        Err(error) => return Err(error.into()),
    }
    let mut ready = fds.iter().map(|fd| !fd.revents().is_empty());
    let (wake, listener) = (ready.next() == Some(true), ready.next() == Some(true));
    Ok(Ready { wake, listener, connections: ready.collect() })
}

/// Takes new connections, and what they ask if it is there already.
fn accept(
    listener: &UnixListener,
    connections: &mut Vec<Connection>,
    answer: &mut impl FnMut(Command) -> Reply,
) -> io::Result<()> {
    for _ in 0..MAX_CONNECTIONS {
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(error),
        };
        stream.set_nonblocking(true)?;
        let mut connection = Connection::new(stream);
        if connection.go_on(answer) == Next::Wait {
            // Whoever holds connections and does nothing keeps nobody else out.
            if connections.len() == MAX_CONNECTIONS {
                connections.remove(0);
            }
            connections.push(connection);
        }
    }
    Ok(())
}

struct Connection {
    stream: UnixStream,
    deadline: Instant,
    state: State,
}

enum State {
    /// So much of a request is there.
    Reading(Vec<u8>),
    /// So much of an answer is left, from this byte on.
    Writing(Vec<u8>, usize),
}

#[derive(PartialEq, Eq)]
#[must_use]
enum Next {
    Wait,
    Close,
}

impl Connection {
    fn new(stream: UnixStream) -> Self {
        let deadline = Instant::now() + EXCHANGE_LIMIT;
        Self { stream, deadline, state: State::Reading(Vec::new()) }
    }

    fn wants(&self) -> PollFlags {
        match self.state {
            State::Reading(_) => PollFlags::IN,
            State::Writing(..) => PollFlags::OUT,
        }
    }

    /// Did it take too long? Who was still asking is told.
    fn is_over(&mut self, now: Instant) -> bool {
        let over = self.deadline <= now;
        if over && matches!(self.state, State::Reading(_)) {
            let line = format!("a request has to come within {EXCHANGE_LIMIT:?}");
            self.reply(Reply::refuse(Status::TimedOut, line));
            let _closed_anyway = self.write();
        }
        over
    }

    /// Reads and writes as far as that goes without waiting.
    fn go_on(&mut self, answer: &mut impl FnMut(Command) -> Reply) -> Next {
        if let State::Reading(_) = self.state
            && self.read(answer) == Next::Close
        {
            return Next::Close;
        }
        self.write()
    }

    fn read(&mut self, answer: &mut impl FnMut(Command) -> Reply) -> Next {
        // Ends, since a request has a bound.
        while let State::Reading(bytes) = &mut self.state {
            let mut chunk = [0; CHUNK_BYTES];
            match self.stream.read(&mut chunk) {
                Ok(0) => return Next::Close,
                Ok(count) => bytes.extend_from_slice(&chunk[..count]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => return Next::Close,
            }
            match request::parse(bytes) {
                Parsed::Partial => {}
                Parsed::Command(command) => self.reply(answer(command)),
                Parsed::Refused(reply) => self.reply(reply),
            }
        }
        Next::Wait
    }

    fn reply(&mut self, reply: Reply) {
        self.state = State::Writing(reply.into_bytes(), 0);
    }

    fn write(&mut self) -> Next {
        let State::Writing(bytes, from) = &mut self.state else { return Next::Wait };
        while *from < bytes.len() {
            match self.stream.write(&bytes[*from..]) {
                Ok(0) => return Next::Close,
                Ok(count) => *from += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Next::Wait,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return Next::Close,
            }
        }
        let mut chunk = [0; CHUNK_BYTES];
        for _ in 0..DRAIN_CHUNKS {
            if !matches!(self.stream.read(&mut chunk), Ok(count) if count > 0) {
                break;
            }
        }
        Next::Close
    }
}

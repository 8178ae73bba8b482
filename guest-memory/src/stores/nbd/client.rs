//! Many requests at a time over one connection, and a new connection when it is lost.
//!
//! ```text
//!   callers: insert into pending -> send (short mutex) -> wait for the batch
//!   thread:  reply -> pending -> its batch;  lost -> all pending fail -> connect, with pauses -> reply ...
//! ```

use std::io::{self, BufReader, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use rustix::net::SendFlags;

use super::handshake::Geometry;
use super::replies::{Answer, Batch, Failure, Request, Run, Waiting, receive};
use super::socket::{self, ConnectError, Socket};
use super::wire::{self, Command, Cookie, REQUEST_BYTES};
use crate::address::{PAGE_BYTES, PAGE_SIZE, PageBytes};
use crate::stores::meter::Counter;
use crate::stores::slots::offset;
use crate::stores::{NbdSpec, Slot};

/// The most requests that wait for a reply.
const MAX_IN_FLIGHT: usize = 1024;
/// How much is read from the socket at a time, in bytes.
const READ_BUFFER_BYTES: usize = 64 << 10;

/// How long things may take.
#[derive(Clone, Copy, Debug)]
pub(super) struct Timing {
    /// Connection and handshake.
    pub(super) connect: Duration,
    /// A request, after which the connection counts as lost.
    pub(super) request: Duration,
    /// The first pause before a new connection; it doubles with every failure.
    pub(super) min_pause: Duration,
    /// The longest pause.
    pub(super) max_pause: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(5),
            request: Duration::from_secs(30),
            min_pause: Duration::from_millis(50),
            max_pause: Duration::from_secs(2),
        }
    }
}

/// What is asked of the server.
#[derive(Clone, Copy, Debug)]
pub(super) enum Operation<'a> {
    Read(Slot),
    Write(Slot, &'a PageBytes),
}

struct State {
    link: Link,
    waiting: Waiting,
}

#[derive(Debug)]
enum Link {
    Up(Arc<Connection>),
    Down(Arc<str>),
    Closed,
}

#[derive(Debug)]
struct Connection {
    socket: Socket,
    /// Held while a batch is sent.
    sender: Mutex<()>,
}

/// A connection that comes back by itself.
pub(super) struct Client {
    inner: Arc<Inner>,
}

struct Inner {
    spec: NbdSpec,
    timing: Timing,
    geometry: Geometry,
    state: Mutex<State>,
    /// There is room for requests, or another state of the connection.
    changed: Condvar,
    losses: Counter,
}

impl Client {
    /// Connects.
    pub(super) fn connect(spec: &NbdSpec, timing: Timing) -> Result<Self, ConnectError> {
        let (socket, geometry) = socket::connect(spec, timing.connect)?;
        Self::over(spec, timing, socket, geometry).map_err(ConnectError::Socket)
    }

    /// Over a socket on which the handshake is done.
    pub(super) fn over(
        spec: &NbdSpec,
        timing: Timing,
        socket: Socket,
        geometry: Geometry,
    ) -> io::Result<Self> {
        let connection = Arc::new(Connection { socket, sender: Mutex::new(()) });
        let inner = Arc::new(Inner {
            spec: spec.clone(),
            timing,
            geometry,
            state: Mutex::new(State {
                link: Link::Up(connection.clone()),
                waiting: Waiting::new(),
            }),
            changed: Condvar::new(),
            losses: Counter::default(),
        });
        let keeper = inner.clone();
        thread::Builder::new().name("nbd".into()).spawn(move || keeper.keep(connection))?;
        Ok(Self { inner })
    }

    /// What the server said of the export.
    pub(super) fn geometry(&self) -> Geometry {
        self.inner.geometry
    }

    /// Sends a batch and waits for all its answers. Nobody waits for the trims, which are sent with it;
    /// says whether they were.
    pub(super) fn run(&self, operations: &[Operation<'_>], trims: &[Run]) -> (Vec<Answer>, bool) {
        let batch = Arc::new(Batch::new(operations.len()));
        match self.inner.submit(&batch, operations, trims) {
            Ok(connection) => {
                let mut answers = batch.wait(self.inner.timing.request, || {
                    connection.socket.shut_down();
                });
                if matches!(self.inner.state().link, Link::Closed) {
                    // A server that is told goodbye may still answer, with errors of its own.
                    let failed = answers.iter_mut().filter(|answer| answer.is_err());
                    failed.for_each(|answer| *answer = Err(Failure::Closed));
                }
                (answers, true)
            }
            Err(failure) => (vec![Err(failure); operations.len()], false),
        }
    }

    /// Runs that were trimmed since the last time.
    pub(super) fn take_trimmed(&self) -> Vec<Run> {
        std::mem::take(&mut self.inner.state().waiting.trimmed)
    }

    /// How the connection is doing.
    pub(super) fn note(&self) -> String {
        let losses = self.inner.losses.get();
        match &self.inner.state().link {
            Link::Up(_) if losses == 0 => "connected".to_owned(),
            Link::Up(_) => format!("connected, after {losses} losses"),
            Link::Down(reason) => format!("not connected: {reason}"),
            Link::Closed => "closed".to_owned(),
        }
    }

    /// Ends all waits and the connection.
    pub(super) fn close(&self) {
        let link = std::mem::replace(&mut self.inner.state().link, Link::Closed);
        self.inner.changed.notify_all();
        if let Link::Up(connection) = link {
            connection.say_goodbye();
            connection.socket.shut_down();
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.close();
    }
}

impl Inner {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nothing panics with this lock held")
    }

    fn submit(
        &self,
        batch: &Arc<Batch>,
        operations: &[Operation<'_>],
        trims: &[Run],
    ) -> Result<Arc<Connection>, Failure> {
        let deadline = Instant::now() + self.timing.request;
        let (mut state, connection) = self.wait_for_room(operations.len(), deadline)?;
        let cookies: Vec<Cookie> = (operations.iter().enumerate())
            .map(|(index, operation)| {
                let is_read = matches!(operation, Operation::Read(_));
                state.waiting.pending.insert(Request::Page { batch: batch.clone(), index, is_read })
            })
            .collect();
        let trim_cookies: Vec<Cookie> =
            trims.iter().map(|run| state.waiting.pending.insert(Request::Trim(*run))).collect();
        drop(state);
        let mut buffer = Vec::with_capacity((REQUEST_BYTES + PAGE_SIZE) * operations.len());
        for (operation, cookie) in operations.iter().zip(cookies) {
            operation.encode(&mut buffer, cookie);
        }
        for (run, cookie) in trims.iter().zip(trim_cookies) {
            let (offset, len) = (offset(run.first), run.pages * PAGE_SIZE as u32);
            wire::push_request(&mut buffer, Command::Trim, cookie, offset, len);
        }
        connection.send(&buffer, deadline);
        Ok(connection)
    }

    fn wait_for_room(
        &self,
        requests: usize,
        deadline: Instant,
    ) -> Result<(MutexGuard<'_, State>, Arc<Connection>), Failure> {
        let mut state = self.state();
        loop {
            match &state.link {
                Link::Closed => return Err(Failure::Closed),
                Link::Down(reason) => return Err(Failure::NotSent(reason.clone())),
                Link::Up(connection) if state.waiting.pending.len() + requests <= MAX_IN_FLIGHT => {
                    let connection = connection.clone();
                    return Ok((state, connection));
                }
                Link::Up(_) => {}
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Failure::NotSent("too many requests wait for the server".into()));
            }
            let waited = self.changed.wait_timeout(state, left);
            state = waited.expect("nothing panics with this lock held").0;
        }
    }

    /// The life of the connection's thread.
    fn keep(&self, mut connection: Arc<Connection>) {
        loop {
            let mut stream = BufReader::with_capacity(READ_BUFFER_BYTES, &connection.socket);
            let error = loop {
                match receive(&mut stream, &self.state) {
                    Ok(()) => self.changed.notify_all(),
                    Err(error) => break error,
                }
            };
            connection.socket.shut_down();
            if self.lost(&error).is_err() {
                return;
            }
            match self.reconnect() {
                Ok(new) => connection = new,
                Err(Closed) => return,
            }
        }
    }

    /// Fails whatever waits for the connection.
    fn lost(&self, error: &io::Error) -> Result<(), Closed> {
        let reason: Arc<str> = format!("the connection was lost: {error}").into();
        let mut state = self.state();
        let pending = state.waiting.pending.drain();
        let closed = matches!(state.link, Link::Closed);
        if !closed {
            state.link = Link::Down(reason.clone());
            self.losses.add(1);
        }
        drop(state);
        self.changed.notify_all();
        let failure = if closed { Failure::Closed } else { Failure::Lost(reason) };
        for request in pending {
            // The slots of a trim that was not answered are never used again.
            if let Request::Page { batch, index, .. } = request {
                batch.deliver(index, Err(failure.clone()));
            }
        }
        if closed { Err(Closed) } else { Ok(()) }
    }

    fn reconnect(&self) -> Result<Arc<Connection>, Closed> {
        let mut pause = self.timing.min_pause;
        loop {
            self.pause(pause)?;
            pause = (pause * 2).min(self.timing.max_pause);
            let reason = match socket::connect(&self.spec, self.timing.connect) {
                Ok((socket, geometry)) if geometry == self.geometry => {
                    let connection = Arc::new(Connection { socket, sender: Mutex::new(()) });
                    let mut state = self.state();
                    if matches!(state.link, Link::Closed) {
                        return Err(Closed);
                    }
                    state.waiting.begin_connection();
                    state.link = Link::Up(connection.clone());
                    return Ok(connection);
                }
                Ok((_, found)) => format!(
                    "the server came back with another export: {} bytes with flags {:#x} instead \
                     of {} bytes with flags {:#x}",
                    found.size_bytes, found.flags, self.geometry.size_bytes, self.geometry.flags
                ),
                Err(error) => error.to_string(),
            };
            let mut state = self.state();
            match &mut state.link {
                Link::Closed => return Err(Closed),
                link => *link = Link::Down(reason.into()),
            }
        }
    }

    fn pause(&self, pause: Duration) -> Result<(), Closed> {
        let is_open = |state: &mut State| !matches!(state.link, Link::Closed);
        let waited = self.changed.wait_timeout_while(self.state(), pause, is_open);
        let (state, _) = waited.expect("nothing panics with this lock held");
        if matches!(state.link, Link::Closed) { Err(Closed) } else { Ok(()) }
    }
}

/// The client was closed meanwhile.
#[derive(Debug)]
struct Closed;

impl AsMut<Waiting> for State {
    fn as_mut(&mut self) -> &mut Waiting {
        &mut self.waiting
    }
}

impl Operation<'_> {
    fn encode(&self, buffer: &mut Vec<u8>, cookie: Cookie) {
        let len = PAGE_BYTES as u32;
        match self {
            Self::Read(slot) => {
                wire::push_request(buffer, Command::Read, cookie, offset(*slot), len);
            }
            Self::Write(slot, page) => {
                wire::push_request(buffer, Command::Write, cookie, offset(*slot), len);
                buffer.extend_from_slice(&page[..]);
            }
        }
    }
}

impl Connection {
    /// Sends all of it. If that does not work the connection is shut down, and its thread tells
    /// everybody who waits.
    fn send(&self, mut buffer: &[u8], deadline: Instant) {
        let sender = self.sender.lock().expect("nothing panics with this lock held");
        while !buffer.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            let sent = match left.is_zero() {
                true => Err(io::ErrorKind::TimedOut.into()),
                false => (self.socket.set_write_timeout(left))
                    .and_then(|()| (&mut &self.socket).write(buffer)),
            };
            match sent {
                Ok(sent) if sent > 0 => buffer = &buffer[sent..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                _ => {
                    self.socket.shut_down();
                    break;
                }
            }
        }
        drop(sender);
    }

    /// Tells the server that nothing more comes, if that needs no waiting.
    fn say_goodbye(&self) {
        let Ok(_sender) = self.sender.try_lock() else {
            return;
        };
        let mut buffer = Vec::new();
        wire::push_request(&mut buffer, Command::Disconnect, Cookie(0), 0, 0);
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        let _ = match &self.socket {
            Socket::Tcp(stream) => rustix::net::send(stream, &buffer, flags),
            Socket::Unix(stream) => rustix::net::send(stream, &buffer, flags),
        };
    }
}

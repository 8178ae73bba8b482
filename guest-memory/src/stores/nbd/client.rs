//! Many requests at a time over one connection, and a new connection when it is lost.
//!
//! ```text
//!   callers: insert into pending -> send (short mutex) -> wait for the batch
//!   thread:  reply -> pending -> its batch;  lost -> all pending fail -> connect, with pauses -> reply ...
//! ```

use std::io::{self, BufReader, Read, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use rustix::net::SendFlags;

use super::handshake::Geometry;
use super::pending::Pending;
use super::socket::{self, ConnectError, Socket};
use super::wire::{self, Command, Cookie, REPLY_BYTES, REQUEST_BYTES};
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

/// Pages of the export that follow one another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) first: Slot,
    pub(super) pages: u32,
}

/// What is asked of the server.
#[derive(Clone, Copy, Debug)]
pub(super) enum Operation<'a> {
    Read(Slot),
    Write(Slot, &'a PageBytes),
}

/// What became of an operation; a read has a page.
pub(super) type Answer = Result<Option<Box<PageBytes>>, Failure>;

/// Why there is no answer, or a bad one.
#[derive(Clone, Debug)]
pub(super) enum Failure {
    /// There is no connection: the server has not seen the request.
    NotSent(Arc<str>),
    /// The connection was lost: the server may still do what was asked.
    Lost(Arc<str>),
    /// The server's error number.
    Server(u32),
    /// The client is closed.
    Closed,
}

/// One request that waits for its reply.
#[derive(Debug)]
enum Request {
    Page { batch: Arc<Batch>, index: usize, is_read: bool },
    Trim(Run),
}

/// The operations of one caller.
#[derive(Debug)]
struct Batch {
    answers: Mutex<Answers>,
    all_there: Condvar,
}

#[derive(Debug)]
struct Answers {
    answers: Vec<Option<Answer>>,
    missing: usize,
}

#[derive(Debug)]
struct State {
    link: Link,
    pending: Pending<Request>,
    /// Runs that the server has trimmed.
    trimmed: Vec<Run>,
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
        let connection = Arc::new(Connection { socket, sender: Mutex::new(()) });
        let inner = Arc::new(Inner {
            spec: spec.clone(),
            timing,
            geometry,
            state: Mutex::new(State::new(Link::Up(connection.clone()))),
            changed: Condvar::new(),
            losses: Counter::default(),
        });
        let keeper = inner.clone();
        thread::Builder::new()
            .name("nbd".into())
            .spawn(move || keeper.keep(connection))
            .map_err(ConnectError::Socket)?;
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
                let mut answers = batch.wait(&connection, self.inner.timing.request);
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
        std::mem::take(&mut self.inner.state().trimmed)
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
                state.pending.insert(Request::Page { batch: batch.clone(), index, is_read })
            })
            .collect();
        let trim_cookies: Vec<Cookie> =
            trims.iter().map(|run| state.pending.insert(Request::Trim(*run))).collect();
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
                Link::Up(connection) if state.pending.len() + requests <= MAX_IN_FLIGHT => {
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
        let pending = state.pending.drain();
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
                    *state = State::new(Link::Up(connection.clone()));
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

/// Takes one reply from the server to whoever waits for it.
///
/// # Errors
/// When the connection ends, or what comes is no reply to anything that was asked. Then nobody was
/// told anything.
fn receive(stream: &mut impl Read, state: &Mutex<State>) -> io::Result<()> {
    let lock = || state.lock().expect("nothing panics with this lock held");
    let mut header = [0; REPLY_BYTES];
    stream.read_exact(&mut header)?;
    let reply = wire::parse_reply(&header)
        .map_err(|wire::NoReply| io::Error::other("the server sent what is no simple reply"))?;
    let not_asked = || io::Error::other("the server replied to what was not asked");
    let is_read = match lock().pending.get(reply.cookie).ok_or_else(not_asked)? {
        Request::Page { is_read, .. } => *is_read,
        Request::Trim(_) => false,
    };
    let answer = match reply.error {
        0 if is_read => {
            let mut page = Box::new([0; PAGE_SIZE]);
            stream.read_exact(&mut *page)?;
            Ok(Some(page))
        }
        0 => Ok(None),
        error => Err(Failure::Server(error)),
    };
    let mut state = lock();
    match state.pending.remove(reply.cookie).ok_or_else(not_asked)? {
        Request::Page { batch, index, .. } => {
            drop(state);
            batch.deliver(index, answer);
        }
        // A server that cannot trim has kept the bytes, and that is all.
        Request::Trim(run) => state.trimmed.push(run),
    }
    Ok(())
}

impl State {
    fn new(link: Link) -> Self {
        Self { link, pending: Pending::new(fastrand::u32(..)), trimmed: Vec::new() }
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

impl Batch {
    fn new(operations: usize) -> Self {
        let answers = (0..operations).map(|_| None).collect();
        let answers = Mutex::new(Answers { answers, missing: operations });
        Self { answers, all_there: Condvar::new() }
    }

    fn deliver(&self, index: usize, answer: Answer) {
        let mut answers = self.answers.lock().expect("nothing panics with this lock held");
        let place = &mut answers.answers[index];
        debug_assert!(place.is_none(), "a second answer");
        *place = Some(answer);
        answers.missing -= 1;
        if answers.missing == 0 {
            self.all_there.notify_one();
        }
    }

    /// Waits for all answers. After `timeout` the connection is given up, which answers the rest.
    fn wait(&self, connection: &Connection, timeout: Duration) -> Vec<Answer> {
        let some_missing = |answers: &mut Answers| answers.missing > 0;
        let answers = self.answers.lock().expect("nothing panics with this lock held");
        let (mut answers, waited) = self
            .all_there
            .wait_timeout_while(answers, timeout, some_missing)
            .expect("nothing panics with this lock held");
        if waited.timed_out() {
            connection.socket.shut_down();
            answers = self
                .all_there
                .wait_while(answers, some_missing)
                .expect("nothing panics with this lock held");
        }
        answers.answers.drain(..).map(|answer| answer.unwrap_or(Err(Failure::Closed))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn reply(cookie: Cookie, error: u32, data: &[u8]) -> Vec<u8> {
        let head = [0x6744_6698_u32.to_be_bytes(), error.to_be_bytes()].concat();
        [&head[..], &cookie.0.to_be_bytes(), data].concat()
    }

    /// One of each kind of request, in batches of their own.
    fn three_requests() -> (Mutex<State>, [Arc<Batch>; 2], [Cookie; 3]) {
        let mut state = State::new(Link::Closed);
        let batches = [Arc::new(Batch::new(1)), Arc::new(Batch::new(1))];
        let page =
            |batch: &Arc<Batch>, is_read| Request::Page { batch: batch.clone(), index: 0, is_read };
        let cookies = [
            state.pending.insert(page(&batches[0], true)),
            state.pending.insert(page(&batches[1], false)),
            state.pending.insert(Request::Trim(Run { first: Slot(3), pages: 2 })),
        ];
        (Mutex::new(state), batches, cookies)
    }

    fn is_answered(batch: &Batch) -> bool {
        batch.answers.lock().unwrap().missing == 0
    }

    #[test]
    fn replies_in_any_order_reach_their_requests() {
        let (state, batches, [read, write, trim]) = three_requests();
        let page = [7; PAGE_SIZE];
        let bytes = [reply(trim, 0, &[]), reply(read, 0, &page), reply(write, 28, &[])].concat();
        let mut stream = &bytes[..];
        for _ in 0..3 {
            receive(&mut stream, &state).unwrap();
        }
        assert!(receive(&mut stream, &state).is_err());
        let answers = |batch: &Batch| batch.answers.lock().unwrap().answers.pop().unwrap().unwrap();
        assert_eq!(**answers(&batches[0]).unwrap().as_ref().unwrap(), page);
        assert!(matches!(answers(&batches[1]), Err(Failure::Server(28))));
        assert_eq!(state.lock().unwrap().trimmed, [Run { first: Slot(3), pages: 2 }]);
    }

    proptest! {
        /// A request is answered by its own cookie in a whole reply, or not at all.
        #[test]
        fn no_bytes_answer_a_wrong_request(
            noise in prop::collection::vec(any::<u8>(), 0..40),
            magic: bool,
            near in prop::option::of((0..3_usize, 0..64_u32)),
            len in 0..5000_usize,
        ) {
            let (state, batches, cookies) = three_requests();
            let mut bytes = noise;
            let mut flipped = None;
            if magic {
                bytes.resize(16, 0);
                bytes[..4].copy_from_slice(&0x6744_6698_u32.to_be_bytes());
            }
            if let Some((which, bit)) = near {
                // A cookie that differs in one bit from one that is waited for.
                let cookie = Cookie(cookies[which].0 ^ 1 << bit);
                flipped = Some(cookie);
                bytes = reply(cookie, 0, &[]);
            }
            bytes.resize(bytes.len() + len, 9);
            let given: [u8; 8] = bytes.get(8..16).map_or([0; 8], |cookie| cookie.try_into().unwrap());
            let given = Cookie(u64::from_be_bytes(given));
            let received = receive(&mut &bytes[..], &state);
            let known = cookies.iter().position(|cookie| *cookie == given);
            prop_assert!(received.is_err() || known.is_some());
            for (index, batch) in batches.iter().enumerate() {
                prop_assert!(!is_answered(batch) || known == Some(index));
            }
            let trimmed = state.lock().unwrap().trimmed.len();
            prop_assert!(trimmed == 0 || known == Some(2));
            if let Some(cookie) = flipped {
                prop_assert_eq!(cookies.contains(&cookie) && received.is_ok(), received.is_ok());
            }
        }

        #[test]
        fn half_a_page_is_no_answer(len in 0..PAGE_SIZE) {
            let (state, batches, [read, ..]) = three_requests();
            let bytes = reply(read, 0, &vec![1; len]);
            prop_assert!(receive(&mut &bytes[..], &state).is_err());
            prop_assert!(!is_answered(&batches[0]));
            prop_assert_eq!(state.lock().unwrap().pending.len(), 3, "it is failed with the others");
        }
    }
}

//! Requests to a control socket: one connection each, bounded in time and size, whoever answers.

use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// How long one exchange may take.
pub(super) const ANSWER_LIMIT: Duration = Duration::from_secs(2);
/// Between two tries to connect while too many others wait to be accepted.
const KNOCK_PAUSE: Duration = Duration::from_millis(10);
/// The longest answer, in bytes: ten times what `/metrics` and `/pages` of a large guest have.
const MAX_ANSWER_BYTES: usize = 2 << 20;
/// The most headers of an answer.
const MAX_HEADERS: usize = 32;
/// A refusal is shown up to so many characters.
const MAX_LINE: usize = 200;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum AskError {
    /// Nothing is there.
    #[error(
        "'{0}' does not exist: give the socket of a running guest, which nowait run --control {0} makes"
    )]
    Missing(PathBuf),
    /// Something else is there.
    #[error("'{path}' is {kind}, no socket: give what nowait run --control made")]
    NotSocket {
        /// The path.
        path: PathBuf,
        /// What is there.
        kind: &'static str,
    },
    /// It was left by a process that is gone.
    #[error("'{0}' is a socket at which nobody listens: its run has ended")]
    Stale(PathBuf),
    /// It is another user's.
    #[error(
        "'{path}' cannot be connected to: it belongs to user {owner}, and only that user may (try sudo)"
    )]
    Denied {
        /// The path.
        path: PathBuf,
        /// Their number.
        owner: u32,
    },
    /// Its directory is.
    #[error(
        "'{0}' cannot be reached: permission denied (try sudo, as the user who started the guest)"
    )]
    Unreachable(PathBuf),
    /// It does not fit in a socket's address.
    #[error("'{0}' is too long for a socket, 107 bytes at most: give a relative path")]
    TooLong(PathBuf),
    /// It takes too long.
    #[error("'{0}' does not answer within {ANSWER_LIMIT:?}")]
    TimedOut(PathBuf),
    /// The connection was closed before.
    #[error("'{0}' closed the connection without a whole answer")]
    Cut(PathBuf),
    /// Somebody else answers.
    #[error("'{path}' is not the control socket of a nowait run: {why}")]
    NotNowait {
        /// The path.
        path: PathBuf,
        /// What is wrong with the answer.
        why: String,
    },
    /// It will not be done; this is its reason.
    #[error("{0}")]
    Refused(String),
    /// Anything else.
    #[error("'{path}': {source}")]
    Io {
        /// The path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl AskError {
    /// Is there nobody any more?
    pub(super) fn is_gone(&self) -> bool {
        matches!(self, Self::Missing(_) | Self::Stale(_) | Self::NotSocket { .. })
    }
}

/// A request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Request {
    /// `GET /metrics`, for example.
    pub(super) line: String,
    pub(super) body: String,
}

impl Request {
    /// Without a body.
    pub(super) fn plain(line: impl Into<String>) -> Self {
        Self { line: line.into(), body: String::new() }
    }
}

/// Who asks at one path.
#[derive(Clone, Debug)]
pub(super) struct Client {
    path: PathBuf,
}

impl Client {
    /// For the socket at this path.
    pub(super) fn new(path: &Path) -> Self {
        Self { path: path.to_owned() }
    }

    /// Asks, and returns the body of the answer. Takes [`ANSWER_LIMIT`] at most, or little more.
    ///
    /// # Errors
    /// When there is no answer, it is none of nowait's, or it is a refusal.
    pub(super) fn ask(&self, request: &Request) -> Result<String, AskError> {
        let deadline = Instant::now() + ANSWER_LIMIT;
        let stream = self.connect(deadline)?;
        let bytes = self.exchange(stream, request, deadline)?;
        self.read_answer(&bytes)
    }

    fn connect(&self, deadline: Instant) -> Result<UnixStream, AskError> {
        let failed = |errno: Errno| self.failed(errno);
        let address = SocketAddrUnix::new(&self.path).map_err(failed)?;
        loop {
            // Without waiting: a socket whose backlog is full would hold us for as long as it likes.
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let socket =
                rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None);
            let socket = socket.map_err(failed)?;
            match rustix::net::connect(&socket, &address) {
                Ok(()) => {
                    let stream = UnixStream::from(socket);
                    stream.set_nonblocking(false).map_err(|source| self.io(source))?;
                    return Ok(stream);
                }
                Err(Errno::AGAIN | Errno::INTR) if Instant::now() < deadline => {
                    thread::sleep(KNOCK_PAUSE);
                }
                Err(Errno::AGAIN) => return Err(AskError::TimedOut(self.path.clone())),
                Err(errno) => return Err(failed(errno)),
            }
        }
    }

    /// Why a connection could not be made.
    fn failed(&self, errno: Errno) -> AskError {
        let path = self.path.clone();
        match (errno, fs::metadata(&self.path)) {
            (Errno::NOENT | Errno::NOTDIR, _) => AskError::Missing(path),
            (Errno::NAMETOOLONG, _) => AskError::TooLong(path),
            (Errno::ACCESS | Errno::PERM, Ok(found)) => {
                AskError::Denied { path, owner: found.uid() }
            }
            (Errno::ACCESS | Errno::PERM, Err(_)) => AskError::Unreachable(path),
            (_, Ok(found)) if !found.file_type().is_socket() => {
                let kind = match () {
                    () if found.is_dir() => "a directory",
                    () if found.is_file() => "a regular file",
                    () => "something else",
                };
                AskError::NotSocket { path, kind }
            }
            (Errno::CONNREFUSED, _) => AskError::Stale(path),
            // A datagram socket, for example.
            (Errno::PROTOTYPE, _) => self.not_nowait("it is a socket of another type"),
            (errno, _) => self.io(errno.into()),
        }
    }

    fn exchange(
        &self,
        mut stream: UnixStream,
        request: &Request,
        deadline: Instant,
    ) -> Result<Vec<u8>, AskError> {
        let Request { line, body } = request;
        let head =
            format!("{line} HTTP/1.1\r\nHost: nowait\r\nContent-Length: {}\r\n\r\n", body.len());
        let left = || deadline.saturating_duration_since(Instant::now());
        // A limit of zero would be none.
        let limit = || Some(left().max(Duration::from_millis(1)));
        let sent = stream
            .set_write_timeout(limit())
            .and_then(|()| stream.write_all((head + body).as_bytes()));
        // Who refuses without reading it all may have answered all the same.
        let sent = sent.map_err(|error| self.lost(error));
        let mut bytes = Vec::new();
        let mut chunk = [0; 16 << 10];
        loop {
            if left().is_zero() {
                return Err(AskError::TimedOut(self.path.clone()));
            }
            stream.set_read_timeout(limit()).map_err(|source| self.io(source))?;
            match stream.read(&mut chunk) {
                Ok(0) => break,
                Ok(count) if bytes.len() + count > MAX_ANSWER_BYTES => {
                    return Err(self.not_nowait("its answer has no end"));
                }
                Ok(count) => bytes.extend_from_slice(&chunk[..count]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Somebody who answers without reading resets the connection behind the answer.
                Err(error)
                    if !bytes.is_empty() && error.kind() == io::ErrorKind::ConnectionReset =>
                {
                    break;
                }
                Err(error) => return Err(self.lost(error)),
            }
        }
        if bytes.is_empty() {
            sent?;
        }
        Ok(bytes)
    }

    fn read_answer(&self, bytes: &[u8]) -> Result<String, AskError> {
        if bytes.is_empty() {
            return Err(AskError::Cut(self.path.clone()));
        }
        let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
        let mut response = httparse::Response::new(&mut headers);
        let head_bytes = match response.parse(bytes) {
            Ok(httparse::Status::Complete(head_bytes)) => head_bytes,
            Ok(httparse::Status::Partial) => return Err(AskError::Cut(self.path.clone())),
            Err(error) => {
                return Err(self.not_nowait(format!("it does not answer in HTTP: {error}")));
            }
        };
        let (code, body) = (response.code.unwrap_or(0), &bytes[head_bytes..]);
        let length =
            response.headers.iter().find(|h| h.name.eq_ignore_ascii_case("Content-Length"));
        let length = length.and_then(|header| std::str::from_utf8(header.value).ok()?.parse().ok());
        if length.is_some_and(|length: usize| body.len() < length) {
            return Err(AskError::Cut(self.path.clone()));
        }
        let Ok(body) = std::str::from_utf8(body) else {
            return Err(self.not_nowait("its answer is not text"));
        };
        match code {
            200 => Ok(body.to_owned()),
            _ => Err(AskError::Refused(one_line(body, code))),
        }
    }

    fn lost(&self, error: io::Error) -> AskError {
        match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
                AskError::TimedOut(self.path.clone())
            }
            io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => {
                AskError::Cut(self.path.clone())
            }
            _ => self.io(error),
        }
    }

    /// What answers makes no sense.
    pub(super) fn not_nowait(&self, why: impl Into<String>) -> AskError {
        AskError::NotNowait { path: self.path.clone(), why: why.into() }
    }

    fn io(&self, source: io::Error) -> AskError {
        AskError::Io { path: self.path.clone(), source }
    }
}

/// A refusal as one line that can be shown.
fn one_line(body: &str, code: u16) -> String {
    let line = body.lines().next().unwrap_or("").trim();
    let line: String = line.chars().filter(|c| !c.is_control()).take(MAX_LINE).collect();
    if line.is_empty() { format!("refused with HTTP status {code}") } else { line }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::{UnixDatagram, UnixListener};

    fn scratch() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control");
        (dir, path)
    }

    fn ask(path: &Path) -> Result<String, AskError> {
        Client::new(path).ask(&Request::plain("GET /metrics"))
    }

    /// A server that does this with its first client.
    fn serve(path: &Path, with: impl FnOnce(UnixStream) + Send + 'static) {
        let listener = UnixListener::bind(path).unwrap();
        thread::spawn(move || with(listener.accept().unwrap().0));
    }

    fn answer(text: &'static [u8]) -> Result<String, AskError> {
        let (_dir, path) = scratch();
        serve(&path, |mut stream| {
            let _ = stream.read(&mut [0; 1024]);
            let _ = stream.write_all(text);
        });
        ask(&path)
    }

    #[test]
    fn what_is_no_living_socket_is_told_by_its_kind() {
        let (dir, path) = scratch();
        let missing = ask(&path).unwrap_err();
        assert!(missing.is_gone() && missing.to_string().contains("does not exist"), "{missing}");
        let through_file = ask(&path.join("below")).unwrap_err();
        assert!(matches!(through_file, AskError::Missing(_)), "{through_file}");
        drop(UnixListener::bind(&path).unwrap());
        let stale = ask(&path).unwrap_err();
        assert!(stale.is_gone() && stale.to_string().contains("nobody listens"), "{stale}");
        let file = dir.path().join("file");
        fs::write(&file, "x").unwrap();
        for (path, kind) in [(file.as_path(), "a regular file"), (dir.path(), "a directory")] {
            let error = ask(path).unwrap_err().to_string();
            assert!(error.contains(kind), "{error}");
        }
        let datagram = dir.path().join("datagram");
        let _socket = UnixDatagram::bind(&datagram).unwrap();
        assert!(ask(&datagram).unwrap_err().to_string().contains("another type"));
        let long = dir.path().join("x".repeat(120));
        assert!(matches!(ask(&long).unwrap_err(), AskError::TooLong(_)));
    }

    #[test]
    fn answers_are_read_and_refusals_shown() {
        assert_eq!(answer(b"HTTP/1.1 200 OK\r\n\r\nyes").unwrap(), "yes");
        let line = answer(b"HTTP/1.1 409 Conflict\r\n\r\n\x1b[2Jno\nmore").unwrap_err().to_string();
        assert_eq!(line, "[2Jno");
        let line = answer(b"HTTP/1.1 500 X\r\n\r\n").unwrap_err().to_string();
        assert!(line.contains("500"), "{line}");
    }

    #[test]
    fn garbage_is_told_from_an_answer_that_is_cut() {
        for garbage in
            [&b"SSH-2.0-OpenSSH\r\n"[..], b"\0\0\0\0", b"HTTP/1.1 200 OK\r\n\r\n\xff\xfe"]
        {
            let error = answer(garbage).unwrap_err();
            assert!(matches!(error, AskError::NotNowait { .. }), "{garbage:?}: {error}");
        }
        for cut in
            [&b""[..], b"HTTP/1.1 200 O", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf"]
        {
            let error = answer(cut).unwrap_err();
            assert!(matches!(error, AskError::Cut(_)), "{cut:?}: {error}");
        }
    }

    #[test]
    fn who_says_nothing_or_never_stops_is_not_waited_for() {
        let (_dir, path) = scratch();
        let (done, wait) = std::sync::mpsc::channel::<()>();
        serve(&path, move |_stream| {
            let _ = wait.recv();
        });
        let began = Instant::now();
        assert!(matches!(ask(&path).unwrap_err(), AskError::TimedOut(_)));
        assert!(began.elapsed() < 2 * ANSWER_LIMIT, "{:?}", began.elapsed());
        drop(done);
        let (_dir, path) = scratch();
        serve(&path, |mut stream| while stream.write_all(&[b'x'; 4096]).is_ok() {});
        assert!(ask(&path).unwrap_err().to_string().contains("no end"));
        // A byte now and then.
        let (_dir, path) = scratch();
        serve(&path, |mut stream| {
            while stream.write_all(b"x").is_ok() {
                thread::sleep(Duration::from_millis(50));
            }
        });
        let began = Instant::now();
        assert!(matches!(ask(&path).unwrap_err(), AskError::TimedOut(_)));
        assert!(began.elapsed() < 2 * ANSWER_LIMIT, "{:?}", began.elapsed());
        // A backlog that nobody accepts from.
        let (_dir, path) = scratch();
        let address = SocketAddrUnix::new(&path).unwrap();
        let socket = rustix::net::socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
        rustix::net::bind(&socket, &address).unwrap();
        rustix::net::listen(&socket, 0).unwrap();
        let _first = UnixStream::connect(&path).unwrap();
        assert!(matches!(ask(&path).unwrap_err(), AskError::TimedOut(_)));
    }
}

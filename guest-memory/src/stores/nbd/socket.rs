//! The connection to a server: TCP or a Unix socket.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream, ToSocketAddrs};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, sockopt};

use super::handshake::{Geometry, Handshake, HandshakeError, Progress};
use crate::stores::{NbdSpec, ServerAddress};

/// After this time without a word TCP asks whether the server is still there, and then this often.
const KEEPALIVE: Duration = Duration::from_secs(5);
/// After this many questions without an answer it is not.
const KEEPALIVE_PROBES: u32 = 3;

/// A connected socket. Reading and writing may go on at the same time.
#[derive(Debug)]
pub(super) enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

/// Why a server cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// No connection.
    #[error("{0}")]
    Socket(#[from] io::Error),
    /// A connection, but no export.
    #[error("{0}")]
    Handshake(#[from] HandshakeError),
}

/// Connects and asks for the export, all of it within `timeout`, but for the look-up of the name.
pub(super) fn connect(
    spec: &NbdSpec,
    timeout: Duration,
) -> Result<(Socket, Geometry), ConnectError> {
    let deadline = Instant::now() + timeout;
    let socket = match &spec.server {
        ServerAddress::Tcp { host, port } => Socket::Tcp(tcp(host, *port, timeout)?),
        ServerAddress::Unix(path) => Socket::Unix(unix(path)?),
    };
    let mut handshake = Handshake::new(&spec.export);
    loop {
        let mut bytes = vec![0; handshake.wants()];
        socket.read_within(&mut bytes, deadline)?;
        match handshake.feed(&bytes)? {
            Progress::More => {}
            Progress::Send(send) => {
                socket.set_write_timeout(left(deadline)?)?;
                (&socket).write_all(&send)?;
            }
            Progress::Done(geometry) => {
                socket.set_read_timeout(None)?;
                return Ok((socket, geometry));
            }
        }
    }
}

fn left(deadline: Instant) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(timed_out()) } else { Ok(left) }
}

fn timed_out() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, "the server does not answer in time")
}

fn tcp(host: &str, port: u16, timeout: Duration) -> io::Result<TcpStream> {
    let deadline = Instant::now() + timeout;
    let mut error = io::Error::new(io::ErrorKind::NotFound, "the host has no address");
    for address in (host, port).to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, left(deadline)?) {
            Ok(stream) => {
                stream.set_nodelay(true)?;
                sockopt::set_socket_keepalive(&stream, true)?;
                sockopt::set_tcp_keepidle(&stream, KEEPALIVE)?;
                sockopt::set_tcp_keepintvl(&stream, KEEPALIVE)?;
                sockopt::set_tcp_keepcnt(&stream, KEEPALIVE_PROBES)?;
                return Ok(stream);
            }
            Err(other) => error = other,
        }
    }
    Err(error)
}

/// Without waiting for a server that does not accept: std's connect would.
fn unix(path: &Path) -> io::Result<UnixStream> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    let stream = UnixStream::from(socket);
    stream.set_nonblocking(false)?;
    Ok(stream)
}

impl Socket {
    /// Ends all reading and writing, now and later.
    pub(super) fn shut_down(&self) {
        // An error says that the connection is gone already.
        let _ = match self {
            Self::Tcp(stream) => stream.shutdown(Shutdown::Both),
            Self::Unix(stream) => stream.shutdown(Shutdown::Both),
        };
    }

    /// How long a write may take; `timeout` is not zero.
    pub(super) fn set_write_timeout(&self, timeout: Duration) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => stream.set_write_timeout(Some(timeout)),
            Self::Unix(stream) => stream.set_write_timeout(Some(timeout)),
        }
    }

    fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => stream.set_read_timeout(timeout),
            Self::Unix(stream) => stream.set_read_timeout(timeout),
        }
    }

    fn read_within(&self, mut bytes: &mut [u8], deadline: Instant) -> io::Result<()> {
        while !bytes.is_empty() {
            self.set_read_timeout(Some(left(deadline)?))?;
            match (&mut &*self).read(bytes) {
                Ok(0) => {
                    let reason = "the server closed the connection before it answered";
                    return Err(io::Error::new(io::ErrorKind::UnexpectedEof, reason));
                }
                Ok(n) => bytes = &mut bytes[n..],
                Err(error) => match error.kind() {
                    io::ErrorKind::Interrupted => {}
                    io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => return Err(timed_out()),
                    _ => return Err(error),
                },
            }
        }
        Ok(())
    }
}

impl Read for &Socket {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Socket::Tcp(stream) => (&*stream).read(buffer),
            Socket::Unix(stream) => (&*stream).read(buffer),
        }
    }
}

impl Write for &Socket {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        match self {
            Socket::Tcp(stream) => (&*stream).write(buffer),
            Socket::Unix(stream) => (&*stream).write(buffer),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

//! The socket as a file: made with mode 0600, never on top of anything, and removed at the end.

use std::fs::{self, File, Metadata};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use rustix::fs::{FlockOperation, Mode, fchmod, flock};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 16;
/// How often, and how far apart, a directory's lock is asked for.
const LOCK_TRIES: usize = 20;
const LOCK_PAUSE: Duration = Duration::from_millis(10);

/// Why there is no control socket.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BindError {
    /// Somebody answers there.
    #[error("'{0}' is the socket of a running process: name another path")]
    InUse(PathBuf),
    /// Something else is there.
    #[error("'{path}' exists and is {kind}: name a path where there is nothing")]
    Exists {
        /// The path.
        path: PathBuf,
        /// What is there.
        kind: &'static str,
    },
    /// It does not fit in a socket's address.
    #[error(
        "'{0}' is too long for a socket, 107 bytes at most: name a shorter path, or a relative one"
    )]
    TooLong(PathBuf),
    /// Anything else.
    #[error("cannot make the socket '{path}': {source}")]
    Io {
        /// The path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// A listening socket at a path that nobody else can connect to.
#[derive(Debug)]
pub(crate) struct ControlSocket {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode of the path, by which it is known again at the end.
    id: (u64, u64),
}

impl ControlSocket {
    /// Makes it. A dead socket of the same user's, left by a run that was killed, is replaced; anything
    /// else that exists is left alone.
    ///
    /// # Errors
    /// When there is something at the path, or a socket cannot be there.
    pub(crate) fn bind(path: &Path) -> Result<Self, BindError> {
        let failed = |source: io::Error| BindError::Io { path: path.to_owned(), source };
        let address = SocketAddrUnix::new(path).map_err(|errno| match errno {
            rustix::io::Errno::NAMETOOLONG => BindError::TooLong(path.to_owned()),
            errno => failed(errno.into()),
        })?;
        let lock = lock_directory(path);
        clear_way(path, &address)?;
        let listener = listen(&address).map_err(|error| match error.kind() {
            io::ErrorKind::AddrInUse => BindError::InUse(path.to_owned()),
            _ => failed(error),
        })?;
        drop(lock);
        let id = fs::symlink_metadata(path).map_err(failed).map(|found| id(&found))?;
        Ok(Self { listener, path: path.to_owned(), id })
    }

    /// Where clients come in; accepting never waits.
    pub(super) fn listener(&self) -> &UnixListener {
        &self.listener
    }
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        // Somebody may have put something else there.
        if fs::symlink_metadata(&self.path).is_ok_and(|found| id(&found) == self.id) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn id(metadata: &Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
}

/// Two runs with one path must not both find it free or dead, or take a socket that does not listen yet
/// for a dead one. Where a directory cannot be locked, that is left to chance.
fn lock_directory(path: &Path) -> Option<File> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    let directory = File::open(parent.unwrap_or(Path::new("."))).ok()?;
    for _ in 0..LOCK_TRIES {
        if flock(&directory, FlockOperation::NonBlockingLockExclusive).is_ok() {
            return Some(directory);
        }
        thread::sleep(LOCK_PAUSE);
    }
    None
}

/// Removes a dead socket of our own user's; refuses anything else.
fn clear_way(path: &Path, address: &SocketAddrUnix) -> Result<(), BindError> {
    let failed = |source| BindError::Io { path: path.to_owned(), source };
    let found = match fs::symlink_metadata(path) {
        Ok(found) => found,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
    };
    let kind = found.file_type();
    let exists = |kind| BindError::Exists { path: path.to_owned(), kind };
    if !kind.is_socket() {
        let link = kind.is_symlink().then_some("a symbolic link");
        return Err(exists(link.unwrap_or_else(|| crate::operand::kind_name(kind))));
    }
    if found.uid() != rustix::process::geteuid().as_raw() {
        return Err(exists("a socket of another user"));
    }
    // Does not wait: a full backlog is answered at once.
    match knock(address) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(failed)
        }
        Ok(()) | Err(_) => Err(BindError::InUse(path.to_owned())),
    }
}

fn socket() -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?)
}

fn knock(address: &SocketAddrUnix) -> io::Result<()> {
    Ok(rustix::net::connect(socket()?, address)?)
}

fn listen(address: &SocketAddrUnix) -> io::Result<UnixListener> {
    let socket = socket()?;
    // The file gets the mode that the socket has when it is bound (unix_bind_bsd in Linux), less the
    // umask: there is no moment at which it is more open.
    fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    rustix::net::bind(&socket, address)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixStream;

    fn scratch() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control");
        (dir, path)
    }

    fn mode(path: &Path) -> u32 {
        fs::symlink_metadata(path).unwrap().permissions().mode() & 0o7777
    }

    #[test]
    fn only_its_owner_can_connect_and_it_is_gone_at_the_end() {
        let (dir, path) = scratch();
        let socket = ControlSocket::bind(&path).unwrap();
        assert_eq!(mode(&path), 0o600);
        // An ordinary one is as open as the umask allows: the mode above is no accident.
        let other = dir.path().join("other");
        let _listener = UnixListener::bind(&other).unwrap();
        assert_ne!(mode(&other), 0o600);
        UnixStream::connect(&path).unwrap();
        drop(socket);
        assert!(!path.exists());
    }

    #[test]
    fn a_dead_socket_is_replaced_and_a_living_one_is_not() {
        let (_dir, path) = scratch();
        drop(UnixListener::bind(&path).unwrap());
        let socket = ControlSocket::bind(&path).unwrap();
        let error = ControlSocket::bind(&path).unwrap_err();
        assert!(matches!(error, BindError::InUse(_)), "{error}");
        // A backlog that is full is not death either.
        let clients: Vec<_> = (0..=BACKLOG)
            .filter_map(|_| knock(&SocketAddrUnix::new(&path).unwrap()).ok())
            .collect();
        assert!(!clients.is_empty());
        assert!(matches!(ControlSocket::bind(&path).unwrap_err(), BindError::InUse(_)));
        assert!(path.exists());
        drop(socket);
    }

    #[test]
    fn what_exists_is_refused_by_its_kind_and_left_alone() {
        let (dir, path) = scratch();
        fs::write(&path, "precious").unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(dir.path().join("nowhere"), &link).unwrap();
        for (path, kind) in
            [(path.as_path(), "a regular file"), (dir.path(), "a directory"), (&link, "a symbolic")]
        {
            let error = ControlSocket::bind(path).unwrap_err().to_string();
            assert!(error.contains(kind) && error.contains("name a path"), "{error}");
        }
        assert_eq!(fs::read(&path).unwrap(), b"precious");
        assert!(link.is_symlink());
    }

    #[test]
    fn what_cannot_be_bound_is_named() {
        let (dir, path) = scratch();
        let long = dir.path().join("x".repeat(120));
        let error = ControlSocket::bind(&long).unwrap_err().to_string();
        assert!(error.contains("shorter"), "{error}");
        for path in [path.join("x"), dir.path().join("no/x"), PathBuf::new()] {
            let error = ControlSocket::bind(&path).unwrap_err().to_string();
            assert!(error.starts_with("cannot make the socket"), "{error}");
        }
    }

    #[test]
    fn what_somebody_else_put_there_stays() {
        let (_dir, path) = scratch();
        let socket = ControlSocket::bind(&path).unwrap();
        fs::remove_file(&path).unwrap();
        fs::write(&path, "another").unwrap();
        drop(socket);
        assert!(path.exists());
    }
}

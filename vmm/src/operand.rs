//! Files named on the command line that are read. Whatever a path stands for, opening it never waits,
//! and what cannot be an input is refused by what it is.

use std::fs::{File, FileType, Metadata, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

/// Why a file cannot be read; the caller names option and file.
#[derive(Debug, thiserror::Error)]
pub enum OperandError {
    /// It cannot be opened or read.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// It is something else than a file.
    #[error("it is {0}, not a regular file")]
    Kind(&'static str),
    /// A pipe with no other end.
    #[error("nobody writes to this pipe: start its writer first")]
    NoWriter,
    /// Too long.
    #[error("it is longer than the {0} bytes that are read")]
    TooLong(u64),
}

/// Tells files apart whatever they are called: device and inode of a regular file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileId {
    device: u64,
    inode: u64,
}

impl FileId {
    /// The regular file that this describes, if it is one.
    #[must_use]
    pub fn new(metadata: &Metadata) -> Option<Self> {
        metadata.is_file().then(|| Self { device: metadata.dev(), inode: metadata.ino() })
    }

    /// The regular file at a path, through links, if there is one.
    #[must_use]
    pub fn at(path: &Path) -> Option<Self> {
        std::fs::metadata(path).ok().as_ref().and_then(Self::new)
    }
}

/// Opens a regular file for reading: also its length in bytes.
///
/// # Errors
/// When it cannot be opened or is no regular file.
pub fn open_regular(path: &Path) -> Result<(File, u64), OperandError> {
    let file = open(path, |kind| kind.is_file())?;
    let bytes = file.metadata()?.len();
    Ok((file, bytes))
}

/// Reads a short text from a regular file, or from a pipe to its end.
///
/// # Errors
/// When it cannot be read, is neither, or is longer than `limit_bytes`.
pub fn read_text(path: &Path, limit_bytes: u64) -> Result<String, OperandError> {
    let mut file = open(path, |kind| kind.is_file() || kind.is_fifo())?;
    let mut bytes = Vec::new();
    if file.metadata()?.file_type().is_fifo() {
        let mut first = [0; 4096];
        match file.read(&mut first) {
            Ok(0) => return Err(OperandError::NoWriter),
            Ok(count) => bytes.extend_from_slice(&first[..count]),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error.into()),
        }
        let flags = fcntl_getfl(&file).map_err(io::Error::from)?;
        fcntl_setfl(&file, flags - OFlags::NONBLOCK).map_err(io::Error::from)?;
    }
    file.take(limit_bytes + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit_bytes {
        return Err(OperandError::TooLong(limit_bytes));
    }
    String::from_utf8(bytes)
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.utf8_error()).into())
}

/// Looked at before it is opened, for that may wait (a FIFO) or do things (a device); and again
/// afterwards, for it may have become another meanwhile.
fn open(path: &Path, accepts: impl Fn(FileType) -> bool) -> Result<File, OperandError> {
    let check = |metadata: &Metadata| {
        let kind = metadata.file_type();
        if accepts(kind) { Ok(()) } else { Err(OperandError::Kind(kind_name(kind))) }
    };
    check(&std::fs::metadata(path)?)?;
    let file =
        OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path)?;
    check(&file.metadata()?)?;
    Ok(file)
}

/// What a file is, for a message.
pub(crate) fn kind_name(kind: FileType) -> &'static str {
    if kind.is_file() {
        "a regular file"
    } else if kind.is_dir() {
        "a directory"
    } else if kind.is_fifo() {
        "a pipe"
    } else if kind.is_socket() {
        "a socket"
    } else if kind.is_char_device() {
        "a character device"
    } else if kind.is_block_device() {
        "a block device"
    } else {
        "something else"
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::net::UnixListener;
    use std::path::PathBuf;

    fn fifo(dir: &tempfile::TempDir) -> PathBuf {
        let path = dir.path().join("fifo");
        assert!(std::process::Command::new("mkfifo").arg(&path).status().unwrap().success());
        path
    }

    #[test]
    fn what_is_no_file_is_refused_by_its_kind() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("socket");
        let _listener = UnixListener::bind(&socket).unwrap();
        for (path, kind) in [
            (dir.path(), "a directory"),
            (&fifo(&dir), "a pipe"),
            (&socket, "a socket"),
            (Path::new("/dev/zero"), "a character device"),
        ] {
            let error = open_regular(path).unwrap_err();
            assert_eq!(error.to_string(), format!("it is {kind}, not a regular file"));
        }
        assert!(matches!(open_regular(Path::new("/nonexistent")), Err(OperandError::Io(_))));
    }

    #[test]
    fn a_text_comes_from_a_file_or_a_pipe_and_is_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("text");
        std::fs::write(&path, "text").unwrap();
        assert_eq!(read_text(&path, 4).unwrap(), "text");
        assert!(matches!(read_text(&path, 3), Err(OperandError::TooLong(3))));
        assert!(matches!(read_text(Path::new("/dev/zero"), 9), Err(OperandError::Kind(_))));
        std::fs::write(&path, [0xff]).unwrap();
        assert!(read_text(&path, 9).unwrap_err().to_string().contains("utf-8"));
        let fifo = fifo(&dir);
        assert!(matches!(read_text(&fifo, 9), Err(OperandError::NoWriter)));
        // Its writer is there but takes its time.
        let both = OpenOptions::new().read(true).write(true).open(&fifo).unwrap();
        let writer = std::thread::spawn(move || {
            let mut both = both;
            std::thread::sleep(std::time::Duration::from_millis(50));
            both.write_all(b"late").unwrap();
        });
        assert_eq!(read_text(&fifo, 9).unwrap(), "late");
        writer.join().unwrap();
    }

    #[test]
    fn links_do_not_hide_that_two_names_are_one_file() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::write(at("a"), "").unwrap();
        std::fs::write(at("b"), "").unwrap();
        std::fs::hard_link(at("a"), at("hard")).unwrap();
        std::os::unix::fs::symlink(at("a"), at("soft")).unwrap();
        let id = FileId::at(&at("a"));
        assert!(id.is_some() && id == FileId::at(&at("hard")) && id == FileId::at(&at("soft")));
        assert_ne!(id, FileId::at(&at("b")));
        assert_eq!(FileId::at(dir.path()), None);
    }
}

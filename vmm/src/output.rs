//! Files that a run writes its results to: claimed at the start, so that two runs never write the
//! same one, and left alone until there is something to write.
//!
//! ```text
//!   open   create if missing, lock or refuse; the content stays as it was
//!   write  replace the content, in one go, at the end       into_stream  replace it as it comes
//!   drop   a file that was created and never written is removed again
//! ```

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{
    FallocateFlags, FlockOperation, OFlags, fallocate, fcntl_getfl, fcntl_setfl, flock,
};
use rustix::io::Errno;

use crate::operand::FileId;

/// The operand that stands for standard output.
pub const STDOUT: &str = "-";
/// How often a file is opened again that someone else removed meanwhile.
const OPEN_ATTEMPTS: usize = 3;

/// Why a result could not be written.
#[derive(Debug, thiserror::Error)]
pub enum OutputError {
    /// The file cannot be opened.
    #[error("cannot open '{path}' for writing: {source}")]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Another process holds the file.
    #[error("'{0}' is being written by another run: wait until it ends, or name another file")]
    InUse(PathBuf),
    /// The run uses the file for something else.
    #[error("'{path}' is also {other}: name another file")]
    Taken {
        /// The file.
        path: PathBuf,
        /// What else it is.
        other: String,
    },
    /// A pipe with no other end.
    #[error("nobody reads the pipe '{0}': start its reader first")]
    NoReader(PathBuf),
    /// Nobody took the content from a pipe.
    #[error("'{0}' was not written: nobody reads what it leads to")]
    NotTaken(PathBuf),
    /// The file system cannot lock.
    #[error("cannot lock '{path}': {source}; name a file on a local file system")]
    Lock {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The content cannot be written.
    #[error("cannot write '{path}': {source}")]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl OutputError {
    /// Is it about standard output?
    #[must_use]
    pub fn is_of_stdout(&self) -> bool {
        matches!(self, Self::Write { path, .. } | Self::NotTaken(path) if path == Path::new(STDOUT))
    }
}

/// A file, or standard output, that this run alone will write.
#[derive(Debug)]
pub struct OutputFile(Target);

#[derive(Debug)]
enum Target {
    Stdout,
    File(Claim),
}

impl OutputFile {
    /// Claims a file; `-` is standard output. Whatever the file holds stays until it is written.
    ///
    /// # Errors
    /// When it cannot be opened or locked, or another run has it.
    pub fn open(path: &Path) -> Result<Self, OutputError> {
        Self::open_beside(path, &[])
    }

    /// Claims a file that must be none of these, each with what it is.
    ///
    /// # Errors
    /// When it is one of them, cannot be opened or locked, or another run has it.
    pub fn open_beside(path: &Path, taken: &[(&'static str, FileId)]) -> Result<Self, OutputError> {
        if path == Path::new(STDOUT) {
            return Ok(Self(Target::Stdout));
        }
        let id = FileId::at(path);
        if let Some((other, _)) = taken.iter().find(|(_, other)| Some(*other) == id) {
            return Err(OutputError::Taken { path: path.to_owned(), other: (*other).to_owned() });
        }
        Claim::new(path).map(Target::File).map(Self)
    }

    /// The regular file that this is, if it is one.
    #[must_use]
    pub fn id(&self) -> Option<FileId> {
        match &self.0 {
            Target::Stdout => FileId::at(Path::new("/proc/self/fd/1")),
            Target::File(claim) => claim.file.metadata().ok().as_ref().and_then(FileId::new),
        }
    }

    /// Whether this is standard output.
    #[must_use]
    pub fn is_stdout(&self) -> bool {
        matches!(self.0, Target::Stdout)
    }

    /// Replaces the content and gives the file up.
    ///
    /// # Errors
    /// When it cannot be written; a file that `open` created is then removed.
    pub fn write(self, content: &[u8]) -> Result<(), OutputError> {
        let path = self.path().to_owned();
        let written = match self.0 {
            Target::Stdout => {
                let mut stdout = io::stdout().lock();
                stdout.write_all(content).and_then(|()| stdout.flush())
            }
            Target::File(mut claim) => {
                claim.replace(content).map(|()| claim.remove_on_drop = false)
            }
        };
        written.map_err(|source| OutputError::Write { path, source })
    }

    /// Empties the file for content that is written as it comes; it stays locked until the writer is
    /// dropped.
    ///
    /// # Errors
    /// When the file cannot be emptied.
    pub fn into_stream(self) -> Result<Box<dyn Write + Send>, OutputError> {
        match self.0 {
            Target::Stdout => Ok(Box::new(io::stdout())),
            Target::File(claim) => match claim.clear() {
                Ok(()) => Ok(Box::new(claim)),
                Err(source) => Err(OutputError::Write { path: claim.path.clone(), source }),
            },
        }
    }

    /// The operand that names it.
    #[must_use]
    pub fn path(&self) -> &Path {
        match &self.0 {
            Target::Stdout => Path::new(STDOUT),
            Target::File(claim) => &claim.path,
        }
    }
}

/// An open file with the lock on it; closing it releases the lock.
#[derive(Debug)]
struct Claim {
    path: PathBuf,
    file: File,
    /// We made it, and nothing has been written to it.
    remove_on_drop: bool,
}

impl Claim {
    /// Another content. On a file system that can say so there is room for it before the old one goes.
    fn replace(&mut self, content: &[u8]) -> io::Result<()> {
        let length = content.len() as u64;
        if self.file.metadata()?.is_file() {
            match fallocate(&self.file, FallocateFlags::KEEP_SIZE, 0, length) {
                Ok(()) => {
                    self.file.write_all_at(content, 0)?;
                    return self.file.set_len(length);
                }
                // It cannot, or there is nothing to write.
                Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.clear()?;
        self.file.write_all(content)
    }

    fn new(path: &Path) -> Result<Self, OutputError> {
        let failed = |source| OutputError::Open { path: path.to_owned(), source };
        for _ in 0..OPEN_ATTEMPTS {
            let (file, created) = open(path).map_err(|source| match source.raw_os_error() {
                Some(libc::ENXIO) if is_fifo(path) => OutputError::NoReader(path.to_owned()),
                _ => failed(source),
            })?;
            // Devices and pipes can be shared, and are.
            if !file.metadata().map_err(failed)?.is_file() {
                return Ok(Self { path: path.to_owned(), file, remove_on_drop: false });
            }
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(Errno::WOULDBLOCK) => return Err(OutputError::InUse(path.to_owned())),
                Err(errno) => {
                    let source = errno.into();
                    return Err(OutputError::Lock { path: path.to_owned(), source });
                }
            }
            // Between the two the run that had it may have failed and removed it: then the lock is
            // on a file that nobody can find.
            if is_at(&file, path).map_err(failed)? {
                return Ok(Self { path: path.to_owned(), file, remove_on_drop: created });
            }
        }
        Err(failed(io::Error::other("someone keeps removing it")))
    }

    /// Empties the file, unless it is a device or a pipe.
    fn clear(&self) -> io::Result<()> {
        if self.file.metadata()?.is_file() { self.file.set_len(0) } else { Ok(()) }
    }
}

impl Write for Claim {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.file.write(bytes)?;
        self.remove_on_drop &= count == 0;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if self.remove_on_drop {
            // Before the lock goes, so that nobody loses a file of theirs.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Opens a file for writing, without waiting: also whether it was not there before.
fn open(path: &Path) -> io::Result<(File, bool)> {
    match OpenOptions::new().write(true).create_new(true).open(path) {
        Ok(file) => Ok((file, true)),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            let file = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(false)
                .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
                .open(path)?;
            // What is written to it may wait.
            fcntl_setfl(&file, fcntl_getfl(&file)? - OFlags::NONBLOCK)?;
            Ok((file, false))
        }
        Err(error) => Err(error),
    }
}

fn is_fifo(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|found| found.file_type().is_fifo())
}

fn is_at(file: &File, path: &Path) -> io::Result<bool> {
    let open = file.metadata()?;
    match fs::metadata(path) {
        Ok(found) => Ok((found.dev(), found.ino()) == (open.dev(), open.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scratch() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out.json");
        (dir, path)
    }

    #[test]
    fn the_second_writer_is_refused_and_harms_nothing() {
        let (_dir, path) = scratch();
        let first = OutputFile::open(&path).unwrap();
        let error = OutputFile::open(&path).unwrap_err();
        assert!(matches!(error, OutputError::InUse(_)));
        assert!(error.to_string().contains("out.json"));
        first.write(b"first").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"first");
        OutputFile::open(&path).unwrap().write(b"2nd").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"2nd");
    }

    #[test]
    fn a_run_that_fails_leaves_no_new_file_and_keeps_an_old_one() {
        let (_dir, path) = scratch();
        drop(OutputFile::open(&path).unwrap());
        assert!(!path.exists());
        fs::write(&path, "old").unwrap();
        drop(OutputFile::open(&path).unwrap());
        assert_eq!(fs::read(&path).unwrap(), b"old");
    }

    #[test]
    fn another_content_is_all_there_is_whatever_its_length() {
        let (_dir, path) = scratch();
        for content in [&b"first"[..], b"a longer one", b"", b"x"] {
            OutputFile::open(&path).unwrap().write(content).unwrap();
            assert_eq!(fs::read(&path).unwrap(), content);
        }
    }

    #[test]
    fn a_stream_replaces_the_content_and_is_locked_while_it_lives() {
        let (_dir, path) = scratch();
        fs::write(&path, "something old").unwrap();
        let mut stream = OutputFile::open(&path).unwrap().into_stream().unwrap();
        stream.write_all(b"one\n").unwrap();
        assert!(matches!(OutputFile::open(&path), Err(OutputError::InUse(_))));
        stream.write_all(b"two\n").unwrap();
        drop(stream);
        assert_eq!(fs::read(&path).unwrap(), b"one\ntwo\n");
    }

    #[test]
    fn a_stream_that_carried_nothing_leaves_no_new_file() {
        let (_dir, path) = scratch();
        drop(OutputFile::open(&path).unwrap().into_stream().unwrap());
        assert!(!path.exists());
    }

    #[test]
    fn a_file_that_the_run_uses_otherwise_is_refused_by_any_name_and_unharmed() {
        let (dir, path) = scratch();
        fs::write(&path, "a kernel").unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        let taken = [("--kernel", FileId::at(&path).unwrap())];
        for name in [&path, &link] {
            let error = OutputFile::open_beside(name, &taken).unwrap_err();
            assert!(error.to_string().contains("is also --kernel"), "{error}");
        }
        assert_eq!(fs::read(&path).unwrap(), b"a kernel");
        let json = OutputFile::open(&dir.path().join("new")).unwrap();
        let taken = [("--json", json.id().unwrap())];
        assert!(OutputFile::open_beside(&dir.path().join("new"), &taken).is_err());
    }

    #[test]
    fn a_pipe_needs_a_reader_and_is_not_waited_for() {
        let (_dir, path) = scratch();
        assert!(std::process::Command::new("mkfifo").arg(&path).status().unwrap().success());
        let error = OutputFile::open(&path).unwrap_err();
        assert!(matches!(error, OutputError::NoReader(_)), "{error}");
        let mut reader =
            OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&path).unwrap();
        OutputFile::open(&path).unwrap().write(b"through").unwrap();
        let mut text = String::new();
        io::Read::read_to_string(&mut reader, &mut text).unwrap();
        assert_eq!(text, "through");
    }

    #[test]
    fn a_full_device_is_an_error_and_two_runs_may_share_a_device() {
        let full = Path::new("/dev/full");
        let first = OutputFile::open(full).unwrap();
        let error = OutputFile::open(full).unwrap().write(b"x").unwrap_err();
        assert!(error.to_string().contains("No space"), "{error}");
        assert!(first.write(b"x").is_err());
    }

    #[test]
    fn what_cannot_be_opened_is_named() {
        let (dir, path) = scratch();
        for bad in [dir.path().to_owned(), path.join("x"), dir.path().join("no/x")] {
            let error = OutputFile::open(&bad).unwrap_err();
            assert!(error.to_string().contains(bad.to_str().unwrap()), "{error}");
        }
    }

    #[test]
    fn devices_and_standard_output_can_be_named() {
        OutputFile::open(Path::new("/dev/null")).unwrap().write(b"x").unwrap();
        assert!(OutputFile::open(Path::new("-")).unwrap().is_stdout());
        assert!(!Path::new("-").exists());
    }
}

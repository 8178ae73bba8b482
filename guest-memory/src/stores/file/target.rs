//! What a file store may write to, and what it must not: nothing that belongs to somebody else, and
//! nothing that is not there for keeping bytes.

use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, OFlags};

use crate::address::{PAGE_BYTES, PAGE_SIZE};
use crate::stores::FileSpec;
use crate::sys::ring::AlignedPage;

/// Why a file cannot be a store.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The system refused.
    #[error("cannot {action} the store {}: {source}; check the path and its permissions", path.display())]
    System {
        /// What was tried.
        action: &'static str,
        /// With what.
        path: PathBuf,
        /// The answer.
        source: io::Error,
    },
    /// No kind of file for this.
    #[error(
        "the store {} is {kind}: name a directory, a new or empty file, or a block device",
        path.display()
    )]
    Kind {
        /// The path.
        path: PathBuf,
        /// What it is.
        kind: &'static str,
    },
    /// It has data.
    #[error(
        "the store {} has data in it, {bytes} bytes, which would be overwritten: name a directory, \
         or a new or empty file",
        path.display()
    )]
    NotEmpty {
        /// The path.
        path: PathBuf,
        /// Its length.
        bytes: u64,
    },
    /// A block device that begins with data.
    #[error(
        "the store {} has data in its first MiB, which may be a file system: if it may be \
         overwritten, clear that with wipefs -a and blkdiscard -z -l 1M",
        path.display()
    )]
    DeviceData {
        /// The path.
        path: PathBuf,
    },
    /// Others can read it.
    #[error(
        "the store {} would show the guest's memory to others (owner {owner}, mode {mode:o}): it \
         must be yours, with mode 600",
        path.display()
    )]
    Exposed {
        /// The path.
        path: PathBuf,
        /// Its owner's number.
        owner: u32,
        /// Its mode.
        mode: u32,
    },
    /// Another run has it.
    #[error("the store {} is in use by another run or program: name another one", path.display())]
    InUse {
        /// The path.
        path: PathBuf,
    },
    /// Less room than asked for.
    #[error(
        "the store {} has room for {bytes} bytes, {wanted} are wanted: use a smaller size= or a \
         larger device",
        path.display()
    )]
    TooSmall {
        /// The path.
        path: PathBuf,
        /// What it has.
        bytes: u64,
        /// What was asked for.
        wanted: u64,
    },
}

/// The part of a block device that is left alone, in bytes: it shows that the device is free to use,
/// and whoever looks for a file system there finds none.
pub(super) const DEVICE_RESERVE_BYTES: u64 = 1 << 20;

/// A file that is ready to be a store.
#[derive(Debug)]
pub(super) struct Target {
    pub(super) file: File,
    /// Where the first slot is, in bytes.
    pub(super) start: u64,
    /// The room for slots, in bytes, if it is bounded.
    pub(super) size_bytes: Option<u64>,
    /// What was created and is to be removed again.
    pub(super) created: Option<PathBuf>,
    /// Whether the page cache is left out.
    pub(super) direct: bool,
}

impl Target {
    /// Opens or creates it, and locks it against other runs.
    pub(super) fn open(spec: &FileSpec) -> Result<Self, FileError> {
        let path = &spec.path;
        let mut target = match fs::metadata(path) {
            Ok(metadata) if metadata.is_dir() => Self::new(unnamed(path)?),
            Ok(metadata) if metadata.is_file() => Self::new(existing(path, &metadata)?),
            Ok(metadata) if metadata.file_type().is_block_device() => device(path)?,
            Ok(metadata) => {
                return Err(FileError::Kind { path: path.clone(), kind: kind(&metadata) });
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => created(path)?,
            Err(source) => return Err(system("find", path)(source)),
        };
        if let Some(wanted) = spec.size_bytes {
            match target.size_bytes {
                Some(bytes) if bytes < wanted => {
                    return Err(FileError::TooSmall { path: path.clone(), bytes, wanted });
                }
                _ => target.size_bytes = Some(wanted),
            }
        }
        target.direct = try_direct(&target).map_err(system("set up", path))?;
        Ok(target)
    }

    fn new(file: File) -> Self {
        Self { file, start: 0, size_bytes: None, created: None, direct: false }
    }

    /// Leaves nothing of the guest's memory behind in a file that has a name.
    fn leave_nothing(&self) {
        if self.start == 0 {
            let _ = self.file.set_len(0);
        }
        let Some(path) = &self.created else {
            return;
        };
        let same = |a: &Metadata, b: &Metadata| (a.dev(), a.ino()) == (b.dev(), b.ino());
        if let (Ok(ours), Ok(there)) = (self.file.metadata(), fs::symlink_metadata(path))
            && same(&ours, &there)
        {
            let _ = fs::remove_file(path);
        }
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        self.leave_nothing();
        // Closing the file is not enough while a child process that was just forked has it, too.
        let _ = rustix::fs::flock(&self.file, FlockOperation::Unlock);
    }
}

fn system<'a>(
    action: &'static str,
    path: &'a Path,
) -> impl FnOnce(io::Error) -> FileError + use<'a> {
    move |source| FileError::System { action, path: path.to_owned(), source }
}

fn options() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(0o600);
    options
}

/// A file in a directory that nobody can open.
fn unnamed(dir: &Path) -> Result<File, FileError> {
    check_file_system(dir)?;
    let flags = (OFlags::TMPFILE | OFlags::EXCL).bits() as i32;
    match options().custom_flags(flags).open(dir) {
        // File systems and kernels without it.
        Err(error) if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EISDIR)) => {
            let name = format!(".nowait-store-{:016x}", fastrand::u64(..));
            let path = dir.join(name);
            let file = options().create_new(true).open(&path).map_err(system("create", &path))?;
            fs::remove_file(&path).map_err(system("remove", &path))?;
            Ok(file)
        }
        other => other.map_err(system("create a file in", dir)),
    }
}

fn created(path: &Path) -> Result<Target, FileError> {
    let file = options().create_new(true).open(path).map_err(system("create", path))?;
    lock(path, &file)?;
    // From here on, an error removes the file.
    let mut target = Target::new(file);
    target.created = Some(path.to_owned());
    Ok(target)
}

fn existing(path: &Path, found: &Metadata) -> Result<File, FileError> {
    // A file that only seems to be one may do something when it is opened or written.
    check_empty(path, found)?;
    check_file_system(path)?;
    let flags = (OFlags::NONBLOCK | OFlags::NOCTTY).bits() as i32;
    let file = options().custom_flags(flags).open(path).map_err(system("open", path))?;
    lock(path, &file)?;
    let metadata = file.metadata().map_err(system("look at", path))?;
    if !metadata.is_file() {
        return Err(FileError::Kind { path: path.to_owned(), kind: kind(&metadata) });
    }
    check_empty(path, &metadata)?;
    let (owner, mode) = (metadata.uid(), metadata.mode() & 0o7777);
    if owner != rustix::process::geteuid().as_raw() || mode & 0o077 != 0 {
        return Err(FileError::Exposed { path: path.to_owned(), owner, mode });
    }
    Ok(file)
}

fn check_empty(path: &Path, metadata: &Metadata) -> Result<(), FileError> {
    match metadata.len() {
        0 => Ok(()),
        bytes => Err(FileError::NotEmpty { path: path.to_owned(), bytes }),
    }
}

/// A block device that nobody else has and that begins with zeros.
fn device(path: &Path) -> Result<Target, FileError> {
    let flags = (OFlags::EXCL | OFlags::NONBLOCK).bits() as i32;
    let mut file = match options().custom_flags(flags).open(path) {
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
            return Err(FileError::InUse { path: path.to_owned() });
        }
        other => other.map_err(system("open", path))?,
    };
    lock(path, &file)?;
    let bytes = file.seek(SeekFrom::End(0)).map_err(system("measure", path))?;
    let room = bytes.saturating_sub(DEVICE_RESERVE_BYTES);
    if room < PAGE_BYTES {
        let wanted = DEVICE_RESERVE_BYTES + PAGE_BYTES;
        return Err(FileError::TooSmall { path: path.to_owned(), bytes, wanted });
    }
    let mut first = vec![0; DEVICE_RESERVE_BYTES as usize];
    file.read_exact_at(&mut first, 0).map_err(system("read", path))?;
    if first.iter().any(|byte| *byte != 0) {
        return Err(FileError::DeviceData { path: path.to_owned() });
    }
    Ok(Target {
        file,
        start: DEVICE_RESERVE_BYTES,
        size_bytes: Some(room),
        created: None,
        direct: false,
    })
}

fn lock(path: &Path, file: &File) -> Result<(), FileError> {
    match rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive) {
        Err(rustix::io::Errno::WOULDBLOCK) => Err(FileError::InUse { path: path.to_owned() }),
        other => other.map_err(io::Error::from).map_err(system("lock", path)),
    }
}

/// Refuses what the kernel makes up.
fn check_file_system(path: &Path) -> Result<(), FileError> {
    // From linux/magic.h; not in the libc crate.
    const BINFMTFS_MAGIC: libc::__fsword_t = 0x4249_4e4d;
    const EFIVARFS_MAGIC: libc::__fsword_t = 0xde5e_81e4;
    const MADE_UP: [libc::__fsword_t; 11] = [
        libc::PROC_SUPER_MAGIC,
        libc::SYSFS_MAGIC,
        libc::DEBUGFS_MAGIC,
        libc::TRACEFS_MAGIC,
        libc::CGROUP_SUPER_MAGIC,
        libc::CGROUP2_SUPER_MAGIC,
        libc::SECURITYFS_MAGIC,
        libc::SELINUX_MAGIC,
        libc::BPF_FS_MAGIC,
        BINFMTFS_MAGIC,
        EFIVARFS_MAGIC,
    ];
    let there = rustix::fs::statfs(path).map_err(io::Error::from);
    match MADE_UP.contains(&there.map_err(system("look at", path))?.f_type) {
        true => {
            Err(FileError::Kind { path: path.to_owned(), kind: "one of the kernel's own files" })
        }
        false => Ok(()),
    }
}

fn kind(metadata: &Metadata) -> &'static str {
    let kind = metadata.file_type();
    match () {
        () if kind.is_fifo() => "a FIFO",
        () if kind.is_socket() => "a socket",
        () if kind.is_char_device() => "a character device",
        () => "no file",
    }
}

/// Leaves the page cache out if the file can do that with pages, and says whether it does.
fn try_direct(target: &Target) -> io::Result<bool> {
    let file = &target.file;
    // Blocking from here on, too: io_uring would answer EAGAIN instead of waiting.
    if rustix::fs::fcntl_setfl(file, OFlags::DIRECT).is_err() {
        rustix::fs::fcntl_setfl(file, OFlags::empty())?;
        return Ok(false);
    }
    let mut page = Box::new(AlignedPage([0; PAGE_SIZE]));
    let works = match target.start {
        0 => file.write_all_at(&page.0, 0).is_ok() && file.set_len(0).is_ok(),
        start => file.read_exact_at(&mut page.0, start).is_ok(),
    };
    if !works {
        rustix::fs::fcntl_setfl(file, OFlags::empty())?;
    }
    Ok(works)
}

//! A newc cpio archive, the format of an initramfs, written entry by entry.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use cpio::newc::{Builder, ModeFileType, trailer};

use crate::paths;

/// An archive being written to a file. Several archives one after the other are one initramfs, so
/// the trailer is written by [`Archive::finish`], padded to what the kernel expects.
pub(crate) struct Archive {
    out: BufWriter<File>,
    file: PathBuf,
    next_ino: u32,
}

impl Archive {
    /// Begins an archive in a new file.
    pub(crate) fn create(file: &Path) -> Result<Archive> {
        let out = File::create(file).with_context(|| format!("cannot write {}", file.display()))?;
        Ok(Archive { out: BufWriter::new(out), file: file.to_path_buf(), next_ino: 1 })
    }

    /// Begins an archive that follows the bytes of another file's.
    pub(crate) fn after(base: &Path, file: &Path) -> Result<Archive> {
        let mut archive = Archive::create(file)?;
        let mut from =
            File::open(base).with_context(|| format!("cannot read {}", base.display()))?;
        io::copy(&mut from, &mut archive.out)
            .with_context(|| format!("cannot write {}", file.display()))?;
        // Inode numbers of the base are only compared between hard links, of which there are none.
        Ok(archive)
    }

    /// A directory; its parents must have come before.
    pub(crate) fn dir(&mut self, name: &str, permissions: u32) -> Result<()> {
        let entry = self.entry(name, permissions).set_mode_file_type(ModeFileType::Directory);
        self.write(entry.nlink(2), &[])
    }

    /// A regular file with these bytes.
    pub(crate) fn bytes(&mut self, name: &str, permissions: u32, bytes: &[u8]) -> Result<()> {
        let entry = self.entry(name, permissions).set_mode_file_type(ModeFileType::Regular);
        self.write(entry, bytes)
    }

    /// A regular file with the bytes and permissions of `from`.
    pub(crate) fn file(&mut self, name: &str, from: &Path) -> Result<()> {
        let bytes = paths::read(from)?;
        let metadata =
            from.metadata().with_context(|| format!("cannot read {}", from.display()))?;
        self.bytes(name, metadata.permissions().mode() & 0o777, &bytes)
    }

    /// A symbolic link.
    pub(crate) fn link(&mut self, name: &str, target: &str) -> Result<()> {
        let entry = self.entry(name, 0o777).set_mode_file_type(ModeFileType::Symlink);
        self.write(entry, target.as_bytes())
    }

    /// A character device.
    pub(crate) fn device(&mut self, name: &str, major: u32, minor: u32) -> Result<()> {
        let entry = self.entry(name, 0o600).set_mode_file_type(ModeFileType::Char);
        self.write(entry.rdev_major(major).rdev_minor(minor), &[])
    }

    /// A file or a directory with all that is in it.
    pub(crate) fn tree(&mut self, name: &str, from: &Path) -> Result<()> {
        if !from.is_dir() {
            return self.file(name, from);
        }
        self.dir(name, 0o755)?;
        let fail = || format!("cannot list {}", from.display());
        let mut entries = std::fs::read_dir(from)
            .and_then(Iterator::collect::<io::Result<Vec<_>>>)
            .with_context(fail)?;
        entries.sort_by_key(std::fs::DirEntry::file_name);
        for entry in entries {
            let inner = format!("{name}/{}", entry.file_name().to_string_lossy());
            self.tree(&inner, &entry.path())?;
        }
        Ok(())
    }

    /// Every directory above `name`.
    pub(crate) fn parents(&mut self, name: &str) -> Result<()> {
        for (end, _) in name.match_indices('/') {
            self.dir(&name[..end], 0o755)?;
        }
        Ok(())
    }

    /// Writes the trailer.
    pub(crate) fn finish(mut self) -> Result<()> {
        let fail = || format!("cannot write {}", self.file.display());
        trailer(&mut self.out).with_context(fail)?;
        self.out.flush().with_context(fail)
    }

    fn entry(&mut self, name: &str, permissions: u32) -> Builder {
        let ino = self.next_ino;
        self.next_ino += 1;
        Builder::new(name).ino(ino).mode(permissions)
    }

    fn write(&mut self, entry: Builder, bytes: &[u8]) -> Result<()> {
        let fail = || format!("cannot write {}", self.file.display());
        let size = u32::try_from(bytes.len())
            .with_context(|| format!("{}: a file of 4 GiB or more", self.file.display()))?;
        let mut writer = entry.write(&mut self.out, size);
        writer.write_all(bytes).with_context(fail)?;
        writer.finish().with_context(fail)?;
        Ok(())
    }
}

//! A file system of a few pages or megabytes, to be full. Needs root.

use std::path::Path;
use std::process::Command;

use tempfile::TempDir;

/// A tmpfs, gone with this value.
#[derive(Debug)]
pub struct SmallDisk {
    dir: TempDir,
}

impl SmallDisk {
    /// Mounts it, with this size as mount(8) has it.
    ///
    /// # Panics
    /// When it cannot be mounted.
    #[must_use]
    pub fn new(size: &str) -> Self {
        let dir = TempDir::new().expect("a temporary directory");
        let option = format!("size={size}");
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &option, "tmpfs"]).arg(dir.path());
        assert!(mount.status().expect("mount starts").success(), "{mount:?}");
        Self { dir }
    }

    /// Where it is mounted.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.dir.path()
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // What cannot be unmounted stays for whoever looks why.
        let _ = Command::new("umount").arg(self.dir.path()).status();
    }
}

//! A memory cgroup for one VMM (cgroup v2).

use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Where cgroups are.
const ROOT: &str = "/sys/fs/cgroup";

/// Why there can be no memory cgroup here, if so.
#[must_use]
pub fn missing() -> Option<&'static str> {
    if !rustix::process::geteuid().is_root() {
        return Some("needs root: it makes a memory cgroup");
    }
    let enabled = fs::read_to_string(Path::new(ROOT).join("cgroup.subtree_control"));
    let memory = enabled.is_ok_and(|list| list.split_whitespace().any(|word| word == "memory"));
    (!memory).then_some("there is no cgroup v2 with the memory controller at /sys/fs/cgroup")
}

/// One cgroup, gone with this value.
#[derive(Debug)]
pub struct Cgroup {
    dir: PathBuf,
}

impl Cgroup {
    /// Makes it.
    ///
    /// # Panics
    /// When it cannot be made, see [`missing`].
    #[must_use]
    pub fn new(name: &str) -> Self {
        let dir = Path::new(ROOT).join(format!("{name}-{}", std::process::id()));
        fs::create_dir(&dir).expect("a cgroup can be made");
        Self { dir }
    }

    /// Its directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The words before a command that has it run in here. The host never kills it for want of memory.
    #[must_use]
    pub fn starter(&self) -> Vec<OsString> {
        const START: &str =
            "echo 0 > \"$0\" && echo -1000 > /proc/self/oom_score_adj && exec \"$@\"";
        let procs = self.dir.join("cgroup.procs");
        vec!["sh".into(), "-c".into(), START.into(), procs.into()]
    }

    /// Writes one of its files.
    ///
    /// # Errors
    /// The kernel's.
    pub fn set(&self, file: &str, value: &str) -> io::Result<()> {
        fs::write(self.dir.join(file), value)
    }

    /// The number in one of its files.
    ///
    /// # Panics
    /// When there is none.
    #[must_use]
    pub fn number(&self, file: &str) -> u64 {
        let text = fs::read_to_string(self.dir.join(file)).expect("the file is there");
        text.trim().parse().expect("a number")
    }

    /// The process in it that has this name.
    #[must_use]
    pub fn process(&self, name: &str) -> Option<u32> {
        let list = fs::read_to_string(self.dir.join("cgroup.procs")).ok()?;
        let named = |pid: &u32| {
            fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm.trim() == name)
        };
        list.lines().filter_map(|line| line.parse().ok()).find(named)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // It fails only while a process is in it.
        let _ = fs::remove_dir(&self.dir);
    }
}

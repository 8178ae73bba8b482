//! The user's cache: directories named by the hash of what went into them, complete or absent.
//!
//! An entry is built in `<name>.tmp` under a lock and renamed when complete, so an interrupted build
//! leaves nothing that could be taken for a result, and two processes build it once.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::fs::{FlockOperation, flock, syncfs};
use rustix::io::Errno;
use sha2::{Digest, Sha256};

use crate::{paths, progress, signals};

/// Hex digits of a key that go into a directory's name.
const KEY_DIGITS: usize = 16;
/// How often a taken lock is tried again.
const LOCK_POLL: Duration = Duration::from_millis(100);

/// The hash of an entry's inputs.
#[derive(Default)]
pub(crate) struct Key(Sha256);

impl Key {
    /// Adds one named input; its length goes in too, so that inputs cannot run into one another.
    pub(crate) fn with(mut self, name: &str, value: impl AsRef<[u8]>) -> Key {
        let value = value.as_ref();
        self.0.update(format!("{name} {}\n", value.len()));
        self.0.update(value);
        self
    }

    /// The hash as it stands in a directory's name.
    pub(crate) fn digits(self) -> String {
        let mut text: String = self.0.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        text.truncate(KEY_DIGITS);
        text
    }
}

/// The directory `<cache>/<name>-<key>`; `build` fills it if it is not there yet.
pub(crate) fn entry(
    name: &str,
    key: Key,
    build: impl FnOnce(&Path) -> Result<()>,
) -> Result<PathBuf> {
    let dir = place(name, key)?;
    if dir.is_dir() {
        return Ok(dir);
    }
    let cache = paths::cache()?;
    let _lock = lock(&cache.join(format!("{name}.lock")))?;
    if dir.is_dir() {
        return Ok(dir);
    }
    let temporary = cache.join(format!("{name}.tmp"));
    clear(&temporary)?;
    paths::create_dir(&temporary)?;
    let built = build(&temporary).and_then(|()| publish(&temporary, &dir));
    if built.is_err() {
        clear(&temporary)?;
    }
    built.map(|()| dir)
}

/// Where [`entry`] has it, or would.
pub(crate) fn place(name: &str, key: Key) -> Result<PathBuf> {
    Ok(paths::cache()?.join(format!("{name}-{}", key.digits())))
}

/// Makes the files durable, then gives the directory its name.
fn publish(temporary: &Path, dir: &Path) -> Result<()> {
    let fail = || format!("cannot store {}", dir.display());
    syncfs(File::open(temporary).with_context(fail)?).with_context(fail)?;
    fs::rename(temporary, dir).with_context(fail)
}

/// Removes a directory if it is there.
pub(crate) fn clear(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", dir.display()))
        }
        _ => Ok(()),
    }
}

/// Takes the lock file, waiting for whoever has it.
pub(crate) fn lock(file: &Path) -> Result<File> {
    let mut said = false;
    loop {
        if let Some(lock) = try_lock(file)? {
            return Ok(lock);
        }
        if !said {
            progress::line(
                "lock",
                &format!("waiting for another cargo xtask ({})", file.display()),
            );
            said = true;
        }
        signals::check()?;
        thread::sleep(LOCK_POLL);
    }
}

/// Takes the lock file unless somebody has it.
pub(crate) fn try_lock(file: &Path) -> Result<Option<File>> {
    let lock = File::create(file).with_context(|| format!("cannot open {}", file.display()))?;
    match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(lock)),
        Err(Errno::WOULDBLOCK) => Ok(None),
        Err(error) => Err(error).with_context(|| format!("cannot lock {}", file.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::Key;

    #[test]
    fn inputs_cannot_run_into_one_another() {
        let one = Key::default().with("a", "bc").with("d", "").digits();
        let two = Key::default().with("a", "b").with("d", "c").digits();
        assert_ne!(one, two);
        assert_eq!(one, Key::default().with("a", "bc").with("d", "").digits());
    }
}

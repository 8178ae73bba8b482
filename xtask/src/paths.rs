//! Where things are: the workspace, its target directory, the user's cache.

use std::path::{Path, PathBuf};
use std::{env, fs};

use anyhow::{Context, Result};

use crate::exit::{self, Exit};

/// The workspace's root directory.
pub(crate) fn root() -> PathBuf {
    let xtask = env::var_os("CARGO_MANIFEST_DIR")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
    xtask.parent().map_or_else(|| PathBuf::from("."), Path::to_path_buf)
}

/// Cargo's target directory.
pub(crate) fn target() -> PathBuf {
    match env::var_os("CARGO_TARGET_DIR") {
        Some(dir) if !dir.is_empty() => root().join(dir),
        _ => root().join("target"),
    }
}

/// Our directory under the user's cache directory, made if it is not there.
pub(crate) fn cache() -> Result<PathBuf> {
    let base = match env::var_os("XDG_CACHE_HOME") {
        Some(dir) if Path::new(&dir).is_absolute() => PathBuf::from(dir),
        _ => match env::var_os("HOME") {
            Some(home) if !home.is_empty() => PathBuf::from(home).join(".cache"),
            _ => {
                return Err(Exit::error(
                    exit::CANNOT,
                    "no cache directory: set HOME or XDG_CACHE_HOME",
                ));
            }
        },
    };
    let dir = base.join("nowait");
    create_dir(&dir)?;
    Ok(dir)
}

/// A fresh log file for a long step, in the cache, so that it outlives a failed step.
pub(crate) fn log(name: &str) -> Result<PathBuf> {
    let file = cache()?.join(format!("{name}.log"));
    write(&file, "")?;
    Ok(file)
}

/// Makes a directory and its parents.
pub(crate) fn create_dir(dir: &Path) -> Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("cannot make directory {}", dir.display()))
}

/// A file's bytes.
pub(crate) fn read(file: &Path) -> Result<Vec<u8>> {
    fs::read(file).with_context(|| format!("cannot read {}", file.display()))
}

/// Writes a file.
pub(crate) fn write(file: &Path, bytes: impl AsRef<[u8]>) -> Result<()> {
    fs::write(file, bytes).with_context(|| format!("cannot write {}", file.display()))
}

/// Copies a file; one onto itself is left alone, which `fs::copy` would empty.
pub(crate) fn copy(from: &Path, to: &Path) -> Result<()> {
    if let (Ok(from), Ok(to)) = (fs::canonicalize(from), fs::canonicalize(to))
        && from == to
    {
        return Ok(());
    }
    fs::copy(from, to)
        .with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))?;
    Ok(())
}

/// The file a program's name stands for on `PATH`, or in the system directories.
pub(crate) fn program(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let system = ["/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from);
    env::split_paths(&path).chain(system).map(|dir| dir.join(name)).find(|file| file.is_file())
}

/// Fails early when `file` cannot be written later: a result is not lost after minutes of work.
pub(crate) fn check_writable(file: &Path) -> Result<()> {
    let fail = |why: String| {
        Exit::error(
            exit::OPERAND,
            format!("cannot write {}: {why}; name a file in a writable directory", file.display()),
        )
    };
    let found = fs::metadata(file);
    let existed = found.is_ok();
    // Not opened: opening a pipe waits for its reader.
    if found.is_ok_and(|found| !found.is_file()) {
        return Err(fail("it is no regular file".to_owned()));
    }
    fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(file)
        .map_err(|error| fail(error.to_string()))?;
    if !existed {
        fs::remove_file(file).map_err(|error| fail(error.to_string()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_copied_onto_itself_stays() {
        let dir = tempfile::tempdir().unwrap();
        let (file, other) = (dir.path().join("a"), dir.path().join("b"));
        write(&file, "figures").unwrap();
        copy(&file, &dir.path().join(".").join("a")).unwrap();
        copy(&file, &other).unwrap();
        assert_eq!([read(&file).unwrap(), read(&other).unwrap()], [b"figures"; 2]);
    }
}

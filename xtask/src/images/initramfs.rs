//! The guest's initramfs: our agent as PID 1, a busybox shell, a console, empty mount points.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use tempfile::NamedTempFile;

use super::archive::Archive;
use crate::cache::{self, Key};
use crate::progress::Step;
use crate::{apt, child, paths};

/// Writes `initramfs.cpio` into `dir`; the file changes its name only when it is complete.
pub(crate) fn guest_initramfs(dir: &Path, agent: &Path) -> Result<PathBuf> {
    let busybox = static_busybox()?;
    let temporary = NamedTempFile::new_in(dir)?;
    let mut archive = Archive::create(temporary.path())?;
    for (name, permissions) in
        [("bin", 0o755), ("dev", 0o755), ("etc", 0o755), ("proc", 0o555), ("root", 0o700)]
    {
        archive.dir(name, permissions)?;
    }
    for (name, permissions) in [("run", 0o755), ("sys", 0o555), ("tmp", 0o1777)] {
        archive.dir(name, permissions)?;
    }
    archive.device("dev/console", 5, 1)?;
    archive.file("bin/busybox", &busybox)?;
    archive.link("bin/sh", "busybox")?;
    archive.bytes("init", 0o755, &paths::read(agent)?)?;
    archive.finish()?;
    let file = dir.join("initramfs.cpio");
    temporary.persist(&file)?;
    Ok(file)
}

/// busybox, which must need no library: this system's own if it is so. Otherwise one from a package that is
/// not installed, since it would take the place of the busybox that others here need.
pub(crate) fn static_busybox() -> Result<PathBuf> {
    const PACKAGE: &str = "busybox-static";
    if let Some(busybox) = paths::program("busybox")
        && !has_interpreter(&paths::read(&busybox)?)
    {
        return Ok(busybox);
    }
    apt::require("a static busybox")?;
    let dir = apt::downloading(|| {
        let package = apt::wanted(PACKAGE)?;
        let key = Key::default().with(PACKAGE, &package.version);
        cache::entry("busybox", key, |dir| {
            let step = Step::begin("busybox", PACKAGE);
            apt::unpack(&step, &package, dir, &paths::log("busybox")?)?;
            step.done(&format!("{PACKAGE} {}", package.version));
            Ok(())
        })
    })?;
    // With merged /usr it may be below usr/bin.
    let mut files = ["bin/busybox", "usr/bin/busybox"].iter().map(|file| dir.join(file));
    files.find(|file| file.is_file()).with_context(|| format!("no busybox in {}", dir.display()))
}

/// Whether a 64-bit ELF program names a loader (a PT_INTERP program header; elf(5)).
fn has_interpreter(elf: &[u8]) -> bool {
    const PT_INTERP: usize = 3;
    let field = |offset: usize, length: usize| -> usize {
        let bytes = elf.get(offset..).and_then(|rest| rest.get(..length)).unwrap_or_default();
        bytes.iter().rev().fold(0, |value, &byte| value << 8 | usize::from(byte))
    };
    let (table, size, count) = (field(32, 8), field(54, 2), field(56, 2));
    (0..count).any(|number| field(table.saturating_add(number * size), 4) == PT_INTERP)
}

/// The names that busybox answers to.
pub(crate) fn applets(busybox: &Path) -> Result<Vec<String>> {
    let text = child::output(std::process::Command::new(busybox).arg("--list"))?;
    Ok(text.lines().filter(|name| *name != "busybox").map(str::to_owned).collect())
}

#[cfg(test)]
mod tests {
    use super::has_interpreter;

    #[test]
    fn a_dynamic_program_is_told() -> std::io::Result<()> {
        // A test program is dynamic wherever these tests are built the usual way.
        let own = std::fs::read(std::env::current_exe()?)?;
        assert_eq!(has_interpreter(&own), !cfg!(target_feature = "crt-static"));
        assert!(!has_interpreter(b""));
        assert!(!has_interpreter(&[0xff; 64]));
        Ok(())
    }
}

//! What a guest is booted from: our kernel, the initramfs with our agent, the distribution's kernel, and
//! the bare-metal test kernel.

mod archive;
mod distribution;
mod initramfs;
mod kconfig;
mod kernel;
mod modules;
mod version;

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use tempfile::{NamedTempFile, TempDir};

pub(crate) use archive::Archive;
pub(crate) use distribution::{DistributionKernel, distribution_kernel};
pub(crate) use initramfs::{applets, static_busybox};
pub(crate) use kernel::guest_kernel;
pub(crate) use modules::Modules;

use crate::{binaries, child, paths};

/// A directory with all images under the names that tests and the nested machine know.
pub(crate) struct Images {
    /// The directory.
    pub(crate) dir: PathBuf,
}

/// File names in [`Images::dir`], and in `/images` of the nested machine.
pub(crate) const NAMES: [&str; 4] = ["vmlinux", "initramfs.cpio", "debian-vmlinuz", "test-kernel"];

/// Where they are, or will be.
pub(crate) fn dir() -> PathBuf {
    paths::target().join("images")
}

/// Builds whatever of the images is not up to date.
pub(crate) fn images() -> Result<Images> {
    let dir = dir();
    paths::create_dir(&dir)?;
    let kernel = guest_kernel()?;
    let distribution = distribution_kernel()?;
    initramfs::guest_initramfs(&dir, &binaries::agent()?)?;
    test_kernel(&binaries::test_kernel()?, &dir.join("test-kernel"))?;
    link(&kernel, &dir.join("vmlinux"))?;
    link(&distribution.bzimage, &dir.join("debian-vmlinuz"))?;
    Ok(Images { dir })
}

/// The test kernel as Multiboot 1 wants it: the same program in an ELF32 file.
fn test_kernel(elf64: &Path, elf32: &Path) -> Result<()> {
    // Somebody may be booting the one that is there.
    let temporary = NamedTempFile::new_in(elf32.parent().unwrap_or(Path::new(".")))?;
    let mut objcopy = Command::new("objcopy");
    objcopy.args(["-O", "elf32-i386"]).arg(elf64).arg(temporary.path());
    child::output(&mut objcopy).context("the test kernel cannot be made ELF32")?;
    temporary.persist(elf32)?;
    Ok(())
}

/// Makes `name` a link to `to`, replacing what was there in one step.
fn link(to: &Path, name: &Path) -> Result<()> {
    let fail = || format!("cannot link {} to {}", name.display(), to.display());
    let parent = name.parent().unwrap_or(Path::new("."));
    let temporary = TempDir::new_in(parent).with_context(fail)?;
    let link = temporary.path().join("link");
    symlink(to, &link).with_context(fail)?;
    std::fs::rename(&link, name).with_context(fail)
}

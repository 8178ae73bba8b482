//! The guest kernel: the distribution's kernel source, our configuration fragment, `make vmlinux`.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{fs, thread};

use anyhow::{Context, Result, bail};

use super::kconfig;
use super::version::{newest, numbers};
use crate::apt::{self, Package};
use crate::cache::{self, Key};
use crate::exit::{self, Exit};
use crate::progress::Step;
use crate::{child, paths};

/// Raised when the steps below change what comes out.
const RECIPE: &str = "1";
/// The kernel series we prefer: the one that the measurements of this project were made on.
const PREFERRED: &[u64] = &[6, 12];
/// The oldest kernel with what we use (UFFDIO_POISON, for the nested machine's own kernel: 6.6).
pub(super) const OLDEST: &[u64] = &[6, 6];

/// The guest kernel, built if the cache does not have it.
pub(crate) fn guest_kernel() -> Result<PathBuf> {
    apt::require("the guest kernel's source")?;
    let fragment_file = paths::root().join("images/kernel/guest.config");
    let fragment = paths::read(&fragment_file)?;
    let gcc = child::output(Command::new("gcc").arg("--version"))?;
    let dir = apt::downloading(|| {
        let source = source_package()?;
        let key = Key::default()
            .with("fragment", &fragment)
            .with("source", format!("{} {}", source.name, source.version))
            .with("gcc", gcc.lines().next().unwrap_or_default())
            .with("recipe", RECIPE);
        cache::entry("kernel", key, |dir| build(dir, &source, &fragment_file))
    })?;
    Ok(dir.join("vmlinux"))
}

/// The newest `linux-source-<version>` of the preferred series, or else the newest of all.
fn source_package() -> Result<Package> {
    for fresh in [false, true] {
        if fresh {
            apt::update()?;
        }
        let names = apt::names("linux-source-")?;
        let found = newest(&names, "linux-source-", "", PREFERRED, 2)
            .or_else(|| newest(&names, "linux-source-", "", &[], 2))
            // An old one may only mean that the package lists are.
            .filter(|name| fresh || numbers(name).as_slice() >= OLDEST);
        if let Some(name) = found
            && let Some(package) = apt::candidate(&name)?
        {
            return Ok(package);
        }
    }
    Err(Exit::error(
        exit::CANNOT,
        "no package linux-source-<version> can be had from the apt sources of this system",
    ))
}

fn build(dir: &Path, source: &Package, fragment: &Path) -> Result<()> {
    let step = Step::begin("kernel", &format!("building from {} {}", source.name, source.version));
    let log = paths::log("kernel")?;
    let unpacked = dir.join("package");
    apt::unpack(&step, source, &unpacked, &log)?;
    let tree = dir.join("source");
    extract(&step, &unpacked, &tree, &log)?;
    configure(&step, &tree, fragment, &log)?;
    let jobs = thread::available_parallelism().map_or(1, usize::from);
    let mut vmlinux = make(&tree);
    vmlinux.arg(format!("-j{jobs}")).arg("vmlinux");
    child::run_noting(&step, &mut vmlinux, &log, |number, line| format!("{number:4} {line}"))?;
    let vmlinux = dir.join("vmlinux");
    paths::copy(&tree.join("vmlinux"), &vmlinux)?;
    child::run(&step, Command::new("strip").arg("--strip-debug").arg(&vmlinux), &log)?;
    paths::copy(&tree.join(".config"), &dir.join("config"))?;
    step.note("removing the source tree");
    cache::clear(&tree)?;
    cache::clear(&unpacked)?;
    step.done(&format!("built from {} {}", source.name, source.version));
    Ok(())
}

/// Unpacks the source tarball, without the bulk that an x86 kernel without graphics never reads.
fn extract(step: &Step, unpacked: &Path, tree: &Path, log: &Path) -> Result<()> {
    let tarball = tarball(&unpacked.join("usr/src"))?;
    paths::create_dir(tree)?;
    step.note("unpacking the kernel source");
    let mut tar = Command::new("tar");
    tar.env("XZ_OPT", "-T0");
    tar.arg("-xf").arg(&tarball).arg("-C").arg(tree).arg("--strip-components=1");
    for bulk in ["Documentation/*.rst", "drivers/gpu/*.[ch]", "tools/testing/*", "sound/*.[ch]"] {
        tar.arg(format!("--exclude=*/{bulk}"));
    }
    child::run(step, &mut tar, log)
}

/// The `linux-source-*.tar.*` below `dir`; Ubuntu has it one level deeper, behind a link.
fn tarball(dir: &Path) -> Result<PathBuf> {
    let mut level = vec![dir.to_path_buf()];
    for _ in 0..2 {
        let mut next = Vec::new();
        for dir in &level {
            for entry in
                fs::read_dir(dir).with_context(|| format!("cannot list {}", dir.display()))?
            {
                let path = entry?.path();
                let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                if path.is_dir() {
                    next.push(path);
                } else if name.starts_with("linux-source-")
                    && name.contains(".tar")
                    && path.is_file()
                {
                    return Ok(path);
                }
            }
        }
        level = next;
    }
    bail!("the package has no linux-source-*.tar.* below {}", dir.display())
}

/// tinyconfig, our fragment over it, and a check that every option of ours survived.
fn configure(step: &Step, tree: &Path, fragment: &Path, log: &Path) -> Result<()> {
    step.note("configuring");
    child::run(step, make(tree).arg("tinyconfig"), log)?;
    let mut merge = Command::new("scripts/kconfig/merge_config.sh");
    merge.args(["-m", ".config"]).arg(fragment).current_dir(tree);
    child::run(step, &mut merge, log)?;
    child::run(step, make(tree).arg("olddefconfig"), log)?;
    let wanted = String::from_utf8_lossy(&paths::read(fragment)?).into_owned();
    let config = String::from_utf8_lossy(&paths::read(&tree.join(".config"))?).into_owned();
    let lost = kconfig::lost(&wanted, &config);
    if !lost.is_empty() {
        bail!(
            "options of {} did not survive olddefconfig: {}",
            fragment.display(),
            lost.join("; ")
        );
    }
    Ok(())
}

/// make in the source tree, with names and times that do not depend on where or when.
fn make(tree: &Path) -> Command {
    let mut make = Command::new("make");
    make.arg("-C").arg(tree).env("LC_ALL", "C");
    // A `cargo xtask` started from make must not hand its job server on.
    for variable in ["MAKEFLAGS", "MFLAGS", "MAKELEVEL", "ARCH", "CROSS_COMPILE"] {
        make.env_remove(variable);
    }
    make.args(["KBUILD_BUILD_USER=nowait", "KBUILD_BUILD_HOST=nowait"]);
    make
}

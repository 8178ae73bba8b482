//! The distribution's own kernel: it runs the nested machine, and boots as a guest (bzImage).
//! Downloaded and unpacked into the cache, never installed.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::kernel::OLDEST;
use super::version::{newest, numbers};
use crate::apt::{self, Package};
use crate::cache::{self, Key};
use crate::exit::{self, Exit};
use crate::progress::Step;
use crate::{paths, setup};

/// Raised when what is kept changes.
const RECIPE: &str = "1";
/// The series we prefer, as for the guest kernel.
const PREFERRED: &[u64] = &[6, 12];

/// A kernel of the distribution in the cache.
pub(crate) struct DistributionKernel {
    /// The bzImage.
    pub(crate) bzimage: PathBuf,
    /// `lib/modules/<release>`.
    pub(crate) modules: PathBuf,
}

/// The newest kernel package that will do, unpacked.
pub(crate) fn distribution_kernel() -> Result<DistributionKernel> {
    apt::require("the nested machine's kernel")?;
    let dir = apt::downloading(|| {
        let packages = packages()?;
        let mut key = Key::default().with("recipe", RECIPE);
        for package in &packages {
            key = key.with(&package.name, &package.version);
        }
        cache::entry("distribution-kernel", key, |dir| {
            let step = Step::begin("distribution kernel", &packages[0].name);
            let log = paths::log("distribution-kernel")?;
            for package in &packages {
                apt::unpack(&step, package, dir, &log)?;
            }
            step.done(&format!("{} {}", packages[0].name, packages[0].version));
            Ok(())
        })
    })?;
    // With merged /usr the modules may be below usr/lib.
    let modules = ["lib/modules", "usr/lib/modules"]
        .iter()
        .find_map(|below| only_entry(&dir.join(below), ""))
        .with_context(|| format!("no lib/modules/<release> in {}", dir.display()))?;
    let bzimage = only_entry(&dir.join("boot"), "vmlinuz-")
        .with_context(|| format!("no boot/vmlinuz-* in {}", dir.display()))?;
    Ok(DistributionKernel { bzimage, modules })
}

/// The image package first, then what holds its modules if that is another one.
fn packages() -> Result<Vec<Package>> {
    for fresh in [false, true] {
        if fresh {
            apt::update()?;
        }
        let found = if setup::distribution().contains("ubuntu") { ubuntu()? } else { debian()? };
        if !found.is_empty() {
            return Ok(found);
        }
    }
    let oldest: Vec<String> = OLDEST.iter().map(u64::to_string).collect();
    Err(Exit::error(
        exit::CANNOT,
        format!("no kernel package of Linux {} or newer in the apt sources", oldest.join(".")),
    ))
}

fn debian() -> Result<Vec<Package>> {
    let names = apt::names("linux-image-")?;
    let find = |series| newest(&names, "linux-image-", "-cloud-amd64", series, 3);
    let Some(name) = find(PREFERRED).or_else(|| find(&[])) else {
        return Ok(Vec::new());
    };
    if numbers(&name).as_slice() < OLDEST {
        return Ok(Vec::new());
    }
    Ok(apt::candidate(&name)?.into_iter().collect())
}

fn ubuntu() -> Result<Vec<Package>> {
    let names = apt::names("linux-modules-")?;
    let Some(modules) = newest(&names, "linux-modules-", "-generic", &[], 3) else {
        return Ok(Vec::new());
    };
    let release = modules.trim_start_matches("linux-modules-").to_owned();
    if numbers(&release).as_slice() < OLDEST {
        return Ok(Vec::new());
    }
    let mut packages = Vec::new();
    // The signed image; where only the unsigned one is published, that.
    for prefix in ["linux-image-", "linux-image-unsigned-"] {
        if let Some(image) = apt::candidate(&format!("{prefix}{release}"))? {
            packages.push(image);
            break;
        }
    }
    if packages.is_empty() {
        return Ok(packages);
    }
    packages.extend(apt::candidate(&modules)?);
    // zram and nbd live here on some releases.
    packages.extend(apt::candidate(&format!("linux-modules-extra-{release}"))?);
    Ok(packages)
}

fn only_entry(dir: &Path, prefix: &str) -> Option<PathBuf> {
    fs::read_dir(dir)
        .ok()?
        .flatten()
        .find(|entry| entry.file_name().to_string_lossy().starts_with(prefix))
        .map(|entry| entry.path())
}

//! What every nested machine has: busybox with all its names, kernel modules, init. Cached.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::cache::{self, Key};
use crate::images::{Archive, DistributionKernel, Modules, applets, static_busybox};
use crate::progress::Step;

/// Raised when what [`base`] writes changes.
const RECIPE: &str = "2";
/// PID 1.
const INIT: &str = include_str!("init.sh");
/// Loaded at start, with what they depend on; those that are built in are passed over.
const MODULES: [&str; 9] = [
    "virtio_pci",
    "virtio_console",
    "irqbypass",
    "kvm",
    "kvm_amd",
    "virtio_blk",
    "zram",
    "nbd",
    "tun",
];
/// Directories, parents first.
const DIRECTORIES: [&str; 22] = [
    "bin",
    "dev",
    "etc",
    "images",
    "lib",
    "lib/modules",
    "lib64",
    "nowait",
    "proc",
    "results",
    "root",
    "run",
    "sbin",
    "sys",
    "tests",
    "tmp",
    "usr",
    "usr/bin",
    "usr/lib",
    "usr/sbin",
    "usr/share",
    "var",
];

/// The first part of the nested machine's initramfs.
pub(crate) fn base(kernel: &DistributionKernel) -> Result<PathBuf> {
    let busybox = static_busybox()?;
    let key = Key::default()
        .with("recipe", RECIPE)
        .with("init", INIT)
        .with("modules", MODULES.join(" "))
        .with("directories", DIRECTORIES.join(" "))
        .with("kernel", kernel.modules.to_string_lossy().as_bytes())
        .with("busybox", format!("{} {:?}", busybox.display(), stamp(&busybox)?));
    let dir = cache::entry("nested-base", key, |dir| {
        let step = Step::begin("nested machine", "writing its initramfs");
        let mut archive = Archive::create(&dir.join("base.cpio"))?;
        for name in DIRECTORIES {
            archive.dir(name, 0o755)?;
        }
        archive.device("dev/console", 5, 1)?;
        archive.device("dev/null", 1, 3)?;
        archive.bytes("init", 0o755, INIT.as_bytes())?;
        archive.bytes("etc/passwd", 0o644, b"root:x:0:0:root:/root:/bin/sh\n")?;
        archive.bytes("etc/group", 0o644, b"root:x:0:\n")?;
        archive.file("bin/busybox", &busybox)?;
        for name in applets(&busybox)? {
            archive.link(&format!("bin/{name}"), "busybox")?;
        }
        let modules = Modules::scan(&kernel.modules)?.in_order(&MODULES)?;
        let mut order = String::new();
        for module in &modules {
            let file = format!("{}.ko", module.name);
            archive.bytes(&format!("lib/modules/{file}"), 0o644, &module.bytes)?;
            order.push_str(&file);
            order.push('\n');
        }
        archive.bytes("lib/modules/order", 0o644, order.as_bytes())?;
        archive.finish()?;
        step.done("initramfs written");
        Ok(())
    })?;
    Ok(dir.join("base.cpio"))
}

/// Tells one version of a file from another without reading it.
fn stamp(file: &Path) -> Result<(u64, i64)> {
    let data = file.metadata().with_context(|| format!("cannot read {}", file.display()))?;
    Ok((data.len(), data.mtime()))
}

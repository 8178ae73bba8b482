//! Kernel modules out of a distribution's package: which ones, in which order, decompressed.
//!
//! The package comes without modules.dep (depmod writes it at installation), so each module's own
//! `depends=` line is followed.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::paths;

/// The modules of one kernel.
pub(crate) struct Modules {
    /// Files by module name (`-` as `_`).
    files: HashMap<String, PathBuf>,
    /// Names that are built in.
    builtin: Vec<String>,
}

/// A module ready to be loaded.
pub(crate) struct Module {
    /// Its name.
    pub(crate) name: String,
    /// The uncompressed ELF file.
    pub(crate) bytes: Vec<u8>,
}

impl Modules {
    /// Reads the directory `lib/modules/<release>`.
    pub(crate) fn scan(dir: &Path) -> Result<Modules> {
        let mut files = HashMap::new();
        find(&dir.join("kernel"), &mut files)?;
        let builtin = String::from_utf8_lossy(&paths::read(&dir.join("modules.builtin"))?)
            .lines()
            .map(|line| module_name(Path::new(line)))
            .collect();
        Ok(Modules { files, builtin })
    }

    /// The modules of `wanted` and all they depend on, in an order that loads.
    pub(crate) fn in_order(&self, wanted: &[&str]) -> Result<Vec<Module>> {
        let mut loaded = Vec::new();
        for name in wanted {
            self.add(name, &mut loaded, 0)?;
        }
        Ok(loaded)
    }

    fn add(&self, name: &str, loaded: &mut Vec<Module>, depth: usize) -> Result<()> {
        /// Dependency chains are short; a longer one is a cycle.
        const DEPTH_LIMIT: usize = 16;
        let name = name.replace('-', "_");
        if self.builtin.contains(&name) || loaded.iter().any(|module| module.name == name) {
            return Ok(());
        }
        let Some(file) = self.files.get(&name) else {
            bail!("the kernel package has no module {name}");
        };
        if depth > DEPTH_LIMIT {
            bail!("module {name}: its dependencies go in a circle");
        }
        let bytes = decompress(file)?;
        for dependency in depends(&bytes) {
            self.add(&dependency, loaded, depth + 1)?;
        }
        loaded.push(Module { name, bytes });
        Ok(())
    }
}

fn find(dir: &Path, files: &mut HashMap<String, PathBuf>) -> Result<()> {
    for entry in fs::read_dir(dir).with_context(|| format!("cannot list {}", dir.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            find(&path, files)?;
        } else if path.to_string_lossy().contains(".ko") {
            files.insert(module_name(&path), path);
        }
    }
    Ok(())
}

/// `…/kvm-amd.ko.xz` is `kvm_amd`.
fn module_name(file: &Path) -> String {
    let name = file.file_name().unwrap_or_default().to_string_lossy();
    name.split(".ko").next().unwrap_or_default().replace('-', "_")
}

/// The names on the module's `depends=` line (strings in .modinfo end with a zero byte).
fn depends(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(start) = module.windows(KEY.len()).position(|window| window == KEY) else {
        return Vec::new();
    };
    let value = &module[start + KEY.len()..];
    let end = value.iter().position(|&byte| byte == 0).unwrap_or(0);
    String::from_utf8_lossy(&value[..end])
        .split(',')
        .filter(|name| !name.is_empty())
        .map(str::to_owned)
        .collect()
}

fn decompress(file: &Path) -> Result<Vec<u8>> {
    let program = match file.extension().and_then(|extension| extension.to_str()) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        Some("gz") => "gzip",
        _ => return paths::read(file),
    };
    let output = Command::new(program)
        .arg("-dc")
        .arg(file)
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("cannot start {program}"))?;
    if !output.status.success() {
        bail!("{program} cannot decompress {}", file.display());
    }
    Ok(output.stdout)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::{depends, module_name};

    #[test]
    fn names_and_dependencies() {
        assert_eq!(module_name(Path::new("kernel/arch/x86/kvm/kvm-amd.ko.xz")), "kvm_amd");
        assert_eq!(depends(b"x\0license=GPL\0depends=kvm,ccp\0name=kvm_amd\0"), ["kvm", "ccp"]);
        assert!(depends(b"x\0depends=\0retpoline=Y\0").is_empty());
        assert!(depends(b"no modinfo").is_empty());
    }
}

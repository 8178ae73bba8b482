//! What one run carries into the nested machine: programs, images, the command.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::exit::{self, Exit};
use crate::images::{Archive, Images, NAMES};
use crate::{child, paths};

/// QEMU's firmware files that the microvm, pc and q35 machines load.
const FIRMWARE: [&str; 12] = [
    "bios-microvm.bin",
    "bios.bin",
    "bios-256k.bin",
    "qboot.rom",
    "pvh.bin",
    "linuxboot.bin",
    "linuxboot_dma.bin",
    "multiboot.bin",
    "multiboot_dma.bin",
    "kvmvapic.bin",
    "efi-virtio.rom",
    "vgabios-stdvga.bin",
];

/// A host file or directory and where it goes.
#[derive(Debug, Clone)]
pub(crate) struct Add {
    /// On the host.
    pub(crate) from: PathBuf,
    /// In the machine, without the leading `/`.
    pub(crate) to: String,
}

impl std::str::FromStr for Add {
    type Err = String;

    fn from_str(text: &str) -> Result<Add, String> {
        let (from, to) = text.split_once(':').ok_or("expected SOURCE:DESTINATION")?;
        let to = to.trim_start_matches('/').trim_end_matches('/');
        if to.is_empty() || to.split('/').any(|part| part.is_empty() || part == "..") {
            return Err(format!("destination of {text:?}: expected an absolute path"));
        }
        Ok(Add { from: PathBuf::from(from), to: to.to_owned() })
    }
}

impl Add {
    /// The file on the host, through links.
    ///
    /// # Errors
    /// When there is none.
    pub(crate) fn source(&self) -> Result<PathBuf> {
        self.from.canonicalize().map_err(|error| {
            let from = self.from.display();
            let what = format!("cannot carry {from} into the nested machine (--add): {error}");
            Exit::error(exit::OPERAND, what)
        })
    }
}

/// The files of one run.
#[derive(Debug, Default)]
pub(crate) struct Hold {
    files: Vec<Add>,
}

impl Hold {
    /// Adds one file or directory.
    pub(crate) fn add(&mut self, from: &Path, to: impl Into<String>) {
        self.files.push(Add { from: from.to_path_buf(), to: to.into() });
    }

    /// Adds what a user named.
    pub(crate) fn extend(&mut self, files: &[Add]) {
        self.files.extend_from_slice(files);
    }

    /// Adds our images.
    pub(crate) fn images(&mut self, images: &Images) {
        for name in NAMES {
            self.add(&images.dir.join(name), format!("images/{name}"));
        }
    }

    /// Adds a program of the host and the libraries it is linked with: the program on the host.
    pub(crate) fn program(&mut self, program: &str) -> Result<PathBuf> {
        let Some(file) = paths::program(program) else {
            bail!("no {program}: run `cargo xtask setup`");
        };
        self.add(&file, format!("usr/bin/{program}"));
        self.libraries(&file)?;
        Ok(file)
    }

    /// Adds the libraries that this file is linked with, where the host has them.
    fn libraries(&mut self, file: &Path) -> Result<()> {
        for library in libraries(&child::output(Command::new("ldd").arg(file))?) {
            let to = library.trim_start_matches('/');
            if !self.files.iter().any(|add| add.to == to) {
                self.add(Path::new(library), to);
            }
        }
        Ok(())
    }

    /// Adds nbdkit with the plugin `memory` and the filter `delay`, and the kernel's client.
    pub(crate) fn nbd(&mut self) -> Result<()> {
        let nbdkit = self.program("nbdkit")?;
        let config = child::output(Command::new(nbdkit).arg("--dump-config"))?;
        for (key, name) in
            [("plugindir=", "nbdkit-memory-plugin.so"), ("filterdir=", "nbdkit-delay-filter.so")]
        {
            let dir = config.lines().find_map(|line| line.strip_prefix(key));
            let file = Path::new(dir.with_context(|| format!("nbdkit does not say its {key}"))?)
                .join(name);
            let to = file.to_string_lossy().trim_start_matches('/').to_owned();
            self.add(&file, to);
            self.libraries(&file)?;
        }
        self.program("nbd-client")?;
        Ok(())
    }

    /// Adds QEMU, the libraries it is linked with, and its firmware.
    pub(crate) fn qemu(&mut self) -> Result<()> {
        // In usr/bin: it looks for its firmware in ../share/qemu.
        let qemu = self.program("qemu-system-x86_64")?;
        let directories = child::output(Command::new(&qemu).args(["-L", "help"]))?;
        for name in FIRMWARE {
            let found =
                directories.lines().map(|dir| Path::new(dir).join(name)).find(|f| f.is_file());
            if let Some(file) = found {
                self.add(&file, format!("usr/share/qemu/{name}"));
            }
        }
        Ok(())
    }

    /// Writes everything, with `command` and `environment`, behind `base` into `file`.
    pub(crate) fn write(
        &self,
        base: &Path,
        command: &[String],
        environment: &[(String, String)],
        file: &Path,
    ) -> Result<()> {
        let mut archive = Archive::after(base, file)?;
        for add in &self.files {
            archive.parents(&add.to)?;
            let from = add.source()?;
            archive.tree(&add.to, &from)?;
        }
        let command: Vec<String> = command.iter().map(|word| quote(word)).collect();
        archive.bytes(
            "nowait/command",
            0o755,
            format!("exec {}\n", command.join(" ")).as_bytes(),
        )?;
        let environment: String = environment
            .iter()
            .map(|(name, value)| format!("export {name}={}\n", quote(value)))
            .collect();
        archive.bytes("nowait/environment", 0o644, environment.as_bytes())?;
        archive.finish()
    }
}

/// A word that the shell takes as it is.
fn quote(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// The absolute paths in ldd's output.
fn libraries(ldd: &str) -> Vec<&str> {
    ldd.lines()
        .filter_map(|line| {
            let line = line.trim();
            let path = line.split_once(" => ").map_or(line, |(_, path)| path);
            path.split(" (").next().filter(|path| path.starts_with('/'))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::{Add, libraries, quote};

    #[test]
    fn words_survive_the_shell() {
        for word in ["plain", "two words", "it's", "\"$HOME\"", "a\nb", "", "*"] {
            let script = format!("printf %s {}", quote(word));
            let output = std::process::Command::new("sh").args(["-c", &script]).output();
            assert_eq!(output.map(|output| output.stdout).ok().as_deref(), Some(word.as_bytes()));
        }
    }

    #[test]
    fn ldd_is_read() {
        let ldd =
            "\tlinux-vdso.so.1 (0x7f)\n\tliba.so => /lib/liba.so (0x1)\n\t/lib64/ld.so (0x2)\n";
        assert_eq!(libraries(ldd), ["/lib/liba.so", "/lib64/ld.so"]);
    }

    #[test]
    fn additions_name_both_ends() {
        assert_eq!("a/b:/c/d".parse::<Add>().map(|add| add.to).as_deref(), Ok("c/d"));
        for wrong in ["a", "a:", "a:/", "a:/x/../y"] {
            assert!(wrong.parse::<Add>().is_err(), "{wrong}");
        }
    }
}

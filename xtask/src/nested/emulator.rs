//! The emulator: the distribution's QEMU with one mend, or as the distribution has it.
//!
//! QEMU delivers an interrupt that VMRUN injects (EVENTINJ) inside the instruction, but leaves it noted as an
//! exception to be delivered. Whatever leaves the emulation loop before the next exit has it delivered once
//! more, with interrupts off: a guest then waits for its own spin lock for ever. So one line is added,
//! and the rest is built as the distribution has it.
//!
//! By the host's clock that happens now and then (once in some minutes in which guests run). Under `-icount` it
//! happens with every timer, so measurements, which take their time from that, need the mended one. With it an
//! instruction takes a fixed time, and an idle processor none of the host's: numbers come out the same
//! on a busy host. By the host's clock an emulated exit costs as much as thousands of instructions, and whatever
//! else the host does is in every number.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{fs, thread};

use anyhow::{Context, Result, bail};

use crate::cache::{self, Key};
use crate::exit::{self, Exit};
use crate::progress::Step;
use crate::{apt, apt_source, child, paths, progress, setup};

/// The emulator's name, in the distribution and here.
const NAME: &str = "qemu-system-x86_64";
/// The mended one's in the cache.
const CACHED: &str = "emulator";
/// Room for 32 MiB of translated code. When it is full, all of it is thrown away, and that is the
/// point: every store into a page that code was once translated from is slow until that translation
/// has been found and dropped. With the default (1 GiB) the translations of guests long gone stay, and
/// boots of the same guest one after the other took 1.9, 3.8, 4.0, 3.9 … s; with 32 MiB 1.6, 1.6, 1.5,
/// 1.5 … s (16: 1.7; 48: 1.7; 96: 2.5).
const CODE_BUFFER: &str = "tb-size=32";
/// An instruction takes 4 ns; a processor that waits does not wait for the host.
const COUNT: &str = "shift=2,sleep=off";
/// The package that it comes from.
const PACKAGE: &str = "qemu-system-x86";
/// Raised when the steps below change what comes out.
const RECIPE: &str = "1";
/// What it is built with.
const NEEDS: [&str; 9] = [
    "dpkg-dev",
    "gcc",
    "libfdt-dev",
    "libglib2.0-dev",
    "libpixman-1-dev",
    "meson",
    "ninja-build",
    "pkg-config",
    "python3-venv",
];
/// No accelerator but TCG, no display, no library that the nested machine does not need.
const CONFIGURE: [&str; 9] = [
    "--cc=gcc",
    "--target-list=x86_64-softmmu",
    "--without-default-features",
    "--enable-system",
    "--enable-tcg",
    "--enable-fdt=system",
    "--disable-docs",
    "--disable-install-blobs",
    "--disable-werror",
];
/// Where the distribution has its programs: another Python would not find its meson.
const SYSTEM: &str = "/usr/sbin:/usr/bin:/sbin:/bin";
/// Where the injection is; later versions have it in the second place.
const SOURCES: [&str; 2] =
    ["target/i386/tcg/sysemu/svm_helper.c", "target/i386/tcg/system/svm_helper.c"];
const DELIVERY: &str = "do_interrupt_x86_hardirq(env, vector, 1);\n            break;";
const MENDED: &str = "do_interrupt_x86_hardirq(env, vector, 1);\n            cs->exception_index = -1;\n            break;";

/// An emulator, and how it is to keep time.
pub(super) struct Emulator {
    /// The binary.
    pub(super) program: PathBuf,
    /// Options for time and firmware.
    pub(super) options: Vec<String>,
}

/// The mended one if it has been built, otherwise the distribution's; the clock is the host's.
pub(super) fn usual() -> Result<Emulator> {
    let distribution = installed()?;
    let mut options: Vec<String> =
        ["-accel", &format!("tcg,thread=multi,{CODE_BUFFER}")].map(str::to_owned).into();
    let program = match built()? {
        Some(program) => {
            options.extend(firmware(&distribution)?);
            program
        }
        None => distribution,
    };
    Ok(Emulator { program, options })
}

fn installed() -> Result<PathBuf> {
    let missing = || Exit::error(exit::CANNOT, format!("no {NAME}: run `cargo xtask setup`"));
    paths::program(NAME).ok_or_else(missing)
}

/// The one whose clock counts instructions, built if the cache does not have it.
pub(super) fn counting() -> Result<Emulator> {
    let program = mended_one("the source of the emulator for measurements").context(
        "cannot make the emulator whose clock counts instructions (`bench apf --wall-clock`, and `nested` \
         without --counted, do without it)",
    )?;
    let accel = format!("tcg,thread=single,{CODE_BUFFER}");
    let mut options: Vec<String> = ["-accel", &accel, "-icount", COUNT].map(str::to_owned).into();
    options.extend(firmware(&installed()?)?);
    Ok(Emulator { program, options })
}

/// Installs what the mended one is built with. Nothing ends for want of it: [`mend_usual`] says what that means.
pub(crate) fn builder() -> Result<()> {
    if !apt::present() {
        return Ok(());
    }
    let outcome = setup::packages(&NEEDS);
    crate::signals::check()?;
    if let Err(error) = outcome {
        progress::line("setup", &format!("the emulator cannot be mended here: {error:#}"));
    }
    Ok(())
}

/// Has [`usual`] give the mended one from now on. Where it cannot be made, says so: the distribution's does,
/// but for a guest that now and then stands still.
pub(crate) fn mend_usual() -> Result<()> {
    let outcome = mended_one("the source of the emulator");
    crate::signals::check()?;
    if let Err(error) = outcome {
        let line = format!(
            "{error:#}; the distribution's is used, which may deliver an interrupt twice: a guest may then \
             stand still (ARCHITECTURE.md, \"The bed\")"
        );
        progress::line("emulator", &line);
    }
    Ok(())
}

/// The mended one, built if the cache does not have it.
fn mended_one(what: &str) -> Result<PathBuf> {
    apt::require(what)?;
    installed()?;
    setup::packages(&NEEDS)?;
    let (key, version) = key()?;
    let dir = cache::entry(CACHED, key, |dir| build(dir, &version))?;
    let program = dir.join(NAME);
    if !runs(&program) {
        let message = format!("{} does not run: remove {}", program.display(), dir.display());
        return Err(Exit::error(exit::CANNOT, message));
    }
    Ok(program)
}

/// The mended one, if the cache has it.
fn built() -> Result<Option<PathBuf>> {
    // Without what it is built with, it has not been built.
    let Ok((key, _)) = key() else { return Ok(None) };
    let program = cache::place(CACHED, key)?.join(NAME);
    Ok(runs(&program).then_some(program))
}

/// Is it there, with the libraries that it was built for?
fn runs(program: &Path) -> bool {
    child::output(Command::new(program).arg("--version")).is_ok()
}

/// What the cache knows the mended one by, and the version of its source.
fn key() -> Result<(Key, String)> {
    let version =
        child::output(Command::new("dpkg-query").args(["-W", "-f", "${source:Version}", PACKAGE]))?;
    let gcc = child::output(Command::new("gcc").arg("--version"))?;
    let key = Key::default()
        .with("source", &version)
        .with("mend", MENDED)
        .with("configure", CONFIGURE.join(" "))
        .with("gcc", gcc.lines().next().unwrap_or_default())
        .with("recipe", RECIPE);
    Ok((key, version))
}

/// The firmware is the distribution's, and so is the place to look for it.
fn firmware(distribution: &Path) -> Result<Vec<String>> {
    let dirs = child::output(Command::new(distribution).args(["-L", "help"]))?;
    Ok(dirs.lines().flat_map(|dir| ["-L".to_owned(), dir.to_owned()]).collect())
}

fn build(dir: &Path, version: &str) -> Result<()> {
    let step = Step::begin("emulator", &format!("building QEMU {version} with a mend"));
    let log = paths::log("emulator")?;
    let work = dir.join("work");
    let tree = work.join("source");
    paths::create_dir(&work)?;
    let version = apt_source::unpack(&step, ("qemu", version), &work, &tree, &log)?;
    mend(&tree)?;
    // Firmware is not built, and what the distribution's source leaves out cannot be found.
    fs::write(tree.join("pc-bios/meson.build"), "roms = []\n")
        .context("cannot leave QEMU's firmware out")?;
    step.note("configuring");
    let build = work.join("build");
    paths::create_dir(&build)?;
    let mut configure = Command::new(tree.join("configure"));
    // What this user builds other things with is no part of it.
    for variable in ["CC", "CFLAGS", "LDFLAGS", "PKG_CONFIG", "PKG_CONFIG_PATH", "PYTHON"] {
        configure.env_remove(variable);
    }
    configure.env("PATH", SYSTEM);
    child::run(&step, configure.args(CONFIGURE).current_dir(&build), &log)?;
    let jobs = thread::available_parallelism().map_or(1, usize::from);
    let mut ninja = Command::new("ninja");
    ninja.env("PATH", SYSTEM).arg("-C").arg(&build).arg(format!("-j{jobs}")).arg(NAME);
    child::run_noting(&step, &mut ninja, &log, |_, line| line.to_owned())?;
    paths::copy(&build.join(NAME), &dir.join(NAME))?;
    child::run(&step, Command::new("strip").arg(dir.join(NAME)), &log)?;
    step.note("removing the source tree");
    cache::clear(&work)?;
    step.done(&format!("built QEMU {version} with a mend"));
    Ok(())
}

/// Adds the line.
fn mend(tree: &Path) -> Result<()> {
    let Some(file) = SOURCES.iter().map(|name| tree.join(name)).find(|file| file.is_file()) else {
        bail!("this QEMU has no {}", SOURCES.join(" or "));
    };
    let text = String::from_utf8_lossy(&paths::read(&file)?).into_owned();
    let text = mended(&text).with_context(|| {
        let file = file.strip_prefix(tree).unwrap_or(&file);
        format!("{} of this QEMU injects interrupts in another way", file.display())
    })?;
    fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()))
}

/// The source with the line added, if it has the one place for it.
fn mended(text: &str) -> Option<String> {
    (text.matches(DELIVERY).count() == 1).then(|| text.replacen(DELIVERY, MENDED, 1))
}

#[cfg(test)]
mod tests {
    use super::mended;

    /// Of QEMU 7.2, helper_vmrun().
    const SVM_HELPER: &str = r#"
        switch (event_inj & SVM_EVTINJ_TYPE_MASK) {
        case SVM_EVTINJ_TYPE_INTR:
            cs->exception_index = vector;
            env->error_code = event_inj_err;
            env->exception_is_int = 0;
            env->exception_next_eip = -1;
            qemu_log_mask(CPU_LOG_TB_IN_ASM, "INTR");
            /* XXX: is it always correct? */
            do_interrupt_x86_hardirq(env, vector, 1);
            break;
        case SVM_EVTINJ_TYPE_NMI:
            cs->exception_index = EXCP02_NMI;
            env->error_code = event_inj_err;
            env->exception_is_int = 0;
            env->exception_next_eip = env->eip;
            qemu_log_mask(CPU_LOG_TB_IN_ASM, "NMI");
            cpu_loop_exit(cs);
            break;
"#;

    #[test]
    fn the_line_is_added_where_there_is_one_place_for_it() {
        let source = SVM_HELPER;
        let after = mended(source).unwrap();
        assert!(after.contains(
            "(env, vector, 1);\n            cs->exception_index = -1;\n            break;"
        ));
        assert_eq!(after.lines().count(), source.lines().count() + 1);
        assert_eq!(mended(&after), None, "mended already");
        assert_eq!(mended(&source.repeat(2)), None);
        assert_eq!(mended(""), None);
    }
}

//! The interactive shell on the console.

use std::fs::{self, File, OpenOptions};
use std::io;

use crate::init::{self, Asked, Signals, say};
use crate::{procfs, sys};

/// Runs a shell on the console until it ends, or until someone asks for another end of the guest.
pub(crate) fn run(signals: &Signals) -> io::Result<Asked> {
    init::install_busybox()?;
    fs::create_dir_all("/root")?;
    let cpus = sys::cpus()?.len();
    say!(
        "Linux {} on {cpus} CPU{} with {} MiB of demand-paged memory.",
        procfs::kernel_release()?,
        if cpus == 1 { "" } else { "s" },
        procfs::meminfo_kib("MemTotal")? / 1024,
    );
    say!("`exit`, Ctrl-D or `poweroff` ends it; /bin has the commands of busybox.");
    let terminal = terminal()?;
    let mut shell = init::command("/bin/sh");
    shell
        .arg("-i")
        .current_dir("/root")
        .stdin(terminal.try_clone()?)
        .stdout(terminal.try_clone()?)
        .stderr(terminal);
    let shell = sys::in_own_session(&mut shell, true)
        .spawn()
        .map_err(|e| io::Error::new(e.kind(), format!("cannot start /bin/sh: {e}")))?
        .id();
    loop {
        sys::wait_readable([signals.file()], None)?;
        while let Some(asked) = signals.next() {
            match asked {
                // One signal may stand for several ended children.
                Asked::Reap => {
                    while let Some(pid) = sys::reap_one() {
                        if pid == shell {
                            return Ok(Asked::PowerOff);
                        }
                    }
                }
                end => return Ok(end),
            }
        }
    }
}

/// The terminal behind `/dev/console`, which itself cannot be opened as a controlling terminal:
/// without one there is no Ctrl-C.
fn terminal() -> io::Result<File> {
    let active = fs::read_to_string("/sys/class/tty/console/active")?;
    let path = match last_console(&active) {
        Some(name) => format!("/dev/{name}"),
        None => "/dev/console".to_owned(),
    };
    OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path)
        .map_err(|e| io::Error::new(e.kind(), format!("cannot open the terminal {path}: {e}")))
}

/// The console that `/dev/console` stands for: the last of the active ones.
fn last_console(active: &str) -> Option<&str> {
    active.split_ascii_whitespace().next_back()
}

#[cfg(test)]
mod tests {
    use super::last_console;

    #[test]
    fn the_last_console_counts() {
        assert_eq!(last_console("ttyS0\n"), Some("ttyS0"));
        assert_eq!(last_console("tty0 ttyS1\n"), Some("ttyS1"));
        assert_eq!(last_console("\n"), None);
    }
}

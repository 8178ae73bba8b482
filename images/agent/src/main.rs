//! The guest agent: PID 1 of nowait's test guest.
//!
//! ```text
//!   start -> READY_LINE on the console -> mount -> nowait.agent= on the kernel command line
//!     shell      a shell on the console; power off when it ends
//!     serve      requests from the host on the second UART (module `serve`)
//!     poweroff | reboot | panic      at once
//! ```
//!
//! PID 1 must not end, since that is a kernel panic: whatever goes wrong is printed on the console
//! and the guest powers off.

mod exec;
mod init;
mod lines;
mod procfs;
mod serve;
mod shell;
mod sys;
mod workload;

use std::io;

use init::{Asked, Signals, say};
use nowait_wire::agent::{Mode, READY_LINE};

fn main() {
    init::ensure_console();
    // Boot is timed to this line: nothing that takes time may come before it.
    say!("{READY_LINE}");
    if std::process::id() != 1 {
        say!("nowait-agent: this is PID 1 of a test guest and does nothing elsewhere");
        std::process::exit(2);
    }
    std::panic::set_hook(Box::new(|panic| {
        say!("nowait-agent: {panic}");
        init::power_off();
    }));
    match run() {
        Ok(Asked::Reboot) => init::reboot(),
        Ok(Asked::PowerOff | Asked::Reap) => {}
        Err(e) => say!("nowait-agent: {e}"),
    }
    init::power_off()
}

fn run() -> io::Result<Asked> {
    init::mount_all()?;
    let cmdline = std::fs::read_to_string("/proc/cmdline")?;
    let mode = Mode::from_cmdline(&cmdline).map_err(|value| {
        let known = Mode::ALL.map(|(_, name)| name).join(", ");
        io::Error::other(format!(
            "nowait.agent={value} on the kernel command line is unknown: use one of {known}"
        ))
    })?;
    match mode {
        Mode::Shell => shell::run(&Signals::new()?),
        Mode::Serve => serve::run(&Signals::new()?),
        Mode::PowerOff => Ok(Asked::PowerOff),
        Mode::Reboot => Ok(Asked::Reboot),
        Mode::Panic => init::panic_kernel(),
    }
}

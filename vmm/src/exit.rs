//! How a run ends, and the exit code of the process that goes with it.
//!
//! nowait's own codes are even; the odd ones belong to a guest that uses the debug-exit port, which
//! ends with `(value << 1) | 1` as QEMU's `isa-debug-exit` has it. [`TABLE`] is what `nowait --help`
//! prints and what README.md quotes.

use serde::Serialize;

/// Exit code: the guest powered off, or the command did its work.
pub const OK: u8 = 0;
/// Exit code: the command line is wrong.
pub const USAGE: u8 = 2;
/// Exit code: an operand is wrong (kernel, initrd, memory, a file …).
pub const OPERAND: u8 = 4;
/// Exit code: this host cannot do it.
pub const HOST: u8 = 6;
/// Exit code: the guest asked for a reset.
pub const RESET: u8 = 8;
/// Exit code: a vCPU shut down with a triple fault.
pub const TRIPLE_FAULT: u8 = 10;
/// Exit code: the guest kernel reported a panic through pvpanic.
pub const PANIC: u8 = 12;
/// Exit code: the run failed (VMM, KVM, agent channel, time-out, an output).
pub const FAILURE: u8 = 14;
/// Exit code: the user or a signal ended the run.
pub const STOPPED: u8 = 16;
/// Exit code: a measurement is incomplete or found data errors.
pub const MEASUREMENT: u8 = 18;

/// Exit code of `nowait stall` alone: a gate failed. Odd, since others' scripts expect it; no guest can end
/// with it, for `stall` passes no debug exit on.
pub const GATE: u8 = 3;

/// The documented table of exit codes: code and meaning.
pub const TABLE: &[(&str, &str)] = &[
    ("0", "the guest powered off; the command did its work"),
    ("2", "the command line is wrong"),
    ("3", "`nowait stall`: a gate failed (--fail-if, --baseline)"),
    (
        "4",
        "an operand is wrong: kernel, initrd, memory size, a store that cannot be opened, a file that cannot be read or written",
    ),
    (
        "6",
        "this host cannot do it: KVM, userfaultfd, a permission; `nowait doctor` says what to do",
    ),
    ("8", "the guest asked for a reset (reboot)"),
    ("10", "the guest shut down with a triple fault"),
    ("12", "the guest kernel panicked (seen through the pvpanic device)"),
    (
        "14",
        "the run failed: the VMM, KVM, the agent channel, --timeout, or standard output that could not be written",
    ),
    ("16", "the user (Ctrl-A x) or a signal ended the run"),
    ("18", "a measurement is incomplete or found data errors"),
    ("odd", "the guest wrote a value to the debug-exit port: (value << 1) | 1"),
];

/// Why a guest stopped.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "reason", rename_all = "snake_case")]
pub enum ExitReason {
    /// ACPI S5.
    PowerOff,
    /// A reset through the ACPI reset register, port 0xcf9 or the keyboard controller.
    Reset,
    /// KVM_EXIT_SHUTDOWN.
    TripleFault {
        /// The vCPU that shut down.
        vcpu: u32,
    },
    /// A guest panic, seen through pvpanic.
    Panic,
    /// The debug-exit port.
    DebugExit {
        /// The value that the guest wrote.
        value: u8,
    },
    /// Ctrl-A x on the console.
    UserStop,
    /// A signal to the VMM.
    Signal {
        /// Its number.
        signal: i32,
    },
    /// The VMM, KVM or the pager could not go on.
    Failure {
        /// Why, in one line.
        message: String,
    },
}

impl ExitReason {
    /// The exit code of the process.
    #[must_use]
    pub fn code(&self) -> u8 {
        match self {
            Self::PowerOff => OK,
            Self::Reset => RESET,
            Self::TripleFault { .. } => TRIPLE_FAULT,
            Self::Panic => PANIC,
            Self::DebugExit { value } => (value << 1) | 1,
            Self::UserStop | Self::Signal { .. } => STOPPED,
            Self::Failure { .. } => FAILURE,
        }
    }
}

impl std::fmt::Display for ExitReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::PowerOff => f.write_str("the guest powered off"),
            Self::Reset => f.write_str("the guest asked for a reset"),
            Self::TripleFault { vcpu } => write!(f, "vCPU {vcpu} shut down with a triple fault"),
            Self::Panic => f.write_str("the guest kernel panicked"),
            Self::DebugExit { value } => {
                write!(f, "the guest wrote {value:#x} to the debug-exit port")
            }
            Self::UserStop => f.write_str("stopped from the console"),
            Self::Signal { signal } => write!(f, "stopped by signal {signal}"),
            Self::Failure { message } => f.write_str(message),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_codes_are_even_and_distinct_and_debug_exit_is_odd() {
        let own =
            [OK, USAGE, OPERAND, HOST, RESET, TRIPLE_FAULT, PANIC, FAILURE, STOPPED, MEASUREMENT];
        let distinct: std::collections::BTreeSet<u8> = own.into();
        assert_eq!(distinct.len(), own.len());
        assert!(own.iter().all(|code| code % 2 == 0));
        for code in own {
            assert!(TABLE.iter().any(|(shown, _)| *shown == code.to_string()), "{code}");
        }
        assert!(TABLE.iter().any(|(shown, _)| *shown == GATE.to_string()));
        for value in 0..=u8::MAX {
            assert_eq!(ExitReason::DebugExit { value }.code() & 1, 1);
        }
        assert_eq!(ExitReason::DebugExit { value: 0x10 }.code(), 0x21);
    }
}

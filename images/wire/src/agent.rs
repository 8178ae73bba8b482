//! The agent channel: requests to the guest agent and its reports, one JSON object a line on COM2.
//!
//! ```text
//!   agent                        host
//!     | -- Hello ------------------> |
//!     | <-- Request::Run(workload) - |
//!     |    (runs; sends nothing)     |
//!     | -- Report::Result ---------> |      … more runs …
//!     | <-- Request::PowerOff ------ |
//! ```

use serde::{Deserialize, Serialize};

/// Version of this protocol; the host refuses a guest agent with another one.
pub const PROTOCOL: u32 = 2;
/// The longest line in either direction, in bytes, with its newline.
pub const MAX_LINE_BYTES: usize = 256 * 1024;
/// Into how many slices of equal length a run is cut for its time lines.
pub const SLICES: usize = 100;
/// The largest overrun that a heartbeat tells apart, in microseconds; later ones count as this. The
/// histogram's smallest value is 1 us.
pub const MAX_OVERRUN_US: u64 = 60_000_000;
/// The significant decimal digits of an overrun in the histogram.
pub const OVERRUN_DIGITS: u8 = 3;
/// The significant decimal digits of the time of a touch in its histogram, whose bounds are the overrun's.
pub const ACCESS_DIGITS: u8 = 2;
/// The kernel command line parameter that tells the agent what to do; see [`Mode`].
pub const CMDLINE_KEY: &str = "nowait.agent";
/// Where the guest has what [`Request::Record`] wrote down.
pub const TOUCHES_FILE: &str = "/run/touches";
/// What the agent prints on the console as its very first line.
pub const READY_LINE: &str = "nowait-agent: ready";

/// What the agent does after start, as the value of [`CMDLINE_KEY`] on the kernel command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// An interactive shell on the console; the guest powers off when it ends. The default.
    Shell,
    /// Serve requests on the agent channel.
    Serve,
    /// Power off at once (for boot benchmarks).
    PowerOff,
    /// Reboot at once.
    Reboot,
    /// Make the kernel panic (through `/proc/sysrq-trigger`).
    Panic,
}

impl Mode {
    /// All modes with their names on the command line.
    pub const ALL: [(Self, &'static str); 5] = [
        (Self::Shell, "shell"),
        (Self::Serve, "serve"),
        (Self::PowerOff, "poweroff"),
        (Self::Reboot, "reboot"),
        (Self::Panic, "panic"),
    ];

    /// The mode that a kernel command line asks for; the last one given wins.
    ///
    /// # Errors
    /// The unknown value.
    pub fn from_cmdline(cmdline: &str) -> Result<Self, String> {
        let value = cmdline
            .split_ascii_whitespace()
            .filter_map(|word| word.strip_prefix(CMDLINE_KEY)?.strip_prefix('='))
            .next_back();
        let Some(value) = value else {
            return Ok(Self::Shell);
        };
        Self::ALL
            .iter()
            .find(|(_, name)| *name == value)
            .map(|(mode, _)| *mode)
            .ok_or_else(|| value.to_owned())
    }
}

/// From the host to the agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case")]
pub enum Request {
    /// Run one workload and report its result.
    Run(Workload),
    /// As [`Request::Run`], and write down which pages its threads touch, in their order: the file
    /// [`TOUCHES_FILE`] has the first `touches` of them, for each the page's number in two bytes, the
    /// lower first.
    Record {
        /// What to run.
        workload: Workload,
        /// How many touches are written down at most.
        touches: u32,
    },
    /// Run a command with `/bin/sh -c` and report its exit status and output.
    Exec {
        /// The command line for the shell.
        command: String,
    },
    /// Power the guest off.
    PowerOff,
}

/// One measured run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Workload {
    /// What the threads do.
    pub kind: Kind,
    /// Faulting threads; 0 with [`Kind::Idle`] and [`Kind::Command`].
    pub threads: u32,
    /// How long the run lasts, in milliseconds; with [`Kind::Command`] how long the command may take.
    pub duration_ms: u32,
    /// How long the threads run before the run, unmeasured, in milliseconds. With [`Pressure::Limit`].
    #[serde(default)]
    pub warm_up_ms: u32,
    /// Pages of the buffer that the threads touch.
    pub pages: u32,
    /// The heartbeat's period, in microseconds.
    pub heartbeat_us: u32,
    /// What takes pages of the buffer out of memory.
    #[serde(default)]
    pub pressure: Pressure,
    /// Threads that compute beside the faulting ones and touch no page of the buffer.
    #[serde(default)]
    pub compute: u32,
    /// How many of 100 pages of the buffer compress well; the others do not compress.
    #[serde(default = "half")]
    pub compressible_percent: u8,
    /// How many of 100 touches of [`Kind::User`] write to the page. With [`Pressure::Limit`].
    #[serde(default)]
    pub write_percent: u8,
    /// What `/bin/sh -c` runs with [`Kind::Command`].
    #[serde(default)]
    pub command: String,
}

impl Workload {
    /// A second of nothing but the heartbeat.
    pub const IDLE: Self = Self {
        kind: Kind::Idle,
        threads: 0,
        duration_ms: 1000,
        warm_up_ms: 0,
        pages: 0,
        heartbeat_us: 1000,
        pressure: Pressure::Evict,
        compute: 0,
        compressible_percent: HALF_PERCENT,
        write_percent: 0,
        command: String::new(),
    };
}

/// What [`Workload::compressible_percent`] is by default: a store has something for each of its tiers.
pub const HALF_PERCENT: u8 = 50;

fn half() -> u8 {
    HALF_PERCENT
}

/// What takes the pages of a workload out of memory, and with it how they are touched.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pressure {
    /// The agent has all of them evicted before the run, through the paging port. Each is touched
    /// once, and the run ends early when all have been.
    #[default]
    Evict,
    /// The host's resident limit, which leaves no room for the whole buffer. The agent asks for
    /// nothing; its threads touch pages again and again until the time is over.
    Limit {
        /// Which pages they touch how often.
        access: Access,
        /// Seeds their order, so that a run can be repeated.
        seed: u64,
    },
}

/// Which pages the threads of a run under a limit touch how often.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Access {
    /// All pages alike.
    Random,
    /// Few pages often: the k-th most popular one about 1/k as often as the first.
    Zipf,
    /// One after the other, round and round; each thread begins at a place of its own.
    Sequential,
    /// A working set of a quarter of the pages, at random; another one after every quarter of the run.
    Phases,
}

/// What the faulting threads of a workload do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Only the heartbeat.
    Idle,
    /// Read pages from user mode.
    User,
    /// Let the kernel write to pages: `read(2)` into them (`copy_to_user`).
    Copy,
    /// Run a command of the user's own.
    Command,
}

/// From the agent to the host.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "report", rename_all = "snake_case")]
pub enum Report {
    /// The agent is up.
    Hello {
        /// [`PROTOCOL`] of the agent.
        protocol: u32,
        /// The guest kernel's release (`uname -r`).
        kernel: String,
        /// Processors online in the guest.
        cpus: u32,
        /// Memory that the guest kernel manages, in KiB.
        mem_total_kib: u64,
    },
    /// A run is over.
    Result(RunResult),
    /// A command is over.
    Exec {
        /// Its exit status; `128 + signal` when a signal ended it.
        status: i32,
        /// The first part of its standard output and error together, lossily as UTF-8.
        output: String,
    },
    /// A request could not be carried out.
    Error {
        /// Why, in one line.
        message: String,
    },
    /// Never sent by the agent: the VMM writes it behind each [`Report::Result`] that it passes on.
    Host(HostStalls),
}

/// What the VMM saw of a run, from the agent's mark at its start to that at its end
/// ([`crate::paging::MARK_PORT`]).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostStalls {
    /// Whether faults come to the vCPUs' threads, so that stalls can be seen. With `--apf host` and
    /// `kernel` they stay inside KVM.
    pub visible: bool,
    /// Whether both marks came.
    pub marked: bool,
    /// Between the marks, in microseconds of the host's clock.
    pub elapsed_us: u64,
    /// Stalls by cause; causes without any are left out.
    pub causes: Vec<CauseStalls>,
    /// Stalls by vCPU.
    pub vcpus: Vec<VcpuStalls>,
    /// Where pages came from, in the same time.
    pub tiers: TierCounts,
}

/// Where pages came from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TierCounts {
    /// Never touched before: zero.
    pub zero: u64,
    /// In memory, but not mapped.
    pub resident: u64,
    /// In the store and at hand: compressed or same-filled.
    pub at_hand: u64,
    /// By I/O.
    pub fetched: u64,
    /// Of these, ahead of a fault.
    pub prefetched: u64,
}

/// The stalls of one cause: from the fault to the entry into the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CauseStalls {
    /// Why the vCPU did not run.
    pub cause: Cause,
    /// All together, in microseconds.
    pub total_us: u64,
    /// Their lengths in microseconds: an HdrHistogram in its V2 encoding, as base64.
    pub us_hdr: String,
}

/// Why a vCPU did not run guest code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cause {
    /// A page that was never touched was made.
    Zero,
    /// A page in memory was mapped.
    Resident,
    /// A page was filled from what the store has at hand.
    AtHand,
    /// Another vCPU, or the host, was at the page.
    Joined,
    /// A page needed I/O, and the vCPU's thread waited for it.
    Waited,
    /// A page needed I/O, and the guest was told, which took this long.
    Told,
    /// A page needed I/O, and the vCPU was halted artificially; interrupts got through.
    Halted,
}

impl Cause {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Zero,
        Self::Resident,
        Self::AtHand,
        Self::Joined,
        Self::Waited,
        Self::Told,
        Self::Halted,
    ];

    /// Its name, as in JSON.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Zero => "zero",
            Self::Resident => "resident",
            Self::AtHand => "at_hand",
            Self::Joined => "joined",
            Self::Waited => "waited",
            Self::Told => "told",
            Self::Halted => "halted",
        }
    }
}

/// The stalls of one vCPU.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuStalls {
    /// How many there were.
    pub count: u64,
    /// All together, in microseconds.
    pub total_us: u64,
    /// In each of [`SLICES`] slices of the run, for how long the vCPU did not run for it, in microseconds.
    pub slices_us: Vec<u64>,
}

/// What one run gave.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunResult {
    /// The workload that ran.
    pub workload: Workload,
    /// From the first touch to the end of the last thread, in microseconds of the guest's clock.
    pub elapsed_us: u64,
    /// Touches of a page whose bytes were checked; with [`Pressure::Limit`] at least one of each thread.
    pub pages_touched: u64,
    /// Of these, touches that found other bytes than had to be there.
    pub data_errors: u64,
    /// Units of work that the computing threads did; they mean something only in comparison.
    #[serde(default)]
    pub compute_units: u64,
    /// How long each touch took, from the access to the instruction's (or the system call's) completion,
    /// in microseconds: an HdrHistogram in its V2 encoding, as base64. Empty without faulting threads.
    #[serde(default)]
    pub access_us_hdr: String,
    /// The command's exit status, or 128 and the signal that ended it; with [`Kind::Command`].
    #[serde(default)]
    pub status: Option<i32>,
    /// The first part of the command's output, lossily as UTF-8.
    #[serde(default)]
    pub output: String,
    /// One for each guest CPU: the wake-up overrun.
    pub heartbeats: Vec<Heartbeat>,
}

/// The wake-up overrun of one guest CPU's heartbeat.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Heartbeat {
    /// The guest CPU.
    pub cpu: u32,
    /// Deadlines that passed while the run lasted; each has one sample, a late one included.
    pub deadlines: u64,
    /// The overruns in microseconds: an HdrHistogram in its V2 encoding, as base64.
    pub overrun_us_hdr: String,
    /// The longest overrun in each of [`SLICES`] slices of the run, in microseconds.
    #[serde(default)]
    pub slices_us: Vec<u64>,
}

/// Why a line of the channel was refused.
#[derive(Debug, thiserror::Error)]
pub enum LineError {
    /// The line is not JSON of the expected shape.
    #[error("the agent channel carried a line that is no message: {0}")]
    Json(#[from] serde_json::Error),
    /// The line is longer than [`MAX_LINE_BYTES`].
    #[error("the agent channel carried a line of more than {MAX_LINE_BYTES} bytes")]
    TooLong,
}

/// Encodes a message as one line with its newline.
///
/// # Errors
/// When the message does not fit in [`MAX_LINE_BYTES`].
pub fn encode_line<T: Serialize>(message: &T) -> Result<Vec<u8>, LineError> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    if line.len() > MAX_LINE_BYTES { Err(LineError::TooLong) } else { Ok(line) }
}

/// Decodes one line; the newline may be there or not.
///
/// # Errors
/// When the line is too long or is not a message of this type.
pub fn decode_line<T: for<'de> Deserialize<'de>>(line: &[u8]) -> Result<T, LineError> {
    if line.len() > MAX_LINE_BYTES {
        return Err(LineError::TooLong);
    }
    Ok(serde_json::from_slice(line)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_mode_comes_from_the_last_parameter() {
        assert_eq!(Mode::from_cmdline("console=ttyS0 quiet"), Ok(Mode::Shell));
        assert_eq!(Mode::from_cmdline("nowait.agent=serve quiet"), Ok(Mode::Serve));
        let twice = "nowait.agent=serve nowait.agent=poweroff";
        assert_eq!(Mode::from_cmdline(twice), Ok(Mode::PowerOff));
        assert_eq!(Mode::from_cmdline("nowait.agent=x"), Err("x".into()));
        assert_eq!(Mode::from_cmdline("nowait.agents=x"), Ok(Mode::Shell));
    }

    #[test]
    fn messages_come_back_as_they_were() {
        let workload = Workload {
            kind: Kind::Copy,
            threads: 8,
            duration_ms: 2000,
            warm_up_ms: 100,
            pages: 512,
            heartbeat_us: 1000,
            pressure: Pressure::Limit { access: Access::Zipf, seed: u64::MAX },
            compute: 2,
            compressible_percent: 70,
            write_percent: 30,
            command: "true".into(),
        };
        let request = Request::Run(workload.clone());
        let line = encode_line(&request).unwrap();
        assert_eq!(decode_line::<Request>(&line).unwrap(), request);
        let report = Report::Result(RunResult {
            workload,
            elapsed_us: 5,
            pages_touched: 6,
            data_errors: 0,
            compute_units: 7,
            access_us_hdr: "AAA=".into(),
            status: Some(3),
            output: "done".into(),
            heartbeats: vec![Heartbeat {
                cpu: 0,
                deadlines: 2,
                overrun_us_hdr: "AA==".into(),
                slices_us: vec![1, 2],
            }],
        });
        let line = encode_line(&report).unwrap();
        assert_eq!(decode_line::<Report>(&line).unwrap(), report);
    }

    #[test]
    fn a_request_without_pressure_evicts() {
        let line = br#"{"request":"run","kind":"user","threads":1,"duration_ms":9,"pages":2,
            "heartbeat_us":1000}"#;
        let Request::Run(workload) = decode_line(line).unwrap() else { panic!() };
        assert_eq!(workload.pressure, Pressure::Evict);
    }

    #[test]
    fn a_line_over_the_limit_is_refused_both_ways() {
        let request = Request::Exec { command: "x".repeat(MAX_LINE_BYTES) };
        assert!(matches!(encode_line(&request), Err(LineError::TooLong)));
        assert!(matches!(
            decode_line::<Request>(&vec![b'{'; MAX_LINE_BYTES + 1]),
            Err(LineError::TooLong)
        ));
    }

    proptest! {
        #[test]
        fn garbage_is_an_error(bytes in prop::collection::vec(any::<u8>(), 0..512)) {
            let _ = decode_line::<Report>(&bytes);
        }
    }
}

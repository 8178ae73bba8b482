//! `nowait run`: its arguments, and the checked description of a run that the machine is built from.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, ValueEnum};
use guest_memory::{MIN_RESIDENT_LIMIT_BYTES, StoreSpec};
use nowait_wire::agent;

use crate::boot::detect::{Kernel, KernelError};
use crate::boot::layout::CMDLINE_MAX_BYTES;
use crate::kvm::cpuid::Apf;
use crate::operand::{self, FileId};
use crate::paging::{FaultSource, Threshold, host};
use crate::size;

/// What every kernel command line begins with.
///
/// `panic=-1` makes a panic end the guest; `swiotlb=noforce` keeps Linux from setting 64 MiB aside for
/// bounce buffers that no device here needs.
pub const DEFAULT_CMDLINE: &str = "console=ttyS0 panic=-1 swiotlb=noforce";
/// The smallest guest, in bytes.
pub const MIN_MEMORY_BYTES: u64 = 4 << 20;
/// The most processors of a guest.
pub const MAX_CPUS: i64 = 32;
/// The longest file of agent requests, in bytes.
pub const MAX_REQUESTS_BYTES: u64 = 1 << 20;

/// Launch a guest whose RAM is demand-paged by userfaultfd.
#[derive(Args, Clone, Debug)]
pub struct RunArgs {
    /// Kernel: an ELF vmlinux (PVH), a bzImage, or a Multiboot 1 ELF32 kernel
    #[arg(long, value_name = "FILE")]
    pub kernel: PathBuf,
    /// Initial RAM disk, or the module of a Multiboot kernel
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,
    /// Appended to the kernel command line "console=ttyS0 panic=-1 swiotlb=noforce"
    /// (a Multiboot kernel gets only this)
    #[arg(
        long,
        value_name = "TEXT",
        default_value = "",
        hide_default_value = true,
        allow_hyphen_values = true
    )]
    pub cmdline: String,
    /// Number of processors, 1 to 32
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=MAX_CPUS), allow_negative_numbers = true)]
    pub cpus: u32,
    /// Guest RAM: a size such as 128M or 4G; more than the host has is fine
    #[arg(long, value_name = "SIZE", default_value = "128M", allow_hyphen_values = true)]
    pub memory: String,
    /// Who handles async page faults [default: user, or kernel where the host cannot do that]
    #[arg(long, value_enum)]
    pub apf: Option<Apf>,
    /// With --apf user, a page that is expected sooner is waited for, without telling the guest: a time
    /// such as 50us, up to an hour, or "auto" for what telling it costs on this host [default: auto]
    #[arg(long, value_name = "TIME", allow_hyphen_values = true)]
    pub apf_threshold: Option<Threshold>,
    /// How faults come to the pager: "marker" goes with --apf user and off, "uffd" with the others
    #[arg(long, value_enum, value_name = "SOURCE")]
    pub fault_source: Option<FaultSource>,
    /// How much of guest RAM may be in memory, compressed pages included: a size of at least 4M
    #[arg(long, value_name = "SIZE", allow_hyphen_values = true)]
    pub resident_limit: Option<String>,
    /// Where pages go that the guest agent has evicted: "store", or "idle" for out of its mapping only,
    /// to measure faults on pages that are at hand
    #[arg(long, value_enum, value_name = "PLACE", default_value_t = EvictTo::Store)]
    pub evict_to: EvictTo,
    /// Do not fetch the neighbours of a page that comes back
    #[arg(long)]
    pub no_prefetch: bool,
    /// Where evicted pages go: one layer or more from front to back, joined by + (--help has them all)
    #[arg(long, value_name = "STORE", default_value = "memory", 
        long_help = format!("Where evicted pages go. {}", StoreSpec::SYNTAX))]
    pub store: StoreSpec,
    /// Never-touched RAM that one fault brings in, a power of two of at least 4K; less near the limit
    #[arg(long, value_name = "SIZE", default_value = "1M", allow_hyphen_values = true)]
    pub fault_around: String,
    /// Have all RAM present at start (for comparison)
    #[arg(long)]
    pub populate: bool,
    /// Add QEMU's isa-debug-exit device at port 0xf4: exit code (value << 1) | 1
    #[arg(long)]
    pub debug_exit: bool,
    /// The first UART: this terminal (Ctrl-A x ends the run, Ctrl-A h helps), or nothing
    #[arg(long, value_enum, default_value_t = ConsoleKind::Stdio)]
    pub console: ConsoleKind,
    /// Requests for the guest agent, a file or a pipe with one JSON object a line
    ///
    /// {"request":"exec","command":"uname -a"}       a shell command
    /// {"request":"run","kind":"user","threads":8,"duration_ms":2000,"pages":64,"heartbeat_us":1000}
    ///                        evicted pages are touched; kind is "idle", "user" or "copy"
    /// {"request":"power_off"}                       the end of the guest
    ///
    /// The agent takes them because "nowait.agent=serve" is added to the kernel command line; each
    /// follows the report of the one before (--report).
    #[arg(long, value_name = "FILE", verbatim_doc_comment)]
    pub requests: Option<PathBuf>,
    /// Where the agent's reports go, one JSON object a line ("-" is standard output)
    #[arg(long, value_name = "FILE")]
    pub report: Option<PathBuf>,
    /// Write how the run went to FILE when it ends ("-" is standard output)
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Write the life of every fault to FILE when the run ends, for ui.perfetto.dev or chrome://tracing: the
    /// last million steps, in 48 MiB of memory at most
    #[arg(long, value_name = "FILE")]
    pub trace: Option<PathBuf>,
    /// Serve HTTP on a Unix socket (mode 0600) that is made here and removed at the end
    ///
    /// GET /metrics    counters and latencies, as Prometheus text
    /// GET /pages      pages by state in ?cells=N parts of RAM, as JSON
    /// POST /pause     keep the guest's processors out of the guest
    /// POST /resume    let them go on, also when they are paused because the store does not answer
    /// PUT /limit      another --resident-limit from now on: a size such as "64M", or "none"
    /// PUT /threshold  another --apf-threshold from now on
    /// POST /evict     move all of guest RAM to the store, once
    ///
    /// nowait top FILE shows it all, live;
    /// curl --unix-socket FILE http://nowait/metrics
    #[arg(long, value_name = "FILE", verbatim_doc_comment)]
    pub control: Option<PathBuf>,
    /// End the run after this many seconds (exit code 14)
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..), allow_negative_numbers = true)]
    pub timeout: Option<u64>,
}

/// What the first UART is joined to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ConsoleKind {
    /// Standard input and output.
    Stdio,
    /// Nothing.
    None,
}

/// Where pages go that the guest agent has evicted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum EvictTo {
    /// To the store.
    #[default]
    Store,
    /// Out of the guest mapping; they stay in memory.
    Idle,
}

impl std::fmt::Display for EvictTo {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Store => "store",
            Self::Idle => "idle",
        })
    }
}

/// Why a description of a run was refused.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// The kernel.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// A size.
    #[error("{option}: {source}")]
    Size {
        /// The option.
        option: &'static str,
        /// Why.
        source: size::SizeError,
    },
    /// A size that no guest can have.
    #[error("--memory {0}")]
    Memory(#[from] MemoryError),
    /// A source that this way of handling async page faults cannot have.
    #[error(
        "--fault-source {source_} does not go with --apf {apf}: {apf} needs {needed} (leave --fault-source out)"
    )]
    FaultSource {
        /// What was asked for.
        source_: FaultSource,
        /// With what.
        apf: Apf,
        /// What it needs.
        needed: FaultSource,
    },
    /// A threshold that nobody would look at.
    #[error("--apf-threshold does not go with --apf {0}: only user has a threshold; leave it out")]
    Threshold(Apf),
    /// A limit under the pager's minimum.
    #[error("--resident-limit {0}: give at least {min}", min = size::show(MIN_RESIDENT_LIMIT_BYTES))]
    LimitTooSmall(String),
    /// Not a power of two, or too small or large.
    #[error("--fault-around {0}: give a power of two from 4K to 2M")]
    FaultAround(String),
    /// Too long.
    #[error(
        "--cmdline: the kernel command line has {0} bytes, and kernels take at most {CMDLINE_MAX_BYTES}: shorten it"
    )]
    CmdlineTooLong(usize),
    /// A NUL or a line break.
    #[error(
        "--cmdline: it contains a control character: a kernel command line is one line of text"
    )]
    CmdlineControl,
    /// The requests cannot be read.
    #[error("--requests '{path}': {detail}")]
    Requests {
        /// The file.
        path: PathBuf,
        /// Why, with the line.
        detail: String,
    },
    /// Both on one stream.
    #[error(
        "standard output cannot carry {0} beside another stream: add --console none, or give a file"
    )]
    StdoutTwice(&'static str),
}

/// Why a guest cannot have so much memory; begins with what was given.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MemoryError {
    /// No size.
    #[error("{0}")]
    Size(#[from] size::SizeError),
    /// Too little.
    #[error(
        "{0}: a guest needs at least {min} (a number alone is bytes: write 128M)", min = size::show(MIN_MEMORY_BYTES)
    )]
    TooSmall(String),
    /// Not a whole number of pages.
    #[error("{0}: not a multiple of the page size; give a multiple of 4K")]
    NotAligned(String),
}

/// A checked description of a run.
#[derive(Debug)]
pub struct Spec {
    /// The kernel, open.
    pub kernel: Kernel,
    /// The initrd.
    pub initrd: Option<PathBuf>,
    /// The whole kernel command line.
    pub cmdline: String,
    /// Processors.
    pub cpus: u32,
    /// Guest RAM in bytes.
    pub memory_bytes: u64,
    /// Who handles async page faults.
    pub apf: Apf,
    /// From which expected latency on the guest is told of a page.
    pub apf_threshold: Threshold,
    /// Where evicted pages go.
    pub store: StoreSpec,
    /// How faults come to the pager.
    pub fault_source: FaultSource,
    /// How much of guest RAM may be in memory, in bytes.
    pub resident_limit_bytes: Option<u64>,
    /// Where pages go that the guest agent has evicted.
    pub evict_to: EvictTo,
    /// Fetch neighbours of pages that come back.
    pub prefetch: bool,
    /// Fault-around in bytes.
    pub fault_around_bytes: u64,
    /// All RAM present at start.
    pub populate: bool,
    /// The debug-exit port.
    pub debug_exit: bool,
    /// The first UART.
    pub console: ConsoleKind,
    /// Requests for the agent.
    pub requests: Vec<agent::Request>,
    /// Where they came from.
    pub requests_file: Option<PathBuf>,
    /// Where reports go.
    pub report: Option<PathBuf>,
    /// Where the summary goes.
    pub json: Option<PathBuf>,
    /// Where the trace goes.
    pub trace: Option<PathBuf>,
    /// Where the control socket is.
    pub control: Option<PathBuf>,
    /// The longest run.
    pub timeout: Option<Duration>,
}

const STDOUT: &str = "-";
const PAGE_BYTES: u64 = 4096;
const MAX_FAULT_AROUND_BYTES: u64 = 2 << 20;

impl Spec {
    /// Checks the arguments.
    ///
    /// # Errors
    /// When one is wrong; the message names it.
    pub fn from_args(args: RunArgs) -> Result<Self, SpecError> {
        let kernel = Kernel::open(&args.kernel)?;
        let memory_bytes = memory_bytes(&args.memory)?;
        let fault_around_bytes = fault_around_bytes(&args.fault_around)?;
        let apf = match args.apf {
            Some(apf) => apf,
            // The one that the source asked for goes with, if one was.
            None if args.fault_source == Some(FaultSource::Uffd) => Apf::Kernel,
            None => host::default_apf(),
        };
        let fault_source = fault_source(apf, args.fault_source)?;
        let resident_limit_bytes =
            args.resident_limit.as_deref().map(resident_limit_bytes).transpose()?;
        check_stdout(&args)?;
        let requests = match &args.requests {
            Some(path) => read_requests(path)?,
            None => Vec::new(),
        };
        let multiboot = kernel.format == crate::boot::detect::Format::Multiboot;
        let cmdline = cmdline(&args.cmdline, multiboot, args.requests.is_some())?;
        Ok(Self {
            kernel,
            initrd: args.initrd,
            cmdline,
            cpus: args.cpus,
            memory_bytes,
            apf,
            apf_threshold: threshold(args.apf, args.apf_threshold)?,
            store: args.store,
            fault_source,
            resident_limit_bytes,
            evict_to: args.evict_to,
            prefetch: !args.no_prefetch,
            fault_around_bytes,
            populate: args.populate,
            debug_exit: args.debug_exit,
            console: args.console,
            requests,
            requests_file: args.requests,
            report: args.report,
            json: args.json,
            trace: args.trace,
            control: args.control,
            timeout: args.timeout.map(Duration::from_secs),
        })
    }
}

impl Spec {
    /// The regular files that the run reads, each with what names it: no output may be one of them.
    #[must_use]
    pub fn inputs(&self) -> Vec<(&'static str, FileId)> {
        let file = |name, path: Option<&Path>| Some((name, FileId::at(path?)?));
        let stdin = match self.console {
            ConsoleKind::Stdio => file("standard input", Some(Path::new("/proc/self/fd/0"))),
            ConsoleKind::None => None,
        };
        let kernel = self.kernel.file.metadata().ok().as_ref().and_then(FileId::new);
        [
            kernel.map(|id| ("--kernel", id)),
            file("--initrd", self.initrd.as_deref()),
            file("--requests", self.requests_file.as_deref()),
            stdin,
        ]
        .into_iter()
        .flatten()
        .collect()
    }
}

/// Only one of console, reports and summary may have standard output.
fn check_stdout(args: &RunArgs) -> Result<(), SpecError> {
    let mut streams =
        [(&args.report, "--report"), (&args.json, "--json"), (&args.trace, "--trace")]
            .into_iter()
            .filter(|(path, _)| path.as_deref() == Some(Path::new(STDOUT)))
            .map(|(_, name)| name);
    match (streams.next(), streams.next()) {
        (Some(name), None) if args.console == ConsoleKind::Stdio => {
            Err(SpecError::StdoutTwice(name))
        }
        (_, Some(name)) => Err(SpecError::StdoutTwice(name)),
        _ => Ok(()),
    }
}

/// A guest's memory in bytes.
///
/// # Errors
/// When the text is no size, or no guest can have so much.
pub(crate) fn memory_bytes(text: &str) -> Result<u64, MemoryError> {
    let bytes = size::parse(text)?;
    if bytes < MIN_MEMORY_BYTES {
        return Err(MemoryError::TooSmall(text.into()));
    }
    if !bytes.is_multiple_of(PAGE_BYTES) {
        return Err(MemoryError::NotAligned(text.into()));
    }
    Ok(bytes)
}

fn fault_source(apf: Apf, asked: Option<FaultSource>) -> Result<FaultSource, SpecError> {
    let needed = FaultSource::of(apf);
    match asked {
        Some(source_) if source_ != needed => Err(SpecError::FaultSource { source_, apf, needed }),
        _ => Ok(needed),
    }
}

/// Only an `--apf` that was given refuses it: what the host made of none is not the user's mistake.
fn threshold(apf: Option<Apf>, asked: Option<Threshold>) -> Result<Threshold, SpecError> {
    match (asked, apf) {
        (Some(_), Some(apf)) if apf != Apf::User => Err(SpecError::Threshold(apf)),
        (asked, _) => Ok(asked.unwrap_or(Threshold::Auto)),
    }
}

fn resident_limit_bytes(text: &str) -> Result<u64, SpecError> {
    let option = "--resident-limit";
    let bytes = size::parse(text).map_err(|source| SpecError::Size { option, source })?;
    if bytes < MIN_RESIDENT_LIMIT_BYTES {
        return Err(SpecError::LimitTooSmall(text.into()));
    }
    Ok(bytes)
}

fn fault_around_bytes(text: &str) -> Result<u64, SpecError> {
    let bytes =
        size::parse(text).map_err(|source| SpecError::Size { option: "--fault-around", source })?;
    let fits = (PAGE_BYTES..=MAX_FAULT_AROUND_BYTES).contains(&bytes) && bytes.is_power_of_two();
    if fits { Ok(bytes) } else { Err(SpecError::FaultAround(text.into())) }
}

fn cmdline(extra: &str, multiboot: bool, serve: bool) -> Result<String, SpecError> {
    if extra.chars().any(char::is_control) {
        return Err(SpecError::CmdlineControl);
    }
    let serve = if serve { format!("{}=serve", agent::CMDLINE_KEY) } else { String::new() };
    let parts = if multiboot { ["", extra, ""] } else { [DEFAULT_CMDLINE, extra, &serve] };
    let line = parts.iter().filter(|part| !part.is_empty()).copied().collect::<Vec<_>>().join(" ");
    if line.len() > CMDLINE_MAX_BYTES {
        Err(SpecError::CmdlineTooLong(line.len()))
    } else {
        Ok(line)
    }
}

fn read_requests(path: &Path) -> Result<Vec<agent::Request>, SpecError> {
    let refuse = |detail: String| SpecError::Requests { path: path.to_owned(), detail };
    let text = operand::read_text(path, MAX_REQUESTS_BYTES).map_err(|e| refuse(e.to_string()))?;
    let requests: Vec<_> = text
        .lines()
        .enumerate()
        .filter(|(_, line)| !line.trim().is_empty())
        .map(|(index, line)| {
            agent::decode_line(line.as_bytes())
                .map_err(|error| refuse(format!("line {}: {error}", index + 1)))
        })
        .collect::<Result<_, _>>()?;
    if requests.is_empty() {
        return Err(refuse("there is no request in it: the guest would wait for ever".into()));
    }
    Ok(requests)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_examples_in_the_help_are_requests() {
        #[derive(clap::Parser)]
        struct Cli {
            #[command(flatten)]
            _args: RunArgs,
        }
        let help = <Cli as clap::CommandFactory>::command().render_long_help().to_string();
        let words: Vec<&str> = help.split('{').skip(1).collect();
        for example in &words {
            let example = format!("{{{}}}", example.split_once('}').unwrap().0);
            agent::decode_line::<agent::Request>(example.as_bytes()).unwrap();
        }
        assert_eq!(words.len(), 3, "{help}");
    }

    #[test]
    fn memory_is_checked() {
        assert_eq!(memory_bytes("128M").unwrap(), 128 << 20);
        assert!(matches!(memory_bytes("0"), Err(MemoryError::TooSmall(_))));
        assert!(matches!(memory_bytes("1M"), Err(MemoryError::TooSmall(_))));
        assert!(matches!(memory_bytes("128"), Err(MemoryError::TooSmall(_))));
        assert!(matches!(memory_bytes("134217729"), Err(MemoryError::NotAligned(_))));
        assert!(matches!(memory_bytes("lots"), Err(MemoryError::Size(_))));
    }

    #[test]
    fn the_fault_source_goes_with_the_mode() {
        use FaultSource::{Marker, Uffd};
        for (apf, needed, other) in [
            (Apf::Off, Marker, Uffd),
            (Apf::User, Marker, Uffd),
            (Apf::Host, Uffd, Marker),
            (Apf::Kernel, Uffd, Marker),
        ] {
            assert_eq!(fault_source(apf, None).unwrap(), needed);
            assert_eq!(fault_source(apf, Some(needed)).unwrap(), needed);
            let message = fault_source(apf, Some(other)).unwrap_err().to_string();
            assert!(message.contains(&format!("--fault-source {other}")), "{message}");
            assert!(message.contains(&format!("--apf {apf}")), "{message}");
        }
    }

    #[test]
    fn the_resident_limit_has_a_minimum() {
        assert_eq!(resident_limit_bytes("64M").unwrap(), 64 << 20);
        assert!(matches!(resident_limit_bytes("1M"), Err(SpecError::LimitTooSmall(_))));
        assert!(matches!(resident_limit_bytes("half"), Err(SpecError::Size { .. })));
    }

    #[test]
    fn fault_around_is_a_power_of_two_in_range() {
        assert_eq!(fault_around_bytes("4K").unwrap(), 4096);
        assert_eq!(fault_around_bytes("2M").unwrap(), 2 << 20);
        for bad in ["2K", "12K", "4M", "0"] {
            assert!(fault_around_bytes(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_command_line_is_put_together_and_bounded() {
        assert_eq!(cmdline("", false, false).unwrap(), DEFAULT_CMDLINE);
        assert_eq!(
            cmdline("quiet", false, true).unwrap(),
            format!("{DEFAULT_CMDLINE} quiet nowait.agent=serve")
        );
        assert_eq!(cmdline("a b", true, false).unwrap(), "a b");
        let fits = CMDLINE_MAX_BYTES - DEFAULT_CMDLINE.len() - 1;
        assert!(cmdline(&"x".repeat(fits), false, false).is_ok());
        assert!(matches!(
            cmdline(&"x".repeat(fits + 1), false, false),
            Err(SpecError::CmdlineTooLong(2048))
        ));
        assert!(matches!(cmdline("a\nb", false, false), Err(SpecError::CmdlineControl)));
    }
}

//! Measured runs: heartbeats on every CPU beside threads that touch pages which are not in memory.
//!
//! ```text
//!   fill the pages -> evict them -> start all threads -> gate opens -> run -> results
//!                     (or do not:   heartbeat (one per CPU, SCHED_FIFO)  |
//!                     a limit does) faulting  (SCHED_OTHER, not pinned)  | the same span of time
//! ```

mod compute;
mod course;
mod evict;
mod fault;
mod gate;
mod heartbeat;
mod pattern;
mod record;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, Scope, ScopedJoinHandle};
use std::time::Duration;

use nowait_wire::agent::{Kind, Pressure, RunResult, TOUCHES_FILE, Workload};
use nowait_wire::paging::MARK_LEAD;

use crate::exec;
use crate::sys::{self, MarkPort};
use fault::{Buffer, Faulting};
use gate::Gate;
use heartbeat::RUNNING;
use record::Record;

/// The largest number of faulting threads.
const MAX_THREADS: u32 = 256;
/// The largest number of pages in the buffer.
const MAX_PAGES: u32 = 65_536;
/// The largest number of touches that are written down.
const MAX_TOUCHES: u32 = 1 << 20;
/// The longest run, in milliseconds.
const MAX_DURATION_MS: u32 = 600_000;
/// The shortest and the longest period of the heartbeat, in microseconds.
const HEARTBEAT_US: std::ops::RangeInclusive<u32> = 100..=1_000_000;
/// What must stay available beside the buffer, in KiB: thread stacks and histograms, which are
/// locked in memory, and room for the kernel.
const RESERVE_KIB: u64 = 16 * 1024;
/// The stack of each thread of a run, in bytes; all of it is locked in memory.
const STACK_BYTES: usize = 64 * 1024;
/// From the mark and the opening of the gate to the start, in nanoseconds: enough for all threads to be asleep
/// at their first deadline when it comes. A millisecond of it is for the mark to arrive.
const LEAD_NS: u64 = MARK_LEAD.as_nanos() as u64 + 1_000_000;

/// Why a run could not be made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum WorkloadError {
    /// A number of the request is out of its range.
    #[error("{operand} is {value}, but it must be {range}")]
    Operand { operand: &'static str, value: u32, range: String },
    /// The buffer does not fit into the guest.
    #[error(
        "{pages} pages need {needed_kib} KiB of guest memory and {available_kib} KiB are \
         available: ask for fewer pages or give the guest more memory"
    )]
    TooLarge { pages: u32, needed_kib: u64, available_kib: u64 },
    /// No memory for the pages.
    #[error("cannot map the pages of the workload: {0}")]
    Memory(#[source] io::Error),
    /// The table of frames cannot be read.
    #[error("cannot read /proc/self/pagemap (the guest kernel needs PROC_PAGE_MONITOR): {0}")]
    Pagemap(#[source] io::Error),
    /// A page that was just written has no frame.
    #[error("/proc/self/pagemap names no frame for page {page} of the buffer: {why:?}")]
    NoFrame { page: usize, why: evict::NoFrame },
    /// The request page lies too high for the 32 bits of the paging port.
    #[error("guest frame {0:#x} of the paging request does not fit in 32 bits")]
    HighFrame(u64),
    /// No right to use I/O ports.
    #[error("cannot get the right to use the paging port (iopl; X86_IOPL_IOPERM): {0}")]
    Port(#[source] io::Error),
    /// A paging request could not be encoded.
    #[error("cannot encode a paging request: {0}")]
    Encode(#[source] nowait_wire::paging::DecodeError),
    /// The paging port is not there.
    #[error(
        "the VMM did not answer the paging request: no paging port at {port:#x}",
        port = nowait_wire::paging::PORT
    )]
    NoAnswer,
    /// The VMM refused to evict.
    #[error("the VMM answered a request to evict {asked} pages with {status}, {done} done")]
    Refused { status: String, done: u32, asked: usize },
    /// The file that `read(2)` copies from cannot be made.
    #[error("cannot make the file to read from: {0}")]
    File(#[source] io::Error),
    /// The touches cannot be written down.
    #[error("cannot write {TOUCHES_FILE}: {0}")]
    Touches(#[source] io::Error),
    /// The command did not end.
    #[error("{0}")]
    Command(String),
    /// A thread of the run could not be started or set up.
    #[error("{0}")]
    Thread(String),
    /// Something about the guest cannot be found out.
    #[error("cannot find out {what}: {source}")]
    Guest { what: &'static str, source: io::Error },
}

/// Makes runs, one after the other.
#[derive(Default)]
pub(crate) struct Runner {
    /// Whether the VMM is told when a run begins and ends.
    marks: bool,
    /// The buffer of the last run under a limit. The next one of its size goes on with it: memory that
    /// was given back would have to be fetched, page by page, only to be filled anew.
    kept: Option<Buffer>,
}

impl Runner {
    /// One that tells the VMM when a run begins and ends.
    pub(crate) fn marking() -> Self {
        Self { marks: true, kept: None }
    }

    /// Makes one run.
    pub(crate) fn run(&mut self, workload: &Workload) -> Result<RunResult, WorkloadError> {
        self.run_with(workload, None)
    }

    /// Makes one run, and writes down which pages it touches.
    pub(crate) fn record(
        &mut self,
        workload: &Workload,
        touches: u32,
    ) -> Result<RunResult, WorkloadError> {
        if touches == 0 || touches > MAX_TOUCHES {
            let range = format!("1 to {MAX_TOUCHES}");
            return Err(WorkloadError::Operand { operand: "touches", value: touches, range });
        }
        let record = Arc::new(Record::new(touches));
        let result = self.run_with(workload, Some(Arc::clone(&record)))?;
        std::fs::write(TOUCHES_FILE, record.bytes()).map_err(WorkloadError::Touches)?;
        Ok(result)
    }

    fn run_with(
        &mut self,
        workload: &Workload,
        record: Option<Arc<Record>>,
    ) -> Result<RunResult, WorkloadError> {
        validate(workload)?;
        let cpus = sys::cpus()
            .map_err(|source| WorkloadError::Guest { what: "the CPUs online", source })?;
        // After the eviction, which needs the right to ports, too, and gives it up.
        let marks = || self.marks.then(MarkPort::open).transpose().map_err(WorkloadError::Port);
        if workload.threads == 0 {
            return measure(workload, &cpus, None, marks()?.as_ref());
        }
        let limited = workload.pressure != Pressure::Evict;
        let fits = |buffer: &Buffer| limited && buffer.fits(workload);
        let kept = self.kept.take().filter(fits);
        if kept.is_none() {
            check_memory(workload.pages)?;
        }
        let mut faulting = Faulting::prepare(workload, kept)?;
        let mut wrong = 0;
        if workload.warm_up_ms > 0 {
            let warm_up = Workload { duration_ms: workload.warm_up_ms, ..workload.clone() };
            measure(&warm_up, &cpus, Some(&faulting), None)?;
            wrong = faulting.data_errors();
            faulting = Faulting::prepare(workload, Some(faulting.into_buffer()))?;
        }
        let faulting = faulting.recorded(record);
        let mut result = measure(workload, &cpus, Some(&faulting), marks()?.as_ref());
        if let Ok(result) = &mut result {
            result.data_errors += wrong;
        }
        self.kept = limited.then(|| faulting.into_buffer());
        result
    }
}

fn validate(workload: &Workload) -> Result<(), WorkloadError> {
    let check = |operand, value, range: std::ops::RangeInclusive<u32>| {
        if range.contains(&value) {
            return Ok(());
        }
        let range = match (range.start(), range.end()) {
            (start, end) if start == end => format!("{start}"),
            (start, end) => format!("{start} to {end}"),
        };
        Err(WorkloadError::Operand { operand, value, range })
    };
    check("duration_ms", workload.duration_ms, 1..=MAX_DURATION_MS)?;
    check("heartbeat_us", workload.heartbeat_us, HEARTBEAT_US)?;
    check("compute", workload.compute, 0..=MAX_THREADS)?;
    check("compressible_percent", workload.compressible_percent.into(), 0..=100)?;
    let limited = workload.pressure != Pressure::Evict;
    let most = |most| if limited { most } else { 0 };
    check("warm_up_ms", workload.warm_up_ms, 0..=most(MAX_DURATION_MS))?;
    let writes = workload.kind == Kind::User && limited;
    check("write_percent", workload.write_percent.into(), 0..=if writes { 100 } else { 0 })?;
    match workload.kind {
        Kind::Idle => check("threads of an idle run", workload.threads, 0..=0),
        Kind::Command => check("threads beside a command", workload.threads, 0..=0),
        Kind::User | Kind::Copy => {
            check("threads", workload.threads, 1..=MAX_THREADS)?;
            check("pages", workload.pages, 1..=MAX_PAGES)
        }
    }
}

fn check_memory(pages: u32) -> Result<(), WorkloadError> {
    let available_kib = crate::procfs::meminfo_kib("MemAvailable").map_err(|source| {
        let what = "the available memory";
        WorkloadError::Guest { what, source }
    })?;
    let needed_kib = u64::from(pages) * (sys::PAGE_BYTES as u64 / 1024) + RESERVE_KIB;
    if needed_kib > available_kib {
        return Err(WorkloadError::TooLarge { pages, needed_kib, available_kib });
    }
    Ok(())
}

/// Starts a thread of the run with a small stack.
fn start<'scope, 'env, T: Send + 'scope>(
    scope: &'scope Scope<'scope, 'env>,
    body: impl FnOnce() -> T + Send + 'scope,
) -> Result<ScopedJoinHandle<'scope, T>, WorkloadError> {
    thread::Builder::new()
        .stack_size(STACK_BYTES)
        .spawn_scoped(scope, body)
        .map_err(|e| WorkloadError::Thread(format!("cannot start a thread: {e}")))
}

fn join<T>(thread: ScopedJoinHandle<'_, Option<T>>) -> Result<T, WorkloadError> {
    let ended_early = || WorkloadError::Thread("a thread of the run ended early".into());
    thread.join().map_err(|_| ended_early())?.ok_or_else(ended_early)
}

fn measure(
    workload: &Workload,
    cpus: &[u32],
    faulting: Option<&Faulting>,
    marks: Option<&MarkPort>,
) -> Result<RunResult, WorkloadError> {
    let duration_ns = u64::from(workload.duration_ms) * 1_000_000;
    let (gate, end_ns) = (Gate::default(), AtomicU64::new(RUNNING));
    let (gate, end_ns) = (&gate, &end_ns);
    thread::scope(|scope| {
        let started = || {
            let heartbeats = cpus
                .iter()
                .map(|&cpu| {
                    let beat = (workload.heartbeat_us, duration_ns);
                    start(scope, move || heartbeat::run(cpu, beat, gate, end_ns))
                })
                .collect::<Result<Vec<_>, _>>()?;
            let computing = (0..workload.compute)
                .map(|thread| start(scope, move || compute::run(thread, duration_ns, gate, end_ns)))
                .collect::<Result<Vec<_>, _>>()?;
            let threads = (0..workload.threads)
                .filter_map(|thread| Some((thread, faulting?)))
                .map(|(thread, faulting)| {
                    start(scope, move || faulting.run(thread, duration_ns, gate, end_ns))
                })
                .collect::<Result<Vec<_>, _>>()?;
            let all = heartbeats.len() + computing.len() + threads.len();
            gate.wait_for(all).map_err(WorkloadError::Thread)?;
            Ok((heartbeats, computing, threads))
        };
        let (heartbeats, computing, threads) = started().inspect_err(|_| gate.open(None))?;
        let start_ns = sys::now_ns() + LEAD_NS;
        if workload.kind == Kind::Idle {
            end_ns.store(start_ns + duration_ns, Ordering::Release);
        }
        marks.iter().for_each(|port| port.mark(workload.duration_ms));
        gate.open(Some(start_ns));
        sys::sleep_until(start_ns);
        let mut command = None;
        if workload.kind == Kind::Command {
            let limit = Duration::from_millis(workload.duration_ms.into());
            let ended = exec::run_within(&workload.command, limit);
            end_ns.store(sys::now_ns(), Ordering::Release);
            command = Some(ended.map_err(WorkloadError::Command)?);
        }
        for thread in threads {
            join(thread)?;
        }
        sys::sleep_until(end_ns.load(Ordering::Acquire));
        marks.iter().for_each(|port| port.mark(0));
        let mut compute_units = 0;
        for thread in computing {
            compute_units += join(thread)?;
        }
        let mut results = Vec::new();
        for (thread, &cpu) in heartbeats.into_iter().zip(cpus) {
            results.push(join(thread)?.encode(cpu).map_err(WorkloadError::Thread)?);
        }
        let end_ns = end_ns.load(Ordering::Acquire);
        let access_us_hdr = faulting.map(Faulting::access_us_hdr).transpose()?.unwrap_or_default();
        let (status, output) = command.unzip();
        Ok(RunResult {
            workload: workload.clone(),
            elapsed_us: end_ns.saturating_sub(start_ns) / 1000,
            pages_touched: faulting.map_or(0, Faulting::pages_touched),
            data_errors: faulting.map_or(0, Faulting::data_errors),
            compute_units,
            access_us_hdr,
            status,
            output: output.unwrap_or_default(),
            heartbeats: results,
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use nowait_wire::agent::Access;

    fn workload(kind: Kind) -> Workload {
        Workload {
            kind,
            threads: u32::from(kind != Kind::Idle),
            duration_ms: 100,
            pages: 16,
            ..Workload::IDLE
        }
    }

    #[test]
    fn each_number_out_of_range_is_named() {
        for kind in [Kind::Idle, Kind::User, Kind::Copy] {
            validate(&workload(kind)).unwrap();
        }
        let refused = |kind, change: fn(&mut Workload)| {
            let mut workload = workload(kind);
            change(&mut workload);
            validate(&workload).unwrap_err().to_string()
        };
        let cases = [
            (refused(Kind::User, |w| w.threads = 0), "threads is 0, but it must be 1 to 256"),
            (refused(Kind::Copy, |w| w.threads = 257), "threads is 257, but it must be 1 to 256"),
            (
                refused(Kind::Idle, |w| w.threads = 1),
                "threads of an idle run is 1, but it must be 0",
            ),
            (refused(Kind::User, |w| w.pages = 0), "pages is 0, but it must be 1 to 65536"),
            (
                refused(Kind::User, |w| w.pages = 65_537),
                "pages is 65537, but it must be 1 to 65536",
            ),
            (
                refused(Kind::Idle, |w| w.duration_ms = 0),
                "duration_ms is 0, but it must be 1 to 600000",
            ),
            (
                refused(Kind::Idle, |w| w.heartbeat_us = 99),
                "heartbeat_us is 99, but it must be 100 to 1000000",
            ),
            (refused(Kind::Idle, |w| w.compute = 257), "compute is 257, but it must be 0 to 256"),
            (
                refused(Kind::Idle, |w| w.compressible_percent = 101),
                "compressible_percent is 101, but it must be 0 to 100",
            ),
        ];
        for (message, expected) in cases {
            assert_eq!(message, expected);
        }
    }

    /// Everything but the eviction, on the host: real-time scheduling needs the right to it.
    #[test]
    fn a_run_on_the_host_touches_all_pages_without_errors() {
        for kind in [Kind::User, Kind::Copy] {
            let mut workload = workload(kind);
            (workload.threads, workload.pages) = (4, 300);
            let faulting = Faulting::new(&workload, None).unwrap();
            let cpus = sys::cpus().unwrap();
            match measure(&workload, &cpus, Some(&faulting), None) {
                Ok(result) => {
                    assert_eq!((result.pages_touched, result.data_errors), (300, 0));
                    assert_eq!(result.heartbeats.len(), cpus.len());
                    let due = result.elapsed_us / 1000;
                    assert!(result.heartbeats.iter().all(|h| h.deadlines == due));
                }
                Err(WorkloadError::Thread(message)) if message.contains("SCHED_FIFO") => {
                    eprintln!("skipped: {message}");
                }
                Err(e) => panic!("{e}"),
            }
        }
    }

    #[test]
    fn a_run_under_a_limit_touches_pages_again_until_the_time_is_over() {
        let mut runner = Runner::default();
        for (kind, access) in
            [(Kind::User, Access::Random), (Kind::Copy, Access::Zipf), (Kind::User, Access::Zipf)]
        {
            let mut workload = workload(kind);
            workload.threads = 4;
            workload.pressure = Pressure::Limit { access, seed: 1 };
            match runner.run(&workload) {
                Ok(result) => {
                    assert!(result.pages_touched > 16 && result.elapsed_us >= 100_000);
                    assert_eq!(result.data_errors, 0);
                }
                Err(WorkloadError::Thread(message)) if message.contains("SCHED_FIFO") => {
                    eprintln!("skipped: {message}");
                }
                Err(e) => panic!("{e}"),
            }
        }
    }

    /// The threads come one after another, the last of them when the time is over.
    #[test]
    fn a_thread_that_comes_too_late_touches_a_page_nevertheless() {
        let threads = 4;
        let workload = Workload {
            threads,
            pressure: Pressure::Limit { access: Access::Random, seed: 1 },
            ..workload(Kind::User)
        };
        let faulting = Faulting::new(&workload, None).unwrap();
        let (gate, end_ns) = (Gate::default(), AtomicU64::new(RUNNING));
        gate.open(Some(sys::now_ns()));
        for thread in 0..threads {
            faulting.run(thread, 1, &gate, &end_ns).unwrap();
        }
        assert_eq!((faulting.pages_touched(), faulting.data_errors()), (threads.into(), 0));
    }

    #[test]
    fn computing_threads_work_beside_the_others_until_the_end() {
        let mut runner = Runner::default();
        let mut workload = workload(Kind::User);
        workload.pressure = Pressure::Limit { access: Access::Random, seed: 1 };
        workload.compute = 2;
        match runner.run(&workload) {
            Ok(result) => {
                assert!(result.pages_touched > 0 && result.compute_units > 0, "{result:?}");
            }
            Err(WorkloadError::Thread(message)) if message.contains("SCHED_FIFO") => {
                eprintln!("skipped: {message}");
            }
            Err(e) => panic!("{e}"),
        }
    }

    #[test]
    fn touches_that_write_and_a_warm_up_leave_every_page_right() {
        let mut runner = Runner::default();
        for access in [Access::Phases, Access::Sequential] {
            let workload = Workload {
                threads: 4,
                write_percent: 60,
                warm_up_ms: 30,
                pressure: Pressure::Limit { access, seed: 3 },
                ..workload(Kind::User)
            };
            match runner.run(&workload) {
                Ok(result) => {
                    assert!(result.pages_touched > 16 && result.data_errors == 0, "{result:?}");
                    // The warm-up is not in it.
                    assert!((100_000..130_000).contains(&result.elapsed_us), "{result:?}");
                    assert!(!result.access_us_hdr.is_empty());
                }
                Err(WorkloadError::Thread(message)) if message.contains("SCHED_FIFO") => {
                    eprintln!("skipped: {message}");
                }
                Err(e) => panic!("{e}"),
            }
        }
    }

    #[test]
    fn a_command_runs_beside_the_heartbeat_until_it_ends() {
        let run = |command: &str, duration_ms| {
            let command = command.to_owned();
            let workload = Workload { command, duration_ms, pages: 0, ..workload(Kind::Command) };
            let workload = Workload { threads: 0, ..workload };
            validate(&workload).unwrap();
            measure(&workload, &sys::cpus().unwrap(), None, None)
        };
        match run("sleep 0.2; echo here; exit 3", 10_000) {
            Ok(result) => {
                assert_eq!((result.status, result.output.as_str()), (Some(3), "here\n"));
                assert!((200_000..5_000_000).contains(&result.elapsed_us), "{result:?}");
                let due = result.elapsed_us / 1000;
                assert!(result.heartbeats.iter().all(|h| h.deadlines.abs_diff(due) <= 1));
                let error = run("sleep 1000", 100).unwrap_err().to_string();
                assert!(error.contains("did not end"), "{error}");
            }
            Err(WorkloadError::Thread(message)) if message.contains("SCHED_FIFO") => {
                eprintln!("skipped: {message}");
            }
            Err(e) => panic!("{e}"),
        }
    }

    #[test]
    fn an_idle_run_lasts_as_long_as_asked_and_has_every_sample() {
        let workload = workload(Kind::Idle);
        match measure(&workload, &sys::cpus().unwrap(), None, None) {
            Ok(result) => {
                assert_eq!(result.elapsed_us, 100_000);
                assert!(result.heartbeats.iter().all(|h| h.deadlines == 100));
            }
            Err(WorkloadError::Thread(message)) if message.contains("SCHED_FIFO") => {
                eprintln!("skipped: {message}");
            }
            Err(e) => panic!("{e}"),
        }
    }
}

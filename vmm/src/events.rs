//! The main loop: waits for whatever may end a run or has to be passed on, and holds no lock.

use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use guest_memory::{Health, Pager};
use nowait_wire::agent::{Report, Request};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Signal, getpid, kill_process};
use signal_hook::consts::{SIGCONT, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGTSTP};
use vmm_sys_util::eventfd::EventFd;

use crate::agent::{Conversation, Message, Step};
use crate::devices::Bus;
use crate::exit::{self, ExitReason};
use crate::machine::MachineError;
use crate::patience::{Lines, Push};
use crate::spec::ConsoleKind;
use crate::stalls::Stalls;
use crate::terminal::{self, Command, EscapeFilter, RawMode};
use crate::threads::{Pauser, Pauses, VcpuThreads};

/// Typed bytes read at once.
const INPUT_CHUNK_BYTES: usize = 4096;
/// How soon what could not be passed on is offered again: typed bytes to the guest, reports to
/// their reader.
const RETRY: Duration = Duration::from_millis(5);

/// What a run takes from outside.
pub(crate) struct Input {
    /// The first UART.
    pub console: ConsoleKind,
    /// When to end at the latest.
    pub deadline: Option<Instant>,
    /// For the agent.
    pub requests: Vec<Request>,
    /// Where reports go.
    pub report: Option<Lines>,
    /// What is written behind a run's report.
    pub stalls: Arc<Stalls>,
}

/// The state of the main loop.
pub(crate) struct Events {
    bus: Arc<Bus>,
    signals: Signals,
    raw: Option<RawMode>,
    /// `None` at the end of the input, or when there is no console.
    stdin: Option<io::Stdin>,
    escape: EscapeFilter,
    typed: Vec<u8>,
    deadline: Option<Instant>,
    conversation: Conversation,
    has_requests: bool,
    unsent: Vec<u8>,
    messages: Receiver<Message>,
    message_event: EventFd,
    health: Health,
    /// As last seen.
    pauses: Pauses,
    report: Option<Lines>,
    stalls: Arc<Stalls>,
    /// A report that its reader was not ready for: no further message is taken before it.
    held: Option<Vec<u8>>,
}

impl Events {
    pub(crate) fn new(
        input: Input,
        signals: Signals,
        bus: Arc<Bus>,
        messages: Receiver<Message>,
        message_event: EventFd,
    ) -> Result<Self, MachineError> {
        signals.at_once.store(false, Ordering::SeqCst);
        // A stop during the start has been and gone.
        signals.stop.store(false, Ordering::SeqCst);
        let (raw, stdin) = match input.console {
            ConsoleKind::None => (None, None),
            ConsoleKind::Stdio => (
                RawMode::enter().map_err(MachineError::host("set the terminal to raw mode"))?,
                Some(io::stdin()),
            ),
        };
        let escape = EscapeFilter::new(raw.is_some());
        Ok(Self {
            bus,
            signals,
            raw,
            stdin,
            escape,
            typed: Vec::new(),
            deadline: input.deadline,
            has_requests: !input.requests.is_empty(),
            conversation: Conversation::new(input.requests),
            unsent: Vec::new(),
            messages,
            message_event,
            report: input.report,
            stalls: input.stalls,
            health: Health::default(),
            pauses: Pauses::default(),
            held: None,
        })
    }

    /// Waits until the run is over and says why.
    pub(crate) fn wait(
        &mut self,
        threads: &VcpuThreads,
        pauser: &Pauser,
        exits: &EventFd,
        pager: &Pager,
    ) -> Result<ExitReason, MachineError> {
        loop {
            let stdin_ready = self.poll(exits, pager)?;
            if let Some(signal) = self.signals.pending() {
                return Ok(ExitReason::Signal { signal });
            }
            self.job_control()?;
            if self.deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                return Ok(failure("the run took longer than --timeout allows"));
            }
            if let Some(error) = pager.failure() {
                return Ok(failure(&error.to_string()));
            }
            self.watch_health(pauser, pager);
            self.watch_pauses(pauser);
            // Reports first: the guest may have powered off right after its last one.
            if let Some(reason) = self.take_messages() {
                return Ok(reason);
            }
            let _ = exits.read();
            if let Some(reason) = threads.exit() {
                return Ok(self.take_messages().unwrap_or(reason));
            }
            if stdin_ready && self.take_input() == Command::Quit {
                return Ok(ExitReason::UserStop);
            }
            self.offer_input();
        }
    }

    /// A store that does not answer, or a host without memory, pauses the guest, which goes on when that is
    /// over.
    fn watch_health(&mut self, pauser: &Pauser, pager: &Pager) {
        if pager.event().read().is_err() {
            return;
        }
        let (before, now) = (std::mem::take(&mut self.health), pager.health());
        match (&before.reads, &now.reads) {
            (None, Some(why)) => {
                pauser.change(|pauses| pauses.store = true);
                say(&format!("{PAUSED_FOR_STORE}: {why}"));
            }
            (Some(_), None) => {
                let now = pauser.change(|pauses| pauses.store = false);
                say(&format!("{STORE_ANSWERS}: the guest {}", goes_on(now)));
            }
            _ => {}
        }
        match (&before.memory, &now.memory) {
            (None, Some(why)) => {
                pauser.change(|pauses| pauses.memory = true);
                say(&format!("{PAUSED_FOR_MEMORY}: {why}"));
            }
            (Some(_), None) => {
                let now = pauser.change(|pauses| pauses.memory = false);
                say(&format!("{MEMORY_AGAIN}: the guest {}", goes_on(now)));
            }
            _ => {}
        }
        match (&before.writes, &now.writes) {
            (None, Some(why)) => {
                say(&format!("{NOT_EVICTED}: {why}"));
            }
            (Some(_), None) => say(EVICTED_AGAIN),
            _ => {}
        }
        self.health = now;
    }

    /// Says what the control socket did to the guest.
    fn watch_pauses(&mut self, pauser: &Pauser) {
        let now = pauser.pauses();
        let before = std::mem::replace(&mut self.pauses, now);
        match (before.any(), now.any()) {
            (false, true) if now.user => say("the guest is paused by the control socket"),
            (true, false) if self.health.reads.is_some() => {
                say("the guest goes on by the control socket; its store does not answer yet");
            }
            (true, false) if self.health.memory.is_some() => {
                say("the guest goes on by the control socket; the host has no memory for it yet");
            }
            (true, false) if before.user => say("the guest goes on by the control socket"),
            _ => {}
        }
    }

    /// Ends the conversation: from here on nobody waits for this loop, the terminal has its former mode,
    /// and a signal ends the process at once. Returns how many requests got no answer.
    pub(crate) fn close(mut self) -> usize {
        drop(self.raw.take());
        self.signals.at_once.store(true, Ordering::SeqCst);
        self.conversation.unanswered()
    }

    /// Stops when asked to (Ctrl-Z of another terminal's `kill -TSTP`), with the terminal as it was, and
    /// takes it back when we go on.
    fn job_control(&mut self) -> Result<(), MachineError> {
        if self.signals.stop.swap(false, Ordering::SeqCst) {
            if let Some(raw) = &mut self.raw {
                raw.suspend();
            }
            let _ = kill_process(getpid(), Signal::STOP);
        }
        if self.signals.go_on.swap(false, Ordering::SeqCst)
            && let Some(raw) = &mut self.raw
        {
            raw.resume().map_err(MachineError::host("set the terminal to raw mode"))?;
        }
        Ok(())
    }

    /// Waits for an event; true when standard input has something.
    fn poll(&self, exits: &EventFd, pager: &Pager) -> Result<bool, MachineError> {
        let mut fds = vec![
            PollFd::new(&self.signals.wake, PollFlags::IN),
            PollFd::from_borrowed_fd(fd::borrow(exits), PollFlags::IN),
            PollFd::from_borrowed_fd(fd::borrow(&self.message_event), PollFlags::IN),
            PollFd::from_borrowed_fd(fd::borrow(pager.event()), PollFlags::IN),
        ];
        if let Some(lines) = &self.report {
            fds.push(PollFd::from_borrowed_fd(fd::borrow(lines.failed()), PollFlags::IN));
        }
        let others = fds.len();
        let ours = self.raw.as_ref().is_none_or(RawMode::in_foreground);
        if let (Some(stdin), true, true) = (&self.stdin, self.typed.is_empty(), ours) {
            fds.push(PollFd::new(stdin, PollFlags::IN));
        }
        let backlog = !self.typed.is_empty() || !self.unsent.is_empty() || self.held.is_some();
        let retry = if backlog { Some(RETRY) } else { self.bus.console.retry_in() };
        let left = self.deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let timeout = [retry, left].into_iter().flatten().min();
        let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(MachineError::host("wait for events")(error.into())),
        }
        Ok(fds.get(others).is_some_and(|fd| !fd.revents().is_empty()))
    }

    fn take_messages(&mut self) -> Option<ExitReason> {
        let _ = self.message_event.read();
        if let Some(error) = self.report.as_ref().and_then(Lines::failure) {
            return Some(failure(&format!("--report: cannot write: {error}")));
        }
        if let Some(line) = self.held.take()
            && let Err(message) = self.pass_on(line)
        {
            return Some(failure(&message));
        }
        while self.held.is_none()
            && let Ok(message) = self.messages.try_recv()
        {
            let step = match message {
                Ok(report) => self.take_report(&report),
                // A guest may write what it likes on its second UART; it matters only when asked.
                Err(error) if self.has_requests => Err(error.to_string()),
                Err(_) => Ok(Step::Wait),
            };
            match step {
                Err(message) => return Some(failure(&message)),
                Ok(Step::Wait) => {}
                Ok(Step::Send(line)) => self.unsent.extend(line),
            }
        }
        None
    }

    fn take_report(&mut self, report: &Report) -> Result<Step, String> {
        if matches!(report, Report::Host(_)) {
            return Err("the guest agent sent a report that only the VMM makes".to_owned());
        }
        if self.report.is_some() {
            let mut lines = json_line(report)?;
            if matches!(report, Report::Result(_)) {
                lines.extend(json_line(&Report::Host(self.stalls.take()))?);
            }
            self.pass_on(lines)?;
        }
        if !self.has_requests {
            return Ok(Step::Wait);
        }
        self.conversation.on_report(report).map_err(|error| error.to_string())
    }

    /// Gives a report to its writer, or keeps it until that has room.
    fn pass_on(&mut self, line: Vec<u8>) -> Result<(), String> {
        match self.report.as_ref().map(|lines| lines.push(line)) {
            None | Some(Push::Taken) => Ok(()),
            Some(Push::Full(line)) => {
                self.held = Some(line);
                Ok(())
            }
            Some(Push::Failed(error)) => Err(format!("--report: cannot write: {error}")),
        }
    }

    /// Reads typed bytes; those for the guest wait in `typed`.
    fn take_input(&mut self) -> Command {
        let Some(stdin) = &mut self.stdin else { return Command::None };
        let mut chunk = [0; INPUT_CHUNK_BYTES];
        // Unbuffered: what `Stdin` buffered would be invisible to poll.
        match rustix::io::read(&*stdin, &mut chunk) {
            Ok(0) => self.stdin = None,
            Ok(count) => {
                let command = self.escape.feed(&chunk[..count], &mut self.typed);
                if command == Command::Help {
                    eprint!("{}", terminal::HELP);
                }
                return command;
            }
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
            Err(_) => self.stdin = None,
        }
        Command::None
    }

    fn offer_input(&mut self) {
        let taken = self.bus.console.send(&self.typed);
        self.typed.drain(..taken);
        let taken = self.bus.agent.send(&self.unsent);
        self.unsent.drain(..taken);
    }
}

fn json_line(report: &Report) -> Result<Vec<u8>, String> {
    let mut line = serde_json::to_vec(report).map_err(|error| error.to_string())?;
    line.push(b'\n');
    Ok(line)
}

/// What a guest does for which one reason to be paused is gone.
fn goes_on(pauses: Pauses) -> &'static str {
    match pauses {
        Pauses { user: true, .. } => "is still paused by the control socket",
        Pauses { store: true, .. } => "is still paused: its store does not answer",
        Pauses { memory: true, .. } => "is still paused: the host has no memory for it",
        _ => "goes on",
    }
}

/// What is said when a store answers no more.
const PAUSED_FOR_STORE: &str = "the guest is paused until its store answers again";
/// What is said when the host is out of memory.
const PAUSED_FOR_MEMORY: &str = "the guest is paused until the host has memory for it again";
/// What is said when a store answers again.
const STORE_ANSWERS: &str = "the store answers again";
/// What is said when the host has memory again.
const MEMORY_AGAIN: &str = "the host has memory again";
/// What is said when a store takes pages again.
const EVICTED_AGAIN: &str = "pages can be evicted again";
/// What is said when a store takes no more.
const NOT_EVICTED: &str = "pages cannot be evicted, the resident limit may be exceeded";

/// Whether a message of ours tells of paging that failed, for a while at least: what was measured meanwhile is
/// no measurement of paging.
pub(crate) fn tells_of_trouble(message: &str) -> bool {
    [PAUSED_FOR_STORE, PAUSED_FOR_MEMORY, NOT_EVICTED].iter().any(|said| message.starts_with(said))
}

/// Whether a message of ours tells that such a trouble is over.
pub(crate) fn tells_of_its_end(message: &str) -> bool {
    [STORE_ANSWERS, MEMORY_AGAIN, EVICTED_AGAIN].iter().any(|said| message.starts_with(said))
}

/// One line for whoever watches; the terminal may be raw.
fn say(message: &str) {
    eprint!("nowait: {message}\r\n");
}

fn failure(message: &str) -> ExitReason {
    ExitReason::Failure { message: message.to_owned() }
}

/// The signals that end a run, as a descriptor to wait for.
///
/// Made before anything else of a run, so that no signal ends the process without its exit code.
///
/// ```text
///   starting           main loop                       ending
///   at once, code 16   terminal back, run over, 16     at once, code 16: results may never be taken
/// ```
#[derive(Debug)]
pub struct Signals {
    wake: UnixStream,
    last: Arc<AtomicUsize>,
    /// Outside of the main loop a signal ends the process at once: reading or writing a file may wait.
    at_once: Arc<AtomicBool>,
    /// SIGTSTP came.
    stop: Arc<AtomicBool>,
    /// SIGCONT came.
    go_on: Arc<AtomicBool>,
}

impl Signals {
    /// Installs the handlers.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn new() -> Result<Self, MachineError> {
        Self::install().map_err(MachineError::host("install signal handlers"))
    }

    fn install() -> io::Result<Self> {
        let (wake, write) = UnixStream::pair()?;
        wake.set_nonblocking(true)?;
        let last = Arc::new(AtomicUsize::new(0));
        let at_once = Arc::new(AtomicBool::new(true));
        for signal in [SIGHUP, SIGINT, SIGQUIT, SIGTERM] {
            let code = i32::from(exit::STOPPED);
            signal_hook::flag::register_conditional_shutdown(signal, code, Arc::clone(&at_once))?;
            // The number first, so that whoever wakes finds it.
            signal_hook::flag::register_usize(signal, Arc::clone(&last), signal as usize)?;
            signal_hook::low_level::pipe::register(signal, write.try_clone()?)?;
        }
        let (stop, go_on) = (Arc::default(), Arc::default());
        signal_hook::flag::register_conditional_default(SIGTSTP, Arc::clone(&at_once))?;
        for (signal, flag) in [(SIGTSTP, &stop), (SIGCONT, &go_on)] {
            signal_hook::flag::register(signal, Arc::clone(flag))?;
            signal_hook::low_level::pipe::register(signal, write.try_clone()?)?;
        }
        Ok(Self { wake, last, at_once, stop, go_on })
    }

    fn pending(&self) -> Option<i32> {
        let mut drain = [0; 64];
        while matches!((&self.wake).read(&mut drain), Ok(count) if count > 0) {}
        match self.last.load(Ordering::SeqCst) {
            0 => None,
            signal => i32::try_from(signal).ok(),
        }
    }
}

mod fd {
    //! vmm-sys-util's eventfds as borrowed descriptors.
    #![allow(unsafe_code, reason = "EventFd predates AsFd")]

    use std::os::fd::{AsRawFd, BorrowedFd};

    use vmm_sys_util::eventfd::EventFd;

    pub(super) fn borrow(event: &EventFd) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is open as long as the EventFd lives, which the result borrows.
        unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
    }
}

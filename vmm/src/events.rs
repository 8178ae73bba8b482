//! The main loop: waits for whatever may end a run or has to be passed on, and holds no lock.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use guest_memory::{Health, Pager};
use nowait_wire::agent::{Report, Request};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};
use vmm_sys_util::eventfd::EventFd;

use crate::agent::{Conversation, Message, Step};
use crate::devices::Bus;
use crate::exit::{self, ExitReason};
use crate::machine::MachineError;
use crate::spec::ConsoleKind;
use crate::terminal::{self, Command, EscapeFilter, RawMode};
use crate::threads::VcpuThreads;

/// Typed bytes read at once.
const INPUT_CHUNK_BYTES: usize = 4096;
/// How soon typed bytes that the guest had no room for are offered again.
const INPUT_RETRY: Duration = Duration::from_millis(20);

/// What a run takes from outside.
pub(crate) struct Input {
    /// The first UART.
    pub console: ConsoleKind,
    /// When to end at the latest.
    pub deadline: Option<Instant>,
    /// For the agent.
    pub requests: Vec<Request>,
    /// Where reports go.
    pub report: Option<Box<dyn Write>>,
}

/// The state of the main loop.
pub(crate) struct Events {
    bus: Arc<Bus>,
    signals: Signals,
    /// Dropped last of what touches the terminal.
    _raw: Option<RawMode>,
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
    report: Option<Box<dyn Write>>,
    health: Health,
}

impl Events {
    pub(crate) fn new(
        input: Input,
        signals: Signals,
        bus: Arc<Bus>,
        messages: Receiver<Message>,
        message_event: EventFd,
    ) -> Result<Self, MachineError> {
        signals.starting.store(false, Ordering::SeqCst);
        let (raw, stdin) = match input.console {
            ConsoleKind::None => (None, None),
            ConsoleKind::Stdio => (
                RawMode::enter().map_err(MachineError::host("set the terminal to raw mode"))?,
                Some(io::stdin()),
            ),
        };
        Ok(Self {
            bus,
            signals,
            _raw: raw,
            stdin,
            escape: EscapeFilter::default(),
            typed: Vec::new(),
            deadline: input.deadline,
            has_requests: !input.requests.is_empty(),
            conversation: Conversation::new(input.requests),
            unsent: Vec::new(),
            messages,
            message_event,
            report: input.report,
            health: Health::default(),
        })
    }

    /// Waits until the run is over and says why.
    pub(crate) fn wait(
        &mut self,
        threads: &VcpuThreads,
        exits: &EventFd,
        pager: &Pager,
    ) -> Result<ExitReason, MachineError> {
        loop {
            let stdin_ready = self.poll(exits, pager)?;
            if let Some(signal) = self.signals.pending() {
                return Ok(ExitReason::Signal { signal });
            }
            if self.deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                return Ok(failure("the run took longer than --timeout allows"));
            }
            if let Some(error) = pager.failure() {
                return Ok(failure(&error.to_string()));
            }
            self.watch_health(threads, pager);
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

    /// A store that does not answer pauses the guest, which goes on when it does again.
    fn watch_health(&mut self, threads: &VcpuThreads, pager: &Pager) {
        if pager.event().read().is_err() {
            return;
        }
        let (before, now) = (std::mem::take(&mut self.health), pager.health());
        match (&before.reads, &now.reads) {
            (None, Some(why)) => {
                threads.pause();
                say(&format!("the guest is paused until its store answers again: {why}"));
            }
            (Some(_), None) => {
                say("the store answers again: the guest goes on");
                threads.resume();
            }
            _ => {}
        }
        match (&before.writes, &now.writes) {
            (None, Some(why)) => {
                say(&format!("pages cannot be evicted, the resident limit may be exceeded: {why}"));
            }
            (Some(_), None) => say("pages can be evicted again"),
            _ => {}
        }
        self.health = now;
    }

    /// Ends the conversation: from here on nobody waits for this loop. Returns how many requests were
    /// never sent.
    pub(crate) fn close(self) -> usize {
        self.conversation.unsent()
    }

    /// Waits for an event; true when standard input has something.
    fn poll(&self, exits: &EventFd, pager: &Pager) -> Result<bool, MachineError> {
        let mut fds = vec![
            PollFd::new(&self.signals.wake, PollFlags::IN),
            PollFd::from_borrowed_fd(fd::borrow(exits), PollFlags::IN),
            PollFd::from_borrowed_fd(fd::borrow(&self.message_event), PollFlags::IN),
            PollFd::from_borrowed_fd(fd::borrow(pager.event()), PollFlags::IN),
        ];
        let others = fds.len();
        let backlog = !self.typed.is_empty() || !self.unsent.is_empty();
        if let (Some(stdin), false) = (&self.stdin, backlog) {
            fds.push(PollFd::new(stdin, PollFlags::IN));
        }
        let left = self.deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let timeout =
            if backlog { Some(left.unwrap_or(INPUT_RETRY).min(INPUT_RETRY)) } else { left };
        let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(MachineError::host("wait for events")(error.into())),
        }
        Ok(fds.get(others).is_some_and(|fd| !fd.revents().is_empty()))
    }

    fn take_messages(&mut self) -> Option<ExitReason> {
        let _ = self.message_event.read();
        while let Ok(message) = self.messages.try_recv() {
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
        if let Some(out) = &mut self.report {
            let mut line = serde_json::to_vec(report).map_err(|error| error.to_string())?;
            line.push(b'\n');
            out.write_all(&line)
                .and_then(|()| out.flush())
                .map_err(|error| format!("--report: cannot write: {error}"))?;
        }
        if !self.has_requests {
            return Ok(Step::Wait);
        }
        self.conversation.on_report(report).map_err(|error| error.to_string())
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

/// One line for whoever watches; the terminal may be raw.
fn say(message: &str) {
    let _ = write!(io::stderr(), "nowait: {message}\r\n");
}

fn failure(message: &str) -> ExitReason {
    ExitReason::Failure { message: message.to_owned() }
}

/// The signals that end a run, as a descriptor to wait for.
///
/// Made before anything else of a run, so that no signal ends the process without its exit code; one
/// that comes early is seen when the main loop begins.
#[derive(Debug)]
pub struct Signals {
    wake: UnixStream,
    last: Arc<AtomicUsize>,
    /// Until the main loop begins, a signal ends the process at once: opening a file may block.
    starting: Arc<AtomicBool>,
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
        let starting = Arc::new(AtomicBool::new(true));
        for signal in [SIGHUP, SIGINT, SIGQUIT, SIGTERM] {
            let code = i32::from(exit::STOPPED);
            signal_hook::flag::register_conditional_shutdown(signal, code, Arc::clone(&starting))?;
            // The number first, so that whoever wakes finds it.
            signal_hook::flag::register_usize(signal, Arc::clone(&last), signal as usize)?;
            signal_hook::low_level::pipe::register(signal, write.try_clone()?)?;
        }
        Ok(Self { wake, last, starting })
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

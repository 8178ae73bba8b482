//! The host's end of the agent channel: lines from COM2 become reports, requests go out one at a time.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::mpsc::{SyncSender, TrySendError};

use nowait_wire::agent::{
    LineError, MAX_LINE_BYTES, PROTOCOL, Report, Request, decode_line, encode_line,
};
use vmm_sys_util::eventfd::EventFd;

/// Messages between the UART and the main loop that may wait; the guest waits when they are not read.
pub const QUEUE_MESSAGES: usize = 16;

/// One line from the guest, decoded.
pub type Message = Result<Report, LineError>;

/// The writer behind COM2: gathers lines and passes them on as messages.
#[derive(Debug)]
pub struct LineSink {
    line: Vec<u8>,
    overflow: bool,
    out: SyncSender<Message>,
    wake: EventFd,
}

impl LineSink {
    /// Lines go to `out`; `wake` is written for each.
    #[must_use]
    pub fn new(out: SyncSender<Message>, wake: EventFd) -> Self {
        Self { line: Vec::new(), overflow: false, out, wake }
    }

    fn end_line(&mut self) {
        let line = std::mem::take(&mut self.line);
        let message = if std::mem::take(&mut self.overflow) {
            Err(LineError::TooLong)
        } else {
            decode_line(&line)
        };
        let message = match self.out.try_send(message) {
            Ok(()) => None,
            Err(TrySendError::Full(message)) => Some(message),
            // The run is ending and nobody listens.
            Err(TrySendError::Disconnected(_)) => return,
        };
        let _ = self.wake.write(1);
        if let Some(message) = message {
            // The main loop is behind: this vCPU waits for it, as it would for a slow line.
            let _ = self.out.send(message);
            let _ = self.wake.write(1);
        }
    }
}

impl Write for LineSink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for &byte in bytes {
            match byte {
                b'\n' => self.end_line(),
                _ if self.line.len() >= MAX_LINE_BYTES => self.overflow = true,
                _ => self.line.push(byte),
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What the main loop does after a message.
#[derive(Debug, PartialEq, Eq)]
#[must_use]
pub enum Step {
    /// Nothing.
    Wait,
    /// Send these bytes to the agent.
    Send(Vec<u8>),
}

/// Sends each request after the report of the one before.
#[derive(Debug)]
pub struct Conversation {
    requests: VecDeque<Request>,
    greeted: bool,
    /// The last request that was sent has no answer yet.
    waiting: bool,
}

/// Why a conversation cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// Another protocol.
    #[error(
        "the guest agent speaks protocol {0}, and this nowait {PROTOCOL}: build the initramfs again (cargo xtask images)"
    )]
    Protocol(u32),
    /// A request that is too long.
    #[error("a request for the agent cannot be sent: {0}")]
    Request(LineError),
    /// A message out of place.
    #[error("the guest agent sent a report before its greeting")]
    NotGreeted,
}

impl Conversation {
    /// A conversation that has yet to begin.
    #[must_use]
    pub fn new(requests: Vec<Request>) -> Self {
        Self { requests: requests.into(), greeted: false, waiting: false }
    }

    /// How many requests have no answer, sent or not. To power off needs none: the guest did.
    #[must_use]
    pub fn unanswered(&self) -> usize {
        let unsent = self.requests.iter().filter(|request| **request != Request::PowerOff);
        unsent.count() + usize::from(self.waiting)
    }

    /// Takes a report and says what to send next.
    ///
    /// # Errors
    /// When the agent does not keep to the protocol.
    pub fn on_report(&mut self, report: &Report) -> Result<Step, AgentError> {
        match report {
            Report::Hello { protocol, .. } if *protocol != PROTOCOL => {
                return Err(AgentError::Protocol(*protocol));
            }
            Report::Hello { .. } => self.greeted = true,
            _ if !self.greeted => return Err(AgentError::NotGreeted),
            _ => {}
        }
        let next = self.requests.pop_front();
        self.waiting = next.as_ref().is_some_and(|request| *request != Request::PowerOff);
        match next {
            None => Ok(Step::Wait),
            Some(request) => encode_line(&request).map(Step::Send).map_err(AgentError::Request),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::sync_channel;

    fn hello(protocol: u32) -> Report {
        Report::Hello { protocol, kernel: "6.12".into(), cpus: 1, mem_total_kib: 1 }
    }

    #[test]
    fn lines_are_gathered_from_single_bytes() {
        let (out, messages) = sync_channel(4);
        let mut sink = LineSink::new(out, EventFd::new(0).unwrap());
        for byte in encode_line(&hello(1)).unwrap() {
            sink.write_all(&[byte]).unwrap();
        }
        sink.write_all(b"garbage\n").unwrap();
        assert_eq!(messages.recv().unwrap().unwrap(), hello(1));
        assert!(messages.recv().unwrap().is_err());
    }

    #[test]
    fn an_endless_line_costs_bounded_memory_and_is_reported_once() {
        let (out, messages) = sync_channel(4);
        let mut sink = LineSink::new(out, EventFd::new(0).unwrap());
        for _ in 0..3 * MAX_LINE_BYTES {
            sink.write_all(b"x").unwrap();
        }
        assert!(sink.line.len() <= MAX_LINE_BYTES);
        sink.write_all(b"\n").unwrap();
        sink.write_all(&encode_line(&hello(1)).unwrap()).unwrap();
        assert!(matches!(messages.recv().unwrap(), Err(LineError::TooLong)));
        assert!(messages.recv().unwrap().is_ok());
    }

    #[test]
    fn nobody_listening_does_not_block_the_guest() {
        let (out, messages) = sync_channel(1);
        drop(messages);
        let mut sink = LineSink::new(out, EventFd::new(0).unwrap());
        for _ in 0..10 {
            sink.write_all(b"{}\n").unwrap();
        }
    }

    #[test]
    fn each_request_follows_the_report_of_the_one_before() {
        let exec = |command: &str| Request::Exec { command: command.into() };
        let mut talk = Conversation::new(vec![exec("a"), Request::PowerOff]);
        let done = Report::Exec { status: 0, output: String::new() };
        assert!(matches!(talk.on_report(&done), Err(AgentError::NotGreeted)));
        let first = encode_line(&exec("a")).unwrap();
        assert_eq!(talk.on_report(&hello(PROTOCOL)).unwrap(), Step::Send(first));
        assert_eq!(talk.unanswered(), 1);
        assert!(matches!(talk.on_report(&done).unwrap(), Step::Send(_)));
        assert_eq!(talk.unanswered(), 0);
        assert_eq!(talk.on_report(&done).unwrap(), Step::Wait);
    }

    #[test]
    fn another_protocol_is_refused_by_number() {
        let error = Conversation::new(vec![]).on_report(&hello(99)).unwrap_err();
        assert!(error.to_string().contains("99"));
    }
}

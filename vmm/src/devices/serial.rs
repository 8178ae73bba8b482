//! The two UARTs, from vm-superio, with flow control for their input.
//!
//! Input waits in a bounded queue here until the guest has read the UART's 64-byte FIFO empty; the
//! UART then refills itself while the vCPU thread still holds it, so no byte is lost and nobody polls.
//! It also waits until the guest listens: a driver that starts reads the FIFO empty to clear it, and
//! with it would go whatever was typed ahead.
//!
//! The console's UART is paced, as a line with a baud rate is: one that is always full keeps the
//! guest's interrupt handler reading, and a guest beside endless input would never get further.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use vm_superio::serial::NoEvents;
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

/// The input that one UART holds back for its guest, in bytes; more is refused.
pub const INPUT_QUEUE_BYTES: usize = 128 * 1024;

/// The UART's interrupt line: an eventfd that KVM turns into an edge.
#[derive(Debug)]
pub struct IrqLine(pub EventFd);

impl Trigger for IrqLine {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// One UART whose output goes to a writer.
pub struct Uart {
    inner: Mutex<Inner>,
}

struct Inner {
    serial: Serial<IrqLine, NoEvents, Box<dyn Write + Send>>,
    input: VecDeque<u8>,
    pace: Option<Pace>,
    /// The guest takes input: it was seen with the interrupt enabled, or polls.
    listening: bool,
    /// The interrupt for received data is enabled.
    wants_interrupt: bool,
    /// Reads of the line status with no other access in between.
    polls: u32,
}

/// Offsets of the registers that tell whether the guest listens.
const INTERRUPT_ENABLE: u8 = 1;
const LINE_STATUS: u8 = 5;
/// Interrupt enable: received data available.
const RECEIVED_DATA: u8 = 1 << 0;
/// So many reads of the line status in a row are a guest that polls for input: one that sends reads
/// it once or twice a byte.
const POLLS_TO_LISTEN: u32 = 64;

impl Uart {
    /// A UART that raises this line and writes what the guest sends to `out`.
    #[must_use]
    pub fn new(irq: IrqLine, out: Box<dyn Write + Send>) -> Self {
        let serial = Serial::new(irq, out);
        let inner = Inner {
            serial,
            input: VecDeque::new(),
            pace: None,
            listening: false,
            wants_interrupt: false,
            polls: 0,
        };
        Self { inner: Mutex::new(inner) }
    }

    /// The same with pauses between its input, so that the guest gets on with other things. Whoever
    /// sends must heed [`Self::retry_in`].
    #[must_use]
    pub fn paced(self) -> Self {
        self.lock().pace = Some(Pace::default());
        self
    }

    /// The guest writes a register (0..=7). A writer that fails loses the byte, as a cut cable would.
    pub fn write(&self, register: u8, value: u8) {
        let mut inner = self.lock();
        inner.note_access(register);
        if register == INTERRUPT_ENABLE {
            inner.wants_interrupt = value & RECEIVED_DATA != 0;
        }
        let _lost_when_the_output_is_gone = inner.serial.write(register, value);
        inner.refill();
    }

    /// The guest reads a register (0..=7).
    pub fn read(&self, register: u8) -> u8 {
        let mut inner = self.lock();
        inner.note_access(register);
        inner.refill();
        let value = inner.serial.read(register);
        inner.refill();
        value
    }

    /// Queues bytes for the guest and returns how many were taken; the rest did not fit, or the guest
    /// is at the UART, which it may be for long when nobody takes its output. Never waits.
    pub fn send(&self, bytes: &[u8]) -> usize {
        let Some(mut inner) = self.try_lock() else { return 0 };
        let taken = bytes.len().min(INPUT_QUEUE_BYTES - inner.input.len());
        inner.input.extend(&bytes[..taken]);
        inner.refill();
        taken
    }

    /// When [`Self::send`] should be called again, if with nothing; `None` when no bytes wait for the
    /// guest.
    #[must_use]
    pub fn retry_in(&self) -> Option<Duration> {
        match self.try_lock() {
            Some(inner) if inner.input.is_empty() => None,
            Some(inner) if !inner.listening => Some(PAUSE_MAX),
            _ => Some(PAUSE_MIN),
        }
    }

    fn try_lock(&self) -> Option<MutexGuard<'_, Inner>> {
        match self.inner.try_lock() {
            Ok(inner) => Some(inner),
            Err(TryLockError::Poisoned(error)) => Some(error.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    /// Notices a guest that listens. A driver that probes the UART sets all interrupt enable bits and
    /// reads them back, which is no listening: so any other access with the interrupt enabled is.
    fn note_access(&mut self, register: u8) {
        self.polls = if register == LINE_STATUS { self.polls.saturating_add(1) } else { 0 };
        self.listening |=
            self.polls >= POLLS_TO_LISTEN || (self.wants_interrupt && register != INTERRUPT_ENABLE);
    }

    /// Moves waiting input into the FIFO when the guest has emptied it.
    fn refill(&mut self) {
        let room = self.serial.fifo_capacity();
        if !self.listening || self.input.is_empty() || room < FIFO_BYTES {
            return;
        }
        if self.pace.as_mut().is_some_and(|pace| !pace.may_fill(Instant::now())) {
            return;
        }
        let chunk: Vec<u8> = self.input.iter().take(room).copied().collect();
        // A guest that has the UART in loopback mode takes nothing now; the next access tries again.
        if let Ok(taken) = self.serial.enqueue_raw_bytes(&chunk) {
            self.input.drain(..taken);
        }
    }
}

/// The FIFO of vm-superio's UART, in bytes.
const FIFO_BYTES: usize = 64;

/// The pauses between two fillings of the FIFO.
///
/// ```text
///   filled ...... found empty ............................... filled again
///          |<- t ->|<- 7 t, at least 5 ms, at most 100 ms ->|
/// ```
///
/// So that the guest spends at most an eighth of its time reading, however slow its exits are; and no
/// more than a line of 115200 baud carries.
#[derive(Clone, Copy, Debug, Default)]
enum Pace {
    /// The FIFO was filled then.
    Filled(Instant),
    /// It was found empty: not before this.
    Pause(Instant),
    /// No input yet.
    #[default]
    Fresh,
}

const PAUSE_SHARE: u32 = 7;
const PAUSE_MIN: Duration = Duration::from_millis(5);
const PAUSE_MAX: Duration = Duration::from_millis(100);

impl Pace {
    /// Asked with the FIFO empty and input waiting; when it says yes the FIFO is filled.
    fn may_fill(&mut self, now: Instant) -> bool {
        if let Self::Filled(then) = *self {
            let pause = PAUSE_SHARE * now.saturating_duration_since(then);
            *self = Self::Pause(now + pause.clamp(PAUSE_MIN, PAUSE_MAX));
        }
        match *self {
            Self::Pause(until) if now < until => false,
            _ => {
                *self = Self::Filled(now);
                true
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    const DATA: u8 = 0;
    const MODEM_CONTROL: u8 = 4;

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn uart() -> (Uart, Sink) {
        let sink = Sink::default();
        let irq = IrqLine(EventFd::new(0).unwrap());
        (Uart::new(irq, Box::new(sink.clone())), sink)
    }

    fn listening() -> (Uart, Sink) {
        let (uart, sink) = uart();
        uart.write(INTERRUPT_ENABLE, RECEIVED_DATA);
        uart.write(MODEM_CONTROL, 1 << 3);
        (uart, sink)
    }

    #[test]
    fn what_is_typed_ahead_waits_for_a_guest_that_listens() {
        let (uart, _) = uart();
        assert_eq!(uart.retry_in(), None);
        assert_eq!(uart.send(b"early"), 5);
        assert_eq!(uart.retry_in(), Some(PAUSE_MAX), "it may listen at any time");
        assert_eq!(uart.read(DATA), 0, "a driver that clears the FIFO finds nothing");
        for probe in [0x0f, 0] {
            uart.write(INTERRUPT_ENABLE, probe);
            assert_eq!(uart.read(INTERRUPT_ENABLE), probe);
        }
        assert_eq!(uart.read(DATA), 0, "a driver that probes does not listen yet");
        uart.write(INTERRUPT_ENABLE, RECEIVED_DATA);
        assert_eq!(uart.read(LINE_STATUS) & 1, 1);
        assert_eq!(uart.read(DATA), b'e');
    }

    #[test]
    fn a_guest_that_polls_gets_its_input() {
        let (uart, _) = uart();
        assert_eq!(uart.send(b"x"), 1);
        let polls = (0..1000).take_while(|_| uart.read(LINE_STATUS) & 1 == 0).count();
        assert!(polls <= POLLS_TO_LISTEN as usize, "{polls}");
        assert_eq!(uart.read(DATA), b'x');
    }

    #[test]
    fn long_input_arrives_whole_and_in_order() {
        let (uart, _) = listening();
        let input: Vec<u8> = (0..1000u32).map(|i| i as u8).collect();
        assert_eq!(uart.send(&input), input.len());
        let mut got = Vec::new();
        while uart.read(LINE_STATUS) & 1 != 0 {
            got.push(uart.read(DATA));
        }
        assert_eq!(got, input);
    }

    #[test]
    fn paced_input_leaves_the_guest_most_of_its_time() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut pace = Pace::default();
        assert!(pace.may_fill(at(0)), "the first keys are not held back");
        assert!(!pace.may_fill(at(4)), "emptied after 4 ms: 28 ms of pause");
        assert!(!pace.may_fill(at(31)));
        assert!(pace.may_fill(at(32)));
        assert!(!pace.may_fill(at(1000)), "a guest that did not look for long");
        assert!(pace.may_fill(at(1100)));
        assert!(!pace.may_fill(at(1100)));
        assert!(!pace.may_fill(at(1104)));
        assert!(pace.may_fill(at(1105)));
    }

    #[test]
    fn paced_input_arrives_whole_and_in_order() {
        let (uart, _) = listening();
        let uart = uart.paced();
        let input: Vec<u8> = (0..300u32).map(|i| i as u8).collect();
        assert_eq!(uart.send(&input), input.len());
        let mut got = Vec::new();
        let mut rests = 0;
        while uart.retry_in().is_some() || uart.read(LINE_STATUS) & 1 != 0 {
            while uart.read(LINE_STATUS) & 1 != 0 {
                got.push(uart.read(DATA));
            }
            assert_eq!(uart.send(&[]), 0);
            rests += 1;
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(got, input);
        assert!(rests >= 5, "{rests}");
    }

    #[test]
    fn input_over_the_queue_is_refused() {
        let (uart, _) = listening();
        assert_eq!(uart.send(&[0; FIFO_BYTES]), FIFO_BYTES, "goes to the FIFO");
        assert_eq!(uart.send(&vec![0; 2 * INPUT_QUEUE_BYTES]), INPUT_QUEUE_BYTES);
        assert_eq!(uart.send(&[0]), 0);
    }

    #[test]
    fn a_guest_in_loopback_mode_loses_no_input() {
        let (uart, sink) = listening();
        uart.write(MODEM_CONTROL, 1 << 4);
        assert_eq!(uart.send(b"later"), 5);
        assert_eq!(uart.read(LINE_STATUS) & 1, 0);
        uart.write(MODEM_CONTROL, 1 << 3);
        assert_eq!(uart.read(DATA), b'l');
        uart.write(DATA, b'x');
        assert_eq!(*sink.0.lock().unwrap(), b"x");
    }
}

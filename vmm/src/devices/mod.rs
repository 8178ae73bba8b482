//! The devices, and the bus on which a vCPU's port accesses find them.

pub mod ports;
pub mod power;
pub mod serial;

use std::sync::{Arc, Mutex, PoisonError};

use guest_memory::{Gfn, Pager, PagerError, Sleeper};
use nowait_wire::paging::{self, MARK_LEAD};

use crate::exit::ExitReason;
use crate::spec::EvictTo;
use crate::stalls::Stalls;
use power::Power;
use serial::Uart;

/// What a port write asks of the vCPU loop.
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use]
pub enum PortVerdict {
    /// Nothing: enter the guest again.
    Continue,
    /// The run is over.
    Stop(ExitReason),
}

/// All devices. Accesses to ports and addresses where nothing is read as ones and are ignored.
pub struct Bus {
    /// COM1.
    pub console: Arc<Uart>,
    /// COM2.
    pub agent: Arc<Uart>,
    power: Mutex<Power>,
    pager: Arc<Pager>,
    evict_to: EvictTo,
    stalls: Arc<Stalls>,
}

impl Bus {
    /// Puts the devices together.
    #[must_use]
    pub fn new(
        console: Arc<Uart>,
        agent: Arc<Uart>,
        power: Power,
        pager: Arc<Pager>,
        evict_to: EvictTo,
        stalls: Arc<Stalls>,
    ) -> Self {
        Self { console, agent, power: Mutex::new(power), pager, evict_to, stalls }
    }

    /// One `OUT` of 1, 2 or 4 bytes.
    ///
    /// `by` is what the calling vCPU's thread waits with, should the access need guest memory.
    pub fn port_write(&self, port: u16, data: &[u8], by: &Arc<Sleeper>) -> PortVerdict {
        if let Some((uart, register)) = self.uart(port) {
            if let Some(byte) = data.first() {
                uart.write(register, *byte);
            }
            return PortVerdict::Continue;
        }
        if port == ports::PAGING {
            if let Ok(gfn) = <[u8; 4]>::try_from(data) {
                self.paging_request(Gfn(u64::from(u32::from_le_bytes(gfn))), by);
            }
            return PortVerdict::Continue;
        }
        if port == ports::MARK {
            if let Ok(duration_ms) = <[u8; 4]>::try_from(data) {
                let duration_ms = u32::from_le_bytes(duration_ms);
                self.stalls.mark(duration_ms, MARK_LEAD, &self.pager.stats());
            }
            return PortVerdict::Continue;
        }
        let mut power = self.power.lock().unwrap_or_else(PoisonError::into_inner);
        power.write(port, data).map_or(PortVerdict::Continue, PortVerdict::Stop)
    }

    /// One `IN` of 1, 2 or 4 bytes.
    pub fn port_read(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((uart, register)) = self.uart(port) {
            if let Some(byte) = data.first_mut() {
                *byte = uart.read(register);
            }
            return;
        }
        let power = self.power.lock().unwrap_or_else(PoisonError::into_inner);
        if power.claims(port) {
            let value = power.read(port).to_le_bytes();
            for (to, from) in data.iter_mut().zip(value.iter().chain([&0, &0])) {
                *to = *from;
            }
        }
    }

    fn uart(&self, port: u16) -> Option<(&Uart, u8)> {
        let register = |base: u16| {
            (base..base + u16::from(ports::UART_BYTES)).contains(&port).then(|| (port - base) as u8)
        };
        register(ports::COM1)
            .map(|offset| (&*self.console, offset))
            .or_else(|| register(ports::COM2).map(|offset| (&*self.agent, offset)))
    }

    /// Carries out one request of the paging port. Whatever the guest wrote, the answer goes to the
    /// page that it named; a page outside its RAM gets none.
    fn paging_request(&self, gfn: Gfn, by: &Arc<Sleeper>) {
        let mut page = [0; paging::PAGE_BYTES];
        if self.pager.read_page(gfn, &mut page, by).is_err() {
            return;
        }
        let (status, done) = match paging::Request::decode(&page) {
            Err(_) => (paging::Status::Malformed, 0),
            Ok(paging::Request::Evict(gfns)) => self.evict(&gfns),
        };
        let answer = paging::encode_answer(status, done);
        // The page was there a moment ago; if the pager has failed since, the run ends anyway.
        let _ = self.pager.write_bytes(gfn, paging::answer_offset(), &answer, by);
    }

    fn evict(&self, gfns: &[u64]) -> (paging::Status, u32) {
        let gfns: Vec<Gfn> = gfns.iter().copied().map(Gfn).collect();
        let evicted = match self.evict_to {
            EvictTo::Store => self.pager.evict(&gfns),
            EvictTo::Idle => self.pager.unmap(&gfns),
        };
        match evicted {
            Ok(done) => (paging::Status::Done, done),
            Err(PagerError::OutOfRange(_)) => (paging::Status::OutOfRange, 0),
            Err(PagerError::Evict { done, .. }) => (paging::Status::Failed, done),
            Err(_) => (paging::Status::Failed, 0),
        }
    }
}

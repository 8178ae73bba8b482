//! Pages on a network block device: any server that speaks NBD's fixed newstyle, over TCP or a Unix
//! socket. Requests are pipelined over one connection.
//!
//! ```text
//!   mod (slots, Store) -> client (batches, reconnects) -> socket -> handshake
//!                             |-> replies -> pending (cookies)      wire
//! ```
//! A slot whose write or trim was under way when the connection was lost is never used again: the
//! server may do what it was asked at any time after that.

mod client;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod handshake;
mod pending;
mod replies;
mod socket;
#[cfg(test)]
mod tests;
mod wire;

use std::io;
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

pub use handshake::HandshakeError;
pub use socket::ConnectError;

use self::client::{Client, Operation, Timing};
use self::replies::{Failure, Run};
use super::meter::{Meter, TierReport};
use super::slots::Slots;
use super::spec::Size;
use super::{MAX_BATCH, NbdSpec, Read, Slot, Store, StoreError, Write};
use crate::address::{PAGE_BYTES, PAGE_SIZE, PageBytes};
use crate::pass::{MayWait, NoWait};

const TIER: &str = "nbd";
/// What a read is expected to take before there was one.
const EXPECTED_READ: Duration = Duration::from_micros(500);
/// How many freed slots wait to be used again before older ones are trimmed.
const MAX_UNTRIMMED: usize = 256;

/// Why a network block device cannot be a store.
#[derive(Debug, thiserror::Error)]
pub enum NbdError {
    /// No server, or no export.
    #[error("cannot use {spec}: {source}; start the server first, for example: nbdkit memory 1G")]
    Connect {
        /// The address.
        spec: String,
        /// Why.
        source: ConnectError,
    },
    /// It cannot be written.
    #[error("cannot use {spec}: the export is read-only; start the server without that option")]
    ReadOnly {
        /// The address.
        spec: String,
    },
    /// Less room than asked for.
    #[error(
        "cannot use {spec}: the export has {bytes} bytes, {wanted} are wanted; use a larger export \
         or a smaller size="
    )]
    TooSmall {
        /// The address.
        spec: String,
        /// What it has.
        bytes: u64,
        /// What was asked for.
        wanted: u64,
    },
    /// It cannot be written page by page.
    #[error(
        "cannot use {spec}: the server takes blocks of {bytes} bytes at least, and a page has 4096; \
         use an export with smaller blocks"
    )]
    BlockSize {
        /// The address.
        spec: String,
        /// The server's smallest block.
        bytes: u32,
    },
}

/// A store on a network block device.
pub(crate) struct Nbd {
    name: String,
    client: Client,
    space: Mutex<Space>,
    meter: Meter,
}

struct Space {
    slots: Slots,
    /// Freed slots whose bytes the server still has. Empty if it does not trim.
    untrimmed: Vec<Slot>,
    /// Slots that are never used again.
    quarantined: u64,
}

impl Nbd {
    /// Connects to the server.
    pub(crate) fn new(spec: &NbdSpec) -> Result<Self, NbdError> {
        Self::with_timing(spec, Timing::default())
    }

    fn with_timing(spec: &NbdSpec, timing: Timing) -> Result<Self, NbdError> {
        let connected = Client::connect(spec, timing);
        let (size_bytes, spec) = (spec.size_bytes, spec.to_string());
        let client = match connected {
            Ok(client) => client,
            Err(source) => return Err(NbdError::Connect { spec, source }),
        };
        let geometry = client.geometry();
        let (bytes, wanted) = (geometry.size_bytes, size_bytes.unwrap_or(PAGE_BYTES));
        if geometry.is_read_only() {
            return Err(NbdError::ReadOnly { spec });
        }
        if bytes < wanted {
            return Err(NbdError::TooSmall { spec, bytes, wanted });
        }
        if geometry.min_block_bytes as usize > PAGE_SIZE {
            return Err(NbdError::BlockSize { spec, bytes: geometry.min_block_bytes });
        }
        let slots = Slots::new(TIER, Some(size_bytes.unwrap_or(bytes)));
        Ok(Self {
            name: spec,
            client,
            space: Mutex::new(Space { slots, untrimmed: Vec::new(), quarantined: 0 }),
            meter: Meter::new(EXPECTED_READ),
        })
    }

    fn space(&self) -> MutexGuard<'_, Space> {
        self.space.lock().expect("nothing panics with this lock held")
    }

    fn trimmed(&self, space: &mut Space) {
        for run in self.client.take_trimmed() {
            let slots = (run.first.0..run.first.0 + run.pages).map(Slot);
            slots.for_each(|slot| space.slots.release(slot));
        }
    }
}

impl Space {
    fn take(&mut self) -> Result<Slot, StoreError> {
        // The one that was freed last: its bytes are overwritten, and need no trimming.
        self.untrimmed.pop().map_or_else(|| self.slots.take(), Ok)
    }

    /// Takes slots to be trimmed, those that were freed first.
    fn begin_trim(&mut self) -> Vec<Run> {
        if self.untrimmed.len() < MAX_UNTRIMMED + MAX_BATCH {
            return Vec::new();
        }
        let mut slots: Vec<Slot> = self.untrimmed.drain(..MAX_BATCH).collect();
        slots.sort_unstable();
        let mut runs: Vec<Run> = Vec::new();
        for slot in slots {
            match runs.last_mut() {
                Some(run) if run.first.0 + run.pages == slot.0 => run.pages += 1,
                _ => runs.push(Run { first: slot, pages: 1 }),
            }
        }
        runs
    }
}

/// What the store answers for a failure of the connection or the server.
fn error(action: &'static str, failure: &Failure) -> StoreError {
    let source = match failure {
        Failure::Closed => return StoreError::Closed,
        Failure::Server(code) => {
            return StoreError::io(TIER, action, io::Error::from_raw_os_error(wire::errno(*code)));
        }
        Failure::NotSent(reason) | Failure::Lost(reason) => {
            io::Error::new(io::ErrorKind::NotConnected, reason.to_string())
        }
    };
    StoreError::Unavailable { tier: TIER, action, source }
}

impl Store for Nbd {
    fn read_now(&self, _: &NoWait, slot: Slot, _: &mut PageBytes) -> Result<bool, StoreError> {
        self.space().slots.check(slot).map(|()| false)
    }

    fn at_hand(&self, _: Slot) -> bool {
        false
    }

    fn read(&self, _: &MayWait, reads: &mut [Read<'_>]) {
        let start = Instant::now();
        let space = self.space();
        for read in &mut *reads {
            read.result = space.slots.check(read.slot);
        }
        drop(space);
        let mut there: Vec<_> = reads.iter_mut().filter(|read| read.result.is_ok()).collect();
        let operations: Vec<_> = there.iter().map(|read| Operation::Read(read.slot)).collect();
        let (answers, _) = self.client.run(&operations, &[]);
        for (read, answer) in there.iter_mut().zip(answers) {
            match answer {
                Ok(Some(page)) => *read.page = *page,
                Ok(None) => unreachable!("a read's answer has a page"),
                Err(failure) => read.result = Err(error("read", &failure)),
            }
        }
        self.meter.count_reads(start, reads);
    }

    fn write(&self, _: &MayWait, writes: &mut [Write<'_>]) {
        let start = Instant::now();
        let mut space = self.space();
        self.trimmed(&mut space);
        writes.iter_mut().for_each(|write| write.result = space.take());
        let trims = space.begin_trim();
        drop(space);
        let placed = writes.iter().filter_map(|write| Some((*write.result.as_ref().ok()?, write)));
        let (places, operations): (Vec<Slot>, Vec<_>) =
            placed.map(|(slot, write)| (slot, Operation::Write(slot, write.page))).unzip();
        let (answers, sent) = self.client.run(&operations, &trims);
        let mut space = self.space();
        let placed = writes.iter_mut().filter(|write| write.result.is_ok());
        for ((write, slot), answer) in placed.zip(places).zip(answers) {
            let Err(failure) = answer else {
                space.slots.hold(slot);
                continue;
            };
            write.result = Err(error("write", &failure));
            match failure {
                Failure::NotSent(_) | Failure::Server(_) => space.slots.release(slot),
                Failure::Lost(_) | Failure::Closed => space.quarantined += 1,
            }
        }
        if !sent {
            let slots = trims.iter().flat_map(|run| run.first.0..run.first.0 + run.pages);
            space.untrimmed.extend(slots.map(Slot));
        }
        drop(space);
        self.meter.count_writes(start, writes);
    }

    fn free(&self, slot: Slot) -> Result<(), StoreError> {
        let mut space = self.space();
        space.slots.forget(slot)?;
        match self.client.geometry().trims() {
            true => space.untrimmed.push(slot),
            false => space.slots.release(slot),
        }
        self.meter.pages.sub(1);
        Ok(())
    }

    fn expected_read(&self) -> Duration {
        self.meter.expected_read()
    }

    fn memory_bytes(&self) -> u64 {
        0
    }

    fn report(&self) -> Vec<TierReport> {
        let report = self.meter.report(self.name.clone());
        let space = self.space();
        let mut notes = vec![self.client.note()];
        if space.quarantined > 0 {
            let bytes = Size(space.quarantined * PAGE_BYTES);
            notes.push(format!("{bytes} given up with lost connections"));
        }
        vec![TierReport {
            stored_bytes: report.pages * PAGE_BYTES,
            metadata_bytes: space.slots.metadata_bytes() + space.untrimmed.capacity() as u64 * 4,
            capacity_bytes: Some(space.slots.capacity_bytes()),
            notes,
            ..report
        }]
    }

    fn close(&self) {
        self.client.close();
    }
}

//! What the control socket acts on: the pager, the workers and the vCPUs' gate.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, TrySendError, sync_channel};
use std::thread;

use guest_memory::Pager;

use super::metrics::{self, Facts, Snapshot};
use super::reply::{Reply, Status};
use super::request::Command;
use crate::paging::{AsyncPfStats, Crew, Notifier};
use crate::size;
use crate::threads::{Pauser, Pauses};

/// Changes of the limit that may wait for the one before.
const MAX_LIMITS: usize = 4;

/// A resident limit in bytes, or none.
type Limit = Option<u64>;

/// The parts of a run.
pub(crate) struct House {
    pager: Arc<Pager>,
    crew: Arc<Crew>,
    pauser: Pauser,
    notifiers: Arc<[Arc<Notifier>]>,
    facts: Facts,
}

impl House {
    /// Of these.
    pub(crate) fn new(
        pager: &Arc<Pager>,
        crew: &Arc<Crew>,
        pauser: &Pauser,
        notifiers: &Arc<[Arc<Notifier>]>,
        facts: Facts,
    ) -> Self {
        Self {
            pager: Arc::clone(pager),
            crew: Arc::clone(crew),
            pauser: pauser.clone(),
            notifiers: Arc::clone(notifiers),
            facts,
        }
    }

    /// Starts the thread that changes the limit. It ends when the sender is dropped.
    pub(super) fn start_limits(&self, alive: Sender<()>) -> io::Result<SyncSender<Limit>> {
        let (sender, limits): (_, Receiver<Limit>) = sync_channel(MAX_LIMITS);
        let pager = Arc::clone(&self.pager);
        thread::Builder::new().name("limits".into()).spawn(move || {
            let _alive = alive;
            for limit in limits {
                // The smallest one was checked with the request.
                let _ = pager.set_resident_limit(limit);
            }
        })?;
        Ok(sender)
    }

    /// Does what was asked for, without waiting.
    pub(super) fn answer(&self, command: Command, limits: &SyncSender<Limit>) -> Reply {
        match command {
            Command::Metrics => Reply::text(metrics::render(&self.snapshot())),
            Command::Pause => {
                self.pauser.change(|pauses| pauses.user = true);
                Reply::text("paused\n")
            }
            Command::Resume => {
                self.pauser.change(|pauses| *pauses = Pauses::default());
                Reply::text("running\n")
            }
            Command::Limit(limit) => match (limits.try_send(limit), limit) {
                (Ok(()), Some(bytes)) => {
                    Reply::text(format!("the resident limit becomes {}\n", size::show(bytes)))
                }
                (Ok(()), None) => Reply::text("there will be no resident limit\n"),
                (Err(TrySendError::Full(_) | TrySendError::Disconnected(_)), _) => {
                    let line = "the limit is being changed: try again in a moment";
                    Reply::refuse(Status::Busy, line)
                }
            },
        }
    }

    fn snapshot(&self) -> Snapshot {
        Snapshot {
            facts: self.facts,
            uptime: self.facts.started.elapsed(),
            pauses: self.pauser.pauses(),
            vcpus_waiting: self.pauser.waiting(),
            health: self.pager.health(),
            pager: self.pager.stats(),
            pool: self.crew.stats(),
            async_pf: AsyncPfStats::of(&self.notifiers),
        }
    }
}

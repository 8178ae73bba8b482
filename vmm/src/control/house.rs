//! What the control socket acts on: the pager, the workers and the vCPUs' gate.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, TrySendError, sync_channel};
use std::thread;

use guest_memory::Pager;

use super::metrics::{self, Facts, Snapshot, VcpuSnapshot};
use super::reply::{Reply, Status};
use super::request::Command;
use crate::paging::{AsyncPfStats, Changed, Crew, InUse, Notifier, Threshold};
use crate::size;
use crate::stalls::Stalls;
use crate::threads::{Pauser, Pauses};

/// Orders that may wait for the one before.
const MAX_ORDERS: usize = 4;

/// What takes its time: for a thread of its own.
#[derive(Clone, Debug)]
pub(super) enum Order {
    /// A resident limit in bytes, or none.
    Limit(Option<u64>),
    /// Move all of guest RAM to the store.
    Evict,
    /// Measure the threshold that `auto` is.
    Measure(Arc<InUse>),
}

/// The parts of a run.
pub(crate) struct House {
    pager: Arc<Pager>,
    crew: Arc<Crew>,
    pauser: Pauser,
    notifiers: Arc<[Arc<Notifier>]>,
    stalls: Arc<Stalls>,
    facts: Facts,
}

impl House {
    /// Of these.
    pub(crate) fn new(
        pager: &Arc<Pager>,
        crew: &Arc<Crew>,
        pauser: &Pauser,
        notifiers: &Arc<[Arc<Notifier>]>,
        stalls: &Arc<Stalls>,
        facts: Facts,
    ) -> Self {
        Self {
            pager: Arc::clone(pager),
            crew: Arc::clone(crew),
            pauser: pauser.clone(),
            notifiers: Arc::clone(notifiers),
            stalls: Arc::clone(stalls),
            facts,
        }
    }

    /// Starts the thread that changes the limit and evicts. It ends when the sender is dropped.
    pub(super) fn start_orders(&self, alive: Sender<()>) -> io::Result<SyncSender<Order>> {
        let (sender, orders): (_, Receiver<Order>) = sync_channel(MAX_ORDERS);
        let pager = Arc::clone(&self.pager);
        thread::Builder::new().name("orders".into()).spawn(move || {
            let _alive = alive;
            for order in orders {
                match order {
                    // The smallest one was checked with the request.
                    Order::Limit(limit) => drop(pager.set_resident_limit(limit)),
                    // What the store does not take stays; its trouble is told as any other.
                    Order::Evict => drop(pager.evict_all()),
                    Order::Measure(threshold) => threshold.measure(),
                }
            }
        })?;
        Ok(sender)
    }

    /// Does what was asked for, without waiting.
    pub(super) fn answer(&self, command: Command, orders: &SyncSender<Order>) -> Reply {
        let order = |order, done: String| match orders.try_send(order) {
            Ok(()) => Reply::text(done),
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {
                let line = "the order before is being carried out: try again in a moment";
                Reply::refuse(Status::Busy, line)
            }
        };
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
            Command::Limit(limit) => {
                let becomes = |bytes| format!("the resident limit becomes {}\n", size::show(bytes));
                let none = || "there will be no resident limit\n".to_owned();
                order(Order::Limit(limit), limit.map_or_else(none, becomes))
            }
            Command::Evict => order(Order::Evict, "all of guest RAM is being evicted\n".to_owned()),
            Command::Pages(cells) => Reply::json(&self.pager.survey(cells)),
            Command::Threshold(threshold) => self.threshold(threshold, order),
        }
    }

    /// Changes the threshold where there is one; one that has to be measured is an order.
    fn threshold(&self, threshold: Threshold, order: impl FnOnce(Order, String) -> Reply) -> Reply {
        let Some(in_use) = self.notifiers.first().map(|notifier| notifier.threshold()) else {
            let line = format!(
                "--apf {} has no threshold: only --apf user tells the guest of a page or waits for it",
                self.facts.apf
            );
            return Reply::refuse(Status::Conflict, line);
        };
        match in_use.set(threshold) {
            Changed::Now(now) => Reply::text(format!("the threshold is {now:?}\n")),
            Changed::Unmeasured => {
                let done = "the threshold is being measured\n".to_owned();
                order(Order::Measure(Arc::clone(in_use)), done)
            }
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
            fetch_ages: self.pager.fetch_ages(),
            stalls: self.stalls.visible().then(|| self.stalls_by_vcpu()),
        }
    }

    /// What each vCPU's thread has written down of its stalls.
    fn stalls_by_vcpu(&self) -> Vec<VcpuSnapshot> {
        let vcpu = |vcpu| VcpuSnapshot {
            totals: self.stalls.totals(vcpu),
            current: self.stalls.current(vcpu),
        };
        (0..self.stalls.vcpus()).map(vcpu).collect()
    }
}

//! A vCPU thread's faults on markers: brought to the pager, and waited for where they need time.

use std::os::fd::AsRawFd;
use std::sync::Arc;

use async_pf::protocol::{Begun, GuestState};
use guest_memory::{Fault, Gfn, GuestSlot, Hit, PageEnd, Pager, Sleeper, Woken};

use nowait_wire::agent::Cause;

use super::notify::{Next, Notifier};
use crate::sigbus::{GuestMapping, GuestThread, SigbusError};

/// A vCPU that meets the same page again and again, though it is mapped by all we know: after this many
/// times its mapping is made anew ...
const REPAIR_AFTER: u32 = 8;
/// ... and after this many it is a memory error of the host.
const ERROR_AFTER: u32 = 64;

/// What became of the fault that made KVM_RUN return.
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use]
pub(crate) enum Resolved {
    /// There was none: a kick, or another signal.
    NoFault,
    /// Enter the guest again; it gets the page, or faults again.
    Enter,
    /// Enter it with a page fault at this address: page-not-present.
    Notify(u64),
    /// Enter it halted: only an interrupt, or the page, has it go on.
    Halt,
    /// Somebody wants the vCPU; the page is still on its way.
    Interrupted,
    /// The guest cannot go on.
    Failed(String),
}

/// The faults of one vCPU's thread.
pub(crate) struct Faults {
    pager: Arc<Pager>,
    thread: GuestThread,
    markers: bool,
    sleeper: Arc<Sleeper>,
    /// With `--apf user`.
    notifier: Option<Arc<Notifier>>,
    lane: u16,
    /// Why the guest did not run because of the last fault.
    cause: Cause,
    /// Its frame.
    gfn: Gfn,
    /// The page of the last fault that found it mapped, and how often in a row.
    present: Option<(Gfn, u32)>,
}

impl Faults {
    /// For the calling thread, which is to run this vCPU. It takes SIGBUS, of markers or, without
    /// `markers`, of memory errors of the host only.
    pub(crate) fn new(
        pager: Arc<Pager>,
        sleeper: Arc<Sleeper>,
        vcpu: u32,
        markers: bool,
        notifier: Option<Arc<Notifier>>,
    ) -> Result<Self, SigbusError> {
        let thread = GuestThread::register(&mappings(&pager.slots()))?;
        // 0 is the VMM's own lane.
        let lane = u16::try_from(vcpu + 1).unwrap_or(u16::MAX);
        Ok(Self {
            pager,
            thread,
            markers,
            sleeper,
            notifier,
            lane,
            cause: Cause::Joined,
            gfn: Gfn(0),
            present: None,
        })
    }

    /// Calls `run`, which is to do one KVM_RUN.
    pub(crate) fn in_kvm_run<R>(&self, run: impl FnOnce() -> R) -> R {
        self.thread.in_kvm_run(run)
    }

    /// See [`GuestThread::collects`].
    pub(crate) fn collects(&mut self, vcpu: &impl AsRawFd) -> Result<(), SigbusError> {
        self.thread.collects(vcpu)
    }

    /// Calls `ioctl`, which is to have KVM map this page ahead of the guest, if that needs no waiting by all
    /// we know: the guest waits better in KVM_RUN, with its interrupts. `None` if it was not called.
    ///
    /// # Errors
    /// [`SigbusError`].
    pub(crate) fn map_ahead<T>(
        &self,
        gfn: Gfn,
        ioctl: impl FnOnce() -> T,
    ) -> Result<Option<T>, SigbusError> {
        let Some(notifier) = self.notifier.as_ref().filter(|_| self.pager.is_mapped(gfn)) else {
            return Ok(None);
        };
        notifier.time_ahead(|| self.thread.in_other_ioctl(ioctl)).map(Some)
    }

    /// KVM_RUN was interrupted.
    pub(crate) fn interrupted(&self) {
        // Without markers nothing waits: there is the handler.
        if self.markers {
            self.thread.collect();
        }
    }

    /// Has [`Faults::resolve`] a fault to bring the page of? Then the guest ran.
    pub(crate) fn has_fault(&self) -> bool {
        self.thread.has_fault()
    }

    /// Do faults come to this thread?
    pub(crate) fn has_markers(&self) -> bool {
        self.markers
    }

    /// The pager.
    pub(crate) fn pager(&self) -> &Arc<Pager> {
        &self.pager
    }

    /// What this thread waits with, and others interrupt it by.
    pub(crate) fn sleeper(&self) -> &Arc<Sleeper> {
        &self.sleeper
    }

    /// Why the guest did not run because of the last fault that [`Faults::resolve`] found, and its frame.
    pub(crate) fn cause(&self) -> (Cause, u64) {
        (self.cause, self.gfn.0)
    }

    /// The async page fault protocol, if it is ours.
    pub(crate) fn notifier(&self) -> Option<&Arc<Notifier>> {
        self.notifier.as_ref()
    }

    /// After KVM_RUN was interrupted: brings the page of the fault, if that was it. `guest` is asked for
    /// only when the page needs time, and told whether it is outstanding already.
    pub(crate) fn resolve(&mut self, guest: impl FnOnce(Begun) -> GuestState) -> Resolved {
        let Some(hva) = self.thread.take_fault() else {
            return Resolved::NoFault;
        };
        let gfn = self.pager.gfn_at(hva);
        self.gfn = gfn.unwrap_or(self.gfn);
        match (gfn, self.notifier.clone()) {
            (Some(gfn), None) => self.bring(gfn),
            (Some(gfn), Some(notifier)) => self.bring_async(gfn, &notifier, guest),
            (None, _) => Resolved::Failed(format!("a fault at hva {hva:#x}, outside guest RAM")),
        }
    }

    /// Brings a page in: waits for it if it needs time.
    pub(crate) fn bring(&mut self, gfn: Gfn) -> Resolved {
        let waiter = self.sleeper.begin();
        self.cause = Cause::Waited;
        match self.pager.fault(gfn, self.lane, &waiter) {
            Ok(Fault::Waits { .. }) => match self.sleeper.wait(None) {
                Woken::Page(PageEnd::Ready) => Resolved::Enter,
                Woken::Page(PageEnd::Lost) => lost(gfn),
                Woken::Interrupted | Woken::Closed | Woken::TimedOut => {
                    self.pager.leave(gfn, &waiter);
                    Resolved::Interrupted
                }
            },
            at_once => self.at_once(gfn, at_once),
        }
    }

    /// Brings a page in; if it needs time the guest is told, or halted, or waits.
    fn bring_async(
        &mut self,
        gfn: Gfn,
        notifier: &Arc<Notifier>,
        guest: impl FnOnce(Begun) -> GuestState,
    ) -> Resolved {
        let begun = notifier.begin(gfn);
        let next = match begun {
            Begun::TooMany => return self.bring(gfn),
            Begun::Outstanding => notifier.again(begun, gfn, guest(begun)),
            Begun::New(token) => match self.pager.fault(gfn, self.lane, &notifier.waiter(token)) {
                Ok(Fault::Waits { expected }) => notifier.on_its_way(token, expected, guest(begun)),
                at_once => {
                    notifier.cancel(token);
                    return self.at_once(gfn, at_once);
                }
            },
        };
        self.cause = match next {
            Next::Enter | Next::Wait => Cause::Waited,
            Next::Notify(_) => Cause::Told,
            Next::Halt => Cause::Halted,
        };
        match next {
            Next::Enter => Resolved::Enter,
            Next::Notify(cr2) => Resolved::Notify(cr2),
            Next::Halt => Resolved::Halt,
            Next::Wait => {
                // Its page, or somebody who wants the vCPU: in both cases the guest meets the page again.
                let _ = self.sleeper.wait(None);
                notifier.awake();
                Resolved::Interrupted
            }
        }
    }

    /// A fault that was answered without waiting.
    fn at_once(&mut self, gfn: Gfn, fault: Result<Fault, guest_memory::PagerError>) -> Resolved {
        self.cause = match fault {
            Ok(Fault::Hit(Hit::Zero)) => Cause::Zero,
            Ok(Fault::Hit(Hit::Resident)) => Cause::Resident,
            Ok(Fault::Hit(Hit::AtHand)) => Cause::AtHand,
            _ => Cause::Joined,
        };
        match fault {
            Ok(Fault::Hit(_) | Fault::Waits { .. }) => {
                self.present = None;
                Resolved::Enter
            }
            Ok(Fault::Present) => self.met_again(gfn),
            Ok(Fault::Lost) => lost(gfn),
            Err(error) => Resolved::Failed(error.to_string()),
        }
    }

    /// Another vCPU was faster, mostly. If it happens over and over, the mapping is not what we think.
    fn met_again(&mut self, gfn: Gfn) -> Resolved {
        let times = match self.present {
            Some((last, times)) if last == gfn => times + 1,
            _ => 1,
        };
        self.present = Some((gfn, times));
        if times > ERROR_AFTER {
            return Resolved::Failed(format!(
                "guest frame {gfn} cannot be accessed though it is in memory: a memory error of the host \
                 (see its kernel log)"
            ));
        }
        if times.is_multiple_of(REPAIR_AFTER) {
            self.pager.remap(gfn);
        }
        Resolved::Enter
    }
}

/// Guest RAM as it is mapped for the guest.
pub(crate) fn mappings(slots: &[GuestSlot]) -> Vec<GuestMapping> {
    slots.iter().map(|slot| GuestMapping { hva: slot.hva, len: slot.len }).collect()
}

fn lost(gfn: Gfn) -> Resolved {
    Resolved::Failed(format!("guest frame {gfn} is lost"))
}

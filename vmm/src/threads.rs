//! The vCPU threads: started together, stopped together, in bounded time.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use async_pf::protocol::Begun;
use guest_memory::{Pager, Sleeper};
use nowait_wire::agent::Cause;
use vmm_sys_util::eventfd::EventFd;

use crate::devices::Bus;
use crate::exit::ExitReason;
use crate::kvm::kick::{self, Kicker};
use crate::kvm::prefault::Ahead;
use crate::kvm::vcpu::{Exit, Vcpu};
use crate::machine::MachineError;
use crate::paging::{FaultSource, Faults, Notifier, Policy, Resolved};
use crate::stalls::Stalls;

/// Between two kicks of a vCPU that has not left yet.
const KICK_INTERVAL: Duration = Duration::from_millis(2);

/// The running vCPUs.
pub(crate) struct VcpuThreads {
    threads: Vec<Running>,
    exits: Receiver<ExitReason>,
    gate: Arc<Gate>,
}

/// One vCPU's thread.
struct Running {
    thread: JoinHandle<()>,
    ear: Ear,
    notifier: Option<Arc<Notifier>>,
}

/// The two ways to make a vCPU's thread listen.
#[derive(Clone)]
struct Ear {
    kicker: Kicker,
    sleeper: Arc<Sleeper>,
}

impl Ear {
    /// Makes it leave KVM_RUN, or its wait for a page.
    fn kick(&self) {
        self.kicker.kick();
        self.sleeper.interrupt();
    }
}

/// What vCPUs pass before they enter the guest.
#[derive(Default)]
struct Gate {
    stop: AtomicBool,
    state: Mutex<GateState>,
    opened: Condvar,
}

#[derive(Clone, Copy, Default)]
struct GateState {
    pauses: Pauses,
    /// vCPUs that wait here.
    waiting: u32,
}

/// Why the vCPUs are kept out of the guest. They run when none of these holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Pauses {
    /// The store does not answer.
    pub(crate) store: bool,
    /// The host has no memory for pages.
    pub(crate) memory: bool,
    /// A user wants it.
    pub(crate) user: bool,
}

impl Pauses {
    /// Is there a reason?
    pub(crate) fn any(self) -> bool {
        self.store || self.memory || self.user
    }
}

impl Gate {
    /// Waits while the VM is paused; false when it is to end.
    fn pass(&self) -> bool {
        let mut state = self.lock();
        state.waiting += 1;
        while state.pauses.any() && !self.stop.load(Ordering::SeqCst) {
            state = self.opened.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.waiting -= 1;
        !self.stop.load(Ordering::SeqCst)
    }

    fn stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
        self.lock().pauses = Pauses::default();
        self.opened.notify_all();
    }

    /// Held for a moment only, and by nobody who waits for something else.
    fn lock(&self) -> MutexGuard<'_, GateState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Keeps the vCPUs out of the guest and lets them go on, from any thread. Waits for none of them.
#[derive(Clone)]
pub(crate) struct Pauser {
    gate: Arc<Gate>,
    ears: Arc<[Ear]>,
    wake: Arc<EventFd>,
}

impl Pauser {
    /// Changes the reasons; with the first one vCPUs in the guest leave it, without any they go on.
    /// Returns what holds now. The main loop is told.
    pub(crate) fn change(&self, change: impl FnOnce(&mut Pauses)) -> Pauses {
        let (before, now) = {
            let mut state = self.gate.lock();
            let before = state.pauses;
            change(&mut state.pauses);
            (before, state.pauses)
        };
        match (before.any(), now.any()) {
            (false, true) => self.ears.iter().for_each(Ear::kick),
            (true, false) => self.gate.opened.notify_all(),
            _ => {}
        }
        if before != now {
            let _ = self.wake.write(1);
        }
        now
    }

    /// Why the guest is paused, if it is.
    pub(crate) fn pauses(&self) -> Pauses {
        self.gate.lock().pauses
    }

    /// How many vCPUs wait outside of the guest because it is paused.
    pub(crate) fn waiting(&self) -> u32 {
        self.gate.lock().waiting
    }
}

/// The vCPUs' gate for threads that only stand for vCPUs.
#[cfg(any(test, feature = "bed"))]
#[derive(Clone)]
pub(crate) struct BareGate(Arc<Gate>);

#[cfg(any(test, feature = "bed"))]
impl BareGate {
    /// A gate, and what closes and opens it for those who sleep with these.
    pub(crate) fn new(sleepers: &[Arc<Sleeper>]) -> std::io::Result<(Self, Pauser)> {
        let gate = Arc::<Gate>::default();
        let ear = |sleeper| Ear { kicker: Kicker::default(), sleeper: Arc::clone(sleeper) };
        let wake = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let ears = sleepers.iter().map(ear).collect();
        let pauser = Pauser { gate: Arc::clone(&gate), ears, wake: Arc::new(wake) };
        Ok((Self(gate), pauser))
    }

    /// As vCPUs pass it: waits while it is closed, and is false at the end.
    pub(crate) fn pass(&self) -> bool {
        self.0.pass()
    }

    /// The end.
    pub(crate) fn stop(&self) {
        self.0.stop();
    }
}

impl VcpuThreads {
    /// Starts one thread for each vCPU. The first reason to end goes to [`Self::exit`], and `wake` is
    /// written.
    pub(crate) fn start(
        vcpus: Vec<Vcpu>,
        bus: &Arc<Bus>,
        paging: &Paging,
        wake: &EventFd,
    ) -> Result<Self, MachineError> {
        kick::install_handler().map_err(MachineError::host("install the kick signal's handler"))?;
        // One reason from each vCPU fits: no vCPU thread ever waits here.
        let (sender, exits) = sync_channel(vcpus.len());
        let mut running = Self { threads: Vec::new(), exits, gate: Arc::default() };
        for vcpu in vcpus {
            let (kicker, sleeper) = (Kicker::default(), Arc::<Sleeper>::default());
            let notifier = paging.policy.as_ref().map(|policy| {
                let (kicker, sleeper) = (kicker.clone(), Arc::clone(&sleeper));
                Arc::new(Notifier::new(vcpu.index(), policy, kicker, sleeper))
            });
            let worker = Worker {
                paging: paging.clone(),
                sleeper: Arc::clone(&sleeper),
                notifier: notifier.clone(),
                bus: Arc::clone(bus),
                kicker: kicker.clone(),
                gate: Arc::clone(&running.gate),
                exits: sender.clone(),
                wake: wake.try_clone().map_err(MachineError::host("clone an eventfd"))?,
            };
            let name = format!("vcpu{}", vcpu.index());
            let thread = thread::Builder::new()
                .name(name)
                .spawn(move || worker.run(vcpu))
                .map_err(MachineError::host("start a vCPU thread"))?;
            running.threads.push(Running { thread, ear: Ear { kicker, sleeper }, notifier });
        }
        Ok(running)
    }

    /// Why the guest ended, if it has.
    pub(crate) fn exit(&self) -> Option<ExitReason> {
        match self.exits.try_recv() {
            Ok(reason) => Some(reason),
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Disconnected) => {
                Some(ExitReason::Failure { message: "all vCPU threads have ended".into() })
            }
        }
    }

    /// The async page fault protocols of the vCPUs; none if they are not ours.
    pub(crate) fn notifiers(&self) -> Arc<[Arc<Notifier>]> {
        self.threads.iter().filter_map(|running| running.notifier.clone()).collect()
    }

    /// What pauses them; each change writes `wake`.
    pub(crate) fn pauser(&self, wake: &EventFd) -> Result<Pauser, MachineError> {
        Ok(Pauser {
            gate: Arc::clone(&self.gate),
            ears: self.threads.iter().map(|running| running.ear.clone()).collect(),
            wake: Arc::new(wake.try_clone().map_err(MachineError::host("clone an eventfd"))?),
        })
    }

    /// Makes all vCPUs leave the guest and waits for their threads, at most this long; one that hangs
    /// in a write to a stuck terminal is left to the end of the process.
    pub(crate) fn stop(self, timeout: Duration) {
        self.gate.stop();
        self.threads.iter().for_each(|running| running.ear.sleeper.close());
        let deadline = Instant::now() + timeout;
        let mut waiting = self.threads;
        loop {
            let (ended, still): (Vec<_>, Vec<_>) =
                waiting.into_iter().partition(|running| running.thread.is_finished());
            for running in ended {
                // A panic has been reported through the exit channel.
                let _ = running.thread.join();
            }
            waiting = still;
            if waiting.is_empty() || Instant::now() >= deadline {
                return;
            }
            waiting.iter().for_each(|running| running.ear.kick());
            thread::sleep(KICK_INTERVAL);
        }
    }
}

/// What vCPU threads need to bring pages in.
#[derive(Clone)]
pub(crate) struct Paging {
    pub(crate) pager: Arc<Pager>,
    pub(crate) source: FaultSource,
    /// With `--apf user`.
    pub(crate) policy: Option<Policy>,
    /// Where stalls are written down.
    pub(crate) stalls: Arc<Stalls>,
    /// Who fills KVM's page tables.
    pub(crate) ahead: Option<Ahead>,
}

struct Worker {
    bus: Arc<Bus>,
    paging: Paging,
    kicker: Kicker,
    sleeper: Arc<Sleeper>,
    notifier: Option<Arc<Notifier>>,
    gate: Arc<Gate>,
    exits: SyncSender<ExitReason>,
    wake: EventFd,
}

impl Worker {
    fn run(self, mut vcpu: Vcpu) {
        let Paging { pager, source, .. } = self.paging.clone();
        let (markers, sleeper) = (source == FaultSource::Marker, Arc::clone(&self.sleeper));
        let faults = Faults::new(pager, sleeper, vcpu.index(), markers, self.notifier.clone());
        let mut faults = match faults {
            Ok(faults) => faults,
            Err(error) => return self.send(ExitReason::Failure { message: error.to_string() }),
        };
        if markers {
            vcpu.watch_state();
        }
        if markers && let Err(error) = vcpu.collect_faults(&mut faults) {
            return self.send(ExitReason::Failure { message: error.to_string() });
        }
        let running = vcpu.attach(&self.kicker);
        let mut stall = self.paging.stalls.of(vcpu.index());
        while self.gate.pass() {
            let exit = vcpu.run(&self.bus, &mut faults);
            stall.end_halt();
            let stop = match exit {
                Exit::Resume => None,
                Exit::Interrupted => {
                    stall.begin();
                    let (fault, stop) = self.after_interrupt(&mut vcpu, &mut faults);
                    stall.end(fault.then(|| faults.cause()));
                    stop
                }
                Exit::Stop(reason) => Some(reason),
            };
            if let Some(reason) = stop {
                self.send(reason);
                break;
            }
        }
        drop(running);
    }

    /// A fault, maybe: whether it was one, and why the run is over, if it is.
    fn after_interrupt(&self, vcpu: &mut Vcpu, faults: &mut Faults) -> (bool, Option<ExitReason>) {
        let failed = |message: String| ExitReason::Failure { message };
        let resolved = faults.resolve(|begun| match begun {
            Begun::New(_) => vcpu.guest_state(self.notifier.as_ref()),
            // The guest is told of nothing: whether it got INIT does not matter yet.
            Begun::Outstanding | Begun::TooMany => vcpu.guest_state(None),
        });
        let fault = resolved != Resolved::NoFault;
        let stop = match resolved {
            Resolved::NoFault | Resolved::Interrupted => None,
            Resolved::Enter => {
                vcpu.fault_served(faults);
                if let (Some(ahead), (Cause::Zero, _)) = (&self.paging.ahead, faults.cause()) {
                    ahead.settle();
                }
                None
            }
            Resolved::Notify(cr2) => {
                if let Some(notifier) = &self.notifier {
                    notifier.time_injection(|| vcpu.inject_page_fault(cr2));
                }
                None
            }
            Resolved::Halt => vcpu.halt().err().map(|error| failed(error.to_string())),
            Resolved::Failed(why) => Some(failed(format!("vCPU {}: {why}", vcpu.index()))),
        };
        (fault, stop)
    }

    fn send(&self, reason: ExitReason) {
        let _nobody_is_left_to_read = self.exits.try_send(reason);
        let _ = self.wake.write(1);
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        if thread::panicking() {
            let name = thread::current().name().unwrap_or("vCPU").to_owned();
            self.send(ExitReason::Failure { message: format!("the thread of {name} panicked") });
        }
    }
}

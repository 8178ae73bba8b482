//! The vCPU threads: started together, stopped together, in bounded time.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, sync_channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use guest_memory::{Pager, Sleeper};
use vmm_sys_util::eventfd::EventFd;

use crate::devices::Bus;
use crate::exit::ExitReason;
use crate::kvm::kick::{self, Kicker};
use crate::kvm::vcpu::{Exit, Vcpu};
use crate::machine::MachineError;
use crate::paging::{FaultSource, Faults, Resolved};

/// Between two kicks of a vCPU that has not left yet.
const KICK_INTERVAL: Duration = Duration::from_millis(2);

/// The running vCPUs.
pub(crate) struct VcpuThreads {
    threads: Vec<Running>,
    exits: Receiver<ExitReason>,
    gate: Arc<Gate>,
}

/// One vCPU's thread, and the two ways to make it listen.
struct Running {
    thread: JoinHandle<()>,
    kicker: Kicker,
    sleeper: Arc<Sleeper>,
}

impl Running {
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
    paused: Mutex<bool>,
    opened: Condvar,
}

impl Gate {
    /// Waits while the VM is paused; false when it is to end.
    fn pass(&self) -> bool {
        let mut paused = self.paused.lock().unwrap_or_else(PoisonError::into_inner);
        while *paused && !self.stop.load(Ordering::SeqCst) {
            paused = self.opened.wait(paused).unwrap_or_else(PoisonError::into_inner);
        }
        !self.stop.load(Ordering::SeqCst)
    }

    fn set_paused(&self, to: bool) {
        *self.paused.lock().unwrap_or_else(PoisonError::into_inner) = to;
        self.opened.notify_all();
    }

    fn stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
        self.set_paused(false);
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
            let worker = Worker {
                paging: paging.clone(),
                sleeper: Arc::clone(&sleeper),
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
            running.threads.push(Running { thread, kicker, sleeper });
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

    /// Keeps all vCPUs out of the guest until [`Self::resume`]; those in it leave it now.
    pub(crate) fn pause(&self) {
        self.gate.set_paused(true);
        self.threads.iter().for_each(Running::kick);
    }

    /// Lets the vCPUs go on.
    pub(crate) fn resume(&self) {
        self.gate.set_paused(false);
    }

    /// Makes all vCPUs leave the guest and waits for their threads, at most this long; one that hangs
    /// in a write to a stuck terminal is left to the end of the process.
    pub(crate) fn stop(self, timeout: Duration) {
        self.gate.stop();
        self.threads.iter().for_each(|running| running.sleeper.close());
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
            waiting.iter().for_each(Running::kick);
            thread::sleep(KICK_INTERVAL);
        }
    }
}

/// What vCPU threads need to bring pages in.
#[derive(Clone)]
pub(crate) struct Paging {
    pub(crate) pager: Arc<Pager>,
    pub(crate) source: FaultSource,
}

struct Worker {
    bus: Arc<Bus>,
    paging: Paging,
    kicker: Kicker,
    sleeper: Arc<Sleeper>,
    gate: Arc<Gate>,
    exits: SyncSender<ExitReason>,
    wake: EventFd,
}

impl Worker {
    fn run(self, mut vcpu: Vcpu) {
        let Paging { pager, source } = self.paging.clone();
        let markers = source == FaultSource::Marker;
        let faults = Faults::new(pager, Arc::clone(&self.sleeper), vcpu.index(), markers);
        let mut faults = match faults {
            Ok(faults) => faults,
            Err(error) => return self.send(ExitReason::Failure { message: error.to_string() }),
        };
        let running = vcpu.attach(&self.kicker);
        while self.gate.pass() {
            match vcpu.run(&self.bus, &mut faults) {
                Exit::Resume => {}
                Exit::Interrupted => match faults.resolve() {
                    Resolved::NoFault | Resolved::Enter | Resolved::Interrupted => {}
                    Resolved::Failed(why) => {
                        let message = format!("vCPU {}: {why}", vcpu.index());
                        self.send(ExitReason::Failure { message });
                        break;
                    }
                },
                Exit::Stop(reason) => {
                    self.send(reason);
                    break;
                }
            }
        }
        drop(running);
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

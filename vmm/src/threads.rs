//! The vCPU threads: started together, stopped together, in bounded time.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, sync_channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::EventFd;

use crate::devices::Bus;
use crate::exit::ExitReason;
use crate::kvm::kick::{self, Kicker};
use crate::kvm::vcpu::{Exit, Vcpu};
use crate::machine::MachineError;

/// Between two kicks of a vCPU that has not left yet.
const KICK_INTERVAL: Duration = Duration::from_millis(2);

/// The running vCPUs.
pub(crate) struct VcpuThreads {
    threads: Vec<(JoinHandle<()>, Kicker)>,
    exits: Receiver<ExitReason>,
    stop: Arc<AtomicBool>,
}

impl VcpuThreads {
    /// Starts one thread for each vCPU. The first reason to end goes to [`Self::exit`], and `wake` is
    /// written.
    pub(crate) fn start(
        vcpus: Vec<Vcpu>,
        bus: &Arc<Bus>,
        wake: &EventFd,
    ) -> Result<Self, MachineError> {
        kick::install_handler().map_err(MachineError::host("install the kick signal's handler"))?;
        // One reason from each vCPU fits: no vCPU thread ever waits here.
        let (sender, exits) = sync_channel(vcpus.len());
        let stop = Arc::new(AtomicBool::new(false));
        let mut running = Self { threads: Vec::new(), exits, stop };
        for vcpu in vcpus {
            let kicker = Kicker::default();
            let worker = Worker {
                bus: Arc::clone(bus),
                kicker: kicker.clone(),
                stop: Arc::clone(&running.stop),
                exits: sender.clone(),
                wake: wake.try_clone().map_err(MachineError::host("clone an eventfd"))?,
            };
            let name = format!("vcpu{}", vcpu.index());
            let thread = thread::Builder::new()
                .name(name)
                .spawn(move || worker.run(vcpu))
                .map_err(MachineError::host("start a vCPU thread"))?;
            running.threads.push((thread, kicker));
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

    /// Makes all vCPUs leave the guest and waits for their threads, at most this long; one that hangs
    /// in a write to a stuck terminal is left to the end of the process.
    pub(crate) fn stop(self, timeout: Duration) {
        self.stop.store(true, Ordering::SeqCst);
        let deadline = Instant::now() + timeout;
        let mut waiting = self.threads;
        loop {
            let (ended, still): (Vec<_>, Vec<_>) =
                waiting.into_iter().partition(|(thread, _)| thread.is_finished());
            for (thread, _) in ended {
                // A panic has been reported through the exit channel.
                let _ = thread.join();
            }
            waiting = still;
            if waiting.is_empty() || Instant::now() >= deadline {
                return;
            }
            waiting.iter().for_each(|(_, kicker)| kicker.kick());
            thread::sleep(KICK_INTERVAL);
        }
    }
}

struct Worker {
    bus: Arc<Bus>,
    kicker: Kicker,
    stop: Arc<AtomicBool>,
    exits: SyncSender<ExitReason>,
    wake: EventFd,
}

impl Worker {
    fn run(self, mut vcpu: Vcpu) {
        let running = vcpu.attach(&self.kicker);
        while !self.stop.load(Ordering::SeqCst) {
            match vcpu.run(&self.bus) {
                Exit::Resume | Exit::Interrupted => {}
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

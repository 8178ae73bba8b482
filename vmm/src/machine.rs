//! One guest from start to end: RAM, KVM, devices, threads, and the loop that waits for the end.
//!
//! ```text
//!   build()     Spec -> GuestRam (loaded through the alias) -> VM, vCPUs -> Pager -> Machine
//!   run()       one thread a vCPU, the pager's thread, and this one:
//!
//!      vCPU threads --- ExitReason ---+
//!      COM2 -------- agent reports ---+--> main loop --> stop vCPUs --> Outcome
//!      terminal, signals, time-out ---+
//! ```

use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::{Duration, Instant};

use guest_memory::{
    GuestRam, LayoutError, Pager, PagerConfig, PagerError, RamError, RamLayout, Workers,
};
use kvm_ioctls::VmFd;
use serde::Serialize;
use vmm_sys_util::eventfd::EventFd;

use crate::agent::{self, LineSink};
use crate::boot::{self, BootError, Payload, regs};
use crate::console::{self, ConsoleOut};
use crate::control::{Control, ControlSocket, Facts, House};
use crate::devices::power::Power;
use crate::devices::serial::{IrqLine, Uart};
use crate::devices::{Bus, ports};
use crate::events::{Events, Input, Signals};
use crate::exit::{self, ExitReason};
use crate::kvm::cpuid::Apf;
use crate::kvm::prefault::Prefault;
use crate::kvm::vcpu::Vcpu;
use crate::kvm::{self, KvmError, cpuid};
use crate::paging::{self, AsyncPfStats, Crew, FaultSource, InUse, Policy, WorkerStats};
use crate::patience::Lines;
use crate::size;
use crate::spec::{ConsoleKind, Spec};
use crate::stalls::Stalls;
use crate::threads::{Paging, VcpuThreads};
use crate::trace::{self, Tracer};

/// Why a guest could not be started.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The size of RAM.
    #[error("--memory: {0}")]
    Layout(#[from] LayoutError),
    /// More RAM than the guest can address.
    #[error(
        "--memory {}: guest physical addresses have {bits} bits on this host, which is {}; give less",
        size::show(*bytes), size::show(1 << *bits)
    )]
    TooWide {
        /// What was asked for.
        bytes: u64,
        /// The width.
        bits: u32,
    },
    /// Guest RAM.
    #[error(transparent)]
    Ram(#[from] RamError),
    /// The pager.
    #[error(transparent)]
    Pager(#[from] PagerError),
    /// Kernel, initrd or tables.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// A thread, a descriptor, a signal handler.
    #[error("cannot {what}: {source}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// The error.
        source: std::io::Error,
    },
}

impl MachineError {
    /// Says what was tried.
    pub(crate) fn host(what: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::Host { what, source }
    }

    /// The exit code that goes with it.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Layout(_)
            | Self::TooWide { .. }
            | Self::Boot(_)
            | Self::Kvm(KvmError::TooManyCpus { .. })
            | Self::Pager(PagerError::Store(_)) => exit::OPERAND,
            Self::Kvm(_) | Self::Ram(_) | Self::Pager(_) => exit::HOST,
            Self::Host { .. } => exit::FAILURE,
        }
    }
}

/// How a run went; `--json` writes it.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    /// The schema of this object.
    pub schema: &'static str,
    /// Why it ended.
    pub exit: Exit,
    /// From the first vCPU's start to the end, in microseconds.
    pub elapsed_us: u64,
    /// Processors.
    pub cpus: u32,
    /// Guest RAM in bytes.
    pub memory_bytes: u64,
    /// Who handled async page faults.
    pub apf: cpuid::Apf,
    /// Agent requests that got no answer.
    pub requests_unanswered: usize,
    /// Pages that were put into KVM's page tables before the guest touched them; `None` where KVM
    /// cannot do it (Linux before 6.11).
    pub pages_mapped_ahead: Option<u64>,
    /// How faults came to the pager.
    pub fault_source: FaultSource,
    /// What the workers did.
    pub workers: WorkerStats,
    /// What our async page faults did; `None` if they are not ours.
    pub async_pf: Option<AsyncPfStats>,
    /// What the pager did.
    pub pager: guest_memory::PagerStats,
    /// The life of every fault.
    #[serde(skip)]
    pub tracer: Option<Arc<Tracer>>,
    /// Why what the guest wrote to the console is not all on standard output.
    #[serde(skip)]
    pub console_failure: Option<console::Failure>,
}

/// Why a run ended, with the exit code.
#[derive(Clone, Debug, Serialize)]
pub struct Exit {
    /// Why.
    #[serde(flatten)]
    pub reason: ExitReason,
    /// The exit code of the process.
    pub code: u8,
}

/// The schema of [`Outcome`].
pub const SCHEMA: &str = "nowait.run/1";

/// A guest that is ready to run.
pub struct Machine {
    spec: Spec,
    /// The VM lives as long as its file descriptor; interrupts need it.
    vm: Arc<VmFd>,
    vcpus: Vec<Vcpu>,
    bus: Arc<Bus>,
    console: ConsoleOut,
    pager: Arc<Pager>,
    crew: Arc<Crew>,
    prefault: Option<Prefault>,
    stalls: Arc<Stalls>,
    tracer: Option<Arc<Tracer>>,
    messages: Receiver<agent::Message>,
    message_event: EventFd,
}

impl Machine {
    /// Builds a guest: nothing of its RAM is present but what the loader wrote.
    ///
    /// # Errors
    /// When an operand does not fit, or the host cannot.
    pub fn build(spec: Spec) -> Result<Self, MachineError> {
        let kvm = kvm::open()?;
        kvm::require_guests()?;
        let supported = cpuid::supported(&kvm)?;
        let layout = RamLayout::new(spec.memory_bytes)?;
        check_width(&layout, spec.memory_bytes, cpuid::physical_address_bits(&supported))?;
        let vm = kvm::create_vm(&kvm, spec.cpus)?;
        let markers = spec.fault_source == FaultSource::Marker;
        if markers {
            kvm::prepare_markers(&vm, spec.apf)?;
        }

        let mut ram = GuestRam::new(&layout)?;
        let memory = ram.loader();
        regs::write_gdt(memory)?;
        let payload = Payload {
            kernel: &spec.kernel,
            initrd: spec.initrd.as_deref(),
            cmdline: &spec.cmdline,
            cpus: spec.cpus,
        };
        let entry = boot::load(memory, &layout, &payload)?;
        kvm::add_memory(&vm, &ram.slots())?;
        let mut vcpus = Vec::new();
        for index in 0..spec.cpus {
            let cpuid = cpuid::for_vcpu(supported.as_slice(), index, spec.cpus, spec.apf);
            vcpus.push(Vcpu::new(&vm, index, &cpuid)?);
        }
        vcpus[0].set_entry(entry)?;
        let cpuid = cpuid::for_vcpu(supported.as_slice(), spec.cpus, spec.cpus + 1, spec.apf);
        let mappings = markers.then(|| paging::mappings(&ram.slots()));
        let prefault = Prefault::start(&kvm, &vm, spec.cpus, &cpuid, mappings)?;
        if let Some(ahead) = prefault.as_ref().map(Prefault::ahead) {
            ram.on_mapped(Box::new(move |gpa, bytes| ahead.mapped(gpa, bytes)));
        }
        let tracer = spec.trace.is_some().then(|| Arc::new(Tracer::new(trace::MAX_STEPS)));
        if let Some(tracer) = tracer.clone() {
            ram.on_step(Box::new(move |gfn, step| tracer.step(gfn.0, step)));
        }
        let crew = Crew::new().map_err(MachineError::host("make the worker pool"))?;
        let config = PagerConfig {
            store: spec.store.clone(),
            fault_around_bytes: spec.fault_around_bytes,
            populate: spec.populate,
            resident_limit_bytes: spec.resident_limit_bytes,
            markers,
            prefetch: spec.prefetch,
        };
        let workers: Arc<dyn Workers> = Arc::<Crew>::clone(&crew);
        let pager = Arc::new(ram.start(&config, workers)?);
        if let Some(prefault) = &prefault {
            prefault.flush();
        }

        let (sink, messages) = sync_channel(agent::QUEUE_MESSAGES);
        let message_event = event("make an eventfd")?;
        let wake = message_event.try_clone().map_err(MachineError::host("clone an eventfd"))?;
        let console = ConsoleOut::new();
        let console_out: Box<dyn std::io::Write + Send> = match spec.console {
            ConsoleKind::Stdio => Box::new(console.clone()),
            ConsoleKind::None => Box::new(std::io::sink()),
        };
        let com1 = uart(&vm, ports::COM1_IRQ, console_out)?.paced();
        let com2 = uart(&vm, ports::COM2_IRQ, Box::new(LineSink::new(sink, wake)))?;
        let power = Power::new(spec.debug_exit);
        let stalls = Arc::new(Stalls::new(spec.cpus, markers, tracer.clone()));
        let (evict_to, marked) = (spec.evict_to, Arc::clone(&stalls));
        let bus = Bus::new(com1.into(), com2.into(), power, Arc::clone(&pager), evict_to, marked);
        let bus = Arc::new(bus);
        Ok(Self {
            spec,
            vm: Arc::new(vm),
            vcpus,
            bus,
            console,
            pager,
            crew,
            prefault,
            stalls,
            tracer,
            messages,
            message_event,
        })
    }

    /// Runs the guest to its end. Reports of the agent go to `report` as they come; `control` is served
    /// meanwhile.
    ///
    /// # Errors
    /// When threads or signal handlers cannot be set up.
    pub(crate) fn run(
        self,
        signals: Signals,
        report: Option<Lines>,
        control: Option<ControlSocket>,
    ) -> Result<Outcome, MachineError> {
        let exits = event("make an eventfd")?;
        let (spec, pager) = (self.spec, self.pager);
        let input = Input {
            console: spec.console,
            deadline: spec.timeout.map(|timeout| Instant::now() + timeout),
            requests: spec.requests,
            report,
            stalls: Arc::clone(&self.stalls),
        };
        let mut events =
            Events::new(input, signals, Arc::clone(&self.bus), self.messages, self.message_event)?;
        let started = Instant::now();
        let policy = match spec.apf {
            Apf::User => {
                let threshold = Arc::new(InUse::new(spec.apf_threshold, &spec.store));
                Some(Policy { vm: self.vm, threshold, tracer: self.tracer.clone() })
            }
            Apf::Off | Apf::Host | Apf::Kernel => None,
        };
        let (source, stalls) = (spec.fault_source, Arc::clone(&self.stalls));
        let ahead = self.prefault.as_ref().map(Prefault::ahead);
        let paging = Paging { pager: Arc::clone(&pager), source, policy, stalls, ahead };
        let threads = VcpuThreads::start(self.vcpus, &self.bus, &paging, &exits)?;
        let pauser = threads.pauser(&exits)?;
        let facts =
            Facts { apf: spec.apf, fault_source: spec.fault_source, cpus: spec.cpus, started };
        let notifiers = threads.notifiers();
        let house = House::new(&pager, &self.crew, &pauser, &notifiers, &self.stalls, facts);
        let control = control.map(|socket| Control::start(socket, house)).transpose();
        let control = control.map_err(MachineError::host("start the control socket's threads"))?;
        let reason = events.wait(&threads, &pauser, &exits, &pager)?;
        drop(control);
        // Vcpu threads may wait for the main loop to take a message: it is gone from here on.
        let requests_unanswered = events.close();
        self.console.abandon();
        threads.stop(STOP_TIMEOUT);
        // Before the VM goes: destroying it waits for KVM's workers, and these may wait for pages.
        let (pager_stats, worker_stats) = (pager.stats(), self.crew.stats());
        pager.shutdown();
        self.crew.close();
        let pages_mapped_ahead = self.prefault.as_ref().map(Prefault::pages);
        if let Some(prefault) = self.prefault {
            prefault.finish();
        }
        let reason = match reason {
            ExitReason::PowerOff if requests_unanswered > 0 => ExitReason::Failure {
                message: format!(
                    "the guest powered off with {} to its agent unanswered",
                    size::count(requests_unanswered as u64, "request")
                ),
            },
            other => other,
        };
        let async_pf = AsyncPfStats::of(&notifiers);
        let code = reason.code();
        Ok(Outcome {
            schema: SCHEMA,
            exit: Exit { reason, code },
            elapsed_us: u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX),
            cpus: spec.cpus,
            memory_bytes: spec.memory_bytes,
            apf: spec.apf,
            requests_unanswered,
            pages_mapped_ahead,
            fault_source: spec.fault_source,
            pager: pager_stats,
            workers: worker_stats.into(),
            async_pf,
            tracer: self.tracer,
            console_failure: self.console.failure().cloned(),
        })
    }
}

/// How long the vCPU threads may take to leave KVM_RUN before the process ends without them.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);

fn check_width(layout: &RamLayout, bytes: u64, bits: u32) -> Result<(), MachineError> {
    let fits = bits >= 64 || layout.end_gpa().0 <= 1 << bits;
    if fits { Ok(()) } else { Err(MachineError::TooWide { bytes, bits }) }
}

fn event(what: &'static str) -> Result<EventFd, MachineError> {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(MachineError::host(what))
}

fn uart(vm: &VmFd, irq: u8, out: Box<dyn std::io::Write + Send>) -> Result<Uart, MachineError> {
    Ok(Uart::new(IrqLine(kvm::irq_line(vm, irq)?), out))
}

//! The probe's VM: creates it, runs the guest, and compares each exit with the step it belongs to.

// `unsafe`: memfd_create, KVM_SET_USER_MEMORY_REGION and the union of kvm_run have no safe wrapper.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::FromRawFd;
use std::time::{Duration, Instant};

use kvm_bindings::{KVM_INTERNAL_ERROR_EMULATION, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

use super::marker::{Marker, MarkerError};
use super::{Outcome, Step, StepReport, guest};
use crate::sigbus::{GuestMapping, GuestThread, SigbusError};

/// KVM_RUN calls that a signal may interrupt without a fault, per step, before the step fails.
const MAX_INTERRUPTIONS: u32 = 16;

/// Why the probe's VM could not be built.
#[derive(Debug, thiserror::Error)]
enum CreateError {
    #[error("cannot open /dev/kvm: {0}")]
    OpenKvm(kvm_ioctls::Error),
    #[error(
        "KVM_CREATE_VM says EBUSY: another hypervisor (VirtualBox, VMware …) holds the processor's \
         virtualisation"
    )]
    Busy,
    #[error("{call} failed: {source}")]
    Kvm { call: &'static str, source: kvm_ioctls::Error },
    #[error("cannot create {} bytes of guest RAM: {source}", guest::RAM_BYTES)]
    Memory { source: io::Error },
    #[error("cannot map {} bytes of guest RAM: {source}", guest::RAM_BYTES)]
    Map { source: vm_memory::mmap::MmapRegionError },
    #[error("cannot write the guest's code and tables: {0}")]
    Load(vm_memory::VolatileMemoryError),
    #[error(transparent)]
    Sigbus(#[from] SigbusError),
}

/// `map_err` for a KVM ioctl.
fn kvm_error(call: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> CreateError {
    move |source| CreateError::Kvm { call, source }
}

/// What KVM_RUN came back with, as far as the probe's guest can cause it.
#[derive(Debug, PartialEq, Eq)]
enum Exit {
    /// OUT to the guest's port, one byte.
    Out(u8),
    /// HLT.
    Halt,
    /// SIGBUS: KVM could not serve the page at this host virtual address.
    Fault(u64),
    /// Anything else, in plain words.
    Other(String),
}

/// Why a step did not pass, in plain words.
enum NotPassed {
    Failed(String),
    Skipped(String),
}

impl From<CreateError> for NotPassed {
    fn from(error: CreateError) -> Self {
        Self::Failed(error.to_string())
    }
}

impl From<MarkerError> for NotPassed {
    fn from(error: MarkerError) -> Self {
        match error {
            // Says nothing about KVM and markers.
            MarkerError::NoUffd(_) => Self::Skipped(error.to_string()),
            _ => Self::Failed(error.to_string()),
        }
    }
}

/// Takes the steps one after the other and reports each; after one that fails only the marker is
/// tried, which does not need the others.
pub(super) fn take_steps(report: &mut dyn FnMut(StepReport)) {
    let mut report = |step, result: Result<(), NotPassed>| {
        let outcome = match result {
            Ok(()) => Outcome::Passed,
            Err(NotPassed::Failed(reason)) => Outcome::Failed { reason },
            Err(NotPassed::Skipped(reason)) => Outcome::Skipped { reason },
        };
        let passed = outcome == Outcome::Passed;
        report(StepReport { step, outcome });
        passed
    };
    let mut machine = match Machine::create(guest::START) {
        Ok(machine) => machine,
        Err(error) => {
            report(Step::Create, Err(error.into()));
            return;
        }
    };
    report(Step::Create, Ok(()));
    let expected = [
        (Step::PortWrite, Exit::Out(guest::OUT_STARTED)),
        (Step::Int3, Exit::Out(guest::OUT_IN_HANDLER)),
        (Step::Iretq, Exit::Out(guest::OUT_RETURNED)),
        (Step::Halt, Exit::Halt),
    ];
    for (step, exit) in expected {
        if !report(step, machine.expect(&exit)) {
            break;
        }
    }
    drop(machine);
    report(Step::PoisonMarker, fault_on_a_marker());
}

/// The last step, in a machine of its own: what stopped the others need not stop this one.
fn fault_on_a_marker() -> Result<(), NotPassed> {
    let mut machine = Machine::create(guest::READ_START)?;
    let hva = machine.guest_mapping.as_ptr() as u64 + guest::MARKED_PAGE as u64;
    let marker = Marker::set(hva)?;
    let exit = machine.run();
    if exit != Exit::Fault(hva) {
        let came = machine.explain(&exit);
        let reason = format!("no SIGBUS with the address of the page: {came}");
        return Err(NotPassed::Failed(reason));
    }
    machine.serve(&marker)?;
    machine.expect(&Exit::Out(guest::MARKED_BYTE))?;
    machine.expect(&Exit::Halt)
}

/// Exits that are timed, and how many before them are not.
const TIMED_EXITS: usize = 33;
const WARM_UP_EXITS: usize = 8;

/// What one exit to this process takes, and back: the median of a few. For a KVM that runs guests.
pub(super) fn exit_cost() -> Option<Duration> {
    let mut machine = Machine::create(guest::LOOP_START).ok()?;
    let mut costs = Vec::with_capacity(TIMED_EXITS);
    for _ in 0..WARM_UP_EXITS + TIMED_EXITS {
        let began = Instant::now();
        if !matches!(machine.run(), Exit::Out(_)) {
            return None;
        }
        costs.push(began.elapsed());
    }
    let timed = &mut costs[WARM_UP_EXITS..];
    timed.sort_unstable();
    Some(timed[TIMED_EXITS / 2])
}

struct Machine {
    // Fields are dropped in this order: the vCPU and the VM before the memory they run on.
    vcpu: VcpuFd,
    _vm: VmFd,
    thread: GuestThread,
    /// What KVM maps for the guest.
    guest_mapping: MmapRegion,
    /// The same memory, for the VMM.
    alias: MmapRegion,
}

impl Machine {
    /// A machine that stands at `rip` of the guest's image.
    fn create(rip: u64) -> Result<Self, CreateError> {
        let kvm = Kvm::new().map_err(CreateError::OpenKvm)?;
        let vm = create_vm(&kvm)?;
        let (guest_mapping, alias) = map_ram()?;
        let ram = alias.as_volatile_slice();
        for (gpa, bytes) in guest::image() {
            ram.write_slice(&bytes, gpa).map_err(CreateError::Load)?;
        }
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: guest::RAM_BYTES as u64,
            userspace_addr: guest_mapping.as_ptr() as u64,
        };
        // SAFETY: the region is a live mapping of exactly that length, which `Machine` keeps until
        // after the VM is dropped; nothing in Rust borrows from this mapping.
        unsafe { vm.set_user_memory_region(region) }
            .map_err(kvm_error("KVM_SET_USER_MEMORY_REGION"))?;
        let vcpu = create_vcpu(&kvm, &vm, rip)?;
        let thread = GuestThread::register(&[GuestMapping {
            hva: guest_mapping.as_ptr() as u64,
            len: guest::RAM_BYTES as u64,
        }])?;
        Ok(Self { vcpu, _vm: vm, thread, guest_mapping, alias })
    }

    /// Runs the guest to its next exit and says what came instead of `wanted`, if it did.
    fn expect(&mut self, wanted: &Exit) -> Result<(), NotPassed> {
        let exit = self.run();
        if exit == *wanted { Ok(()) } else { Err(NotPassed::Failed(self.explain(&exit))) }
    }

    /// Fills the marked page through the alias and maps it in the marker's place.
    fn serve(&self, marker: &Marker) -> Result<(), MarkerError> {
        self.alias
            .as_volatile_slice()
            .write_obj(guest::MARKED_BYTE, guest::MARKED_PAGE)
            .map_err(MarkerError::Fill)?;
        marker.replace()
    }

    /// KVM_RUN until something happens that is not a stray signal.
    fn run(&mut self) -> Exit {
        for _ in 0..MAX_INTERRUPTIONS {
            let (thread, vcpu) = (&self.thread, &mut self.vcpu);
            match thread.in_kvm_run(|| vcpu.run()) {
                Ok(VcpuExit::IoOut(guest::PORT, &[byte])) => return Exit::Out(byte),
                Ok(VcpuExit::Hlt) => return Exit::Halt,
                Ok(VcpuExit::InternalError) => return Exit::Other(self.internal_error()),
                Ok(exit) => return Exit::Other(describe(&exit)),
                Err(error) if error.errno() == libc::EINTR => {
                    if let Some(hva) = self.thread.take_fault() {
                        return Exit::Fault(hva);
                    }
                }
                Err(error) => return Exit::Other(format!("KVM_RUN failed: {error}")),
            }
        }
        Exit::Other(format!("KVM_RUN was interrupted {MAX_INTERRUPTIONS} times without a fault"))
    }

    /// The words for KVM_EXIT_INTERNAL_ERROR, the exit of the KVMs that emulate.
    fn internal_error(&mut self) -> String {
        // SAFETY: the exit reason was KVM_EXIT_INTERNAL_ERROR, for which KVM fills in `internal`.
        let suberror = unsafe { self.vcpu.get_kvm_run().__bindgen_anon_1.internal.suberror };
        let words = match suberror {
            KVM_INTERNAL_ERROR_EMULATION => "KVM had to emulate an instruction that it cannot",
            kvm_bindings::KVM_INTERNAL_ERROR_SIMUL_EX => "KVM met two exceptions at once",
            kvm_bindings::KVM_INTERNAL_ERROR_DELIVERY_EV => "KVM could not deliver an exception",
            kvm_bindings::KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON => {
                "the processor left the guest for a reason that KVM does not know"
            }
            _ => "KVM gave up on the guest",
        };
        format!("{words} (KVM_EXIT_INTERNAL_ERROR, suberror {suberror})")
    }

    /// An exit that was not wanted, with the place where the guest stands.
    fn explain(&self, exit: &Exit) -> String {
        let what = match exit {
            Exit::Out(byte) => format!("the guest wrote {byte:#x} to port {:#x}", guest::PORT),
            Exit::Halt => "the guest halted".to_owned(),
            Exit::Fault(hva) => format!("KVM reported a memory error at hva {hva:#x}"),
            Exit::Other(words) => words.clone(),
        };
        match self.vcpu.get_regs() {
            Ok(regs) => format!("{what}, at rip {:#x}", regs.rip),
            Err(_) => what,
        }
    }
}

/// KVM_CREATE_VM, which a signal may interrupt.
fn create_vm(kvm: &Kvm) -> Result<VmFd, CreateError> {
    let mut result = kvm.create_vm();
    for _ in 0..MAX_INTERRUPTIONS {
        match &result {
            Err(error) if error.errno() == libc::EINTR => result = kvm.create_vm(),
            _ => break,
        }
    }
    result.map_err(|source| match source.errno() {
        libc::EBUSY => CreateError::Busy,
        _ => CreateError::Kvm { call: "KVM_CREATE_VM", source },
    })
}

/// Guest RAM: one memfd, mapped for the guest and for the VMM.
fn map_ram() -> Result<(MmapRegion, MmapRegion), CreateError> {
    let memory = |source| CreateError::Memory { source };
    // SAFETY: the name is a C string; the result is checked before it is used.
    let fd = unsafe { libc::memfd_create(c"nowait-probe".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(memory(io::Error::last_os_error()));
    }
    // SAFETY: a fresh descriptor that nobody else owns.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(guest::RAM_BYTES as u64).map_err(memory)?;
    let second = file.try_clone().map_err(memory)?;
    let map = |file| {
        MmapRegion::from_file(FileOffset::new(file, 0), guest::RAM_BYTES)
            .map_err(|source| CreateError::Map { source })
    };
    Ok((map(file)?, map(second)?))
}

/// A vCPU with the host's CPUID, in 64-bit mode, at `rip`.
fn create_vcpu(kvm: &Kvm, vm: &VmFd, rip: u64) -> Result<VcpuFd, CreateError> {
    let cpuid = kvm
        .get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
        .map_err(kvm_error("KVM_GET_SUPPORTED_CPUID"))?;
    let vcpu = vm.create_vcpu(0).map_err(kvm_error("KVM_CREATE_VCPU"))?;
    vcpu.set_cpuid2(&cpuid).map_err(kvm_error("KVM_SET_CPUID2"))?;
    let mut sregs = vcpu.get_sregs().map_err(kvm_error("KVM_GET_SREGS"))?;
    guest::set_long_mode(&mut sregs);
    vcpu.set_sregs(&sregs).map_err(kvm_error("KVM_SET_SREGS"))?;
    vcpu.set_regs(&guest::regs(rip)).map_err(kvm_error("KVM_SET_REGS"))?;
    Ok(vcpu)
}

fn describe(exit: &VcpuExit<'_>) -> String {
    match exit {
        VcpuExit::Shutdown => "the guest shut down with a triple fault".to_owned(),
        VcpuExit::FailEntry(reason, _) => {
            format!("the processor refused to enter the guest (reason {reason:#x})")
        }
        VcpuExit::MmioRead(gpa, _) => {
            format!("KVM emulated a read and took gpa {gpa:#x}, which is RAM, for a device")
        }
        VcpuExit::MmioWrite(gpa, _) => {
            format!("KVM emulated a write and took gpa {gpa:#x}, which is RAM, for a device")
        }
        other => format!("an exit that the guest did not ask for: {other:?}"),
    }
}

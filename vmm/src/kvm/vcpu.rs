//! One vCPU: its state at reset, and KVM_RUN with its exits. Raw `kvm_run` is decoded here only.

use std::sync::Arc;

use async_pf::protocol::{GuestState, Msr};
use guest_memory::{Gfn, Gpa, PagerError};
use kvm_bindings::{
    CpuId, KVM_CAP_ENFORCE_PV_FEATURE_CPUID, Msrs, kvm_cpuid_entry2, kvm_enable_cap, kvm_msr_entry,
};
use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};

use super::emulation::Emulation;
use super::kick::{Kicker, Running};
use super::{KvmError, inject, prefault};
use crate::boot::{Entry, regs};
use crate::devices::{Bus, PortVerdict};
use crate::exit::ExitReason;
use crate::paging::areas::Areas;
use crate::paging::{Faults, Notifier};
use crate::sigbus::SigbusError;

/// What KVM_RUN came back with, after the devices have answered.
#[derive(Debug, PartialEq, Eq)]
#[must_use]
pub enum Exit {
    /// Enter the guest again.
    Resume,
    /// A kick or another signal: look whether something is wanted.
    Interrupted,
    /// The run is over.
    Stop(ExitReason),
}

/// One vCPU.
#[derive(Debug)]
pub struct Vcpu {
    fd: VcpuFd,
    index: u32,
    areas: Areas,
    emulation: Emulation,
    /// The address of the last instruction that KVM could not emulate, and how often in a row.
    stuck: Option<(u64, u32)>,
    /// It is halted artificially, or was when it was entered last.
    halted: Option<inject::Halted>,
    /// INIT is looked for.
    armed: bool,
    /// KVM is asked to map pages ahead, and has not refused.
    maps_ahead: bool,
    /// What an exit leaves of the guest's state.
    watch: inject::Watch,
}

/// Where KVM does not say: nothing can be injected there, and nothing halted.
const UNKNOWN: GuestState =
    GuestState { cpl: 0, interrupts: false, shadow: true, event: true, paging: false };
/// How often KVM may give up at one instruction before it is the guest's own fault.
const EMULATION_TRIES: u32 = 16;
/// KVM_INTERNAL_ERROR_EMULATION.
const ERROR_EMULATION: u32 = 1;

/// `IA32_MTRR_DEF_TYPE`: MTRRs enabled, write-back by default, as firmware leaves it (SDM 3A, 12.11).
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_ENABLED_WRITE_BACK: u64 = 1 << 11 | 6;

/// Gives a new vCPU its CPUID.
///
/// # Errors
/// When KVM refuses.
pub(super) fn prepare(fd: &VcpuFd, index: u32, cpuid: &[kvm_cpuid_entry2]) -> Result<(), KvmError> {
    let during = |what: &str| KvmError::during(format!("{what} of vCPU {index}"));
    let invalid = |_| kvm_ioctls::Error::new(libc::E2BIG);
    let cpuid = CpuId::from_entries(cpuid).map_err(invalid).map_err(during("the CPUID"))?;
    fd.set_cpuid2(&cpuid).map_err(during("KVM_SET_CPUID2"))?;
    // A feature that CPUID hides is not there for who writes its MSR all the same.
    let enforce = kvm_enable_cap {
        cap: KVM_CAP_ENFORCE_PV_FEATURE_CPUID,
        args: [1, 0, 0, 0],
        ..Default::default()
    };
    fd.enable_cap(&enforce).map_err(during("KVM_CAP_ENFORCE_PV_FEATURE_CPUID"))
}

impl Vcpu {
    /// Creates vCPU `index` with this CPUID, in the state of a processor after reset.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn new(vm: &VmFd, index: u32, cpuid: &[kvm_cpuid_entry2]) -> Result<Self, KvmError> {
        let fd = vm
            .create_vcpu(u64::from(index))
            .map_err(KvmError::during(format!("KVM_CREATE_VCPU {index}")))?;
        prepare(&fd, index, cpuid)?;
        let during = |what: &str| KvmError::during(format!("{what} of vCPU {index}"));
        let invalid = |_| kvm_ioctls::Error::new(libc::E2BIG);
        let entry = kvm_msr_entry {
            index: MSR_MTRR_DEF_TYPE,
            data: MTRR_ENABLED_WRITE_BACK,
            ..Default::default()
        };
        let msrs = Msrs::from_entries(&[entry]).map_err(invalid).map_err(during("the MSRs"))?;
        let set = fd.set_msrs(&msrs).map_err(during("KVM_SET_MSRS"))?;
        if set != 1 {
            let refused = kvm_ioctls::Error::new(libc::EINVAL);
            return Err(during("IA32_MTRR_DEF_TYPE")(refused));
        }
        Ok(Self {
            fd,
            index,
            areas: Areas::default(),
            emulation: Emulation::default(),
            stuck: None,
            halted: None,
            armed: false,
            maps_ahead: true,
            watch: inject::Watch::default(),
        })
    }

    /// From here on an exit leaves what faults by markers need.
    pub(crate) fn watch_state(&mut self) {
        inject::Watch::begin(&mut self.fd);
    }

    /// The guest as the last exit left it, after [`Vcpu::watch_state`]. If it got INIT since, its protocol
    /// is off.
    pub(crate) fn guest_state(&mut self, notifier: Option<&Arc<Notifier>>) -> GuestState {
        if let Some(notifier) = notifier {
            self.look_for_init(notifier);
        }
        inject::guest_state(&mut self.fd, &mut self.watch).unwrap_or(UNKNOWN)
    }

    fn look_for_init(&mut self, notifier: &Notifier) {
        if self.armed && matches!(inject::had_init(&self.fd), Ok(true)) {
            self.armed = false;
            notifier.reset();
        }
    }

    /// The next entry is a page fault at this address; [`Vcpu::guest_state`] had no event.
    pub(crate) fn inject_page_fault(&mut self, cr2: u64) {
        inject::page_fault(&mut self.fd, cr2);
    }

    /// The next entry halts the guest until an interrupt; any exit ends it.
    ///
    /// # Errors
    /// When KVM refuses.
    pub(crate) fn halt(&mut self) -> Result<(), KvmError> {
        let during = KvmError::during(format!("an artificial halt of vCPU {}", self.index));
        self.halted = Some(inject::halt(&self.fd).map_err(during)?);
        Ok(())
    }

    /// Sets the registers of the boot processor. The others wait for INIT and SIPI.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn set_entry(&self, entry: Entry) -> Result<(), KvmError> {
        let mut sregs = self.fd.get_sregs().map_err(KvmError::during("KVM_GET_SREGS"))?;
        regs::special(entry, &mut sregs);
        self.fd.set_sregs(&sregs).map_err(KvmError::during("KVM_SET_SREGS"))?;
        self.fd.set_regs(&regs::general(entry)).map_err(KvmError::during("KVM_SET_REGS"))
    }

    /// Its number, which is its APIC id.
    #[must_use]
    pub fn index(&self) -> u32 {
        self.index
    }

    /// Has faults by markers end KVM_RUN without a signal handler.
    ///
    /// # Errors
    /// When a call fails.
    pub(crate) fn collect_faults(&self, faults: &mut Faults) -> Result<(), SigbusError> {
        faults.collects(&self.fd)
    }

    /// Declares that the calling thread runs this vCPU; kicks reach it while the guard lives.
    pub fn attach(&mut self, kicker: &Kicker) -> Running {
        kicker.enter(&mut self.fd)
    }

    /// Runs the guest until something needs more than the devices. After [`Exit::Interrupted`],
    /// [`Faults::resolve`] says whether it was a page fault.
    pub(crate) fn run(&mut self, bus: &Bus, faults: &mut Faults) -> Exit {
        self.watch.passed(&mut self.fd);
        let exit = self.enter(bus, faults);
        if let Some(notifier) = faults.notifier() {
            if notifier.sends_next() {
                // What could not be sent, maybe for want of a processor that runs.
                self.look_for_init(notifier);
            }
            notifier.awake();
        }
        // An artificial halt ends with any exit: the guest meets its page again, if that has not come.
        if let Some(halted) = self.halted.take()
            && !faults.has_fault()
            && let Err(error) = inject::end_halt(&self.fd, halted)
        {
            return self.failure(format!("the end of an artificial halt: {error}"));
        }
        exit
    }

    fn enter(&mut self, bus: &Bus, faults: &mut Faults) -> Exit {
        match faults.in_kvm_run(|| self.fd.run()) {
            Ok(VcpuExit::IoOut(port, data)) => {
                let data = SmallData::new(data);
                self.port_out(bus, port, &data, faults)
            }
            Ok(VcpuExit::IoIn(port, data)) => {
                let len = data.len();
                self.port_in(bus, port, len);
                self.emulation.port_access(&self.fd, faults);
                Exit::Resume
            }
            Ok(VcpuExit::MmioRead(gpa, data)) => {
                data.fill(0xff);
                let read = access::read(faults, Gpa(gpa), data);
                self.after_operand(read, faults)
            }
            Ok(VcpuExit::MmioWrite(gpa, data)) => {
                let written = access::write(faults, Gpa(gpa), data);
                self.after_operand(written, faults)
            }
            Ok(VcpuExit::X86Rdmsr(exit)) => {
                let msr = exit.index;
                self.read_msr(msr, faults)
            }
            Ok(VcpuExit::X86Wrmsr(exit)) => {
                let (msr, value) = (exit.index, exit.data);
                self.write_msr(msr, value, faults)
            }
            Ok(VcpuExit::Shutdown) => Exit::Stop(ExitReason::TripleFault { vcpu: self.index }),
            Ok(VcpuExit::InternalError) => self.internal_error(faults),
            Ok(VcpuExit::FailEntry(reason, _)) => self
                .failure(format!("the processor refused its state (hardware reason {reason:#x})")),
            Ok(VcpuExit::MemoryFault { gpa, size, .. }) => self.failure(format!(
                "KVM could not get guest memory at gpa {gpa:#x} ({size:#x} bytes)"
            )),
            Ok(VcpuExit::Intr) => {
                faults.interrupted();
                Exit::Interrupted
            }
            Ok(other) => {
                let other = format!("{other:?}");
                self.failure(format!("unexpected exit {other}"))
            }
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
                self.fd.set_kvm_immediate_exit(0);
                faults.interrupted();
                Exit::Interrupted
            }
            Err(error) => self.failure(format!("KVM_RUN: {error}")),
        }
    }

    /// The page of a marker fault has been brought.
    pub(crate) fn fault_served(&mut self, faults: &Faults) {
        self.emulation.fault_served(&self.fd, faults);
    }

    /// An instruction's operand lay on a page that KVM could not reach, and was served by us: what the
    /// rest of the instruction needs is brought in and kept until the next such exit.
    fn after_operand(&mut self, served: Result<Served, PagerError>, faults: &mut Faults) -> Exit {
        match served {
            Ok(Served::NoRam) => {
                self.emulation.device_access(&self.fd, faults);
                Exit::Resume
            }
            Ok(Served::Ram) => self.hold(faults),
            Err(error) => self.cannot("serve an operand in guest RAM", &error),
        }
    }

    fn hold(&mut self, faults: &Faults) -> Exit {
        let state = self.fd.get_regs().and_then(|regs| Ok((regs, self.fd.get_sregs()?)));
        let (regs, sregs) = match state {
            Ok(state) => state,
            Err(error) => return self.failure(format!("KVM_GET_REGS: {error}")),
        };
        match self.emulation.bring(faults, &regs, &sregs) {
            Ok(()) => Exit::Resume,
            Err(error) => self.cannot("bring in what an instruction needs", &error),
        }
    }

    /// A page did not come. If that is because the run ends, the vCPU is not entered again.
    fn cannot(&self, what: &str, error: &PagerError) -> Exit {
        match error {
            PagerError::Interrupted(_) | PagerError::Stopped => Exit::Resume,
            error => self.failure(format!("cannot {what}: {error}")),
        }
    }

    /// The guest names a page to KVM that KVM will write: it stays in memory from here on.
    fn write_msr(&mut self, msr: u32, value: u64, faults: &Faults) -> Exit {
        if let (Some(ours), Some(notifier)) = (Msr::of(msr), faults.notifier()) {
            return self.write_protocol(ours, value, notifier, faults);
        }
        let held = match Areas::hold(faults.pager(), faults.sleeper(), msr, value) {
            Ok(held) => held,
            Err(error) => return self.cannot("bring in a paravirtual area", &error),
        };
        let entry = kvm_msr_entry { index: msr, data: value, ..Default::default() };
        let set = Msrs::from_entries(&[entry])
            .map_err(|_| kvm_ioctls::Error::new(libc::E2BIG))
            .and_then(|msrs| self.fd.set_msrs(&msrs));
        // 0 of 1: KVM refuses the value, and the guest gets its #GP.
        let refused = set != Ok(1);
        if let (false, Some(held)) = (refused, held) {
            self.areas.keep(held);
        }
        raw::set_msr_error(&mut self.fd, refused);
        Exit::Resume
    }

    /// The guest reads an MSR of async page faults; no other read comes to us.
    fn read_msr(&mut self, msr: u32, faults: &Faults) -> Exit {
        if let (Some(ours), Some(notifier)) = (Msr::of(msr), faults.notifier()) {
            self.look_for_init(notifier);
            raw::set_msr_data(&mut self.fd, notifier.read(ours));
        } else {
            raw::set_msr_error(&mut self.fd, true);
        }
        Exit::Resume
    }

    /// The guest writes an MSR of async page faults.
    fn write_protocol(
        &mut self,
        msr: Msr,
        value: u64,
        notifier: &Notifier,
        faults: &Faults,
    ) -> Exit {
        let written = match msr {
            Msr::Ack => {
                if let Some(gfn) = notifier.acknowledge(value)
                    && let Err(error) = self.map_ahead(gfn, faults)
                {
                    return self.failure(error.to_string());
                }
                // Behind that ioctl, which may write where the answer is.
                raw::set_msr_error(&mut self.fd, false);
                return Exit::Resume;
            }
            // What it writes now is for after the INIT.
            Msr::Int => {
                self.look_for_init(notifier);
                notifier.set_int(value)
            }
            Msr::En => {
                self.look_for_init(notifier);
                match notifier.set_en(value, faults.pager()) {
                    Ok(written) => written,
                    Err(error) => return self.cannot("bring in the async page fault area", &error),
                }
            }
        };
        raw::set_msr_error(&mut self.fd, written.is_err());
        if notifier.is_on() && !self.armed {
            if let Err(error) = inject::arm_sentinel(&self.fd) {
                return self.failure(format!("KVM_SET_MSRS: {error}"));
            }
            self.armed = true;
        }
        Exit::Resume
    }

    /// The guest has been told that its page came, and meets it with its next steps: KVM maps it now, which
    /// spares a fault. A bonus: what KVM cannot do is met again by the guest.
    fn map_ahead(&mut self, gfn: Gfn, faults: &Faults) -> Result<(), SigbusError> {
        if self.maps_ahead {
            let mapped = faults.map_ahead(gfn, || prefault::page(&self.fd, gfn))?;
            self.maps_ahead = mapped.is_none_or(|mapped| mapped.is_ok());
        }
        Ok(())
    }

    fn port_out(&mut self, bus: &Bus, port: u16, data: &SmallData, faults: &Faults) -> Exit {
        for item in data.bytes().chunks(self.io_size()) {
            if let PortVerdict::Stop(reason) = bus.port_write(port, item, faults.sleeper()) {
                return Exit::Stop(reason);
            }
        }
        self.emulation.port_access(&self.fd, faults);
        Exit::Resume
    }

    fn port_in(&mut self, bus: &Bus, port: u16, len: usize) {
        let size = self.io_size();
        let data = raw::io_data(&mut self.fd, len);
        for item in data.chunks_mut(size) {
            bus.port_read(port, item);
        }
    }

    /// Bytes of one item of the port access that KVM_RUN came back with; a string instruction has
    /// several items in one exit.
    fn io_size(&mut self) -> usize {
        raw::io_size(&mut self.fd).clamp(1, 4)
    }

    /// KVM gave up. If it could not emulate an instruction, that may be for want of a page.
    fn internal_error(&mut self, faults: &mut Faults) -> Exit {
        let suberror = raw::internal_suberror(&mut self.fd);
        let rip = self.fd.get_regs().map_or(0, |regs| regs.rip);
        if suberror == ERROR_EMULATION && faults.has_markers() {
            let times = match self.stuck {
                Some((last, times)) if last == rip => times + 1,
                _ => 1,
            };
            self.stuck = Some((rip, times));
            if times <= EMULATION_TRIES {
                return self.hold(faults);
            }
        }
        let what = match suberror {
            ERROR_EMULATION => "it could not emulate the instruction".into(),
            other => format!("suberror {other}"),
        };
        self.failure(format!(
            "KVM gave up at rip {rip:#x}: {what}; if this happens with every guest, `nowait doctor` says why"
        ))
    }

    fn failure(&self, what: String) -> Exit {
        Exit::Stop(ExitReason::Failure { message: format!("vCPU {}: {what}", self.index) })
    }
}

/// Whether an MMIO access was to RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Served {
    Ram,
    NoRam,
}

mod access {
    //! MMIO exits whose address lies in RAM: operands on pages that KVM's emulator could not reach.

    use guest_memory::{Gpa, PagerError, Pinned};
    use vm_memory::{Bytes, GuestAddress};

    use super::Served;
    use crate::paging::Faults;

    fn pinned(faults: &Faults, gpa: Gpa, bytes: usize) -> Result<Option<Pinned>, PagerError> {
        match faults.pager().pin(&[(gpa, bytes as u64)], faults.sleeper()) {
            Ok(pinned) => Ok(Some(pinned)),
            Err(PagerError::OutOfRange(_)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    pub(super) fn read(faults: &Faults, gpa: Gpa, data: &mut [u8]) -> Result<Served, PagerError> {
        let Some(pinned) = pinned(faults, gpa, data.len())? else { return Ok(Served::NoRam) };
        let read = pinned.read_slice(data, GuestAddress(gpa.0));
        read.map(|()| Served::Ram).map_err(|_| PagerError::OutOfRange(gpa.gfn()))
    }

    pub(super) fn write(faults: &Faults, gpa: Gpa, data: &[u8]) -> Result<Served, PagerError> {
        let Some(pinned) = pinned(faults, gpa, data.len())? else { return Ok(Served::NoRam) };
        let written = pinned.write_slice(data, GuestAddress(gpa.0));
        written.map(|()| Served::Ram).map_err(|_| PagerError::OutOfRange(gpa.gfn()))
    }
}

/// A copy of the data of one port write: at most a page, mostly one byte.
struct SmallData {
    inline: [u8; 8],
    spilled: Vec<u8>,
    len: usize,
}

impl SmallData {
    fn new(data: &[u8]) -> Self {
        let mut inline = [0; 8];
        let mut spilled = Vec::new();
        match inline.get_mut(..data.len()) {
            Some(room) => room.copy_from_slice(data),
            None => spilled.extend_from_slice(data),
        }
        Self { inline, spilled, len: data.len() }
    }

    fn bytes(&self) -> &[u8] {
        self.inline.get(..self.len).unwrap_or(&self.spilled)
    }
}

mod raw {
    //! Fields of `kvm_run` that kvm-ioctls does not hand out.
    #![allow(unsafe_code, reason = "kvm_run has unions whose live member the exit reason tells")]

    use kvm_ioctls::VcpuFd;

    pub(super) fn io_size(fd: &mut VcpuFd) -> usize {
        // SAFETY: called after KVM_EXIT_IO only, so `io` is the live member; plain integers either way.
        usize::from(unsafe { fd.get_kvm_run().__bindgen_anon_1.io.size })
    }

    pub(super) fn io_data(fd: &mut VcpuFd, len: usize) -> &mut [u8] {
        let run = fd.get_kvm_run();
        // SAFETY: called after KVM_EXIT_IO only. KVM put `len` bytes (count x size, as kvm-ioctls
        // computed it from the same fields) at data_offset inside the mapping of this vCPU, which
        // lives as long as `fd`, which the slice borrows.
        unsafe {
            let offset = run.__bindgen_anon_1.io.data_offset as usize;
            std::slice::from_raw_parts_mut(std::ptr::from_mut(run).cast::<u8>().add(offset), len)
        }
    }

    pub(super) fn set_msr_data(fd: &mut VcpuFd, data: u64) {
        // Called after KVM_EXIT_X86_RDMSR only. Writing a union's member needs no unsafe.
        fd.get_kvm_run().__bindgen_anon_1.msr.data = data;
    }

    pub(super) fn set_msr_error(fd: &mut VcpuFd, error: bool) {
        // Called after an exit for an MSR only. Writing a union's member needs no unsafe.
        fd.get_kvm_run().__bindgen_anon_1.msr.error = error.into();
    }

    pub(super) fn internal_suberror(fd: &mut VcpuFd) -> u32 {
        // SAFETY: called after KVM_EXIT_INTERNAL_ERROR only; a plain integer either way.
        unsafe { fd.get_kvm_run().__bindgen_anon_1.internal.suberror }
    }
}

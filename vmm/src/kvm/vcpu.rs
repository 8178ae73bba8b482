//! One vCPU: its state at reset, and KVM_RUN with its exits. Raw `kvm_run` is decoded here only.

use kvm_bindings::{CpuId, Msrs, kvm_cpuid_entry2, kvm_msr_entry};
use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};

use super::KvmError;
use super::kick::{Kicker, Running};
use crate::boot::{Entry, regs};
use crate::devices::{Bus, PortVerdict};
use crate::exit::ExitReason;

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
}

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
    fd.set_cpuid2(&cpuid).map_err(during("KVM_SET_CPUID2"))
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
        Ok(Self { fd, index })
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

    /// Declares that the calling thread runs this vCPU; kicks reach it while the guard lives.
    pub fn attach(&mut self, kicker: &Kicker) -> Running {
        kicker.enter(&mut self.fd)
    }

    /// Runs the guest until something needs more than the devices.
    pub fn run(&mut self, bus: &Bus) -> Exit {
        match self.fd.run() {
            Ok(VcpuExit::IoOut(port, data)) => {
                let data = SmallData::new(data);
                self.port_out(bus, port, &data)
            }
            Ok(VcpuExit::IoIn(port, data)) => {
                let len = data.len();
                self.port_in(bus, port, len);
                Exit::Resume
            }
            Ok(VcpuExit::MmioRead(_, data)) => {
                data.fill(0xff);
                Exit::Resume
            }
            Ok(VcpuExit::MmioWrite(..)) => Exit::Resume,
            Ok(VcpuExit::Shutdown) => Exit::Stop(ExitReason::TripleFault { vcpu: self.index }),
            Ok(VcpuExit::InternalError) => self.internal_error(),
            Ok(VcpuExit::FailEntry(reason, _)) => self
                .failure(format!("the processor refused its state (hardware reason {reason:#x})")),
            Ok(VcpuExit::MemoryFault { gpa, size, .. }) => self.failure(format!(
                "KVM could not get guest memory at gpa {gpa:#x} ({size:#x} bytes)"
            )),
            Ok(VcpuExit::Intr) => Exit::Interrupted,
            Ok(other) => {
                let other = format!("{other:?}");
                self.failure(format!("unexpected exit {other}"))
            }
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
                self.fd.set_kvm_immediate_exit(0);
                Exit::Interrupted
            }
            Err(error) => self.failure(format!("KVM_RUN: {error}")),
        }
    }

    fn port_out(&mut self, bus: &Bus, port: u16, data: &SmallData) -> Exit {
        for item in data.bytes().chunks(self.io_size()) {
            if let PortVerdict::Stop(reason) = bus.port_write(port, item) {
                return Exit::Stop(reason);
            }
        }
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

    fn internal_error(&mut self) -> Exit {
        let suberror = raw::internal_suberror(&mut self.fd);
        let rip = self.fd.get_regs().map_or(0, |regs| regs.rip);
        let what = match suberror {
            1 => "it could not emulate the instruction".into(),
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

    pub(super) fn internal_suberror(fd: &mut VcpuFd) -> u32 {
        // SAFETY: called after KVM_EXIT_INTERNAL_ERROR only; a plain integer either way.
        unsafe { fd.get_kvm_run().__bindgen_anon_1.internal.suberror }
    }
}

//! KVM: opening it, making a VM out of guest RAM, and its vCPUs.

pub mod cpuid;
mod emulation;
pub(crate) mod inject;
pub mod kick;
pub mod prefault;
pub mod vcpu;

use std::path::Path;

use guest_memory::GuestSlot;
use kvm_bindings::{
    KVM_CAP_EXIT_ON_EMULATION_FAILURE, KVM_CAP_X86_USER_SPACE_MSR, KVM_MSR_EXIT_REASON_FILTER,
    KVM_PIT_SPEAKER_DUMMY, kvm_enable_cap, kvm_pit_config,
};
use kvm_ioctls::{Cap, Kvm, MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VmFd};
use vmm_sys_util::eventfd::EventFd;

use self::cpuid::Apf;
use crate::boot::layout::{KVM_IDENTITY_MAP, KVM_TSS};
use crate::paging::areas;

/// Why KVM cannot be used or a VM not be made.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// /dev/kvm is not there.
    #[error(
        "no /dev/kvm on this machine: load kvm_intel or kvm_amd (modprobe), enable virtualization in the \
         firmware or nested virtualization in the host, or use `cargo xtask nested`"
    )]
    NoDevice,
    /// /dev/kvm may not be opened.
    #[error(
        "no permission to open /dev/kvm: join its group (`sudo usermod -aG kvm $USER`, then log in again) or run as root"
    )]
    NoPermission,
    /// /dev/kvm cannot be opened for another reason.
    #[error("cannot open /dev/kvm: {0}; `nowait doctor` checks the host")]
    Open(kvm_ioctls::Error),
    /// A guest of a few instructions did not get through.
    #[error(
        "this KVM cannot run guests ({0}): use a machine with nested virtualization, or `cargo xtask nested`; \
         `nowait doctor` checks the host"
    )]
    NoGuests(String),
    /// A capability that nowait needs is missing.
    #[error(
        "this KVM lacks {0}: a newer Linux kernel is needed; `nowait doctor` lists all requirements"
    )]
    MissingCapability(&'static str),
    /// A capability that only `--apf user` needs is missing.
    #[error(
        "this KVM lacks {0}, which --apf user and off need: use --apf kernel, or a newer Linux kernel"
    )]
    MissingForUser(&'static str),
    /// KVM walks the guest's page tables itself.
    #[error(
        "nested paging is off ({module}.{parameter}={value}): KVM would take pages that are not there for \
         page faults of the guest's; load it anew: \
         `sudo modprobe -r {module} && sudo modprobe {module} {parameter}=1`"
    )]
    NoNestedPaging {
        /// KVM's module for this processor.
        module: &'static str,
        /// Its parameter.
        parameter: &'static str,
        /// What that is.
        value: String,
    },
    /// More processors than KVM can have.
    #[error("--cpus {wanted} is more than the {max} that this KVM allows")]
    TooManyCpus {
        /// What was asked for.
        wanted: u32,
        /// KVM's limit.
        max: usize,
    },
    /// An ioctl failed.
    #[error("KVM refused {operation}: {source}")]
    Ioctl {
        /// The ioctl and its operands.
        operation: String,
        /// Its error.
        source: kvm_ioctls::Error,
    },
}

impl KvmError {
    /// Says which operation failed.
    pub(crate) fn during(operation: impl Into<String>) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |source| Self::Ioctl { operation: operation.into(), source }
    }
}

/// The capabilities without which nothing runs, with their names in `linux/kvm.h`.
pub const REQUIRED: &[(Cap, &str)] = &[
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::SetIdentityMapAddr, "KVM_CAP_SET_IDENTITY_MAP_ADDR"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Pit2, "KVM_CAP_PIT2"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
];

/// The largest memslot, in bytes: KVM counts its pages in 31 bits.
const MAX_SLOT_BYTES: u64 = 1 << 42;

/// Opens /dev/kvm and checks what nowait needs.
///
/// # Errors
/// When it is absent, not permitted or too old.
pub fn open() -> Result<Kvm, KvmError> {
    let kvm = Kvm::new().map_err(|error| match error.errno() {
        libc::ENOENT | libc::ENODEV | libc::ENXIO => KvmError::NoDevice,
        libc::EACCES | libc::EPERM => KvmError::NoPermission,
        _ => KvmError::Open(error),
    })?;
    check_nested_paging(Path::new("/sys/module"))?;
    for (cap, name) in REQUIRED {
        if !kvm.check_extension(*cap) {
            return Err(KvmError::MissingCapability(name));
        }
    }
    Ok(kvm)
}

/// Refuses a KVM that opens but cannot run guests, as a host without hardware virtualisation may have.
///
/// # Errors
/// With what the probe guest did.
pub fn require_guests() -> Result<(), KvmError> {
    crate::probe::reason_against_guests().map_or(Ok(()), |why| Err(KvmError::NoGuests(why)))
}

/// Refuses a KVM without EPT or NPT. One whose parameters cannot be read is taken for one that has them.
fn check_nested_paging(modules: &Path) -> Result<(), KvmError> {
    for (module, parameter) in [("kvm_intel", "ept"), ("kvm_amd", "npt")] {
        let file = modules.join(module).join("parameters").join(parameter);
        let value = std::fs::read_to_string(file).unwrap_or_default();
        let value = value.trim();
        if matches!(value, "N" | "0") {
            return Err(KvmError::NoNestedPaging { module, parameter, value: value.into() });
        }
    }
    Ok(())
}

/// Makes a VM with the in-kernel interrupt controllers and timer, and no memory yet.
///
/// # Errors
/// When KVM refuses.
pub fn create_vm(kvm: &Kvm, cpus: u32) -> Result<VmFd, KvmError> {
    let max = kvm.get_max_vcpus();
    if cpus as usize > max {
        return Err(KvmError::TooManyCpus { wanted: cpus, max });
    }
    let vm = loop {
        // KVM_CREATE_VM may be interrupted by a signal; it has then done nothing.
        match kvm.create_vm() {
            Err(error) if error.errno() == libc::EINTR => {}
            other => break other.map_err(KvmError::during("KVM_CREATE_VM"))?,
        }
    };
    vm.set_identity_map_address(KVM_IDENTITY_MAP)
        .map_err(KvmError::during("KVM_SET_IDENTITY_MAP_ADDR"))?;
    vm.set_tss_address(KVM_TSS as usize).map_err(KvmError::during("KVM_SET_TSS_ADDR"))?;
    vm.create_irq_chip().map_err(KvmError::during("KVM_CREATE_IRQCHIP"))?;
    let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
    vm.create_pit2(pit).map_err(KvmError::during("KVM_CREATE_PIT2"))?;
    Ok(vm)
}

/// What a VM needs whose absent pages carry markers: the guest's writes to the MSRs of KVM's areas come
/// to us, and so does an instruction that KVM cannot fetch.
///
/// # Errors
/// When KVM is too old for it or refuses.
pub fn prepare_markers(vm: &VmFd, apf: Apf) -> Result<(), KvmError> {
    enable(vm, KVM_CAP_X86_USER_SPACE_MSR, u64::from(KVM_MSR_EXIT_REASON_FILTER))
        .map_err(KvmError::during("KVM_CAP_X86_USER_SPACE_MSR"))?;
    enable(vm, KVM_CAP_EXIT_ON_EMULATION_FAILURE, 1)
        .map_err(KvmError::during("KVM_CAP_EXIT_ON_EMULATION_FAILURE"))?;
    // With a protocol of our own its MSRs are ours, too, to read as well.
    let protocol = if apf == Apf::User { areas::PROTOCOL } else { 0 };
    let range = |flags, bitmap| MsrFilterRange {
        flags,
        base: areas::MSR_BASE,
        msr_count: areas::MSR_COUNT,
        bitmap,
    };
    let (writes, reads) = ([areas::ALLOWED & !protocol], [!protocol]);
    let ranges =
        [range(MsrFilterRangeFlags::WRITE, &writes), range(MsrFilterRangeFlags::READ, &reads)];
    vm.set_msr_filter(MsrFilterDefaultAction::ALLOW, &ranges)
        .map_err(KvmError::during("KVM_X86_SET_MSR_FILTER"))?;
    inject::prepare_registers(vm)?;
    if apf == Apf::User { inject::prepare(vm) } else { Ok(()) }
}

fn enable(vm: &VmFd, cap: u32, argument: u64) -> Result<(), kvm_ioctls::Error> {
    vm.enable_cap(&kvm_enable_cap { cap, args: [argument, 0, 0, 0], ..Default::default() })
}

/// Makes guest RAM known to the VM.
///
/// # Errors
/// When KVM refuses a memslot.
pub fn add_memory(vm: &VmFd, slots: &[GuestSlot]) -> Result<(), KvmError> {
    let mut index = 0;
    for slot in slots {
        let mut done = 0;
        while done < slot.len {
            let len = (slot.len - done).min(MAX_SLOT_BYTES);
            memslot::set(vm, index, slot.gpa + done, slot.hva + done, len).map_err(
                KvmError::during(format!(
                    "a memslot of {len:#x} bytes at gpa {:#x}",
                    slot.gpa + done
                )),
            )?;
            index += 1;
            done += len;
        }
    }
    Ok(())
}

/// An eventfd that raises an interrupt line.
///
/// # Errors
/// When KVM refuses.
pub fn irq_line(vm: &VmFd, irq: u8) -> Result<EventFd, KvmError> {
    let operation = || format!("KVM_IRQFD for line {irq}");
    let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(|error| {
        let source = kvm_ioctls::Error::new(error.raw_os_error().unwrap_or(libc::EIO));
        KvmError::Ioctl { operation: operation(), source }
    })?;
    vm.register_irqfd(&event, u32::from(irq)).map_err(KvmError::during(operation()))?;
    Ok(event)
}

mod memslot {
    //! The one ioctl that hands our mapping to KVM.
    #![allow(unsafe_code, reason = "KVM_SET_USER_MEMORY_REGION gives KVM a raw host address")]

    use kvm_bindings::kvm_userspace_memory_region;
    use kvm_ioctls::VmFd;

    pub(super) fn set(
        vm: &VmFd,
        slot: u32,
        gpa: u64,
        hva: u64,
        len: u64,
    ) -> Result<(), kvm_ioctls::Error> {
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: gpa,
            memory_size: len,
            userspace_addr: hva,
        };
        // SAFETY: `hva..hva + len` is the guest mapping of the pager, which the machine keeps until its
        // vCPUs have ended (machine.rs); nothing in this process reads or writes through that mapping.
        unsafe { vm.set_user_memory_region(region) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kvm_without_nested_paging_is_refused_by_its_parameter() {
        let modules = tempfile::tempdir().unwrap();
        assert!(check_nested_paging(modules.path()).is_ok());
        let parameters = modules.path().join("kvm_amd/parameters");
        std::fs::create_dir_all(&parameters).unwrap();
        std::fs::write(parameters.join("npt"), "1\n").unwrap();
        assert!(check_nested_paging(modules.path()).is_ok());
        std::fs::write(parameters.join("npt"), "N\n").unwrap();
        let error = check_nested_paging(modules.path()).unwrap_err().to_string();
        assert!(error.contains("kvm_amd.npt=N") && error.contains("modprobe"), "{error}");
    }
}

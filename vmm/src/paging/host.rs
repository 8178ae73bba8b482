//! Which way of handling async page faults this host can do.

use kvm_bindings::{
    KVM_CAP_EXCEPTION_PAYLOAD, KVM_CAP_EXIT_ON_EMULATION_FAILURE, KVM_CAP_SYNC_REGS,
    KVM_CAP_X86_MSR_FILTER, KVM_CAP_X86_USER_SPACE_MSR,
};
use kvm_ioctls::Kvm;

use crate::kvm::cpuid::Apf;
use crate::probe::uffd;

/// Without one of these `--apf user` is refused.
pub(crate) const NEEDED_FOR_USER: [u32; 5] = [
    KVM_CAP_X86_USER_SPACE_MSR,
    KVM_CAP_X86_MSR_FILTER,
    KVM_CAP_EXIT_ON_EMULATION_FAILURE,
    KVM_CAP_SYNC_REGS,
    KVM_CAP_EXCEPTION_PAYLOAD,
];

/// [`Apf::User`] where it works, else [`Apf::Kernel`]. A host that lets nobody ask gets the former, and
/// the run says why it cannot start.
#[must_use]
pub(crate) fn default_apf() -> Apf {
    let has_markers = match uffd::create(uffd::FEATURE_MINOR_SHMEM | uffd::FEATURE_POISON) {
        Ok(_) | Err(uffd::UffdError::NoDescriptor { .. }) => true,
        Err(uffd::UffdError::NoFeatures { .. }) => false,
    };
    let has_kvm = Kvm::new().map_or(true, |kvm| {
        NEEDED_FOR_USER.iter().all(|cap| kvm.check_extension_raw((*cap).into()) > 0)
    });
    if has_markers && has_kvm { Apf::User } else { Apf::Kernel }
}

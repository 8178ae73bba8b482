//! What the guest's CPUID says: KVM's supported set, made consistent for each vCPU.

use clap::ValueEnum;
use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};
use kvm_ioctls::Kvm;
use serde::{Deserialize, Serialize};

use super::KvmError;

/// Who handles async page faults, and what the guest is told about them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Apf {
    /// Nobody: a vCPU waits for its page, with no help from the guest or KVM.
    Off,
    /// KVM's artificial halt only; the protocol is hidden from the guest.
    Host,
    /// KVM's own paravirtual async page faults; under a limit of a few MiB the guest may stand still while it
    /// boots, by KVM itself.
    Kernel,
    /// Ours, by the same protocol: only for pages that need I/O.
    User,
}

impl std::fmt::Display for Apf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Off => "off",
            Self::Host => "host",
            Self::Kernel => "kernel",
            Self::User => "user",
        })
    }
}

/// The most entries that KVM itself can return.
const MAX_ENTRIES: usize = 256;

const LEAF_FEATURES: u32 = 0x1;
const LEAF_TOPOLOGY: u32 = 0xb;
const LEAF_TOPOLOGY_V2: u32 = 0x1f;
const LEAF_KVM_FEATURES: u32 = 0x4000_0001;
const LEAF_EXTENDED_FEATURES: u32 = 0x8000_0001;
const LEAF_ADDRESS_SIZES: u32 = 0x8000_0008;
const LEAF_AMD_TOPOLOGY: u32 = 0x8000_001e;

/// Leaf 1, ECX.
const VMX: u32 = 1 << 5;
const TSC_DEADLINE: u32 = 1 << 24;
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 0x8000_0001, ECX.
const SVM: u32 = 1 << 2;
const TOPOLOGY_EXTENSIONS: u32 = 1 << 22;

/// Leaf 0x4000_0001, EAX (Documentation/virt/kvm/x86/cpuid.rst).
const KVM_CLOCKSOURCE_LEGACY: u32 = 1 << 0;
const KVM_ASYNC_PF: u32 = 1 << 4;
const KVM_ASYNC_PF_VMEXIT: u32 = 1 << 10;
const KVM_ASYNC_PF_INT: u32 = 1 << 14;

/// The CPUID that this KVM supports.
///
/// # Errors
/// When KVM refuses.
pub fn supported(kvm: &Kvm) -> Result<CpuId, KvmError> {
    kvm.get_supported_cpuid(MAX_ENTRIES).map_err(KvmError::during("KVM_GET_SUPPORTED_CPUID"))
}

/// The width of a guest physical address, in bits.
#[must_use]
pub fn physical_address_bits(supported: &CpuId) -> u32 {
    const DEFAULT: u32 = 36;
    let leaf = supported.as_slice().iter().find(|entry| entry.function == LEAF_ADDRESS_SIZES);
    match leaf.map(|entry| (entry.eax & 0xff, (entry.eax >> 16) & 0xff)) {
        Some((_, guest)) if guest != 0 => guest,
        Some((host, _)) if host != 0 => host,
        _ => DEFAULT,
    }
}

/// The CPUID entries of vCPU `index` of `cpus`.
#[must_use]
pub fn for_vcpu(
    supported: &[kvm_cpuid_entry2],
    index: u32,
    cpus: u32,
    apf: Apf,
) -> Vec<kvm_cpuid_entry2> {
    let mut entries: Vec<_> = supported
        .iter()
        .filter(|entry| !matches!(entry.function, LEAF_TOPOLOGY | LEAF_TOPOLOGY_V2))
        .copied()
        .collect();
    let id_bits = cpus.next_power_of_two().trailing_zeros();
    for entry in &mut entries {
        match entry.function {
            LEAF_FEATURES => {
                entry.ecx = (entry.ecx & !VMX) | HYPERVISOR | TSC_DEADLINE;
                entry.ebx = (entry.ebx & 0xffff) | (cpus << 16) | (index << 24);
            }
            LEAF_KVM_FEATURES => {
                entry.eax &= !KVM_CLOCKSOURCE_LEGACY;
                if apf != Apf::Kernel {
                    entry.eax &= !(KVM_ASYNC_PF | KVM_ASYNC_PF_VMEXIT | KVM_ASYNC_PF_INT);
                }
                if apf == Apf::User {
                    entry.eax |= KVM_ASYNC_PF | KVM_ASYNC_PF_INT;
                }
            }
            // Without the topology extensions AMD kernels count the cores in leaf 0x8000_0008.
            LEAF_EXTENDED_FEATURES => entry.ecx &= !(SVM | TOPOLOGY_EXTENSIONS),
            LEAF_ADDRESS_SIZES => {
                entry.ecx = (entry.ecx & !0xf0ff) | (cpus - 1) | (id_bits << 12);
            }
            LEAF_AMD_TOPOLOGY => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (index, 0, 0, 0),
            _ => {}
        }
    }
    let max_leaf = entries.iter().find(|entry| entry.function == 0).map_or(0, |entry| entry.eax);
    if max_leaf >= LEAF_TOPOLOGY {
        entries.extend(topology(index, cpus, id_bits));
    }
    entries
}

/// Leaf 0xb: one thread a core, all cores in one package (Intel SDM volume 2A, CPUID).
fn topology(index: u32, cpus: u32, id_bits: u32) -> [kvm_cpuid_entry2; 3] {
    const THREAD: u32 = 1 << 8;
    const CORE: u32 = 2 << 8;
    let level = |subleaf, eax, ebx, kind| kvm_cpuid_entry2 {
        function: LEAF_TOPOLOGY,
        index: subleaf,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax,
        ebx,
        ecx: kind | subleaf,
        edx: index,
        ..Default::default()
    };
    [level(0, 0, 1, THREAD), level(1, id_bits, cpus, CORE), level(2, 0, 0, 0)]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, eax: !0, ebx: !0, ecx: !0, edx: !0, ..Default::default() }
    }

    fn entry_without_features() -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { eax: 0, ..entry(LEAF_KVM_FEATURES) }
    }

    fn supported() -> Vec<kvm_cpuid_entry2> {
        let mut leaves: Vec<_> = [
            LEAF_FEATURES,
            LEAF_TOPOLOGY,
            LEAF_TOPOLOGY_V2,
            LEAF_KVM_FEATURES,
            LEAF_EXTENDED_FEATURES,
        ]
        .map(entry)
        .into();
        leaves.push(kvm_cpuid_entry2 { eax: 0x1f, ..entry(0) });
        leaves
    }

    fn leaf(entries: &[kvm_cpuid_entry2], function: u32) -> kvm_cpuid_entry2 {
        *entries.iter().find(|entry| entry.function == function).unwrap()
    }

    #[test]
    fn only_kernel_passes_the_protocol_through() {
        let apf_bits = KVM_ASYNC_PF | KVM_ASYNC_PF_VMEXIT | KVM_ASYNC_PF_INT;
        let host = for_vcpu(&supported(), 0, 1, Apf::Host);
        let off = for_vcpu(&supported(), 0, 1, Apf::Off);
        for hidden in [&host, &off] {
            assert_eq!(leaf(hidden, LEAF_KVM_FEATURES).eax & apf_bits, 0);
        }
        let kernel = for_vcpu(&supported(), 0, 1, Apf::Kernel);
        assert_eq!(leaf(&kernel, LEAF_KVM_FEATURES).eax & apf_bits, apf_bits);
        // Ours, whatever KVM can do; VMEXIT is a promise to nested guests.
        let user = for_vcpu(&[entry_without_features()], 0, 1, Apf::User);
        let ours = leaf(&user, LEAF_KVM_FEATURES).eax & apf_bits;
        assert_eq!(ours, KVM_ASYNC_PF | KVM_ASYNC_PF_INT);
        for entries in [off, host, kernel] {
            assert_eq!(leaf(&entries, LEAF_KVM_FEATURES).eax & KVM_CLOCKSOURCE_LEGACY, 0);
        }
    }

    #[test]
    fn the_hypervisor_bit_is_set_and_nested_virtualization_hidden() {
        let mut bare = supported();
        for entry in &mut bare {
            entry.ecx &= !HYPERVISOR;
        }
        let entries = for_vcpu(&bare, 0, 1, Apf::Host);
        assert_eq!(leaf(&entries, LEAF_FEATURES).ecx & (HYPERVISOR | VMX), HYPERVISOR);
        assert_eq!(leaf(&entries, LEAF_EXTENDED_FEATURES).ecx & SVM, 0);
    }

    #[test]
    fn every_vcpu_has_its_own_apic_id_and_one_topology_leaf() {
        for cpus in [1, 2, 3, 32] {
            for index in 0..cpus {
                let entries = for_vcpu(&supported(), index, cpus, Apf::Kernel);
                assert_eq!(leaf(&entries, LEAF_FEATURES).ebx >> 24, index);
                assert!(entries.iter().all(|entry| entry.function != LEAF_TOPOLOGY_V2));
                let levels: Vec<_> =
                    entries.iter().filter(|entry| entry.function == LEAF_TOPOLOGY).collect();
                assert_eq!(levels.len(), 3);
                assert!(levels.iter().all(|level| level.edx == index));
                assert_eq!(levels[1].ebx, cpus);
                assert!(1 << levels[1].eax >= cpus);
            }
        }
    }

    #[test]
    fn the_guest_physical_width_is_preferred() {
        let width = |eax| {
            let entry = kvm_cpuid_entry2 { eax, ..entry(LEAF_ADDRESS_SIZES) };
            physical_address_bits(&CpuId::from_entries(&[entry]).unwrap())
        };
        assert_eq!(width(0x0000_3028), 40);
        assert_eq!(width(0x0030_3034), 48);
        assert_eq!(width(0), 36);
    }
}

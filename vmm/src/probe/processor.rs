//! Whether the processor shows hardware virtualisation to this host.

// `unsafe`: CPUID is an unsafe function in the Rust releases that we support.
#![allow(unsafe_code)]

use core::arch::x86_64::__cpuid;

/// CPUID 1: ECX bit 5 is VMX (Intel SDM, volume 2A, CPUID).
const VMX: (u32, u32) = (1, 1 << 5);
/// CPUID 0x80000001: ECX bit 2 is SVM (AMD APM, volume 3, appendix E).
const SVM: (u32, u32) = (0x8000_0001, 1 << 2);
/// The leaf whose EAX is the largest extended one.
const EXTENDED: u32 = 0x8000_0000;

/// Whether VMX or SVM is there, so that KVM runs guests on the processor itself.
#[must_use]
pub(super) fn has_virtualisation() -> bool {
    let has =
        |(leaf, bit): (u32, u32)| leaf <= eax_ecx(leaf & EXTENDED).0 && eax_ecx(leaf).1 & bit != 0;
    has(VMX) || has(SVM)
}

#[allow(unused_unsafe, reason = "newer Rust releases have CPUID as a safe function")]
fn eax_ecx(leaf: u32) -> (u32, u32) {
    // SAFETY: every x86-64 processor has CPUID.
    let result = unsafe { __cpuid(leaf) };
    (result.eax, result.ecx)
}

#[cfg(test)]
mod tests {
    #[test]
    fn it_is_what_the_kernel_says() {
        let Ok(text) = std::fs::read_to_string("/proc/cpuinfo") else { return };
        let flags = text.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
        // A kernel may hide what the processor has, never the other way round.
        if flags.split_whitespace().any(|flag| flag == "vmx" || flag == "svm") {
            assert!(super::has_virtualisation());
        }
    }
}

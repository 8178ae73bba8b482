//! /dev/kvm, the capabilities of KVM, and whether it runs the probe guest.

use kvm_bindings as kb;

use super::super::facts::{Access, Facts, KvmFacts};
use super::super::report::Check;
use super::{USE_NESTED, check, denied};
use crate::probe::{Outcome, Step, Verdict};

/// The only version of KVM's interface there has been since 2007.
const API_VERSION: i32 = 12;
/// vCPUs that a guest may be given.
const MAX_GUEST_CPUS: i32 = 32;

/// A capability that nowait uses.
pub(in super::super) struct Capability {
    /// Its number in linux/kvm.h.
    pub(in super::super) id: u32,
    /// The last part of the check's name.
    name: &'static str,
    /// The least value of KVM_CHECK_EXTENSION that will do.
    at_least: i32,
    /// Without it no guest runs; otherwise it is only missed.
    pub(in super::super) is_needed: bool,
    needed_for: &'static str,
}

const fn needed(id: u32, name: &'static str, needed_for: &'static str) -> Capability {
    Capability { id, name, at_least: 1, is_needed: true, needed_for }
}

const fn wanted(id: u32, name: &'static str, needed_for: &'static str) -> Capability {
    Capability { id, name, at_least: 1, is_needed: false, needed_for }
}

/// The capabilities that nowait uses.
pub(in super::super) const CAPABILITIES: &[Capability] = &[
    needed(kb::KVM_CAP_IRQCHIP, "irqchip", "interrupt controllers in the kernel"),
    needed(kb::KVM_CAP_USER_MEMORY, "user_memory", "guest RAM in this process's memory"),
    needed(kb::KVM_CAP_SET_TSS_ADDR, "set_tss_addr", "vCPUs on Intel processors"),
    needed(kb::KVM_CAP_SET_IDENTITY_MAP_ADDR, "set_identity_map_addr", "vCPUs on Intel processors"),
    needed(kb::KVM_CAP_IRQFD, "irqfd", "interrupts of the guest's devices"),
    needed(kb::KVM_CAP_PIT2, "pit2", "the guest's timer while it calibrates the others"),
    needed(kb::KVM_CAP_EXT_CPUID, "ext_cpuid", "the CPUID that the guest sees"),
    needed(kb::KVM_CAP_MP_STATE, "mp_state", "starting and halting the guest's processors"),
    needed(kb::KVM_CAP_IMMEDIATE_EXIT, "immediate_exit", "stopping a vCPU at any moment"),
    Capability {
        id: kb::KVM_CAP_MAX_VCPUS,
        name: "max_vcpus",
        at_least: MAX_GUEST_CPUS,
        is_needed: false,
        needed_for: "`--cpus` up to 32",
    },
    wanted(kb::KVM_CAP_TSC_DEADLINE_TIMER, "tsc_deadline_timer", "the guest's fast timer"),
    wanted(kb::KVM_CAP_ADJUST_CLOCK, "adjust_clock", "the guest's paravirtual clock"),
    needed(
        kb::KVM_CAP_ENFORCE_PV_FEATURE_CPUID,
        "enforce_pv_feature_cpuid",
        "what CPUID hides is refused, not only hidden",
    ),
    wanted(
        kb::KVM_CAP_PRE_FAULT_MEMORY,
        "pre_fault_memory",
        "fault-around in KVM's page tables too: a faster start (Linux 6.11)",
    ),
    wanted(kb::KVM_CAP_SYNC_REGS, "sync_regs", "`--apf user`: page faults are injected"),
    wanted(
        kb::KVM_CAP_EXCEPTION_PAYLOAD,
        "exception_payload",
        "`--apf user`: page faults are injected with their address",
    ),
    wanted(
        kb::KVM_CAP_X86_USER_SPACE_MSR,
        "x86_user_space_msr",
        "`--apf user` and `off`: KVM's paravirtual areas are pinned",
    ),
    wanted(
        kb::KVM_CAP_X86_MSR_FILTER,
        "x86_msr_filter",
        "`--apf user` and `off`: KVM's paravirtual areas are pinned",
    ),
    wanted(
        kb::KVM_CAP_EXIT_ON_EMULATION_FAILURE,
        "exit_on_emulation_failure",
        "`--apf user` and `off`: instructions on evicted pages",
    ),
];

/// Bits of CPUID 0x40000001 EAX (Documentation/virt/kvm/x86/cpuid.rst) that nowait offers guests.
const PV_FEATURES: &[(u32, &str, &str)] = &[
    (3, "kvmclock", "the guest's paravirtual clock"),
    (4, "async_pf", "`--apf kernel`: async page faults by KVM"),
    (14, "async_pf_int", "`--apf kernel`: page-ready as an interrupt (Linux guests since 5.8)"),
];

/// All checks whose names start with `kvm`.
pub(super) fn checks(facts: &Facts) -> Vec<Check> {
    let mut checks = vec![device(facts), api(facts)];
    checks.extend(CAPABILITIES.iter().map(|cap| capability(cap, facts.kvm.as_ref())));
    checks.extend(PV_FEATURES.iter().map(|&(bit, name, needed_for)| {
        pv_feature(bit, check(format!("kvm.cpuid.{name}"), needed_for), facts.kvm.as_ref())
    }));
    checks.extend([nested_paging(facts), guest(facts), poison_marker(facts)]);
    checks
}

fn device(facts: &Facts) -> Check {
    const PATH: &str = "/dev/kvm";
    let check = check("kvm.device", "every guest");
    if let Some((found, remedy)) = denied(PATH, &facts.kvm_device, &facts.identity) {
        return check.fail(found, remedy);
    }
    match &facts.kvm_device {
        Access::Failed { text, .. } => {
            let found = format!("{PATH} exists, but there is no driver behind it: {text}");
            check.fail(found, no_driver(facts))
        }
        Access::Absent => check.fail(format!("there is no {PATH}"), no_driver(facts)),
        Access::Opens | Access::Denied { .. } => {
            check.pass(format!("{PATH} opens ({})", modules(facts)))
        }
    }
}

fn modules(facts: &Facts) -> String {
    if facts.kvm_modules.is_empty() {
        "no kvm module loaded".to_owned()
    } else {
        format!("modules: {}", facts.kvm_modules.join(", "))
    }
}

/// What to do where KVM is not there at all.
fn no_driver(facts: &Facts) -> String {
    let loaded = |name: &str| facts.kvm_modules.iter().any(|module| module == name);
    let (module, cpu_can) = match (facts.cpu.vmx, facts.cpu.svm) {
        (true, _) => ("kvm_intel", true),
        (_, true) => ("kvm_amd", true),
        _ => ("", false),
    };
    if cpu_can && loaded(module) {
        format!(
            "KVM is loaded on this machine but not visible here: start the container with \
             `--device /dev/kvm`, or {USE_NESTED}"
        )
    } else if cpu_can {
        format!("load it: `sudo modprobe {module}`")
    } else if facts.cpu.hypervisor {
        format!(
            "this is a virtual machine without nested virtualisation: turn that on in the \
             hypervisor below, or {USE_NESTED}"
        )
    } else {
        format!(
            "the processor shows neither VMX nor SVM: turn virtualisation on in the firmware, or \
             {USE_NESTED}"
        )
    }
}

fn api(facts: &Facts) -> Check {
    let check = check("kvm.api", "every guest");
    match &facts.kvm {
        None => check.skip("not asked: /dev/kvm does not open"),
        Some(KvmFacts { api_version: API_VERSION, .. }) => {
            check.pass(format!("version {API_VERSION}"))
        }
        Some(KvmFacts { api_version, .. }) => check.fail(
            format!("version {api_version} instead of {API_VERSION}"),
            format!("this is not Linux's KVM: {USE_NESTED}"),
        ),
    }
}

fn capability(capability: &Capability, kvm: Option<&KvmFacts>) -> Check {
    let check = check(format!("kvm.cap.{}", capability.name), capability.needed_for);
    let Some(kvm) = kvm else {
        return check.skip("not asked: /dev/kvm does not open");
    };
    let value = kvm
        .capabilities
        .iter()
        .find_map(|&(id, value)| (id == capability.id).then_some(value))
        .unwrap_or(0);
    if value >= capability.at_least {
        check.pass(if value == 1 { "yes".to_owned() } else { value.to_string() })
    } else if capability.is_needed {
        check.fail(
            format!("KVM does not have it (KVM_CHECK_EXTENSION: {value})"),
            format!("a newer kernel, or {USE_NESTED}"),
        )
    } else {
        check.warn(
            format!("{value}, wanted at least {}", capability.at_least),
            "a newer kernel, or do without what it is needed for",
        )
    }
}

fn pv_feature(bit: u32, check: super::Unfinished, kvm: Option<&KvmFacts>) -> Check {
    match kvm {
        None => check.skip("not asked: /dev/kvm does not open"),
        Some(kvm) if kvm.pv_features & 1 << bit != 0 => check.pass("offered to guests"),
        Some(kvm) => check.warn(
            format!(
                "not among the features that KVM offers (0x40000001 EAX {:#x})",
                kvm.pv_features
            ),
            "a kernel with CONFIG_KVM_ASYNC_PF and kvmclock, or do without what it is needed for",
        ),
    }
}

/// Without nested paging KVM walks guest page tables itself, over pages that are not there.
fn nested_paging(facts: &Facts) -> Check {
    let check = check("kvm.ept-npt", "page faults of the guest's own stay its own");
    let (module, parameter, value) = match (&facts.ept, &facts.npt) {
        (Some(value), _) => ("kvm_intel", "ept", value),
        (None, Some(value)) => ("kvm_amd", "npt", value),
        (None, None) => return check.skip("neither kvm_intel nor kvm_amd is loaded"),
    };
    if matches!(value.as_str(), "Y" | "1") {
        check.pass(format!("{module}.{parameter}={value}"))
    } else {
        check.fail(
            format!("{module}.{parameter}={value}: nested paging is off"),
            format!("`sudo modprobe -r {module} && sudo modprobe {module} {parameter}=1`"),
        )
    }
}

fn guest(facts: &Facts) -> Check {
    let check = check("kvm.guest", "every guest: a probe of a few instructions in 64-bit mode");
    if facts.kvm.is_none() {
        return check.skip("not tried: /dev/kvm does not open");
    }
    match &facts.probe.verdict {
        Verdict::Yes => check.pass("it runs: port write, INT3, IRETQ, HLT"),
        Verdict::No { step: Step::Create, reason } => check.fail(reason, USE_NESTED),
        Verdict::No { step, reason } => check.fail(
            format!("it stops at {}: {reason}", step.describe()),
            format!("this KVM ({}) cannot run unmodified kernels: {USE_NESTED}", modules(facts)),
        ),
    }
}

fn poison_marker(facts: &Facts) -> Check {
    let check = check(
        "kvm.poison-marker",
        "`--apf user` (the default) and `off`: faults with their address, on the vCPU's own thread",
    );
    if facts.kvm.is_none() {
        return check.skip("not tried: /dev/kvm does not open");
    }
    match facts.probe.outcome(Step::PoisonMarker) {
        Some(Outcome::Passed) => check.pass("SIGBUS with the address, served, re-entered"),
        Some(Outcome::Failed { reason }) if facts.probe.can_run() => {
            check.warn(reason, "Linux 6.6 or later; without it `--apf kernel` is the default")
        }
        Some(Outcome::Failed { reason }) => {
            check.warn(reason, format!("as kvm.guest: {USE_NESTED}"))
        }
        Some(Outcome::Skipped { reason }) => check.skip(reason),
        None => check.skip("not tried"),
    }
}

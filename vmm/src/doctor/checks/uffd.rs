//! userfaultfd: may we have one for kernel faults, and what can it do.

use super::super::facts::{Access, Facts, UffdCreation, UffdFeature};
use super::super::report::Check;
use super::{check, denied};
use crate::probe::uffd::DEVICE;

/// All checks whose names start with `uffd`.
pub(super) fn checks(facts: &Facts) -> Vec<Check> {
    let feature = |feature, name: &str, needed_for| {
        self::feature(facts, feature, check(format!("uffd.feature.{name}"), needed_for))
    };
    vec![
        access(facts),
        feature(UffdFeature::MissingShmem, "missing-shmem", "pages that were never there"),
        feature(UffdFeature::MinorShmem, "minor-shmem", "pages that are there but not mapped"),
        feature(
            UffdFeature::Poison,
            "poison",
            "markers: faults with an address, on the vCPU thread",
        ),
    ]
}

fn access(facts: &Facts) -> Check {
    let check = check("uffd.access", "guest RAM that is paged on demand, also when KVM touches it");
    let uffd = &facts.uffd;
    let (errno, text) = match &uffd.creation {
        UffdCreation::Created => return check.pass(way(facts)),
        UffdCreation::Failed { errno, text } => (*errno, text),
    };
    let sysctl = uffd.sysctl.as_deref().unwrap_or("absent");
    let ptrace = if facts.identity.cap_sys_ptrace { "held" } else { "not held" };
    match errno {
        libc::ENOSYS => check.fail(
            "the kernel has no userfaultfd: built without CONFIG_USERFAULTFD",
            "a kernel with CONFIG_USERFAULTFD=y (all big distributions have it)",
        ),
        libc::EPERM if facts.identity.cap_sys_ptrace || sysctl == "1" => check.fail(
            format!(
                "userfaultfd(2) is refused although vm.unprivileged_userfaultfd is {sysctl} and \
                 CAP_SYS_PTRACE is {ptrace}: a seccomp filter (as a container has it) denies it"
            ),
            "start the container with `--security-opt seccomp=unconfined`, or a profile that \
             allows userfaultfd",
        ),
        libc::EPERM => {
            let refused = format!(
                "userfaultfd(2) is refused: vm.unprivileged_userfaultfd is {sysctl}, CAP_SYS_PTRACE \
                 is {ptrace}"
            );
            let sysctl = "`sudo sysctl vm.unprivileged_userfaultfd=1`, or run nowait with \
                          CAP_SYS_PTRACE";
            match denied(DEVICE, &uffd.device, &facts.identity) {
                Some((found, remedy)) => {
                    check.fail(format!("{found}; {refused}"), format!("{remedy}; or {sysctl}"))
                }
                None => check.fail(format!("there is no {DEVICE}; {refused}"), sysctl),
            }
        }
        _ => check.fail(
            format!("userfaultfd cannot be created: {text} (vm.unprivileged_userfaultfd {sysctl})"),
            "Linux 5.14 or later with CONFIG_USERFAULTFD",
        ),
    }
}

/// Which way the userfaultfd came.
fn way(facts: &Facts) -> String {
    let sysctl = facts.uffd.sysctl.as_deref().unwrap_or("absent");
    match facts.uffd.device {
        Access::Opens => format!("{DEVICE} opens (vm.unprivileged_userfaultfd {sysctl})"),
        _ if facts.identity.cap_sys_ptrace => "by userfaultfd(2), with CAP_SYS_PTRACE".to_owned(),
        _ => format!("by userfaultfd(2), vm.unprivileged_userfaultfd {sysctl}"),
    }
}

fn feature(facts: &Facts, feature: UffdFeature, check: super::Unfinished) -> Check {
    if facts.uffd.creation != UffdCreation::Created {
        return check.skip("not asked: no userfaultfd to ask");
    }
    if facts.uffd.features.contains(&feature) {
        return check.pass("yes");
    }
    let found = format!("this kernel's userfaultfd does not have bit {:#x}", feature.bit());
    match feature {
        UffdFeature::Poison => {
            check.warn(found, "Linux 6.6 or later; without it `--apf kernel` is the default")
        }
        UffdFeature::MissingShmem | UffdFeature::MinorShmem => {
            check.fail(found, "Linux 5.14 or later, with CONFIG_USERFAULTFD and CONFIG_SHMEM")
        }
    }
}

//! The checks over made-up hosts, the parsers over samples, and the whole on this host.

use super::gather::{chosen, cpu, identity, limit_in, name_in, swaps};
use super::*;
use crate::probe::{Outcome, ProbeReport, Step, StepReport};

fn probe(failed: &[Step]) -> ProbeReport {
    let steps = Step::ALL.map(|step| StepReport {
        step,
        outcome: if failed.contains(&step) {
            Outcome::Failed { reason: "suberror 1".to_owned() }
        } else {
            Outcome::Passed
        },
    });
    ProbeReport::new(&steps, "")
}

/// A host on which everything is as it should be; the user is not root.
fn good() -> Facts {
    Facts {
        kernel_release: "6.12.117+deb12-cloud-amd64".to_owned(),
        identity: Identity { uid: 1000, gids: vec![1000], cap_sys_ptrace: false },
        cpu: Cpu { vmx: false, svm: true, hypervisor: false },
        kvm_modules: vec!["kvm".to_owned(), "kvm_amd".to_owned()],
        kvm_device: Access::Opens,
        kvm: Some(KvmFacts {
            api_version: 12,
            capabilities: checks::CAPABILITIES.iter().map(|cap| (cap.id, 1024)).collect(),
            pv_features: u32::MAX,
        }),
        ept: None,
        npt: Some("Y".to_owned()),
        probe: probe(&[]),
        uffd: UffdFacts {
            device: Access::Opens,
            sysctl: Some("0".to_owned()),
            creation: UffdCreation::Created,
            features: vec![UffdFeature::MissingShmem, UffdFeature::MinorShmem, UffdFeature::Poison],
        },
        shmem_huge: Some("advise".to_owned()),
        swaps: Vec::new(),
        memlock: Some(Limit { soft: Some(8 << 20), hard: Some(8 << 20) }),
        nofile: Some(Limit { soft: Some(1024), hard: None }),
        qemu: Some("QEMU emulator version 7.2.22".to_owned()),
    }
}

/// The status of the check, and its findings and remedy in one string.
fn look(facts: &Facts, name: &str) -> (Status, String) {
    let report = Report::new(facts);
    let check = report.check(name).unwrap_or_else(|| panic!("no check {name}"));
    (check.status, format!("{} / {}", check.found, check.remedy.as_deref().unwrap_or("-")))
}

#[track_caller]
fn expect(facts: &Facts, name: &str, status: Status, words: &[&str]) {
    let (found, text) = look(facts, name);
    assert_eq!(found, status, "{name}: {text}");
    for word in words {
        assert!(text.contains(word), "{name}: {word:?} is not in {text:?}");
    }
}

fn denied(gid: u32, group: &str, mode: u32) -> Access {
    Access::Denied { owner: "root".to_owned(), group: group.to_owned(), gid, mode }
}

#[test]
fn a_good_host_passes_everything_and_has_nothing_to_do() {
    let report = Report::new(&good());
    for check in &report.checks {
        assert_eq!(check.status, Status::Pass, "{check:?}");
        assert_eq!(check.remedy, None, "{check:?}");
    }
    assert!(report.verdict.host);
    assert_eq!(report.verdict.summary, "This host can run nowait directly.");
    assert!(!report.to_table().contains("What to do"));
}

#[test]
fn every_check_that_did_not_pass_says_what_to_do() {
    let mut facts = good();
    facts.kvm = Some(KvmFacts::default());
    facts.npt = Some("0".to_owned());
    facts.probe = probe(&Step::ALL);
    facts.uffd.features.clear();
    facts.kernel_release = "5.4.0-generic".to_owned();
    facts.shmem_huge = Some("force".to_owned());
    facts.swaps = vec![Swap { path: "/swapfile".to_owned(), size_kib: 2 << 20 }];
    facts.nofile = Some(Limit { soft: Some(64), hard: Some(4096) });
    facts.qemu = None;
    let report = Report::new(&facts);
    assert!(!report.verdict.host && !report.verdict.nested);
    for check in &report.checks {
        let has_remedy = check.remedy.is_some();
        let must_have = matches!(check.status, Status::Fail | Status::Warn);
        assert_eq!(has_remedy, must_have, "{check:?}");
        assert!(!check.found.is_empty() && !check.needed_for.is_empty(), "{check:?}");
    }
    let failed = report.checks.iter().filter(|check| check.status == Status::Fail).count();
    assert!(failed >= 10, "{}", report.to_table());
}

#[test]
fn an_absent_dev_kvm_is_told_apart_by_processor_and_module() {
    let mut facts = good();
    facts.kvm_device = Access::Absent;
    facts.kvm = None;
    expect(&facts, "kvm.device", Status::Fail, &["no /dev/kvm", "--device /dev/kvm"]);
    facts.kvm_modules.clear();
    expect(&facts, "kvm.device", Status::Fail, &["modprobe kvm_amd"]);
    facts.cpu = Cpu { vmx: true, ..Cpu::default() };
    expect(&facts, "kvm.device", Status::Fail, &["modprobe kvm_intel"]);
    facts.cpu = Cpu { hypervisor: true, ..Cpu::default() };
    expect(&facts, "kvm.device", Status::Fail, &["nested virtualisation", "--nested"]);
    facts.cpu = Cpu::default();
    expect(&facts, "kvm.device", Status::Fail, &["firmware"]);
    expect(&facts, "kvm.cap.irqchip", Status::Skip, &["/dev/kvm does not open"]);
    expect(&facts, "kvm.guest", Status::Skip, &[]);
}

#[test]
fn a_node_without_a_driver_is_not_called_absent() {
    let mut facts = good();
    facts.kvm = None;
    facts.kvm_modules.clear();
    facts.kvm_device = Access::Failed { errno: libc::ENODEV, text: "No such device".to_owned() };
    expect(&facts, "kvm.device", Status::Fail, &["no driver", "No such device", "modprobe"]);
}

#[test]
fn a_denied_dev_kvm_names_its_owner_its_group_and_the_command() {
    let mut facts = good();
    facts.kvm = None;
    facts.kvm_device = denied(104, "kvm", 0o660);
    expect(&facts, "kvm.device", Status::Fail, &["root:kvm", "0660", "1000", "usermod -aG kvm"]);
    // The group has no rights, or is root's: joining it would not help, or help too much.
    facts.kvm_device = denied(104, "kvm", 0o600);
    expect(&facts, "kvm.device", Status::Fail, &["setfacl -m u:$USER:rw /dev/kvm"]);
    facts.kvm_device = denied(0, "root", 0o660);
    expect(&facts, "kvm.device", Status::Fail, &["setfacl"]);
    facts.identity.uid = 0;
    expect(&facts, "kvm.device", Status::Fail, &["container", "--device /dev/kvm"]);
}

#[test]
fn a_kvm_that_cannot_run_the_probe_points_to_the_nested_machine() {
    let mut facts = good();
    facts.probe = probe(&[Step::Int3, Step::PoisonMarker]);
    expect(&facts, "kvm.guest", Status::Fail, &["INT3", "suberror 1", "cargo xtask demo --nested"]);
    expect(&facts, "kvm.poison-marker", Status::Warn, &["--nested"]);
    let report = Report::new(&facts);
    assert!(!report.verdict.host && report.verdict.nested);
    assert!(report.verdict.summary.contains("cannot run guests"), "{}", report.verdict.summary);
    assert!(report.verdict.summary.contains("cargo xtask demo --nested"));
}

#[test]
fn a_missing_marker_is_a_warning_only() {
    let mut facts = good();
    facts.probe = probe(&[Step::PoisonMarker]);
    facts.uffd.features.pop();
    facts.kernel_release = "6.1.0-generic".to_owned();
    expect(&facts, "kvm.poison-marker", Status::Warn, &["6.6"]);
    expect(&facts, "uffd.feature.poison", Status::Warn, &["0x4000", "6.6"]);
    expect(&facts, "kernel.version", Status::Warn, &["6.6"]);
    expect(&facts, "kvm.guest", Status::Pass, &[]);
    assert!(Report::new(&facts).verdict.host);
}

#[test]
fn capabilities_are_needed_or_wanted() {
    let mut facts = good();
    let without = |id| {
        let capabilities = checks::CAPABILITIES.iter().map(|cap| (cap.id, 1024));
        Some(KvmFacts {
            api_version: 12,
            capabilities: capabilities.filter(|&(cap, _)| cap != id).collect(),
            pv_features: 1 << 3 | 1 << 4,
        })
    };
    facts.kvm = without(kvm_bindings::KVM_CAP_IRQCHIP);
    expect(&facts, "kvm.cap.irqchip", Status::Fail, &["--nested"]);
    facts.kvm = without(kvm_bindings::KVM_CAP_MAX_VCPUS);
    expect(&facts, "kvm.cap.max_vcpus", Status::Warn, &["32"]);
    expect(&facts, "kvm.cpuid.async_pf", Status::Pass, &[]);
    expect(&facts, "kvm.cpuid.async_pf_int", Status::Warn, &["0x18"]);
    facts.kvm = Some(KvmFacts { api_version: 11, ..KvmFacts::default() });
    expect(&facts, "kvm.api", Status::Fail, &["11"]);
}

#[test]
fn what_a_guest_is_refused_without_is_needed_here_too() {
    for (cap, name) in crate::kvm::REQUIRED {
        let is_needed =
            checks::CAPABILITIES.iter().any(|known| known.id == *cap as u32 && known.is_needed);
        assert!(is_needed, "{name} is not a check that fails");
    }
}

#[test]
fn nested_paging_that_is_off_is_refused_with_the_modprobe_line() {
    let mut facts = good();
    facts.npt = Some("0".to_owned());
    expect(&facts, "kvm.ept-npt", Status::Fail, &["kvm_amd.npt=0", "modprobe kvm_amd npt=1"]);
    facts.ept = Some("N".to_owned());
    expect(&facts, "kvm.ept-npt", Status::Fail, &["kvm_intel.ept=N"]);
    (facts.ept, facts.npt) = (None, None);
    expect(&facts, "kvm.ept-npt", Status::Skip, &[]);
}

#[test]
fn a_refused_userfaultfd_is_told_apart_by_its_cause() {
    let mut facts = good();
    let refused = |errno| UffdCreation::Failed { errno, text: "text".to_owned() };
    facts.uffd.creation = refused(libc::EPERM);
    facts.uffd.device = denied(0, "root", 0o600);
    expect(&facts, "uffd.access", Status::Fail, &["root:root", "0600", "/dev/userfaultfd"]);
    expect(&facts, "uffd.feature.minor-shmem", Status::Skip, &[]);
    facts.uffd.device = Access::Absent;
    facts.uffd.creation = refused(libc::EPERM);
    expect(
        &facts,
        "uffd.access",
        Status::Fail,
        &["vm.unprivileged_userfaultfd is 0", "CAP_SYS_PTRACE is not held", "sudo sysctl"],
    );
    facts.uffd.sysctl = Some("1".to_owned());
    expect(&facts, "uffd.access", Status::Fail, &["seccomp"]);
    facts.uffd.creation = refused(libc::ENOSYS);
    expect(&facts, "uffd.access", Status::Fail, &["CONFIG_USERFAULTFD"]);
    assert!(!Report::new(&facts).verdict.host);
}

#[test]
fn swap_huge_pages_and_limits_warn_and_do_not_fail() {
    let mut facts = good();
    facts.swaps = vec![Swap { path: "/swapfile".to_owned(), size_kib: 2 << 20 }];
    expect(&facts, "swap", Status::Warn, &["/swapfile (2048 MiB)", "swapoff"]);
    facts.shmem_huge = Some("always".to_owned());
    expect(&facts, "thp.shmem", Status::Warn, &["echo advise"]);
    facts.nofile = Some(Limit { soft: Some(64), hard: None });
    expect(&facts, "limits.nofile", Status::Warn, &["64", "unlimited", "ulimit -n 256"]);
    facts.qemu = None;
    expect(&facts, "nested.qemu", Status::Warn, &["apt-get install"]);
    assert!(Report::new(&facts).verdict.host);
}

#[test]
fn proc_files_are_parsed_and_rubbish_is_no_panic() {
    let status = "Name:\tx\nUid:\t1\t2\t3\t4\nGid:\t5\t6\t7\t8\nGroups:\t10 104 \n\
                  CapEff:\t0000000000080000\n";
    let who = identity(status);
    assert_eq!((who.uid, who.gids, who.cap_sys_ptrace), (2, vec![6, 10, 104], true));
    assert!(!identity("").cap_sys_ptrace);
    let flags = cpu("processor: 0\nflags\t\t: fpu svm hypervisor\n");
    assert!(flags.svm && flags.hypervisor && !flags.vmx);
    assert_eq!(chosen("always [never] deny").as_deref(), Some("never"));
    assert_eq!(chosen("nothing"), None);
    let table = "Filename Type Size Used Priority\n/dev/vda2 partition 1048576 0 -2\nshort\n";
    assert_eq!(swaps(table), [Swap { path: "/dev/vda2".to_owned(), size_kib: 1 << 20 }]);
    let limits = "Max open files            1024                 unlimited            files \n";
    assert_eq!(limit_in("Max open files", limits), Some(Limit { soft: Some(1024), hard: None }));
    assert_eq!(limit_in("Max open files", "Max open files x y"), None);
    assert_eq!(name_in(104, "root:x:0:\nkvm:x:104:\n").as_deref(), Some("kvm"));
    assert_eq!(name_in(7, "broken\n::\n"), None);
}

#[test]
fn the_json_has_the_agreed_shape() {
    let json: serde_json::Value = serde_json::from_str(&Report::new(&good()).to_json()).unwrap();
    assert_eq!(json["schema"], "nowait.doctor/1");
    assert_eq!(json["verdict"]["host"], true);
    assert_eq!(json["probe"]["verdict"]["can_run"], "yes");
    assert_eq!(json["checks"][0]["name"], "kvm.device");
    assert_eq!(json["checks"][0]["status"], "pass");
    for field in ["found", "needed_for", "remedy"] {
        assert!(json["checks"][0].get(field).is_some(), "{field}");
    }
}

#[test]
fn this_host_is_examined_without_a_contradiction() {
    let facts = gather::gather(probe(&[Step::Int3]));
    let report = Report::new(&facts);
    println!("{}", report.to_table());
    assert!(!report.verdict.host, "the probe failed");
    let mut names: Vec<&str> = report.checks.iter().map(|check| check.name.as_str()).collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), report.checks.len(), "every name once");
    let opens = report.check("kvm.device").is_some_and(|check| check.status == Status::Pass);
    assert_eq!(opens, facts.kvm.is_some());
    assert!(!report.to_json().contains("Operation not permitted\""));
}

//! Reads the facts from the running host. No judgement here; what cannot be read is absent.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Stdio};

use kvm_ioctls::Kvm;

use super::checks::CAPABILITIES;
use super::facts::{
    Access, Cpu, Facts, Identity, KvmFacts, Limit, Swap, UffdCreation, UffdFacts, UffdFeature,
};
use crate::probe::ProbeReport;
use crate::probe::uffd::{self, UffdError};

/// The bit of CAP_SYS_PTRACE in a capability set.
const CAP_SYS_PTRACE_BIT: u64 = 1 << 19;
/// CPUID leaf with KVM's paravirtual features.
const KVM_CPUID_FEATURES: u32 = 0x4000_0001;
/// The QEMU that the nested machine runs in.
const QEMU: &str = "qemu-system-x86_64";

/// Reads everything; `probe` is what the probe guest did.
pub(super) fn gather(probe: ProbeReport) -> Facts {
    Facts {
        kernel_release: read("/proc/sys/kernel/osrelease").unwrap_or_default(),
        identity: identity(&read("/proc/self/status").unwrap_or_default()),
        cpu: cpu(&read("/proc/cpuinfo").unwrap_or_default()),
        kvm_modules: kvm_modules(),
        kvm_device: device("/dev/kvm"),
        kvm: kvm(),
        ept: read("/sys/module/kvm_intel/parameters/ept"),
        npt: read("/sys/module/kvm_amd/parameters/npt"),
        probe,
        uffd: uffd(),
        shmem_huge: read("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
            .and_then(|line| chosen(&line)),
        swaps: swaps(&read("/proc/swaps").unwrap_or_default()),
        memlock: limit("Max locked memory"),
        nofile: limit("Max open files"),
        qemu: qemu_version(),
    }
}

fn read(path: &str) -> Option<String> {
    fs::read_to_string(path).ok().map(|text| text.trim_end().to_owned())
}

/// Parses /proc/self/status.
pub(super) fn identity(status: &str) -> Identity {
    let field = |name: &str| {
        status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).unwrap_or("")
    };
    // Real, effective, saved, file system.
    let effective =
        |name| field(name).split_whitespace().nth(1).and_then(|id| id.parse::<u32>().ok());
    let supplementary = field("Groups").split_whitespace().filter_map(|gid| gid.parse().ok());
    let capabilities = u64::from_str_radix(field("CapEff").trim(), 16).unwrap_or(0);
    Identity {
        uid: effective("Uid").unwrap_or(u32::MAX),
        gids: effective("Gid").into_iter().chain(supplementary).collect(),
        cap_sys_ptrace: capabilities & CAP_SYS_PTRACE_BIT != 0,
    }
}

/// Parses /proc/cpuinfo (the first processor speaks for all).
pub(super) fn cpu(cpuinfo: &str) -> Cpu {
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags")).unwrap_or("");
    let has = |flag: &str| flags.split_whitespace().any(|word| word == flag);
    Cpu { vmx: has("vmx"), svm: has("svm"), hypervisor: has("hypervisor") }
}

fn kvm_modules() -> Vec<String> {
    let mut modules: Vec<String> = fs::read_dir("/sys/module")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.starts_with("kvm"))
        .collect();
    modules.sort();
    modules
}

fn device(path: &str) -> Access {
    let error = match OpenOptions::new().read(true).write(true).open(path) {
        Ok(_) => return Access::Opens,
        Err(error) => error,
    };
    match (error.kind(), fs::metadata(path)) {
        (io::ErrorKind::NotFound, _) => Access::Absent,
        (io::ErrorKind::PermissionDenied, Ok(metadata)) => Access::Denied {
            owner: name_of(metadata.uid(), "/etc/passwd"),
            group: name_of(metadata.gid(), "/etc/group"),
            gid: metadata.gid(),
            mode: metadata.mode() & 0o7777,
        },
        _ => Access::Failed { errno: error.raw_os_error().unwrap_or(0), text: error.to_string() },
    }
}

/// The name of a user or group in a passwd(5) or group(5) file, or its number.
fn name_of(id: u32, file: &str) -> String {
    let table = read(file).unwrap_or_default();
    name_in(id, &table).unwrap_or_else(|| id.to_string())
}

/// Name:password:id:…
pub(super) fn name_in(id: u32, table: &str) -> Option<String> {
    table.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)?.parse() == Ok(id)).then(|| name.to_owned())
    })
}

fn kvm() -> Option<KvmFacts> {
    let kvm = Kvm::new().ok()?;
    let capabilities = CAPABILITIES
        .iter()
        .map(|capability| (capability.id, kvm.check_extension_raw(capability.id.into())))
        .collect();
    let pv_features = kvm
        .get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
        .ok()
        .and_then(|cpuid| {
            let leaf = cpuid.as_slice().iter().find(|leaf| leaf.function == KVM_CPUID_FEATURES);
            leaf.map(|leaf| leaf.eax)
        })
        .unwrap_or(0);
    Some(KvmFacts { api_version: kvm.get_api_version(), capabilities, pv_features })
}

fn uffd() -> UffdFacts {
    let creation = match uffd::create(0) {
        Ok(_) => UffdCreation::Created,
        Err(
            UffdError::NoDescriptor { syscall: source, .. } | UffdError::NoFeatures { source, .. },
        ) => UffdCreation::Failed {
            errno: source.raw_os_error().unwrap_or(0),
            text: source.to_string(),
        },
    };
    let features =
        [UffdFeature::MissingShmem, UffdFeature::MinorShmem, UffdFeature::Poison].into_iter();
    UffdFacts {
        device: device(uffd::DEVICE),
        sysctl: read("/proc/sys/vm/unprivileged_userfaultfd"),
        creation,
        // A kernel refuses a userfaultfd that asks for a feature it does not have.
        features: features.filter(|feature| uffd::create(feature.bit()).is_ok()).collect(),
    }
}

/// The word in brackets: `always [never] deny`.
pub(super) fn chosen(line: &str) -> Option<String> {
    let (_, rest) = line.split_once('[')?;
    rest.split_once(']').map(|(word, _)| word.to_owned())
}

/// Parses /proc/swaps.
pub(super) fn swaps(table: &str) -> Vec<Swap> {
    let row = |line: &str| {
        let mut fields = line.split_whitespace();
        let path = fields.next()?.to_owned();
        Some(Swap { path, size_kib: fields.nth(1)?.parse().ok()? })
    };
    table.lines().skip(1).filter_map(row).collect()
}

fn limit(name: &str) -> Option<Limit> {
    limit_in(name, &read("/proc/self/limits")?)
}

/// Parses a line of /proc/self/limits.
pub(super) fn limit_in(name: &str, limits: &str) -> Option<Limit> {
    let rest = limits.lines().find_map(|line| line.strip_prefix(name))?;
    let mut values = rest.split_whitespace().map(|word| match word {
        "unlimited" => Some(None),
        number => number.parse().ok().map(Some),
    });
    Some(Limit { soft: values.next()??, hard: values.next()?? })
}

/// The first line of QEMU's version, if QEMU is on the PATH.
fn qemu_version() -> Option<String> {
    let path = std::env::var_os("PATH")?;
    let program = std::env::split_paths(&path)
        .map(|directory| directory.join(QEMU))
        .find(|program| Path::is_file(program))?;
    let output = Command::new(program).arg("--version").stderr(Stdio::null()).output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout);
    output.status.success().then(|| text.lines().next().unwrap_or(QEMU).to_owned())
}

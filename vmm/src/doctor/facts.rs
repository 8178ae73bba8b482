//! What `doctor` looked at, as plain data: no judgement here, and no access to the host.

use crate::probe::{ProbeReport, uffd};

/// All facts about a host that the checks read.
#[derive(Clone, Debug)]
pub struct Facts {
    /// As `uname -r` prints it.
    pub kernel_release: String,
    /// Who asks.
    pub identity: Identity,
    /// The processor's virtualisation.
    pub cpu: Cpu,
    /// Loaded kernel modules whose names start with `kvm`.
    pub kvm_modules: Vec<String>,
    /// /dev/kvm.
    pub kvm_device: Access,
    /// What KVM says of itself; `None` if the device does not open.
    pub kvm: Option<KvmFacts>,
    /// Value of the module parameter kvm_intel.ept.
    pub ept: Option<String>,
    /// Value of the module parameter kvm_amd.npt.
    pub npt: Option<String>,
    /// What the probe guest did.
    pub probe: ProbeReport,
    /// userfaultfd.
    pub uffd: UffdFacts,
    /// The chosen word of /sys/kernel/mm/transparent_hugepage/shmem_enabled.
    pub shmem_huge: Option<String>,
    /// Swap areas in use.
    pub swaps: Vec<Swap>,
    /// RLIMIT_MEMLOCK in bytes.
    pub memlock: Option<Limit>,
    /// RLIMIT_NOFILE in descriptors.
    pub nofile: Option<Limit>,
    /// The first line of `qemu-system-x86_64 --version`.
    pub qemu: Option<String>,
}

/// Who asks: the effective user, its groups and the capability that userfaultfd asks for.
#[derive(Clone, Debug, Default)]
pub struct Identity {
    /// Effective user id.
    pub uid: u32,
    /// Effective and supplementary group ids.
    pub gids: Vec<u32>,
    /// Whether CAP_SYS_PTRACE is effective.
    pub cap_sys_ptrace: bool,
}

/// The processor's virtualisation, from /proc/cpuinfo.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cpu {
    /// Intel VMX.
    pub vmx: bool,
    /// AMD SVM.
    pub svm: bool,
    /// Runs under a hypervisor itself.
    pub hypervisor: bool,
}

/// Whether a device node opens for reading and writing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Access {
    /// It does.
    Opens,
    /// No such file.
    Absent,
    /// It exists, but not for us.
    Denied {
        /// Name or number of the user that owns it.
        owner: String,
        /// Name or number of its group.
        group: String,
        /// Its group id.
        gid: u32,
        /// Its permission bits.
        mode: u32,
    },
    /// It exists and opening it fails for another reason.
    Failed {
        /// The errno.
        errno: i32,
        /// The same in words.
        text: String,
    },
}

/// What KVM says of itself.
#[derive(Clone, Debug, Default)]
pub struct KvmFacts {
    /// KVM_GET_API_VERSION.
    pub api_version: i32,
    /// KVM_CHECK_EXTENSION by capability number, for every capability that a check asks about.
    pub capabilities: Vec<(u32, i32)>,
    /// EAX of leaf 0x40000001 in KVM_GET_SUPPORTED_CPUID: the paravirtual features.
    pub pv_features: u32,
}

/// A feature bit of userfaultfd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UffdFeature {
    /// Missing faults on shared memory.
    MissingShmem,
    /// Minor faults on shared memory.
    MinorShmem,
    /// Poison markers.
    Poison,
}

/// How the creation of a userfaultfd for kernel faults ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum UffdCreation {
    /// Created.
    Created,
    /// Neither the device nor the system call gives one.
    Failed {
        /// The errno of the system call; 0 if there was none.
        errno: i32,
        /// The same in words.
        text: String,
    },
}

/// What is known about userfaultfd.
#[derive(Clone, Debug)]
pub struct UffdFacts {
    /// /dev/userfaultfd; where it does not open, the system call is tried.
    pub device: Access,
    /// Value of the sysctl vm.unprivileged_userfaultfd.
    pub sysctl: Option<String>,
    /// How the creation ended.
    pub creation: UffdCreation,
    /// The features that a userfaultfd could be created with.
    pub features: Vec<UffdFeature>,
}

/// A swap area in use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Swap {
    /// Its file or device.
    pub path: String,
    /// Its size in KiB.
    pub size_kib: u64,
}

/// A resource limit; `None` = unlimited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    /// What holds now.
    pub soft: Option<u64>,
    /// What it can be raised to.
    pub hard: Option<u64>,
}

impl UffdFeature {
    /// Its bit, as in linux/userfaultfd.h.
    #[must_use]
    pub fn bit(self) -> u64 {
        match self {
            Self::MissingShmem => uffd::FEATURE_MISSING_SHMEM,
            Self::MinorShmem => uffd::FEATURE_MINOR_SHMEM,
            Self::Poison => uffd::FEATURE_POISON,
        }
    }
}

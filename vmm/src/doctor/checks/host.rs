//! The kernel's version and settings, and this process's limits.

use super::super::facts::{Facts, Limit, Swap};
use super::super::report::Check;
use super::check;

/// Linux that has minor faults on shared memory.
const KERNEL_NEEDED: (u32, u32) = (5, 14);
/// Linux that has UFFDIO_POISON.
const KERNEL_WANTED: (u32, u32) = (6, 6);
/// Descriptors of the largest guest (32 vCPUs, their timers and events) with room to spare.
const FILES_NEEDED: u64 = 256;

/// The checks `kernel.*`, `thp.*`, `swap` and `limits.*`.
pub(super) fn checks(facts: &Facts) -> Vec<Check> {
    vec![
        kernel(&facts.kernel_release),
        shmem_huge_pages(facts.shmem_huge.as_deref()),
        swap(&facts.swaps),
        memlock(facts.memlock),
        nofile(facts.nofile),
    ]
}

/// Major and minor version of a release such as `6.12.117+deb12-cloud-amd64`.
pub(super) fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

fn kernel(release: &str) -> Check {
    let check = check("kernel.version", "minor faults on shared memory (5.14), markers (6.6)");
    match version(release) {
        Some(version) if version >= KERNEL_WANTED => check.pass(release),
        Some(version) if version >= KERNEL_NEEDED => {
            check.warn(release, "Linux 6.6 or later for UFFDIO_POISON")
        }
        Some(_) => check.fail(release, "Linux 5.14 or later, better 6.6"),
        None => check.warn(
            format!("the release {release:?} is no version"),
            "look at the checks uffd.feature.* instead",
        ),
    }
}

/// Both mappings of guest RAM refuse huge pages; `force` and `always` reach past that when the
/// file behind them is written without a mapping.
fn shmem_huge_pages(setting: Option<&str>) -> Check {
    const FILE: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";
    let check = check("thp.shmem", "guest RAM in pages of 4 KiB: one page is fetched, not 512");
    match setting {
        None => check.pass("no transparent huge pages in this kernel"),
        Some(word @ ("always" | "force")) => check.warn(
            format!("{word}: shared memory may come in 2 MiB pages"),
            format!("`echo advise | sudo tee {FILE}`"),
        ),
        Some(word) => check.pass(word),
    }
}

fn swap(swaps: &[Swap]) -> Check {
    let check = check("swap", "honest figures: host swap hides pages that count as resident");
    if swaps.is_empty() {
        return check.pass("off");
    }
    let areas: Vec<String> =
        swaps.iter().map(|s| format!("{} ({} MiB)", s.path, s.size_kib >> 10)).collect();
    check.warn(
        format!("on: {}", areas.join(", ")),
        "`sudo swapoff -a` while you measure; guests run either way",
    )
}

fn memlock(limit: Option<Limit>) -> Check {
    let check = check("limits.memlock", "nothing yet: guest RAM is never locked");
    match limit {
        Some(limit) => check.pass(format!("{} bytes", shown(limit.soft))),
        None => check.skip("/proc/self/limits does not say"),
    }
}

fn nofile(limit: Option<Limit>) -> Check {
    let check = check("limits.nofile", "descriptors of a guest with 32 vCPUs: 256 are plenty");
    match limit {
        Some(Limit { soft: Some(soft), hard }) if soft < FILES_NEEDED => check.warn(
            format!("{soft} (can be raised to {})", shown(hard)),
            format!("`ulimit -n {FILES_NEEDED}` in the shell that starts nowait"),
        ),
        Some(limit) => check.pass(shown(limit.soft)),
        None => check.skip("/proc/self/limits does not say"),
    }
}

fn shown(value: Option<u64>) -> String {
    value.map_or_else(|| "unlimited".to_owned(), |value| value.to_string())
}

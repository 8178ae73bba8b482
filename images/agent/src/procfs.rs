//! What the guest kernel says about itself in `/proc`.

use std::fs;
use std::io;

/// The kernel's release, as `uname -r` prints it.
pub(crate) fn kernel_release() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned())
}

/// A field of `/proc/meminfo`, in KiB.
pub(crate) fn meminfo_kib(field: &str) -> io::Result<u64> {
    parse_meminfo(&fs::read_to_string("/proc/meminfo")?, field)
        .ok_or_else(|| io::Error::other(format!("/proc/meminfo has no field {field}")))
}

fn parse_meminfo(meminfo: &str, field: &str) -> Option<u64> {
    meminfo
        .lines()
        .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?
        .trim()
        .strip_suffix("kB")?
        .trim()
        .parse()
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_of_meminfo() {
        let text = "MemTotal:         117664 kB\nMemFree: 5 kB\nHugePages_Total:   0\n";
        assert_eq!(parse_meminfo(text, "MemTotal"), Some(117_664));
        assert_eq!(parse_meminfo(text, "MemFree"), Some(5));
        assert_eq!(parse_meminfo(text, "Mem"), None);
        assert_eq!(parse_meminfo(text, "HugePages_Total"), None);
    }
}

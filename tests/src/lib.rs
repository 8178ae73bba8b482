//! The harness of nowait's integration tests: runs the real `nowait` binary with real guests, as a user
//! does, and looks at exit code, output, reports and JSON.
//!
//! A guest test reads as a few lines:
//!
//! ```no_run
//! use nowait_tests::guest::Guest;
//! let end = Guest::linux().args(["--cpus", "2"]).exec("nproc").run();
//! end.expect_code(0);
//! assert_eq!(end.exec_output(0).trim(), "2");
//! ```
#![forbid(unsafe_code)]

pub mod cgroup;
pub mod control;
pub mod figures;
pub mod guest;
pub mod process;
pub mod row;
pub mod running;
pub mod small_disk;
pub use vmm::stats;

use std::env;
use std::path::PathBuf;

/// The `nowait` binary under test: `$NOWAIT_BIN`, or the one in `$PATH`.
#[must_use]
pub fn nowait_bin() -> PathBuf {
    env::var_os("NOWAIT_BIN").map_or_else(|| PathBuf::from("nowait"), PathBuf::from)
}

/// A file of the images directory, `$NOWAIT_IMAGES` or `/images`.
#[must_use]
pub fn image(name: &str) -> PathBuf {
    env::var_os("NOWAIT_IMAGES").map_or_else(|| PathBuf::from("/images"), PathBuf::from).join(name)
}

/// Our guest kernel.
#[must_use]
pub fn vmlinux() -> PathBuf {
    image("vmlinux")
}

/// The initramfs with the guest agent.
#[must_use]
pub fn initramfs() -> PathBuf {
    image("initramfs.cpio")
}

/// The bare-metal test kernel (images/test-kernel).
#[must_use]
pub fn test_kernel() -> PathBuf {
    image("test-kernel")
}

//! Real kernels with damaged headers: refused in one line, or run as they are; never a panic, and never
//! a hang that a time-out does not end.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nowait_tests::process::{self, Finished};
use nowait_tests::{image, nowait_bin, vmlinux};
use tempfile::TempDir;

use crate::Test;
use crate::kernels::{TestKernel, debug_exit};

pub(crate) const TESTS: &[Test] = &[
    ("kernels_cut_at_each_header_are_refused", cut),
    ("a_vmlinux_with_absurd_headers_is_refused_or_runs", vmlinux_headers),
    ("a_bzimage_with_absurd_headers_is_refused_or_runs", bzimage_headers),
    ("a_multiboot_kernel_with_absurd_headers_is_refused_or_runs", multiboot_headers),
];

const LIMIT: Duration = Duration::from_secs(30);
/// Values that arithmetic trips over, cut to the width of the field.
const ABSURD: [u64; 6] =
    [0, 1, 0xffff, 0x7fff_ffff_ffff_f000, 0xffff_ffff_ffff_f000, 0xffff_ffff_ffff_ffff];

/// A kernel whose bytes are changed for one run at a time.
struct Patient {
    _directory: TempDir,
    path: PathBuf,
    file: File,
}

impl Patient {
    fn new(kernel: &Path) -> Self {
        let directory = TempDir::new().expect("a temporary directory");
        let path = directory.path().join("kernel");
        fs::copy(kernel, &path).expect("a copy");
        let file = File::options().read(true).write(true).open(&path).expect("it opens");
        Self { _directory: directory, path, file }
    }

    fn run(&self) -> Finished {
        let mut command = Command::new(nowait_bin());
        command.args(["run", "--memory", "96M", "--timeout", "1", "--console", "none"]);
        process::run(command.arg("--kernel").arg(&self.path), LIMIT)
    }

    /// Runs it with each absurd value in a field.
    fn try_field(&self, at: u64, width: usize) {
        let mut before = [0; 8];
        self.file.read_exact_at(&mut before[..width], at).expect("the field");
        for value in ABSURD {
            let bytes = &value.to_le_bytes()[..width];
            self.file.write_all_at(bytes, at).expect("it is written");
            let end = self.run();
            let what = format!("{value:#x} in the {width} bytes at {at:#x}");
            assert!(!end.stderr.contains("panicked"), "{what}: {}", end.stderr);
            match end.code() {
                // Refused.
                4 => end.expect_refusal(4, &["kernel"]),
                // It ran to one of the ends of a guest, or into its time-out.
                0 | 8 | 10 | 12 | 14 => {}
                code => panic!("{what}: exit code {code}\n{}", end.stderr),
            }
        }
        self.file.write_all_at(&before[..width], at).expect("it is written");
    }
}

fn cut() {
    for (kernel, lengths) in [
        (vmlinux(), &[1, 4, 16, 63, 64, 100, 64 + 5 * 56 - 1, 64 + 5 * 56, 0x20_0000][..]),
        (image("debian-vmlinuz"), &[1, 0x1f1, 0x202, 0x206, 0x236, 0x26f, 0x270, 0x400, 0x10_0000]),
    ] {
        let patient = Patient::new(&kernel);
        for length in lengths.iter().rev() {
            patient.file.set_len(*length).expect("it is cut");
            patient.run().expect_refusal(4, &["kernel"]);
        }
    }
    let multiboot = TestKernel::new(&debug_exit(0));
    let patient = Patient::new(&multiboot.path());
    for length in (1..fs::metadata(multiboot.path()).expect("a file").len()).rev().step_by(7) {
        patient.file.set_len(length).expect("it is cut");
        patient.run().expect_refusal(4, &["kernel"]);
    }
}

fn vmlinux_headers() {
    let patient = Patient::new(&vmlinux());
    // e_type, e_phoff, e_phentsize, e_phnum.
    for (at, width) in [(16, 2), (32, 8), (54, 2), (56, 2)] {
        patient.try_field(at, width);
    }
    // p_offset, p_paddr, p_filesz, p_memsz of the first segment, p_offset and p_filesz of the notes.
    let (first, notes) = (64, 64 + 4 * 56);
    for at in [first + 8, first + 24, first + 32, first + 40, notes + 8, notes + 32] {
        patient.try_field(at, 8);
    }
}

fn bzimage_headers() {
    let patient = Patient::new(&image("debian-vmlinuz"));
    // setup_sects, version, initrd_addr_max, payload_offset, payload_length, pref_address, init_size.
    for (at, width) in
        [(0x1f1, 1), (0x206, 2), (0x22c, 4), (0x248, 4), (0x24c, 4), (0x258, 8), (0x260, 4)]
    {
        patient.try_field(at, width);
    }
}

fn multiboot_headers() {
    let patient = Patient::new(&TestKernel::new(&[0xf4]).path());
    // e_entry, e_phoff, e_phnum; p_offset, p_paddr, p_filesz, p_memsz; the Multiboot header.
    for (at, width) in [(24, 4), (28, 4), (44, 2)] {
        patient.try_field(at, width);
    }
    for at in [56, 64, 68, 72, 84, 88, 92] {
        patient.try_field(at, 4);
    }
}

//! Bad input: one line that names the operand and the remedy, and the documented exit code.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use nowait_tests::process::{self, Finished};
use nowait_tests::{image, initramfs, nowait_bin, vmlinux};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::kernels::{TestKernel, debug_exit};
use crate::{AS_NOBODY, Test};

pub(crate) const TESTS: &[Test] = &[
    ("kernels_that_are_none", kernels),
    ("an_initrd_that_does_not_fit_or_is_not_there", initrds),
    ("memory_sizes", memory),
    ("processor_counts", processors),
    ("kernel_command_lines", command_lines),
    ("options_that_do_not_exist_or_contradict_each_other", options),
    ("outputs_that_cannot_be_written", outputs),
    ("requests_that_are_none", requests),
    ("two_runs_may_not_write_one_file", same_file),
];

/// Those that need root, for they mount an empty /dev of their own.
pub(crate) const ROOT_TESTS: &[Test] =
    &[("no_dev_kvm", no_kvm), ("no_right_to_userfaultfd", no_userfaultfd)];

const LIMIT: Duration = Duration::from_secs(30);

fn nowait(args: &[&str]) -> Finished {
    process::run(Command::new(nowait_bin()).args(args), LIMIT)
}

/// Runs a good kernel with these further arguments.
fn run(args: &[&str]) -> Finished {
    let kernel = vmlinux();
    nowait(&[&["run", "--kernel", kernel.to_str().expect("UTF-8")], args].concat())
}

fn kernels() {
    let files = TempDir::new().expect("a temporary directory");
    let refuse = |name: &str, bytes: &[u8], words: &[&str]| {
        let path = files.path().join(name);
        fs::write(&path, bytes).expect("the file can be written");
        nowait(&["run", "--kernel", path.to_str().expect("UTF-8")])
            .expect_refusal(4, &[&[name], words].concat());
    };
    nowait(&["run", "--kernel", "/nonexistent"])
        .expect_refusal(4, &["/nonexistent", "No such file"]);
    nowait(&["run", "--kernel", "/"]).expect_refusal(4, &["'/'", "not a regular file"]);
    refuse("empty", b"", &["empty"]);
    refuse("random", &[0x5a; 9000], &["not a kernel"]);
    let good = fs::read(vmlinux()).expect("our kernel");
    refuse("truncated", &good[..good.len() / 2], &["truncated"]);
    refuse("headless", &good[..100], &["truncated"]);
    let bzimage = fs::read(image("debian-vmlinuz")).expect("the distribution's kernel");
    refuse("cut-bzimage", &bzimage[..bzimage.len() / 2], &["truncated"]);
    let mut only32 = bzimage;
    only32[0x236] &= !1; // XLF_KERNEL_64
    refuse("bzimage32", &only32, &["32-bit only"]);
    let mut elf32 = fs::read(TestKernel::new(&debug_exit(0)).path()).expect("a test kernel");
    elf32[84] = 0; // no Multiboot header any more
    refuse("elf32", &elf32, &["32-bit only"]);
    let mut arm = good;
    arm[18] = 183; // EM_AARCH64
    refuse("arm", &arm, &["AArch64", "x86-64"]);
}

fn initrds() {
    run(&["--initrd", "/nonexistent"]).expect_refusal(4, &["initrd", "/nonexistent"]);
    let files = TempDir::new().expect("a temporary directory");
    let large = files.path().join("large");
    fs::File::create(&large).and_then(|file| file.set_len(1 << 30)).expect("a sparse file");
    let large = large.to_str().expect("UTF-8");
    run(&["--initrd", large]).expect_refusal(4, &["large", "1 GiB", "--memory"]);
}

fn memory() {
    for (size, words) in [
        ("0", ["--memory 0", "at least"]),
        ("1M", ["--memory 1M", "at least"]),
        ("134217729", ["--memory 134217729", "multiple"]),
        ("lots", ["--memory", "'lots'"]),
        ("8M", ["kernel", "--memory"]),
        ("99999999T", ["--memory", "64 bits"]),
    ] {
        run(&["--memory", size]).expect_refusal(4, &words);
    }
    let end = run(&["--memory", "16000000T"]);
    end.expect_refusal(4, &["--memory"]);
}

fn processors() {
    for cpus in ["0", "33", "-1", "two"] {
        let operand = format!("--cpus={cpus}");
        run(&[&operand]).expect_refusal(2, &["--cpus", cpus]);
    }
}

fn command_lines() {
    run(&["--cmdline", &"x".repeat(2048)]).expect_refusal(4, &["--cmdline", "2047"]);
    run(&["--cmdline", "two\nlines"]).expect_refusal(4, &["--cmdline"]);
}

fn options() {
    nowait(&["run"]).expect_refusal(2, &["--kernel"]);
    nowait(&["fly"]).expect_refusal(2, &["fly"]);
    run(&["--apf", "fast"]).expect_refusal(2, &["--apf", "fast", "host"]);
    run(&["--store", "tape"]).expect_refusal(2, &["--store", "tape"]);
    run(&["--store", "delay=soon"]).expect_refusal(2, &["--store", "soon"]);
    run(&["--fault-around", "5K"]).expect_refusal(4, &["--fault-around", "5K"]);
    run(&["--json", "-"]).expect_refusal(4, &["--json", "--console none"]);
}

fn outputs() {
    run(&["--json", "/nonexistent/run.json"])
        .expect_refusal(4, &["--json", "/nonexistent/run.json"]);
    run(&["--report", "/proc"]).expect_refusal(4, &["--report", "/proc"]);
}

fn requests() {
    run(&["--requests", "/nonexistent"]).expect_refusal(4, &["--requests", "/nonexistent"]);
    let files = TempDir::new().expect("a temporary directory");
    let path = files.path().join("requests");
    fs::write(&path, "{\"request\":\"power_off\"}\n{\"request\":\"dance\"}\n")
        .expect("it is written");
    run(&["--requests", path.to_str().expect("UTF-8")])
        .expect_refusal(4, &["--requests", "line 2"]);
}

fn same_file() {
    let files = TempDir::new().expect("a temporary directory");
    let json = files.path().join("run.json");
    let json = json.to_str().expect("UTF-8");
    let kernel = vmlinux();
    let first = Command::new(nowait_bin())
        .args(["run", "--kernel", kernel.to_str().expect("UTF-8"), "--json", json])
        .arg("--initrd")
        .arg(initramfs())
        .args(["--cmdline", "nowait.agent=serve"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("it starts");
    thread::sleep(Duration::from_secs(1));
    let second = run(&["--json", json]);
    let pid = Pid::from_raw(first.id().cast_signed()).expect("a pid");
    kill_process(pid, Signal::TERM).expect("the first still runs");
    process::finish(first, LIMIT).expect("it ends").expect_code(16);
    second.expect_refusal(4, &["--json", "run.json"]);
    assert!(fs::read_to_string(json).expect("the first's file").contains("nowait.run/1"));
}

/// Runs a good kernel in a mount namespace whose /dev is empty but for what `prepare` (a shell
/// command) puts there, as an ordinary user.
fn in_bare_dev(prepare: &str) -> Finished {
    let files = TempDir::new().expect("a temporary directory");
    fs::set_permissions(files.path(), fs::Permissions::from_mode(0o755)).expect("readable");
    let copy = |from: &Path, name: &str, mode: u32| {
        let to = files.path().join(name);
        fs::copy(from, &to).expect("a copy");
        fs::set_permissions(&to, fs::Permissions::from_mode(mode)).expect("its mode");
        to
    };
    let which = Command::new("sh").args(["-c", "command -v \"$0\""]).arg(nowait_bin()).output();
    let which = String::from_utf8(which.expect("a shell").stdout).expect("UTF-8");
    let nowait = copy(Path::new(which.trim()), "nowait", 0o755);
    let kernel = copy(&vmlinux(), "vmlinux", 0o644);
    let script = format!(
        "mount -t tmpfs none /dev && mknod -m 666 /dev/null c 1 3 && {{ {prepare}; }} && \
         exec {} {AS_NOBODY} {} run --kernel {} --cmdline nowait.agent=poweroff",
        std::env::current_exe().expect("this program").display(),
        nowait.display(),
        kernel.display()
    );
    process::run(Command::new("unshare").args(["-m", "sh", "-c", &script]), LIMIT)
}

fn no_kvm() {
    in_bare_dev("true").expect_refusal(6, &["/dev/kvm", "modprobe"]);
    in_bare_dev("mknod -m 600 /dev/kvm c 10 232").expect_refusal(6, &["/dev/kvm", "permission"]);
}

fn no_userfaultfd() {
    in_bare_dev("mknod -m 666 /dev/kvm c 10 232")
        .expect_refusal(6, &["userfaultfd", "vm.unprivileged_userfaultfd"]);
}

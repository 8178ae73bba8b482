//! Standard streams, pipes and devices where a file or a person is expected: a guest runs beside them,
//! or the run is refused before it begins; nothing hangs and no result is lost in silence.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use nowait_tests::guest::GUEST_LIMIT;
use nowait_tests::process::{self, Finished};
use nowait_tests::small_disk::SmallDisk;
use nowait_tests::{initramfs, nowait_bin, vmlinux};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::Test;
use crate::kernels::{TestKernel, debug_exit};

pub(crate) const TESTS: &[Test] = &[
    ("a_guest_boots_beside_endless_input", endless_input),
    ("inputs_that_are_no_files_are_refused", inputs),
    ("requests_come_through_a_pipe_too", piped_requests),
    ("outputs_that_are_inputs_are_refused_unharmed", outputs_that_are_inputs),
    ("a_full_device_fails_the_run_and_hides_no_result", full_device),
    ("a_pipe_without_a_reader_is_refused", pipe_without_reader),
    ("closed_descriptors_do_no_harm", closed_descriptors),
    ("a_reader_that_went_away_does_not_end_the_guest", reader_gone),
    ("a_signal_ends_a_run_whose_output_nobody_takes", stuck_output),
];
pub(crate) const ROOT_TESTS: &[Test] = &[("a_full_disk_leaves_the_earlier_result", full_disk)];

const LIMIT: Duration = Duration::from_secs(30);

fn linux() -> Command {
    let mut command = Command::new(nowait_bin());
    command.arg("run").arg("--kernel").arg(vmlinux()).arg("--initrd").arg(initramfs());
    command.args(["--cmdline", "nowait.agent=poweroff"]);
    command
}

/// A kernel that ends at once with exit code 3.
fn tiny(kernel: &Path) -> Command {
    let mut command = Command::new(nowait_bin());
    command.arg("run").arg("--kernel").arg(kernel).args(["--memory", "8M", "--debug-exit"]);
    command
}

const TINY_CODE: i32 = 3;

fn tiny_kernel() -> TestKernel {
    TestKernel::new(&debug_exit(1))
}

fn finish(command: &mut Command, limit: Duration) -> Finished {
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn().expect("it starts");
    process::finish(child, limit).unwrap_or_else(|so_far| panic!("{command:?} hangs: {so_far:?}"))
}

fn fifo(path: PathBuf) -> PathBuf {
    let status = Command::new("mkfifo").arg(&path).status().expect("mkfifo runs");
    assert!(status.success());
    path
}

fn endless_input() {
    finish(linux().stdin(File::open("/dev/zero").expect("it opens")), GUEST_LIMIT).expect_code(0);
    let mut yes = Command::new("yes").stdout(Stdio::piped()).spawn().expect("yes runs");
    let end = finish(linux().stdin(yes.stdout.take().expect("its output")), GUEST_LIMIT);
    let _ = yes.kill();
    let _ = yes.wait();
    end.expect_code(0);
    // With the terminal's own work, and commands that run meanwhile.
    let files = TempDir::new().expect("a temporary directory");
    let at = |name: &str| files.path().join(name);
    let exec = "{\"request\":\"exec\",\"command\":\"sleep 2; echo alive\"}";
    fs::write(at("requests"), format!("{exec}\n{{\"request\":\"power_off\"}}\n"))
        .expect("it is written");
    let mut command = linux();
    command.arg("--requests").arg(at("requests")).arg("--report").arg(at("report"));
    finish(command.stdin(File::open("/dev/zero").expect("it opens")), GUEST_LIMIT).expect_code(0);
    assert!(fs::read_to_string(at("report")).expect("reports").contains("alive\\n"));
}

fn inputs() {
    let kernel = tiny_kernel();
    let fifo = fifo(kernel.path().with_file_name("fifo"));
    for (file, word) in [
        (fifo.as_path(), "pipe"),
        (Path::new("/dev/zero"), "character device"),
        (Path::new("/"), "directory"),
        (Path::new("/proc/version"), "empty"),
    ] {
        tiny_run(file, &[]).expect_refusal(4, &["kernel", word]);
        let initrd = [OsStr::new("--initrd"), file.as_os_str()];
        tiny_run(&kernel.path(), &initrd).expect_refusal(4, &["initrd", word]);
    }
    for (file, word) in [
        (fifo.as_path(), "nobody writes"),
        (Path::new("/dev/zero"), "character device"),
        (Path::new("/"), "directory"),
        (Path::new("/dev/null"), "character device"),
    ] {
        let requests = [OsStr::new("--requests"), file.as_os_str()];
        tiny_run(&kernel.path(), &requests).expect_refusal(4, &["--requests", word]);
    }
    let empty = kernel.file("empty", b"\n");
    tiny_run(&kernel.path(), &[OsStr::new("--requests"), empty.as_os_str()])
        .expect_refusal(4, &["no request"]);
}

fn tiny_run(kernel: &Path, args: &[&OsStr]) -> Finished {
    process::run(tiny(kernel).args(args), LIMIT)
}

fn piped_requests() {
    let mut words = vec!["-c".into(), "echo '{\"request\":\"power_off\"}' | \"$@\"".into()];
    words.push("sh".into());
    let run = linux();
    words.push(run.get_program().to_owned());
    words.extend(run.get_args().map(OsStr::to_owned));
    words.extend(["--console", "none", "--requests", "/proc/self/fd/0"].map(Into::into));
    process::run(Command::new("sh").args(words), GUEST_LIMIT).expect_code(0);
}

fn outputs_that_are_inputs() {
    let kernel = tiny_kernel();
    let before = fs::read(kernel.path()).expect("the kernel");
    let other = |name: &str| kernel.path().with_file_name(name);
    symlink(kernel.path(), other("soft")).expect("a link");
    fs::hard_link(kernel.path(), other("hard")).expect("a link");
    for output in [kernel.path(), other("soft"), other("hard")] {
        for option in ["--json", "--report"] {
            tiny_run(&kernel.path(), &[OsStr::new(option), output.as_os_str()])
                .expect_refusal(4, &[option, "is also --kernel"]);
        }
    }
    assert_eq!(fs::read(kernel.path()).expect("the kernel"), before);
    let initrd = kernel.file("initrd", b"initrd");
    let args = ["--initrd".as_ref(), initrd.as_os_str(), "--json".as_ref(), initrd.as_os_str()];
    tiny_run(&kernel.path(), &args).expect_refusal(4, &["is also --initrd"]);
    let both = other("both");
    let args = ["--json".as_ref(), both.as_os_str(), "--report".as_ref(), both.as_os_str()];
    tiny_run(&kernel.path(), &args).expect_refusal(4, &["--report", "is also --json"]);
    assert!(!both.exists(), "a refused run leaves nothing");
    let mut command = tiny(&kernel.path());
    command.arg("--json").arg(&both).stdout(File::create(&both).expect("a file"));
    let child = command.stdin(Stdio::null()).stderr(Stdio::piped()).spawn().expect("it starts");
    process::finish(child, LIMIT)
        .expect("it ends")
        .expect_refusal(4, &["--json", "is also standard output"]);
}

fn full_device() {
    let kernel = tiny_kernel();
    let full = |option: &str| tiny_run(&kernel.path(), &[option.as_ref(), "/dev/full".as_ref()]);
    let end = full("--json");
    end.expect_code(4);
    for words in ["exit code 3", "--json", "/dev/full", "No space left"] {
        assert!(end.stderr.contains(words), "{words}: {}", end.stderr);
    }
    let open = || OpenOptions::new().write(true).open("/dev/full").expect("it opens");
    let mut command = linux();
    command.stdin(Stdio::null()).stdout(open()).stderr(Stdio::piped());
    let end = process::finish(command.spawn().expect("it starts"), GUEST_LIMIT).expect("it ends");
    end.expect_code(14);
    assert!(end.stderr.contains("powered off"), "{}", end.stderr);
    assert!(end.stderr.contains("standard output: No space left"), "{}", end.stderr);
    let requests = kernel.file("requests", b"{\"request\":\"power_off\"}\n");
    let mut command = linux();
    command.args(["--report", "/dev/full", "--requests"]).arg(requests);
    let end = process::run(&mut command, GUEST_LIMIT);
    end.expect_code(14);
    assert!(end.stderr.contains("--report") && end.stderr.contains("No space"), "{}", end.stderr);
}

fn full_disk() {
    const RESULT: &[u8] = include_bytes!("../browser/sample.json");
    let disk = SmallDisk::new("64k");
    let files = TempDir::new().expect("a temporary directory");
    let (result, page) = (files.path().join("result"), disk.path().join("page"));
    fs::write(&result, RESULT).expect("a result");
    fs::write(&page, "the earlier page").expect("a page");
    let mut report = Command::new(nowait_bin());
    report.arg("report").arg(&result).arg("--html").arg(&page);
    process::run(&mut report, LIMIT).expect_refusal(4, &["--html", "No space left"]);
    assert_eq!(fs::read_to_string(&page).expect("it is there"), "the earlier page");
}

fn pipe_without_reader() {
    let kernel = tiny_kernel();
    let fifo = fifo(kernel.path().with_file_name("fifo"));
    for option in ["--json", "--report"] {
        tiny_run(&kernel.path(), &[OsStr::new(option), fifo.as_os_str()])
            .expect_refusal(4, &[option, "nobody reads"]);
    }
    let fifo_again = fifo.clone();
    let reader = thread::spawn(move || fs::read_to_string(fifo_again).expect("it is read"));
    thread::sleep(Duration::from_millis(500));
    tiny_run(&kernel.path(), &["--json".as_ref(), fifo.as_os_str()]).expect_code(TINY_CODE);
    assert!(reader.join().expect("it ends").contains("nowait.run/1"));
}

fn closed_descriptors() {
    let files = TempDir::new().expect("a temporary directory");
    let json = files.path().join("json");
    for closed in ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"] {
        let run = linux();
        let mut command = Command::new("sh");
        command.args(["-c", &format!("exec \"$@\" {closed}"), "sh"]).arg(run.get_program());
        command.args(run.get_args()).arg("--json").arg(&json);
        let end = process::run(&mut command, GUEST_LIMIT);
        end.expect_code(0);
        let text = fs::read_to_string(&json).expect("the outcome");
        assert!(text.starts_with('{') && text.contains("power_off"), "{closed}: {text}");
    }
}

fn reader_gone() {
    let (reader, writer) = io::pipe().expect("a pipe");
    drop(reader);
    let mut command = linux();
    command.stdin(Stdio::null()).stdout(writer).stderr(Stdio::piped());
    let child = command.spawn().expect("it starts");
    drop(command);
    let end = process::finish(child, GUEST_LIMIT).expect("it ends");
    end.expect_code(0);
    assert!(end.stderr.contains("standard output: Broken pipe"), "{}", end.stderr);
}

fn stuck_output() {
    let chatterbox = TestKernel::new(&[
        0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
        0xb0, b'x', //             mov al, 'x'
        0xee, //             next: out dx, al
        0xeb, 0xfd, //             jmp next
    ]);
    let mut command = tiny(&chatterbox.path());
    let (_reader, writer) = io::pipe().expect("a pipe");
    let errors = writer.try_clone().expect("a descriptor");
    command.stdin(File::open("/dev/zero").expect("it opens")).stdout(writer).stderr(errors);
    let child = command.spawn().expect("it starts");
    // The pipe is full by then: 64 KiB, each byte an exit.
    thread::sleep(Duration::from_secs(12));
    let pid = Pid::from_raw(child.id().cast_signed()).expect("a pid");
    kill_process(pid, Signal::TERM).expect("it runs");
    process::finish(child, Duration::from_secs(10)).expect("it ends in time").expect_code(16);
}

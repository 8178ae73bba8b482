//! Guests that have more memory than they may keep, with each store, each way of taking faults, and
//! stores that fail: whatever happens, no page holds anything but what was last written to it.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nowait_tests::guest::{End, Guest};
use nowait_tests::small_disk::SmallDisk;
use nowait_wire::agent::{Access, Kind, Pressure, Request, Workload};
use tempfile::TempDir;

use crate::Test;

pub(crate) const TESTS: &[Test] = &[
    ("pages_hold_their_bytes_with_host_memory_as_store", memory),
    ("pages_hold_their_bytes_compressed_before_host_memory", compressed_memory),
    ("pages_hold_their_bytes_compressed_before_a_file", compressed_file),
    ("pages_hold_their_bytes_in_a_file", file),
    ("a_guest_with_an_eighth_of_its_memory_gets_on", eighth),
    ("damaged_reads_are_tried_again", damaged_now_and_then),
    ("a_page_that_stays_damaged_ends_the_run", damaged_for_good),
];

/// Those that need `qemu-nbd`.
pub(crate) const NBD_TESTS: &[Test] = &[
    ("pages_hold_their_bytes_at_an_nbd_server", nbd),
    ("a_killed_nbd_server_may_come_back", nbd_killed),
];

/// Those that need root, for they mount a file system.
pub(crate) const ROOT_TESTS: &[Test] = &[("a_full_store_keeps_pages_in_memory", full)];

/// A guest of 64M that may keep a quarter.
const MEMORY: [&str; 4] = ["--memory", "64M", "--resident-limit", "16M"];
const LIMIT_BYTES: u64 = 16 << 20;
/// 20M, which do not fit.
const PAGES: u32 = 5120;

fn run(kind: Kind, access: Access, duration_ms: u32) -> Request {
    let pressure = Pressure::Limit { access, seed: 7 };
    Request::Run(Workload {
        kind,
        threads: 4,
        duration_ms,
        pages: PAGES,
        heartbeat_us: 10_000,
        pressure,
        ..Workload::IDLE
    })
}

/// A guest with a run of each kind.
fn guest(apf: &str, cpus: &str, store: &str) -> Guest {
    Guest::linux()
        .args(MEMORY)
        .args(["--apf", apf, "--cpus", cpus, "--store", store])
        .request(run(Kind::Copy, Access::Random, 600))
        .request(run(Kind::User, Access::Zipf, 600))
}

/// All runs are there, touched pages and found what they had to.
fn check(end: &End, runs: usize) {
    end.expect_code(0);
    let results = end.results();
    assert_eq!(results.len(), runs);
    for result in results {
        assert_eq!(result.data_errors, 0, "{result:?}");
        assert!(result.pages_touched > 0, "{result:?}");
    }
}

/// As [`check`], and pages came and went within the limit.
fn check_paged(end: &End, runs: usize) {
    check(end, runs);
    let came_back = end.number("/pager/fetched_pages") + end.number("/pager/hits_stored");
    assert!(came_back > 0 && end.number("/pager/evicted_pages") >= 2048, "{:#?}", end.json);
    let kept = end.number("/pager/resident_bytes") + end.number("/pager/store_memory_bytes");
    assert!(kept <= LIMIT_BYTES / 100 * 102, "{kept} bytes in memory at the end");
}

/// Every way of taking faults, with one and with two processors.
fn with_each_source(store: &str) -> Vec<End> {
    let mut guests = vec![("off", "2"), ("host", "1"), ("kernel", "2"), ("user", "2")];
    // `cargo xtask soak`.
    if std::env::var("NOWAIT_MATRIX").is_ok_and(|matrix| matrix == "full") {
        let cpus = ["1", "2", "4"];
        guests = ["off", "host", "kernel", "user"].map(|apf| cpus.map(|cpus| (apf, cpus))).concat();
    }
    let ends = guests.into_iter().map(|(apf, cpus)| {
        let end = guest(apf, cpus, store).run();
        check_paged(&end, 2);
        end
    });
    ends.collect()
}

/// Both tiers had something to do.
fn check_tiers(ends: &[End]) {
    for end in ends {
        // Behind the first one, which is for same-filled pages.
        for tier in ["/pager/tiers/1/writes", "/pager/tiers/2/writes"] {
            assert!(end.number(tier) > 0, "no {tier}");
        }
    }
}

fn memory() {
    with_each_source("memory");
}

fn compressed_memory() {
    check_tiers(&with_each_source("lz4=4M+memory"));
}

fn compressed_file() {
    let files = TempDir::new().expect("a temporary directory");
    check_tiers(&with_each_source(&format!("lz4=4M+file={}", files.path().display())));
}

fn file() {
    let files = TempDir::new().expect("a temporary directory");
    with_each_source(&format!("file={}", files.path().display()));
}

fn eighth() {
    for apf in ["off", "kernel", "user"] {
        let end = Guest::linux()
            .args(["--memory", "64M", "--resident-limit", "8M", "--apf", apf])
            .request(run(Kind::User, Access::Zipf, 600))
            .run();
        check_paged(&end, 1);
    }
}

fn damaged_now_and_then() {
    let end = guest("kernel", "1", "fail=read:rate=0.02,kind=corrupt+memory").run();
    check_paged(&end, 2);
    assert!(end.number("/pager/read_errors") > 0);
}

fn damaged_for_good() {
    for apf in ["off", "host", "kernel", "user"] {
        let end = guest(apf, "1", "fail=read:rate=1,kind=corrupt+memory").run();
        end.expect_code(14);
        for word in ["guest frame 0x", "checksum"] {
            assert!(end.stderr.contains(word), "'{word}' is not in\n{}", end.stderr);
        }
        assert!(end.results().iter().all(|result| result.data_errors == 0));
    }
}

/// A `qemu-nbd` that serves a file; killed in the end.
struct Server {
    files: TempDir,
    child: Child,
}

impl Server {
    fn start() -> Self {
        let files = TempDir::new().expect("a temporary directory");
        let disk = fs::File::create(files.path().join("disk")).expect("a file for the disk");
        disk.set_len(256 << 20).expect("a disk of 256M");
        let child = serve(files.path());
        Self { files, child }
    }

    fn store(&self) -> String {
        format!("nbd+unix:///?socket={}", self.files.path().join("socket").display())
    }

    /// What the disk holds, in bytes.
    fn disk_bytes(files: &Path) -> u64 {
        fs::metadata(files.join("disk")).map_or(0, |disk| disk.blocks() * 512)
    }

    /// SIGKILL.
    fn kill(&mut self) {
        self.child.kill().expect("the server runs");
        self.child.wait().expect("a child can be waited for");
        let _ = fs::remove_file(self.files.path().join("socket"));
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Starts the server, and waits until it listens.
fn serve(files: &Path) -> Child {
    let socket: PathBuf = files.join("socket");
    let child = Command::new("qemu-nbd")
        .args(["--format", "raw", "--persistent", "--shared", "8", "--socket"])
        .arg(&socket)
        .arg(files.join("disk"))
        .stdin(Stdio::null())
        .spawn()
        .expect("qemu-nbd starts");
    let deadline = Instant::now() + Duration::from_secs(60);
    while !socket.exists() {
        assert!(Instant::now() < deadline, "qemu-nbd does not listen");
        thread::sleep(Duration::from_millis(20));
    }
    child
}

fn nbd() {
    let server = Server::start();
    with_each_source(&server.store());
}

fn nbd_killed() {
    for apf in ["off", "kernel", "user"] {
        let mut server = Server::start();
        let guest = Guest::linux()
            .args(MEMORY)
            .args(["--apf", apf, "--store", &server.store()])
            .request(run(Kind::Copy, Access::Random, 4000))
            .run_beside(|| {
                // The guest's buffer is being filled, or more.
                let deadline = Instant::now() + Duration::from_secs(60);
                while Server::disk_bytes(server.files.path()) < 4 << 20 {
                    assert!(Instant::now() < deadline, "nothing is written to the server");
                    thread::sleep(Duration::from_millis(20));
                }
                server.kill();
                thread::sleep(Duration::from_secs(2));
                server.child = serve(server.files.path());
            });
        check(&guest, 1);
        assert!(guest.number("/pager/fetched_pages") > 0);
    }
}

fn full() {
    let disk = SmallDisk::new("6M");
    let end = guest("kernel", "1", &format!("file={}", disk.path().display())).run();
    check(&end, 2);
    assert!(end.number("/pager/write_errors") > 0);
    assert!(end.stderr.contains("the resident limit may be exceeded"), "{}", end.stderr);
    assert!(end.number("/pager/resident_bytes") > LIMIT_BYTES);
}

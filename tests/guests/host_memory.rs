//! A host whose memory fails: there is none for a while, or what there is has an error.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use nowait_tests::cgroup::Cgroup;
use nowait_tests::control;
use nowait_tests::guest::{End, Guest};
use nowait_wire::agent::{Access, Kind, Pressure, Request, Workload};
use tempfile::TempDir;

use crate::Test;

pub(crate) const SHORTAGE_TESTS: &[Test] = &[("a_guest_waits_for_memory_of_the_host", shortage)];

pub(crate) const ERROR_TESTS: &[Test] = &[("a_memory_error_ends_the_run_with_its_frame", error)];

/// Takes a page out of use, by its physical address, as after an error that cannot be corrected.
const OFFLINE: &str = "/sys/devices/system/memory/hard_offline_page";
/// How long a guest may take to come where something is done to it.
const LIMIT: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_millis(100);
/// How much less than it has a process may have, so that it gets nothing.
const TOO_LITTLE_BYTES: u64 = 2 << 20;
/// How long there is no memory: on a slow machine the kernel may spend the shorter time on its own
/// allocations for the vCPU, which it reports at length and then grants.
const SHORTAGES: [Duration; 2] = [Duration::from_secs(6), Duration::from_secs(20)];
const PAGE_BYTES: u64 = 4096;
/// The guest's buffer: 32M of 96M.
pub(crate) const PAGES: u32 = 8192;
/// Of the guest that waits for memory: 56M. It has one fault for each page, so that filling it takes longer
/// than a test needs to look.
const MORE_PAGES: u32 = 14_336;
/// Pages that are touched when memory ends: what the loader wrote, a bit more, and nothing of the buffer.
const BOOTING: u64 = 4000;
/// Pages that are taken until the guest has met one.
const MOST_ERRORS: usize = 40;

/// Why memory errors cannot be made here, if so.
pub(crate) fn missing() -> Option<&'static str> {
    if std::env::var("NOWAIT_ACCEL").is_ok_and(|accel| accel != "nested") {
        return Some("it takes memory out of use for good: in the nested machine only");
    }
    (!Path::new(OFFLINE).exists())
        .then_some("this kernel cannot take pages out of use (CONFIG_MEMORY_FAILURE)")
}

/// A guest that touches its buffer for so long, while something is done to it: called with the control
/// socket when so many of its pages have been touched.
pub(crate) fn guest_beside(
    cgroup: &Cgroup,
    args: &[&str],
    (kind, pages, duration_ms): (Kind, u32, u32),
    touched: u64,
    act: impl FnOnce(&Path),
) -> End {
    let files = TempDir::new().expect("a temporary directory");
    let socket = files.path().join("control");
    let workload = Workload {
        kind,
        threads: 4,
        duration_ms,
        pages,
        heartbeat_us: 10_000,
        pressure: Pressure::Limit { access: Access::Random, seed: 3 },
        ..Workload::IDLE
    };
    Guest::linux()
        .args(["--memory", "96M", "--control"])
        .args([&socket])
        .args(args)
        .within(cgroup)
        .request(Request::Run(workload))
        .run_beside(|| {
            let started = Instant::now();
            loop {
                let answer = control::ask(&socket, "GET /metrics", "").ok();
                let pages = answer.and_then(|a| a.metric("nowait_pages_touched_total"));
                if pages.is_some_and(|pages| pages >= touched as f64) {
                    break;
                }
                assert!(started.elapsed() < LIMIT, "{pages:?} pages touched");
                thread::sleep(PAUSE / 10);
            }
            act(&socket);
        })
}

fn shortage() {
    for apf in ["off", "host", "kernel"] {
        assert!(SHORTAGES.iter().any(|time| waits_in_a_shortage(apf, *time) > 0), "--apf {apf}");
    }
}

/// How often the pager waited for memory while the host had none for it.
fn waits_in_a_shortage(apf: &str, time: Duration) -> u64 {
    let cgroup = Cgroup::new("nowait-shortage");
    let args = ["--apf", apf, "--fault-around", "4K"];
    let end = guest_beside(&cgroup, &args, (Kind::User, MORE_PAGES, 500), BOOTING, |_| {
        // What the kernel keeps for the process counts, too: sockets may fail, and nobody asks for
        // metrics meanwhile.
        let less = cgroup.number("memory.current") - TOO_LITTLE_BYTES;
        cgroup.set("memory.max", &less.to_string()).expect("a limit");
        thread::sleep(time);
        cgroup.set("memory.max", "max").expect("no limit");
    });
    end.expect_code(0);
    let results = end.results();
    assert_eq!(results.len(), 1);
    assert_eq!(results[0].data_errors, 0, "{results:?}");
    let waits = end.number("/pager/memory_waits");
    // Where even starting a thread takes the kernel seconds, the time may be over before the guest is
    // paused; guest-memory/tests/want_of_memory.rs is where that is certain.
    let paused = end.stderr.contains("paused until the host has memory for it again");
    println!("--apf {apf}: {waits} waits for memory in {time:?}; paused: {paused}");
    assert_eq!(paused, end.stderr.contains("the host has memory again"), "{}", end.stderr);
    waits
}

fn error() {
    for (apf, early) in [("off", "0"), ("host", "0"), ("kernel", "0"), ("off", "1")] {
        // With 1, the process hears of an error before it runs into it.
        fs::write("/proc/sys/vm/memory_failure_early_kill", early).expect("a setting");
        let cgroup = Cgroup::new("nowait-error");
        let mut taken = 0;
        let args = ["--apf", apf, "--fault-around", "16K"];
        let end = guest_beside(&cgroup, &args, (Kind::User, PAGES, 30_000), 10_000, |socket| {
            let pid = cgroup.process("nowait").expect("it runs");
            let pages = ram_pages(pid);
            println!("--apf {apf}: {} pages of guest RAM are mapped", pages.len());
            // From the middle on: most is the buffer.
            for page in pages.iter().skip(pages.len() / 2).step_by(7).take(MOST_ERRORS) {
                if control::ask(socket, "GET /metrics", "").is_err() {
                    break;
                }
                taken += 1;
                fs::write(OFFLINE, format!("{:#x}", page * PAGE_BYTES)).expect("it can be taken");
                thread::sleep(2 * PAUSE);
            }
        });
        println!("--apf {apf}: {taken} pages taken; {}", end.stderr.lines().last().unwrap_or(""));
        end.expect_code(14);
        for words in ["guest frame 0x", "memory error of the host"] {
            assert!(end.stderr.contains(words), "'{words}' is not in\n{}", end.stderr);
        }
    }
    fs::write("/proc/sys/vm/memory_failure_early_kill", "0").expect("a setting");
}

/// The host's frames that are mapped in the larger part of a process's guest RAM.
fn ram_pages(pid: u32) -> Vec<u64> {
    const PRESENT: u64 = 1 << 63;
    const FRAME: u64 = (1 << 55) - 1;
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).expect("its mappings");
    let pagemap = File::open(format!("/proc/{pid}/pagemap")).expect("its page map");
    let frames = |range: &str| -> Vec<u64> {
        let (from, to) = range.split_once('-').expect("a range");
        let address = |text| u64::from_str_radix(text, 16).expect("an address") / PAGE_BYTES;
        (address(from)..address(to))
            .filter_map(|page| {
                let mut entry = [0; 8];
                pagemap.read_exact_at(&mut entry, page * 8).ok()?;
                let entry = u64::from_ne_bytes(entry);
                (entry & PRESENT != 0).then_some(entry & FRAME)
            })
            .collect()
    };
    let ram = maps.lines().filter(|line| line.contains("memfd:nowait-ram"));
    let mapped = ram.map(|line| frames(line.split(' ').next().expect("a range")));
    mapped.max_by_key(Vec::len).expect("guest RAM is mapped")
}

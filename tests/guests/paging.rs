//! RAM is absent until it is touched, goes away when evicted, and comes back as it was.

use nowait_tests::guest::{End, Guest};
use nowait_wire::agent::Kind;

use crate::Test;

pub(crate) const TESTS: &[Test] = &[
    ("nothing_is_present_but_what_the_loader_wrote", absent_at_start),
    ("populate_makes_all_ram_present", populate),
    ("fault_around_brings_neighbours", fault_around),
    ("fault_around_fills_kvms_page_tables", mapped_ahead),
    ("evicted_pages_come_back_as_they_were", evicted_pages),
    ("a_slow_store_does_not_stop_other_threads", slow_store),
    ("pages_are_evicted_again_and_again", again_and_again),
];

const PAGES: u32 = 256;

fn absent_at_start() {
    let end = Guest::linux().args(["--cmdline", "nowait.agent=poweroff", "--memory", "1G"]).run();
    end.expect_code(0);
    assert!(end.number("/pager/resident_bytes") < 96 << 20);
    assert_eq!(end.number("/pager/total_bytes"), 1 << 30);
    assert!(end.stderr.contains("ever touched"), "{}", end.stderr);
}

fn populate() {
    let end = Guest::linux().args(["--cmdline", "nowait.agent=poweroff", "--populate"]).run();
    end.expect_code(0);
    assert_eq!(end.number("/pager/resident_bytes"), 128 << 20);
    assert_eq!(end.number("/pager/messages_missing"), 0);
}

fn fault_around() {
    let missing = |size: &str| {
        let end = Guest::linux()
            .args(["--cmdline", "nowait.agent=poweroff", "--fault-around", size])
            .run();
        end.expect_code(0);
        // However they came: by messages, or by markers.
        (end.number("/pager/zero_faults"), end.number("/pager/fault_around_pages"))
    };
    let ((alone, no_neighbours), (with, neighbours)) = (missing("4K"), missing("64K"));
    assert_eq!(no_neighbours, 0);
    assert!(neighbours > 0 && with * 3 < alone, "{with} faults with fault-around, {alone} without");
}

fn mapped_ahead() {
    let end = Guest::linux().args(["--cmdline", "nowait.agent=poweroff"]).run();
    end.expect_code(0);
    let json = end.json.as_ref().expect("the run's outcome");
    // Absent where KVM cannot do it; doctor's row `kvm.cap.pre_fault_memory` says so there.
    if json["pages_mapped_ahead"].is_null() {
        assert!(!linux_is_at_least(6, 11), "this KVM can do it");
        return;
    }
    let known = end.number("/pager/pages_loaded") + end.number("/pager/fault_around_pages");
    let ahead = end.number("/pages_mapped_ahead");
    assert!(ahead * 2 > known, "{ahead} of {known} pages mapped ahead");
}

/// Does the kernel below have at least this version?
fn linux_is_at_least(major: u32, minor: u32) -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release.split(['.', '-']).map_while(|word| word.trim().parse::<u32>().ok());
    (numbers.next(), numbers.next()) >= (Some(major), Some(minor))
}

fn check(end: &End, runs: usize) {
    end.expect_code(0);
    let results = end.results();
    assert_eq!(results.len(), runs);
    for result in results {
        assert_eq!(result.data_errors, 0, "{result:?}");
        assert_eq!(result.pages_touched, u64::from(PAGES), "{result:?}");
        for heartbeat in &result.heartbeats {
            assert!(heartbeat.deadlines > 0, "{heartbeat:?}");
        }
    }
    let wanted = u64::from(PAGES) * runs as u64;
    assert!(end.number("/pager/evicted_pages") >= wanted);
    assert!(end.number("/pager/fetched_pages") >= wanted);
}

fn evicted_pages() {
    for (apf, cpus) in
        [("off", "1"), ("host", "1"), ("kernel", "1"), ("off", "2"), ("host", "2"), ("kernel", "2")]
    {
        let end = Guest::linux()
            .args(["--apf", apf, "--cpus", cpus])
            .workload(Kind::User, 1, PAGES)
            .workload(Kind::User, 8, PAGES)
            .workload(Kind::Copy, 1, PAGES)
            .workload(Kind::Copy, 8, PAGES)
            .run();
        check(&end, 4);
    }
}

fn slow_store() {
    for apf in ["host", "kernel"] {
        let end = Guest::linux()
            .args(["--apf", apf, "--store", "delay=20ms"])
            .workload(Kind::User, 8, PAGES)
            .run();
        check(&end, 1);
        // Eight threads, eight pages on their way: counted, not timed.
        let most = end.number("/pager/outstanding_max");
        assert!(most >= 4, "at most {most} fetches at once with --apf {apf}");
    }
}

fn again_and_again() {
    let mut guest = Guest::linux().args(["--cpus", "2", "--apf", "kernel"]);
    for _ in 0..10 {
        guest = guest.workload(Kind::User, 8, PAGES);
    }
    check(&guest.run(), 10);
}

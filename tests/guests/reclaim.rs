//! A host that swaps guest pages out: it takes mapped pages out of the guest mapping behind the pager's
//! back, and the next access of each is a minor event.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use nowait_tests::cgroup::Cgroup;
use nowait_tests::control;
use nowait_tests::guest::End;
use nowait_wire::agent::Kind;

use crate::Test;
use crate::host_memory::{PAGES, guest_beside};

pub(crate) const TESTS: &[Test] = &[
    ("pages_hold_their_bytes_when_the_host_swaps_them_out", swapped),
    ("a_limit_and_the_hosts_own_reclaim_go_together", limited_and_swapped),
];

/// What the host is asked to take at a time.
const RECLAIM: &str = "1M";
/// The pause between.
const PAUSE: Duration = Duration::from_millis(300);
/// How long an answer of the control socket may take meanwhile.
const ANSWER_LIMIT: Duration = Duration::from_millis(500);
/// Pages that the guest has touched when it begins.
const TOUCHED: u64 = 11_000;
const DURATION_MS: u32 = 2000;

/// Why the host cannot swap here, if so.
pub(crate) fn missing() -> Option<&'static str> {
    match (has_swap(), is_nested(), Path::new(ZRAM).exists()) {
        (true, ..) | (false, true, true) => None,
        (false, true, false) => Some("the nested machine has no zram"),
        (false, false, _) => Some("this host has no swap"),
    }
}

fn has_swap() -> bool {
    fs::read_to_string("/proc/swaps").is_ok_and(|list| list.lines().count() > 1)
}

fn is_nested() -> bool {
    std::env::var("NOWAIT_ACCEL").is_ok_and(|accel| accel == "nested")
}

const ZRAM: &str = "/sys/block/zram0";

/// The host's swap; in the nested machine, which is ours, one that is made and goes with this value.
struct Swap {
    is_ours: bool,
}

impl Swap {
    fn on() -> Self {
        if has_swap() {
            return Self { is_ours: false };
        }
        fs::write(format!("{ZRAM}/disksize"), "256M").expect("zram is not in use");
        run("mkswap", &["/dev/zram0"]);
        run("swapon", &["/dev/zram0"]);
        Self { is_ours: true }
    }
}

impl Drop for Swap {
    fn drop(&mut self) {
        if self.is_ours {
            run("swapoff", &["/dev/zram0"]);
            let _ = fs::write(format!("{ZRAM}/reset"), "1");
        }
    }
}

fn run(program: &str, arguments: &[&str]) {
    let status = Command::new(program).args(arguments).status();
    assert!(status.expect("it starts").success(), "{program} {arguments:?}");
}

/// A guest whose host takes pages all the time; how much was swapped out at once, in bytes.
fn guest_with_reclaim(kind: Kind, args: &[&str]) -> (End, u64) {
    let cgroup = Cgroup::new("nowait-reclaim");
    let (mut swapped, mut times) = (0, Vec::new());
    // From when it has filled its buffer, nearly, to the end.
    let all = [args, &["--fault-around", "16K"]].concat();
    let end = guest_beside(&cgroup, &all, (kind, PAGES, DURATION_MS), TOUCHED, |socket| {
        while let Ok(answer) = control::ask(socket, "GET /metrics", "") {
            times.push(answer.took);
            // It takes what it gets.
            let _ = cgroup.set("memory.reclaim", RECLAIM);
            swapped = swapped.max(cgroup.number("memory.swap.current"));
            thread::sleep(PAUSE);
        }
    });
    times.sort_unstable();
    let (median, most) = (times[times.len() / 2], times[times.len() - 1]);
    println!(
        "{args:?}: {swapped} bytes swapped out at most; {} minor events, {} mapped anew; metrics took \
         {median:?} at the median, {most:?} at most",
        end.number("/pager/messages_minor"),
        end.number("/pager/remapped_pages"),
    );
    end.expect_code(0);
    let results = end.results();
    assert_eq!(results.len(), 1);
    assert_eq!(results[0].data_errors, 0, "{results:?}");
    assert!(results[0].pages_touched > 0, "{results:?}");
    assert!(most < ANSWER_LIMIT, "{times:?}");
    (end, swapped)
}

fn swapped() {
    let _swap = Swap::on();
    for (apf, cpus, kind) in
        [("off", "2", Kind::User), ("host", "1", Kind::Copy), ("kernel", "2", Kind::Copy)]
    {
        let (end, swapped) = guest_with_reclaim(kind, &["--apf", apf, "--cpus", cpus]);
        assert!(swapped > 1 << 20, "{swapped} bytes swapped out");
        let (minor, anew) =
            (end.number("/pager/messages_minor"), end.number("/pager/remapped_pages"));
        assert!(minor >= 100 && anew >= 100, "{minor} minor events, {anew} mapped anew");
        // Nothing else takes pages here.
        assert_eq!(end.number("/pager/evicted_pages"), 0);
    }
}

/// Idle pages are swapped out, too, and stored pages are read from where the host put them.
fn limited_and_swapped() {
    let _swap = Swap::on();
    for apf in ["off", "kernel", "user"] {
        let args = ["--apf", apf, "--resident-limit", "28M", "--store", "lz4=4M+memory"];
        let (end, _) = guest_with_reclaim(Kind::Copy, &args);
        // With markers only pages that were idle when the host took them are counted.
        assert!(end.number("/pager/remapped_pages") >= 20);
        assert!(end.number("/pager/evicted_pages") >= 1000);
        assert!(end.number("/pager/fetched_pages") + end.number("/pager/hits_stored") > 0);
    }
}

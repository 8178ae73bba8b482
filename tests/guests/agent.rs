//! What the guest agent cannot do comes back as a report, and it goes on.

use nowait_tests::guest::{End, Guest};
use nowait_wire::agent::{Kind, Report, Request, Workload};

use crate::Test;

pub(crate) const TESTS: &[Test] = &[
    ("wrong_workloads_are_answered_by_name", wrong_workloads),
    ("a_guest_out_of_memory_answers", out_of_memory),
    ("a_heartbeat_faster_than_the_guest_ends", fast_heartbeat),
    ("commands_that_go_wrong_are_answered", commands),
    ("a_guest_that_leaves_before_its_answer_is_a_failure", leaves_early),
];

fn good() -> Workload {
    Workload { kind: Kind::User, threads: 1, duration_ms: 100, pages: 16, ..Workload::IDLE }
}

fn errors(end: &End) -> Vec<&str> {
    end.reports
        .iter()
        .filter_map(|report| match report {
            Report::Error { message } => Some(message.as_str()),
            _ => None,
        })
        .collect()
}

fn wrong_workloads() {
    let cases = [
        (Workload { threads: 0, ..good() }, "threads"),
        (Workload { threads: 1000, ..good() }, "threads"),
        (Workload { pages: 0, ..good() }, "pages"),
        (Workload { pages: u32::MAX, ..good() }, "pages"),
        (Workload { duration_ms: u32::MAX, ..good() }, "duration_ms"),
        (Workload { heartbeat_us: 0, ..good() }, "heartbeat_us"),
        (Workload { kind: Kind::Idle, ..good() }, "threads of an idle run"),
        (Workload { kind: Kind::Command, ..good() }, "threads beside a command"),
        (Workload { warm_up_ms: 1, ..good() }, "warm_up_ms"),
        (Workload { write_percent: 1, ..good() }, "write_percent"),
    ];
    let mut guest = Guest::linux();
    for (workload, _) in &cases {
        guest = guest.request(Request::Run(workload.clone()));
    }
    let end = guest.exec("echo alive").run();
    end.expect_code(0);
    let errors = errors(&end);
    assert_eq!(errors.len(), cases.len(), "{errors:?}");
    for (error, (_, word)) in errors.iter().zip(&cases) {
        assert!(error.contains(word), "{word}: {error}");
    }
    assert_eq!(end.exec_output(0).trim(), "alive");
}

fn out_of_memory() {
    let end = Guest::linux()
        .args(["--memory", "64M"])
        .request(Request::Run(Workload { pages: 65_536, ..good() }))
        // busybox keeps a line whole: it grows until the kernel kills it.
        .exec("tail -n 1 /dev/zero; echo killed=$?")
        .exec("echo alive")
        .run();
    end.expect_code(0);
    assert!(errors(&end)[0].contains("KiB of guest memory"), "{:?}", errors(&end));
    assert!(end.exec_output(0).contains("killed=137"), "{}", end.exec_output(0));
    assert_eq!(end.exec_output(1).trim(), "alive");
}

fn fast_heartbeat() {
    let workload = Workload { heartbeat_us: 100, threads: 2, duration_ms: 500, ..good() };
    let end = Guest::linux()
        .args(["--cpus", "2"])
        .request(Request::Run(workload))
        .exec("echo alive")
        .run();
    end.expect_code(0);
    assert_eq!(end.exec_output(0).trim(), "alive");
}

fn commands() {
    let end = Guest::linux()
        .exec("no-such-command; true")
        .exec("sleep 1000 & echo left")
        .exec("head -c 1000000 /dev/zero | tr '\\0' x")
        .run();
    end.expect_code(0);
    assert!(end.exec_output(0).contains("not found"), "{}", end.exec_output(0));
    assert_eq!(end.exec_output(1).trim(), "left");
    assert!(end.exec_output(2).len() > 1000);
}

fn leaves_early() {
    let end = Guest::linux().exec("poweroff -f").exec("echo never").run();
    end.expect_code(14);
    assert!(end.stderr.contains("2 requests to its agent unanswered"), "{}", end.stderr);
    assert_eq!(end.number("/requests_unanswered"), 2);
}

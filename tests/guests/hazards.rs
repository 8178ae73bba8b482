//! What markers do to KVM's own accesses to guest memory, one by one, with the bare-metal test kernel
//! (images/test-kernel), which evicts what it is about to use.

use nowait_tests::guest::{End, Guest};
use nowait_tests::test_kernel;

use crate::Test;

pub(crate) const TESTS: &[Test] = &[
    ("the_test_kernel_itself_works", kernel),
    ("kvms_own_areas_stay_in_memory_and_only_while_they_are_areas", areas),
    ("pages_may_go_at_any_time", markers),
];

/// The exit code of a guest that wrote 0 to the debug-exit port.
const PASSED: i32 = 1;

/// Runs tests of the test kernel, and expects them all to pass.
fn pass(tests: &str, args: &[&str]) -> End {
    let end = Guest::kernel(&test_kernel())
        .args(["--debug-exit", "--memory", "64M", "--cpus", "2"])
        .args(["--cmdline", &format!("test={tests}")])
        .args(args)
        .run();
    print!("{}", end.stdout);
    end.expect_code(PASSED);
    for test in tests.split(',') {
        let line = format!("ok {test}");
        assert!(end.stdout.lines().any(|l| l == line), "no '{line}' in\n{}", end.stdout);
    }
    end
}

fn kernel() {
    for apf in ["off", "host", "kernel"] {
        pass("msr,interrupt,page-fault,user,evict,processors", &["--apf", apf]);
    }
}

fn areas() {
    pass("clock,steal-time,pv-eoi,areas-move,areas-refused", &["--apf", "off"]);
}

fn markers() {
    pass("first-touch,thrash", &["--apf", "off"]);
}

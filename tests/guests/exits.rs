//! Every way in which a guest ends has its exit code.

use nowait_tests::guest::Guest;

use crate::Test;
use crate::kernels::{TestKernel, debug_exit};

pub(crate) const TESTS: &[Test] = &[
    ("power_off_is_0", || linux("nowait.agent=poweroff", 0, "power_off")),
    ("reboot_is_8", || linux("nowait.agent=reboot", 8, "reset")),
    ("triple_fault_is_10", || linux("nowait.agent=reboot reboot=t", 10, "triple_fault")),
    ("panic_is_12", || linux("nowait.agent=panic", 12, "panic")),
    ("no_init_is_a_panic", no_init),
    ("debug_exit_is_odd", debug_exit_codes),
    ("debug_exit_is_off_unless_asked_for", debug_exit_off),
    ("time_out_is_14", time_out),
];

fn linux(cmdline: &str, code: i32, reason: &str) {
    let end = Guest::linux().args(["--cmdline", cmdline]).run();
    end.expect_code(code);
    let json = end.json.as_ref().expect("the run wrote its JSON");
    assert_eq!(json["exit"]["reason"], reason);
    assert_eq!(json["exit"]["code"], code);
    assert_eq!(json["schema"], "nowait.run/1");
}

fn no_init() {
    let end = Guest::kernel(&nowait_tests::vmlinux()).run();
    end.expect_code(12);
}

fn debug_exit_codes() {
    for value in [0, 0x10, 0x7f] {
        let kernel = TestKernel::new(&debug_exit(value));
        let end = Guest::kernel(&kernel.path()).args(["--debug-exit", "--memory", "8M"]).run();
        end.expect_code((i32::from(value) << 1) | 1);
    }
}

fn debug_exit_off() {
    let kernel = TestKernel::new(&debug_exit(1));
    let end = Guest::kernel(&kernel.path()).args(["--memory", "8M", "--timeout", "2"]).run();
    end.expect_code(14);
}

fn time_out() {
    let end = Guest::linux().args(["--cmdline", "nowait.agent=serve", "--timeout", "1"]).run();
    end.expect_code(14);
    assert!(end.stderr.contains("--timeout"), "{}", end.stderr);
}

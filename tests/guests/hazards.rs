//! What markers do to KVM's own accesses to guest memory, one by one, with the bare-metal test kernel
//! (images/test-kernel), which evicts what it is about to use.

use nowait_tests::guest::{End, Guest};
use nowait_tests::test_kernel;

use crate::Test;

pub(crate) const TESTS: &[Test] = &[
    ("the_test_kernel_itself_works", kernel),
    ("kvms_own_areas_stay_in_memory_and_only_while_they_are_areas", areas),
    ("pages_may_go_at_any_time", markers),
    ("string_input_loses_no_byte_and_makes_no_false_page_fault", string_input),
    ("string_output_sends_the_right_bytes", string_output),
    ("string_io_beside_eviction_moves_the_right_bytes", string_io_beside_eviction),
    ("moves_between_ram_and_a_device_of_ours_make_no_false_page_fault", device),
    ("moves_between_ram_and_a_device_of_kvms_have_the_right_bytes", device_in_kvm),
];

/// The exit code of a guest that wrote 0 to the debug-exit port.
const PASSED: i32 = 1;

/// Runs tests of the test kernel, and expects them all to pass.
pub(crate) fn pass(tests: &str, args: &[&str]) -> End {
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

/// One line of measurements.
struct Measured<'a>(&'a str);

impl Measured<'_> {
    /// The value of one key.
    fn value(&self, key: &str) -> &str {
        let found = self.0.split_whitespace().find_map(|word| {
            let (name, value) = word.split_once('=')?;
            (name == key).then_some(value)
        });
        found.unwrap_or_else(|| panic!("no {key} in '{}'", self.0))
    }

    fn false_faults(&self) -> u64 {
        self.value("false-faults").parse().expect("a number")
    }
}

/// The measurements that a run printed.
fn measured(end: &End) -> Vec<Measured<'_>> {
    let lines: Vec<_> =
        end.stdout.lines().filter(|line| line.starts_with("measured:")).map(Measured).collect();
    assert!(!lines.is_empty(), "{}", end.stdout);
    lines
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

/// With nothing held back for it, 16 of 16 bytes were wrong in every try whose page table was evicted.
fn string_input() {
    let end = pass("rep-ins", &["--apf", "off"]);
    for line in measured(&end) {
        assert_eq!(line.false_faults(), 0, "{}", line.0);
    }
}

/// A page table of the operand that was evicted alone, right before, cannot be seen to be wanted: the
/// first byte's access makes a false page fault then. Whatever else is evicted makes none.
fn string_output() {
    let end = pass("rep-outs", &["--apf", "off"]);
    for line in measured(&end) {
        let (evicted, operands) = (line.value("evicted"), line.value("operands"));
        let most = match (evicted, operands) {
            ("Nothing" | "Operand", _) => 0,
            // The first try may; from then on the operand's table is kept.
            (_, "1") => 1,
            ("Everything", _) => 2,
            _ => continue,
        };
        assert!(line.false_faults() <= most, "{}", line.0);
    }
}

fn string_io_beside_eviction() {
    pass("rep-beside-eviction", &["--apf", "off"]);
}

fn device() {
    let end = pass("mmio-nothing", &["--apf", "off"]);
    for line in measured(&end) {
        assert_eq!(line.false_faults(), 0, "{}", line.0);
    }
}

/// KVM's own devices are reached without an exit, so that nobody can look before: what is moved from one
/// to RAM may make a false page fault.
fn device_in_kvm() {
    let end = pass("mmio-apic", &["--apf", "off"]);
    for line in measured(&end).iter().filter(|line| !line.0.contains("movs-from-apic")) {
        assert_eq!(line.false_faults(), 0, "{}", line.0);
    }
}

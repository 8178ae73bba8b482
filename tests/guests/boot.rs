//! Guests of every kind come up, and their RAM comes with them.

use std::time::Duration;

use nowait_tests::guest::Guest;
use nowait_tests::{image, initramfs};
use nowait_wire::agent::Kind;

use crate::Test;
use crate::kernels::{TestKernel, show_boot_information};

pub(crate) const TESTS: &[Test] = &[
    ("a_vmlinux_boots_by_pvh", vmlinux),
    ("a_distribution_bzimage_boots_by_the_64_bit_protocol", bzimage),
    ("a_multiboot_kernel_gets_command_line_and_module", multiboot),
    ("every_processor_comes_up", processors),
    ("ram_beyond_the_hole_is_there", beyond_the_hole),
    ("more_ram_than_the_host_has_is_fine", overcommitted),
    ("the_guest_knows_its_hypervisor", hypervisor),
    ("apf_host_hides_the_protocol_and_kernel_shows_it", protocol),
];

fn vmlinux() {
    let end = Guest::linux().exec("uname -s").run();
    end.expect_code(0);
    assert_eq!(end.exec_output(0).trim(), "Linux");
    let (touched, loaded) = (end.number("/pager/pages_touched"), end.number("/pager/pages_loaded"));
    assert!(loaded > 0 && loaded < touched, "{loaded} loaded, {touched} touched");
    assert!(touched < 128 << 8, "not all of 128 MiB: {touched}");
    assert!(end.number("/pager/messages_missing") > 0);
}

fn bzimage() {
    let end = Guest::kernel(&image("debian-vmlinuz"))
        .args(["--initrd".as_ref(), initramfs().as_os_str()])
        .args(["--memory", "256M", "--cmdline", "quiet"])
        .exec("uname -r")
        .limit(Duration::from_secs(240))
        .run();
    end.expect_code(0);
    assert!(!end.exec_output(0).trim().is_empty());
}

fn multiboot() {
    let kernel = TestKernel::new(&show_boot_information());
    let module = kernel.file("module", b"\x15 and more");
    let end = Guest::kernel(&kernel.path())
        .args(["--initrd".as_ref(), module.as_os_str()])
        .args(["--cmdline", "hello multiboot", "--debug-exit", "--memory", "16M"])
        .run();
    end.expect_code((0x15 << 1) | 1);
    assert!(end.stdout.starts_with("hello multiboot"), "{}", end.stdout);
}

fn processors() {
    for cpus in ["2", "5", "16"] {
        let end = Guest::linux().args(["--cpus", cpus]).exec("nproc").run();
        end.expect_code(0);
        assert_eq!(end.exec_output(0).trim(), cpus);
    }
}

fn memory_kib(memory: &str) -> u64 {
    let end = Guest::linux().args(["--memory", memory]).exec("grep MemTotal /proc/meminfo").run();
    end.expect_code(0);
    let line = end.exec_output(0);
    line.split_whitespace().nth(1).and_then(|n| n.parse().ok()).expect("MemTotal: N kB")
}

fn beyond_the_hole() {
    let kib = memory_kib("4G");
    assert!(kib > (3 << 20) + (900 << 10), "{kib} KiB of 4 GiB");
}

fn overcommitted() {
    let meminfo = std::fs::read_to_string("/proc/meminfo").expect("/proc/meminfo");
    let host: u64 = meminfo
        .split_whitespace()
        .nth(1)
        .and_then(|n| n.parse().ok())
        .expect("MemTotal comes first");
    // The page descriptors of the guest cost 1/64 of its RAM: half as much again is cheap.
    let gib = ((host * 3 / 2) >> 20).max(4);
    let kib = memory_kib(&format!("{gib}G"));
    assert!(kib > host, "{kib} KiB of {gib} GiB on a host with {host} KiB");
}

fn hypervisor() {
    let end = Guest::linux().exec("dmesg | grep -c 'Hypervisor detected: KVM'").run();
    end.expect_code(0);
    assert_eq!(end.exec_output(0).trim(), "1");
}

fn protocol() {
    for (apf, uses_it) in [("host", false), ("kernel", true)] {
        let end = Guest::linux()
            .args(["--apf", apf, "--store", "delay=5ms"])
            .workload(Kind::User, 8, 64)
            .exec("grep HYP /proc/interrupts || true")
            .run();
        end.expect_code(0);
        // Page-ready interrupts: "HYP:  count of CPU 0  Hypervisor callback interrupts".
        let count =
            end.exec_output(0).split_whitespace().nth(1).map_or(0, |n| n.parse().unwrap_or(0));
        assert_eq!(count > 0, uses_it, "--apf {apf}: {}", end.exec_output(0));
    }
}

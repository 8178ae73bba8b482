//! A guest that does what it should not: the VMM answers or ignores it, and goes on.

use nowait_tests::guest::Guest;
use nowait_wire::paging::{PORT, Status};

use crate::Test;
use crate::kernels::{TestKernel, debug_exit, exit_with_byte_at, out32};

pub(crate) const TESTS: &[Test] = &[
    ("paging_requests_for_impossible_pages_are_ignored", impossible_pages),
    ("a_malformed_paging_request_is_answered_in_its_page", malformed_page),
    ("unknown_ports_and_string_instructions_do_no_harm", ports),
    ("garbage_on_the_agent_channel_ends_nothing", garbage),
];

/// Where the answer's status stands in a request page.
const STATUS_OFFSET: u32 = 16;

fn expect_byte(code: &[u8], byte: u8) {
    let kernel = TestKernel::new(code);
    let end = Guest::kernel(&kernel.path()).args(["--debug-exit", "--memory", "8M"]).run();
    end.expect_code(((i32::from(byte) << 1) | 1) & 0xff);
}

fn impossible_pages() {
    let mut code = Vec::new();
    for gfn in [u32::MAX, 0x8000_0000, 8 << 8, 0xc_0000] {
        code.extend(out32(PORT, gfn));
    }
    code.extend(debug_exit(0x21));
    expect_byte(&code, 0x21);
}

fn malformed_page() {
    const PAGE: u32 = 0x300;
    let mut code = out32(PORT, PAGE);
    code.extend(exit_with_byte_at((PAGE << 12) + STATUS_OFFSET));
    expect_byte(&code, Status::Malformed as u8);
}

fn ports() {
    let mut code = vec![
        0xbe, 0, 0, 0x20, 0, //    mov esi, 0x200000: never touched
        0xb9, 0, 0x10, 0, 0, //    mov ecx, 4096
        0x66, 0xba, 0xf8, 0x02, // mov dx, 0x2f8
        0xfc, 0xf3, 0x6e, //       cld; rep outsb
        0xbf, 0, 0, 0x28, 0, //    mov edi, 0x280000: never touched
        0xb9, 0, 4, 0, 0, //       mov ecx, 1024
        0x66, 0xba, 0x34, 0x12, // mov dx, 0x1234
        0xf3, 0x6d, //             rep insd
        0xa1, 0, 0, 0, 0xd0, //    mov eax, [0xd0000000]: no device
        0xa3, 0, 0, 0, 0xd0, //    mov [0xd0000000], eax
    ];
    // All ones were read into RAM.
    code.extend(exit_with_byte_at(0x28_0fff));
    expect_byte(&code, 0xff);
}

fn garbage() {
    let end = Guest::linux()
        .args(["--cmdline", "nowait.agent=serve"])
        .exec("head -c 70000 /dev/zero > /dev/ttyS1; echo '{\"report\":\"x\"}' > /dev/ttyS1; echo alive")
        .run();
    // The channel is the agent's: whoever garbles it makes the measurement fail, not the VMM.
    end.expect_code(14);
    assert!(end.stderr.contains("agent channel"), "{}", end.stderr);
}

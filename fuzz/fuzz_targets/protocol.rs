//! What a guest, its pager and its processor do to the async page fault protocol, in any order.
#![no_main]

use async_pf::fuzzing;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    fuzzing::protocol(bytes);
});

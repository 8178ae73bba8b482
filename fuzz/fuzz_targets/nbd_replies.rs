//! What an NBD server answers to requests.
#![no_main]

use guest_memory::fuzzing;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    fuzzing::replies(bytes);
});

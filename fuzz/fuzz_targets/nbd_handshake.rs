//! What an NBD server says before the first request.
#![no_main]

use guest_memory::fuzzing;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    fuzzing::handshake(bytes);
});

//! Pages through all of their lives; without userfaultfd there is nothing to find.
#![no_main]

use guest_memory::fuzzing;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    assert_eq!(fuzzing::page_lives(bytes), fuzzing::Ran::All);
});

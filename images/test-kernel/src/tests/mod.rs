//! The tests: a name and a function each. To add one, write it in a module here and put it into that
//! module's table, and the module's table into [`TABLES`].

mod apf;
mod areas;
mod emulated;
mod false_faults;
mod machine;
mod markers;
mod mmio;
mod strings;

use alloc::string::String;

use crate::println;

/// What a test says in the end.
pub(crate) type Outcome = Result<(), String>;

/// One test.
pub(crate) struct Test {
    /// As in `test=NAME`.
    pub(crate) name: &'static str,
    /// Runs it.
    pub(crate) run: fn() -> Outcome,
}

const TABLES: &[&[Test]] = &[
    machine::TESTS,
    strings::TESTS,
    mmio::TESTS,
    areas::TESTS,
    markers::TESTS,
    apf::registers::TESTS,
    apf::TESTS,
    apf::resets::TESTS,
    apf::hostile::TESTS,
];

/// Fails the test with this text unless the condition holds.
#[macro_export]
macro_rules! ensure {
    ($condition:expr, $($text:tt)*) => {
        if !$condition {
            return Err(::alloc::format!($($text)*));
        }
    };
}

/// Runs the tests that `test=NAME,NAME` names, or all; true when all of them passed. A name that is none
/// is a failure.
pub(crate) fn run(command_line: &str) -> bool {
    let tests = || TABLES.iter().copied().flatten();
    let names = command_line.split_whitespace().find_map(|word| word.strip_prefix("test="));
    let Some(names) = names else {
        return tests().map(one).filter(|passed| !passed).count() == 0;
    };
    let named = names.split(',').map(|name| match tests().find(|test| test.name == name) {
        Some(test) => one(test),
        None => {
            println!("FAIL {name}: there is no such test");
            false
        }
    });
    named.filter(|passed| !passed).count() == 0
}

fn one(test: &Test) -> bool {
    match (test.run)() {
        Ok(()) => {
            println!("ok {}", test.name);
            true
        }
        Err(why) => {
            println!("FAIL {}: {why}", test.name);
            false
        }
    }
}

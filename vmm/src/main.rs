//! The `nowait` binary.

use std::process::ExitCode;

fn main() -> ExitCode {
    ExitCode::from(vmm::commands::main())
}

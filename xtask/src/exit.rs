//! Exit codes of `cargo xtask`, and the error that carries one.
//!
//! | code | meaning |
//! |---|---|
//! | 0 | everything passed |
//! | 1 | a step or a test failed |
//! | 2 | bad command line |
//! | 4 | a bad operand (a file that cannot be read or written, …) |
//! | 6 | this machine cannot: something is missing and cannot be installed from here |
//! | 124 | the nested machine ran into its timeout |
//! | 125 | the nested machine itself failed (kernel panic, no exit status) |
//! | 128+n | stopped by signal n |
//!
//! `cargo xtask nested` passes its command's own exit code on; everything else is from this table.

use std::fmt;

/// A step or a test failed.
pub(crate) const FAILED: u8 = 1;
/// A bad command line, as clap has it.
pub(crate) const USAGE: u8 = 2;
/// A bad operand.
pub(crate) const OPERAND: u8 = 4;
/// This machine cannot.
pub(crate) const CANNOT: u8 = 6;
/// The nested machine ran into its timeout (the code of timeout(1)).
pub(crate) const TIMEOUT: u8 = 124;
/// The nested machine itself failed.
pub(crate) const MACHINE: u8 = 125;

/// An error with an exit code of its own.
#[derive(Debug)]
pub(crate) struct Exit {
    /// The process's exit code.
    pub(crate) code: u8,
    /// One line for the user; empty when everything has been said.
    pub(crate) message: String,
}

impl Exit {
    /// An error that ends the process with `code`.
    pub(crate) fn error(code: u8, message: impl Into<String>) -> anyhow::Error {
        anyhow::Error::new(Exit { code, message: message.into() })
    }
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Exit {}

/// Prints `error` as one line and gives the exit code it stands for.
pub(crate) fn report(error: &anyhow::Error) -> u8 {
    let text = format!("{error:#}");
    if !text.is_empty() {
        eprintln!("xtask: {text}");
    }
    error.downcast_ref::<Exit>().map_or(FAILED, |exit| exit.code)
}

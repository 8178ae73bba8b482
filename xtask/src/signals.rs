//! Ctrl-C and SIGTERM: noted in a flag that every wait looks at, so that children are ended and the
//! terminal is restored before the process goes.

use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, Result};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};

use crate::exit::Exit;

static SEEN: OnceLock<Arc<AtomicUsize>> = OnceLock::new();

/// Installs the handlers; called once, first thing.
pub(crate) fn install() -> Result<()> {
    let seen = SEEN.get_or_init(Default::default);
    for signal in [SIGINT, SIGTERM, SIGHUP, SIGQUIT] {
        signal_hook::flag::register_usize(signal, Arc::clone(seen), signal as usize)
            .with_context(|| format!("cannot install a handler for signal {signal}"))?;
    }
    Ok(())
}

/// The signal that asked us to stop, if one came.
pub(crate) fn seen() -> Option<u8> {
    match SEEN.get().map_or(0, |seen| seen.load(Ordering::Relaxed)) {
        0 => None,
        signal => u8::try_from(signal).ok(),
    }
}

/// Fails with `128 + signal` once a signal came.
pub(crate) fn check() -> Result<()> {
    seen().map_or(Ok(()), |signal| Err(stopped_by(signal)))
}

/// The error of a signal.
pub(crate) fn stopped_by(signal: u8) -> anyhow::Error {
    Exit::error(128 + signal, format!("stopped by signal {signal}"))
}

/// The signal that asked us to stop, if one came, for the only one who waits, who looks for another one
/// meanwhile and then [puts it back](put_back).
pub(crate) fn take() -> Option<u8> {
    match SEEN.get().map_or(0, |seen| seen.swap(0, Ordering::Relaxed)) {
        0 => None,
        signal => u8::try_from(signal).ok(),
    }
}

/// The signal was not answered yet.
pub(crate) fn put_back(signal: u8) {
    if let Some(seen) = SEEN.get() {
        seen.store(signal.into(), Ordering::Relaxed);
    }
}

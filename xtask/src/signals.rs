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
    match seen() {
        None => Ok(()),
        Some(signal) => Err(Exit::error(128 + signal, format!("stopped by signal {signal}"))),
    }
}

//! `nowait top`: a live view of a running guest's stalls, faults and memory, over its control socket.
//!
//! ```text
//!   poller (its thread) <--- client: HTTP, bounded in time ---> the run's control socket
//!      |        ^
//!    news    actions
//!      v        |
//!   screen (terminal, keys, signals) --> model: snapshots of a minute (history), the strip (pages), status
//!                                          |
//!                                        view: drawn from the model alone
//! ```
//!
//! The screen waits for nobody: a run that does not answer is shown as that. Model, history, snapshot, pages
//! and view know no clock, socket or terminal.

mod client;
mod history;
mod model;
mod pages;
mod poller;
mod screen;
mod snapshot;
mod view;

use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;

use client::{AskError, Client};
use model::Model;
use poller::Poller;
use screen::{End, Signals};

use crate::exit;

/// Arguments of `nowait top`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = KEYS)]
pub struct TopArgs {
    /// Control socket of the guest (nowait run --control SOCKET)
    #[arg(value_name = "SOCKET")]
    socket: PathBuf,
}

const KEYS: &str = "Keys:
  + l   a tenth more of the resident limit
  - L   a tenth less of it (4 MiB at least)
  t T   double the async page fault threshold, halve it
  a     the threshold as measured on this host
  p r   pause the guest, resume it
  e     move all of guest RAM to the store, once (asks)
  q     quit; the guest goes on
  ?     help

It needs a terminal of 80x24. Without one, the same numbers are at
  curl --unix-socket SOCKET http://nowait/metrics";

/// Why there is nothing to show.
#[derive(Debug, thiserror::Error)]
enum TopError {
    #[error(transparent)]
    Ask(#[from] AskError),
    #[error(
        "standard output is not a terminal: for numbers without one, curl --unix-socket {0} \
         http://nowait/metrics"
    )]
    NotTerminal(String),
    #[error("cannot {what}: {source}")]
    Host { what: &'static str, source: io::Error },
}

impl TopError {
    fn host(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Host { what, source }
    }

    fn exit_code(&self) -> u8 {
        match self {
            Self::Ask(_) | Self::NotTerminal(_) => exit::OPERAND,
            Self::Host { .. } => exit::FAILURE,
        }
    }
}

/// Runs it; the exit code.
pub(crate) fn main(args: &TopArgs) -> u8 {
    match show(args) {
        Ok(End::Quit) => exit::OK,
        Ok(End::Interrupted) => exit::STOPPED,
        Ok(End::Gone) => {
            say(&format!("the run at '{}' has ended", args.socket.display()));
            exit::OK
        }
        Err(error) => {
            say(&error.to_string());
            error.exit_code()
        }
    }
}

fn show(args: &TopArgs) -> Result<End, TopError> {
    let socket = args.socket.display().to_string();
    let client = Client::new(&args.socket);
    // What is wrong with the socket is wrong with any output.
    let first = poller::metrics(&client)?;
    if !io::stdout().is_terminal() {
        return Err(TopError::NotTerminal(socket));
    }
    let signals = Signals::install().map_err(TopError::host("install signal handlers"))?;
    let poller = Poller::start(client).map_err(TopError::host("start a thread"))?;
    let mut model = Model::new(socket, first);
    screen::run(&mut model, &poller, &signals).map_err(TopError::host("use the terminal"))
}

/// One line on standard error.
fn say(message: &str) {
    let _nobody_reads = writeln!(io::stderr(), "nowait: {message}");
}

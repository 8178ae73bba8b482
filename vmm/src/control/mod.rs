//! The control socket of a run (`--control`): HTTP on a Unix socket, for one's own user only.
//!
//! ```text
//!   client -- socket --> server (its thread) -- request --> House --+-- metrics: a snapshot, as text
//!             mode 0600  no wait for a client                       +-- pages: a survey of the page table
//!                                                                   +-- pause, resume: the vCPUs' gate
//!                                                                   +-- threshold
//!                                                                   +-- limit, evict --> orders (its thread)
//! ```
//!
//! Nothing on the server's thread waits for the store, a page or a vCPU: it answers while they hang.
//! Another resident limit and an eviction look at every page of RAM, so these have a thread of their own,
//! and so has a threshold that has to be measured. A survey looks at a bounded number of pages.

#[cfg(any(test, feature = "bed"))]
#[cfg_attr(not(feature = "bed"), allow(unreachable_pub))]
pub mod bed;
#[cfg(test)]
mod bed_tests;
mod families;
mod house;
mod metrics;
mod reply;
mod request;
mod server;
mod socket;
#[cfg(test)]
mod tests;

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::Duration;

pub(crate) use house::House;
pub(crate) use metrics::Facts;
pub(crate) use socket::{BindError, ControlSocket};

use reply::Reply;
use request::Command;

/// How long the end of a run waits for the threads; each of their steps is shorter.
const END_LIMIT: Duration = Duration::from_secs(1);

/// The control socket at work, until it is dropped.
pub(crate) struct Control {
    /// The server ends when this is closed.
    wake: Option<UnixStream>,
    /// Disconnected when all threads have ended.
    ended: Receiver<()>,
}

impl Control {
    /// Starts the threads.
    ///
    /// # Errors
    /// When the host has none.
    pub(crate) fn start(socket: ControlSocket, house: House) -> io::Result<Self> {
        let (alive, ended) = channel();
        let orders = house.start_orders(alive.clone())?;
        Self::serve(socket, move |command| house.answer(command, &orders), alive, ended)
    }

    fn serve(
        socket: ControlSocket,
        answer: impl FnMut(Command) -> Reply + Send + 'static,
        alive: Sender<()>,
        ended: Receiver<()>,
    ) -> io::Result<Self> {
        let (wake, closed) = UnixStream::pair()?;
        thread::Builder::new().name("control".into()).spawn(move || {
            // Dropped in reverse: at the end of the wait for this thread the file is gone.
            let _alive = alive;
            let socket = socket;
            if let Err(error) = server::serve(socket.listener(), &closed, answer) {
                eprint!("nowait: --control: cannot go on: {error}\r\n");
            }
        })?;
        Ok(Self { wake: Some(wake), ended })
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        drop(self.wake.take());
        let _ended_or_left_behind = self.ended.recv_timeout(END_LIMIT);
    }
}

//! The thread that talks to the run: asks for numbers again and again, and for what keys ask for at once.
//! The screen never waits for an answer.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use super::client::{AskError, Client, Request};
use super::history::HZ;
use super::model::Action;
use super::pages::Pages;
use super::snapshot::Snapshot;

/// Between two questions for the metrics, and for the pages, which are more work.
const METRICS_EVERY: Duration = Duration::from_millis(1000 / HZ as u64);
const PAGES_EVERY: Duration = Duration::from_millis(1000);
/// Actions that may wait for the one before, and news that nobody has taken yet.
const MAX_ACTIONS: usize = 4;
const MAX_NEWS: usize = 16;

/// What came in.
#[derive(Debug)]
pub(super) enum News {
    Metrics(Box<Snapshot>),
    Pages(Pages),
    /// An action, by its name: what the server said.
    Acted(&'static str, Result<String, String>),
    /// There are no numbers this time; why.
    Trouble(String),
    /// Nobody is there any more; nothing comes after it.
    Gone,
}

/// The thread, for as long as somebody takes its news.
#[derive(Debug)]
pub(super) struct Poller {
    pub(super) news: Receiver<News>,
    actions: SyncSender<Action>,
    /// In how many cells the pages are wanted.
    cells: Arc<AtomicU32>,
}

impl Poller {
    /// Starts it.
    ///
    /// # Errors
    /// When the host has no thread.
    pub(super) fn start(client: Client) -> io::Result<Self> {
        let (actions, to_do) = sync_channel(MAX_ACTIONS);
        let (news, come_in) = sync_channel(MAX_NEWS);
        let cells = Arc::new(AtomicU32::new(1));
        let wanted = Arc::clone(&cells);
        thread::Builder::new().name("poller".into()).spawn(move || {
            // It ends when nobody is there any more, or nobody wants to know.
            let _end = poll(&client, &to_do, &news, &wanted);
        })?;
        Ok(Self { news: come_in, actions, cells })
    }

    /// Has an action done; false when too many wait.
    pub(super) fn act(&self, action: Action) -> bool {
        self.actions.try_send(action).is_ok()
    }

    /// In how many cells the pages are wanted from now on.
    pub(super) fn want_cells(&self, cells: u32) {
        self.cells.store(cells.clamp(1, 1024), Ordering::Relaxed);
    }
}

/// Nobody takes the news, or there is none to come.
struct Over;

fn poll(
    client: &Client,
    actions: &Receiver<Action>,
    news: &SyncSender<News>,
    cells: &AtomicU32,
) -> Result<(), Over> {
    let (mut metrics_at, mut pages_at) = (Instant::now(), Instant::now());
    loop {
        let until = metrics_at.min(pages_at).saturating_duration_since(Instant::now());
        let item = match actions.recv_timeout(until) {
            Ok(Action { name, request }) => {
                let answer = client.ask(&request);
                // What it did is to be seen soon.
                metrics_at = Instant::now();
                match answer {
                    Err(error) if error.is_gone() => Err(error),
                    answer => Ok(News::Acted(name, answer.map_err(|error| error.to_string()))),
                }
            }
            Err(RecvTimeoutError::Disconnected) => return Err(Over),
            Err(RecvTimeoutError::Timeout) if metrics_at <= pages_at => {
                metrics_at = Instant::now() + METRICS_EVERY;
                metrics(client).map(|snapshot| News::Metrics(Box::new(snapshot)))
            }
            Err(RecvTimeoutError::Timeout) => {
                pages_at = Instant::now() + PAGES_EVERY;
                pages(client, cells.load(Ordering::Relaxed)).map(News::Pages)
            }
        };
        let item = item.unwrap_or_else(|error| match error {
            error if error.is_gone() => News::Gone,
            error => News::Trouble(error.to_string()),
        });
        let gone = matches!(item, News::Gone);
        news.send(item).map_err(|_| Over)?;
        if gone {
            return Err(Over);
        }
    }
}

/// Asks for a snapshot.
///
/// # Errors
/// When there is no answer, or it is somebody else's.
pub(super) fn metrics(client: &Client) -> Result<Snapshot, AskError> {
    let text = client.ask(&Request::plain("GET /metrics")).map_err(|error| match error {
        AskError::Refused(line) => client.not_nowait(format!("it has no /metrics: {line}")),
        error => error,
    })?;
    Snapshot::parse(&text).map_err(|error| client.not_nowait(error.to_string()))
}

fn pages(client: &Client, cells: u32) -> Result<Pages, AskError> {
    let text = client.ask(&Request::plain(format!("GET /pages?cells={cells}")))?;
    Pages::parse(&text).map_err(|why| client.not_nowait(format!("its pages cannot be read: {why}")))
}

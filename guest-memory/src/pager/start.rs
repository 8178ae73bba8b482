//! From RAM at rest to a running pager.

use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex, OnceLock};
use std::thread;
use std::time::Duration;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EFD_SEMAPHORE, EventFd};

use super::worker::{self, Worker};
use super::{MAX_REQUESTS, Pager, PagerConfig, PagerError, Shared, block_pages, system};
use crate::address::{PageIndex, PageRun, pages_in};
use crate::ram::GuestRam;
use crate::state::{OnInstalled, PageWord};
use crate::stats::Counters;
use crate::store::Store;
use crate::sys::{Outcome, Userfault, memfd};
use crate::table::PageTable;

/// The most pages that are populated by one system call (64 MiB).
const POPULATE_CHUNK_PAGES: u32 = 16 << 10;
/// How often an installation that the kernel puts off is tried before the guest runs, and how long
/// the pause between is.
const START_TRIES: u32 = 1000;
const START_PAUSE: Duration = Duration::from_millis(1);

impl GuestRam {
    /// Registers RAM with userfaultfd, maps what the loader wrote, and starts the pager thread. The
    /// loader's alias is gone from here on.
    ///
    /// # Errors
    /// [`PagerError::FaultAround`]; [`PagerError::Userfault`] when this host or user cannot use
    /// userfaultfd; [`PagerError::Store`]; or what the kernel said.
    pub fn start(self, config: PagerConfig) -> Result<Pager, PagerError> {
        let store = config.store.open()?;
        self.start_with_store(&config, store)
    }

    /// As [`GuestRam::start`], with a store of the caller's in place of `config.store`.
    ///
    /// # Errors
    /// As [`GuestRam::start`].
    pub fn start_with_store(
        self,
        config: &PagerConfig,
        store: Box<dyn Store>,
    ) -> Result<Pager, PagerError> {
        let worker = self.prepare(config, store)?;
        let shared = Arc::clone(&worker.shared);
        let bell = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK | EFD_SEMAPHORE);
        let bell = Arc::new(bell.map_err(system("make an eventfd"))?);
        let (requests, inbox) = sync_channel(MAX_REQUESTS);
        let thread = thread::Builder::new().name("pager".into()).spawn({
            let bell = Arc::clone(&bell);
            move || worker::run(worker, &inbox, &bell)
        });
        Ok(Pager {
            shared,
            requests,
            bell,
            thread: Mutex::new(Some(thread.map_err(system("start its thread"))?)),
        })
    }

    /// All but the thread: registered, and everything mapped that is to be there at the start.
    pub(super) fn prepare(
        self,
        config: &PagerConfig,
        store: Box<dyn Store>,
    ) -> Result<Worker, PagerError> {
        let fault_around_pages = block_pages(config.fault_around_bytes)?;
        let userfault = Userfault::register(&self.mapping)?;
        let table = PageTable::new(self.layout.all_pages().pages())
            .map_err(system("make the table of page states"))?;
        let failure_event = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK);
        let shared = Arc::new(Shared {
            layout: self.layout,
            file: self.file,
            mapping: self.mapping,
            counters: Counters::default(),
            failure: OnceLock::new(),
            failure_event: failure_event.map_err(system("make an eventfd"))?,
            abandoned: Mutex::new(None),
        });
        let mut worker = Worker::new(shared, userfault, table, store, fault_around_pages);
        worker.on_mapped = self.on_mapped;
        worker.map_loaded()?;
        if config.populate {
            worker.populate()?;
        }
        Ok(worker)
    }
}

/// What happens before the guest runs: nobody waits for a page yet, and nobody else maps any.
impl Worker {
    /// Maps what the loader wrote: all that is no hole in the RAM file.
    fn map_loaded(&mut self) -> Result<(), PagerError> {
        let searching = || system("find the loaded parts of guest RAM");
        let mut file = self.shared.file.try_clone().map_err(searching())?;
        let mut offset = 0;
        while let Some((start, len)) = memfd::next_data(&mut file, offset).map_err(searching())? {
            offset = start + len;
            let first = PageIndex::containing(start);
            let pages = pages_in(len);
            if let Some(run) = first.zip(pages).and_then(|(first, n)| PageRun::new(first, n)) {
                self.install_at_start(run, "map", Userfault::map)?;
                self.shared.counters.pages_loaded.add(run.pages().into());
                self.tell_mapped(run);
            }
        }
        Ok(())
    }

    /// Installs zero pages wherever the loader wrote nothing.
    fn populate(&mut self) -> Result<(), PagerError> {
        let mut left = Some(self.shared.layout.all_pages());
        while let Some(run) = left {
            // Skips the loaded pages one by one; the chunk ends where the next of them is.
            let Some(zeros) = self.table.zero_prefix(run, POPULATE_CHUNK_PAGES) else {
                left = run.suffix(1);
                continue;
            };
            self.install_at_start(zeros, "populate", Userfault::zero)?;
            left = run.suffix(zeros.pages());
        }
        Ok(())
    }

    fn install_at_start(
        &mut self,
        run: PageRun,
        action: &'static str,
        install: impl Fn(&Userfault, PageRun) -> std::io::Result<Outcome>,
    ) -> Result<(), PagerError> {
        let mut left = Some(run);
        let mut tries = 0;
        while let Some(run) = left {
            match install(&self.userfault, run).map_err(self.on_pages(action, run))? {
                Outcome::Done => left = None,
                Outcome::Partial(pages) => left = run.suffix(pages),
                // Done by an earlier try that was cut short.
                Outcome::Exists => left = run.suffix(1),
                Outcome::Again if tries < START_TRIES => {
                    tries += 1;
                    thread::sleep(START_PAUSE);
                }
                Outcome::Again => {
                    let again = std::io::Error::from_raw_os_error(libc::EAGAIN);
                    return Err(self.on_pages(action, run)(again));
                }
            }
        }
        for page in run.iter() {
            if self.table.edge(page, PageWord::installed) == OnInstalled::First {
                self.shared.counters.pages_touched.add(1);
            }
        }
        Ok(())
    }
}

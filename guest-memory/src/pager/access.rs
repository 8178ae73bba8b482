//! The VMM's own reads and writes of guest RAM. They go to the RAM file, never through the guest
//! mapping, and only when the page's bytes are there.

use std::os::unix::fs::FileExt;
use std::sync::mpsc::SyncSender;

use super::PagerError;
use super::fault::too_many_tasks;
use super::worker::Worker;
use crate::address::{PAGE_SIZE, PageBytes, PageIndex, PageRun};
use crate::state::{OnFault, PageState, PageWord};

/// The most accesses that wait for fetches. Each has a thread that waits for its reply.
const MAX_WAITING: usize = 256;

/// One access, with the way to its caller.
pub(super) enum Access {
    Read { reply: SyncSender<Result<Box<PageBytes>, PagerError>> },
    Write { offset: usize, bytes: Vec<u8>, reply: SyncSender<Result<(), PagerError>> },
}

impl Access {
    // In both: the caller may be gone, and there is room for the one reply.
    fn refuse(self, error: PagerError) {
        match self {
            Self::Read { reply } => drop(reply.try_send(Err(error))),
            Self::Write { reply, .. } => drop(reply.try_send(Err(error))),
        }
    }
}

impl Worker {
    /// Serves the access now, or when the page has come.
    pub(super) fn access(&mut self, page: PageIndex, access: Access) {
        match self.table.state(page) {
            PageState::Zero | PageState::Mapped => self.perform(page, access),
            PageState::Failed(_) => {
                access.refuse(PagerError::Lost(self.shared.layout.gfn_of(page)));
            }
            PageState::Stored(_) | PageState::Fetching(_) => self.park(page, access),
        }
    }

    fn park(&mut self, page: PageIndex, access: Access) {
        if self.waiting.len() >= MAX_WAITING {
            access.refuse(PagerError::Busy { what: "accesses", limit: MAX_WAITING });
            return;
        }
        if self.deadlines.room() == 0 {
            access.refuse(too_many_tasks());
            return;
        }
        self.waiting.push((page, access));
        if self.table.edge(page, PageWord::fault) == OnFault::StartFetch
            && let Err(error) = self.start_fetch(page)
        {
            self.shared.fail(error);
        }
    }

    /// The page's fetch is over, well or not.
    pub(super) fn serve_waiting(&mut self, page: PageIndex) {
        let served: Vec<_> = self.waiting.extract_if(.., |(p, _)| *p == page).collect();
        for (page, access) in served {
            self.access(page, access);
        }
    }

    fn perform(&mut self, page: PageIndex, access: Access) {
        match access {
            Access::Read { reply } => drop(reply.try_send(self.read(page))),
            Access::Write { offset, bytes, reply } => {
                drop(reply.try_send(self.write(page, offset, &bytes)));
            }
        }
    }

    fn read(&self, page: PageIndex) -> Result<Box<PageBytes>, PagerError> {
        let mut bytes = Box::new([0; PAGE_SIZE]);
        // An untouched page is zeros, and reading it here does not touch it.
        if self.table.state(page) == PageState::Mapped {
            let read = self.shared.file.read_exact_at(&mut bytes[..], page.file_offset());
            read.map_err(self.on_pages("read", PageRun::single(page)))?;
        }
        Ok(bytes)
    }

    fn write(&mut self, page: PageIndex, offset: usize, bytes: &[u8]) -> Result<(), PagerError> {
        let at = page.file_offset() + offset as u64;
        let written = self.shared.file.write_all_at(bytes, at);
        written.map_err(self.on_pages("write", PageRun::single(page)))?;
        if self.table.state(page) == PageState::Zero && !bytes.is_empty() {
            self.first_touch(page);
            self.map_first_time(page)?;
        }
        Ok(())
    }
}

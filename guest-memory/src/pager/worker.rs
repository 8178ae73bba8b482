//! The pager thread's loop.

use std::io;
use std::os::fd::AsRawFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::EventFd;

use super::access::Access;
use super::{PagerError, Request, Shared, system};
use crate::address::{PAGE_SIZE, PageBytes, PageIndex, PageRun};
use crate::deadline::{Deadlines, Task};
use crate::ram::OnMapped;
use crate::store::Store;
use crate::sys::{FaultBatch, Userfault, wait_readable};
use crate::table::PageTable;

/// The most fetches and retries under way. KVM has at most 65 faults under way for each vCPU; when
/// there are more, their messages wait in the kernel.
pub(super) const MAX_OUTSTANDING: usize = 4096;
/// The most messages that are read at once.
const MESSAGE_BATCH: usize = 64;
/// The most due tasks that are done before messages are looked at again.
const TASK_BATCH: usize = 64;
/// How long the shutdown spends on fetches under way.
const DRAIN_LIMIT: Duration = Duration::from_secs(1);

/// What the pager thread owns.
pub(super) struct Worker {
    pub(super) shared: Arc<Shared>,
    pub(super) userfault: Userfault,
    pub(super) table: PageTable,
    pub(super) store: Box<dyn Store>,
    pub(super) deadlines: Deadlines,
    /// Accesses that wait for a fetch.
    pub(super) waiting: Vec<(PageIndex, Access)>,
    pub(super) fault_around_pages: u32,
    pub(super) buffer: Box<PageBytes>,
    pub(super) on_mapped: Option<OnMapped>,
}

/// What one turn of the loop says.
enum Turn {
    Again,
    Stop,
}

/// The thread: works until it is told to stop. A failure is told to the VMM, and the userfaultfd is
/// kept open then, so that the guest waits and does not read zeros.
pub(super) fn run(mut worker: Worker, inbox: &Receiver<Request>, bell: &EventFd) {
    // What the worker owns is only dropped after a panic, or kept as it is.
    let end = catch_unwind(AssertUnwindSafe(|| worker.serve(inbox, bell)));
    let error = match end {
        Ok(Ok(())) => return,
        Ok(Err(error)) => error,
        Err(_) => PagerError::Panicked,
    };
    let Worker { shared, userfault, .. } = worker;
    *shared.abandoned.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(userfault);
    shared.fail(error);
}

impl Worker {
    pub(super) fn new(
        shared: Arc<Shared>,
        userfault: Userfault,
        table: PageTable,
        store: Box<dyn Store>,
        fault_around_pages: u32,
    ) -> Self {
        Self {
            shared,
            userfault,
            table,
            store,
            deadlines: Deadlines::new(MAX_OUTSTANDING),
            waiting: Vec::new(),
            fault_around_pages,
            buffer: Box::new([0; PAGE_SIZE]),
            on_mapped: None,
        }
    }

    fn serve(&mut self, inbox: &Receiver<Request>, bell: &EventFd) -> Result<(), PagerError> {
        let mut batch = FaultBatch::new(MESSAGE_BATCH);
        let mut faults = Vec::with_capacity(MESSAGE_BATCH);
        loop {
            self.do_due_tasks(Instant::now());
            let (has_faults, has_request) = self.wait(bell)?;
            if has_faults {
                let messages = self.userfault.read(&self.shared.mapping, &mut batch);
                faults.extend(messages.map_err(system("read userfaultfd messages"))?);
                self.on_messages(&mut faults);
            }
            if has_request && let Turn::Stop = self.serve_request(inbox, bell)? {
                self.drain();
                return Ok(());
            }
        }
    }

    /// Waits for a message, a request, or the next deadline.
    fn wait(&self, bell: &EventFd) -> Result<(bool, bool), PagerError> {
        // Every message may add a task: without room for a whole batch, messages wait.
        let room = self.deadlines.room() >= MESSAGE_BATCH;
        let userfault = room.then_some(&self.userfault as &dyn AsRawFd);
        let timeout =
            self.deadlines.next_due().map(|due| due.saturating_duration_since(Instant::now()));
        let readable = wait_readable([userfault, Some(bell)], timeout);
        let [faults, request] = readable.map_err(system("wait for messages"))?;
        Ok((faults, request))
    }

    pub(super) fn do_due_tasks(&mut self, now: Instant) {
        for _ in 0..TASK_BATCH {
            match self.deadlines.pop_due(now) {
                Some((Task::Fetch, page)) => self.finish_fetch(page),
                Some((Task::Retry, page)) => self.resolve(page),
                None => return,
            }
        }
    }

    /// Serves one request, so that faults get their turn between two of them.
    fn serve_request(
        &mut self,
        inbox: &Receiver<Request>,
        bell: &EventFd,
    ) -> Result<Turn, PagerError> {
        match bell.read() {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Turn::Again),
            other => other.map_err(system("read its eventfd"))?,
        };
        // The bell is rung after the request was sent; no sender left means that the handle is gone.
        match inbox.try_recv() {
            Ok(Request::Evict { pages, reply }) => {
                let result = self.evict(&pages);
                // The caller may be gone.
                let _ = reply.try_send(result);
            }
            Ok(Request::Access(page, access)) => self.access(page, access),
            Ok(Request::Stop) | Err(_) => return Ok(Turn::Stop),
        }
        Ok(Turn::Again)
    }

    /// Completes what is under way, without waiting for the store's latency.
    fn drain(&mut self) {
        let end = Instant::now() + DRAIN_LIMIT;
        while Instant::now() < end
            && let Some((task, page)) = self.deadlines.pop()
        {
            match task {
                Task::Fetch => self.finish_fetch(page),
                // The kernel had no time for it before; whoever waits is woken by the close.
                Task::Retry => {}
            }
        }
    }

    /// These pages are in the guest mapping now.
    pub(super) fn tell_mapped(&mut self, run: PageRun) {
        if let Some(told) = &mut self.on_mapped {
            for (gpa, bytes) in self.shared.layout.guest_ranges(run) {
                told(gpa, bytes);
            }
        }
    }

    /// An error about some pages, with the frame's number.
    pub(super) fn on_pages(
        &self,
        action: &'static str,
        run: PageRun,
    ) -> impl FnOnce(io::Error) -> PagerError + use<> {
        let gfn = self.shared.layout.gfn_of(run.first());
        let pages = run.pages();
        move |source| PagerError::Pages { action, gfn, pages, source }
    }
}

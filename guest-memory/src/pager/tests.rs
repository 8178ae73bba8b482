//! What cannot be brought about from outside: pages in the RAM file that nobody put there, and
//! installations that the kernel puts off. The worker runs without its thread.

use std::os::unix::fs::FileExt;
use std::thread;
use std::time::{Duration, Instant};

use super::worker::Worker;
use super::{PagerConfig, PagerError};
use crate::address::{PAGE_BYTES, PageIndex, PageRun};
use crate::state::PageState;
use crate::store::StoreSpec;
use crate::{GuestRam, RamLayout};

const LONG: Duration = Duration::from_secs(10);

/// A worker for 16 pages in one block of fault-around; `None` without userfaultfd.
fn worker(store: StoreSpec) -> Option<Worker> {
    let layout = RamLayout::new(16 * PAGE_BYTES).unwrap();
    let ram = GuestRam::new(&layout).unwrap();
    match ram.prepare(&PagerConfig::default(), store.open().unwrap()) {
        Ok(worker) => Some(worker),
        Err(PagerError::Userfault(error)) => {
            println!("SKIP: {error}");
            None
        }
        Err(other) => panic!("{other}"),
    }
}

/// Does what is due at once, and what a store that takes less than [`LONG`] has ready then.
fn later(worker: &mut Worker) {
    worker.do_due_tasks(Instant::now() + LONG);
}

fn touch(worker: &Worker, page: u32) -> thread::JoinHandle<u8> {
    let shared = std::sync::Arc::clone(&worker.shared);
    thread::spawn(move || shared.mapping.touch(PageIndex(page)))
}

#[test]
fn a_page_that_the_kernel_put_into_the_file_is_only_mapped() {
    let Some(mut worker) = worker(StoreSpec::Memory) else {
        return;
    };
    // As a huge page in the page cache does.
    for page in [3, 4, 9] {
        let at = PageIndex(page).file_offset();
        worker.shared.file.write_all_at(&[7], at).unwrap();
    }
    worker.resolve(PageIndex(5));
    assert!(worker.shared.failure.get().is_none());
    let counters = &worker.shared.counters;
    assert_eq!(counters.pages_touched.get(), 16);
    assert_eq!(counters.zero_faults.get(), 1);
    assert_eq!(counters.fault_around_pages.get(), 15);
    // All are mapped, or these would wait for ever; and nothing was overwritten.
    for page in 0..16 {
        let expected = if [3, 4, 9].contains(&page) { 7 } else { 0 };
        assert_eq!(worker.shared.mapping.touch(PageIndex(page)), expected);
    }
}

#[test]
fn an_installation_that_was_put_off_is_tried_again() {
    let Some(mut worker) = worker(StoreSpec::Memory) else {
        return;
    };
    worker.resolve(PageIndex(0));
    let run = PageRun::single(PageIndex(0));
    worker.shared.mapping.unmap(run).unwrap();
    let waiter = touch(&worker, 0);
    worker.retry(PageIndex(0)).unwrap();
    thread::sleep(Duration::from_millis(20));
    assert!(!waiter.is_finished());
    later(&mut worker);
    assert_eq!(waiter.join().unwrap(), 0);
    assert_eq!(worker.shared.counters.install_retries.get(), 1);
}

#[test]
fn a_late_retry_goes_by_the_state_and_ends_no_fetch() {
    let delay = Duration::from_secs(60);
    let Some(mut worker) = worker(StoreSpec::Delay(delay)) else {
        return;
    };
    let page = PageIndex(0);
    worker.resolve(page);
    worker.retry(page).unwrap();
    assert_eq!(worker.evict(&[page]).unwrap(), 1);
    worker.resolve(page);
    worker.retry(page).unwrap();
    later(&mut worker);
    assert!(matches!(worker.table.state(page), PageState::Fetching(_)));
    assert_eq!(worker.shared.counters.outstanding_max.get(), 1);
    worker.do_due_tasks(Instant::now() + 2 * delay);
    assert_eq!(worker.table.state(page), PageState::Mapped);
    assert_eq!(worker.shared.counters.outstanding.get(), 0);
    assert!(worker.shared.failure.get().is_none());
}

#[test]
fn a_page_that_is_there_already_is_no_error_and_its_waiters_are_woken() {
    let Some(mut worker) = worker(StoreSpec::Memory) else {
        return;
    };
    worker.resolve(PageIndex(2));
    worker.resolve(PageIndex(2));
    assert_eq!(worker.shared.counters.messages_duplicate.get(), 1);
    assert!(worker.shared.failure.get().is_none());
}

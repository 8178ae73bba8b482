//! Pages that come and go while they are used.

use alloc::format;
use core::sync::atomic::{AtomicU64, Ordering};

use super::{Outcome, Test};
use crate::memory::Pages;
use crate::{ensure, evict, println, smp};

pub(super) const TESTS: &[Test] =
    &[Test { name: "first-touch", run: first_touch }, Test { name: "thrash", run: thrash }];

/// Four 2 MiB blocks, of which nothing else uses a page.
const FRESH: Pages = Pages::new(8 * 512, 4 * 512);

/// The first page of a block has no marker, the others have: all read as zeros, keep what is written, and
/// can be evicted again.
fn first_touch() -> Outcome {
    let step = 37;
    for page in (0..FRESH.count()).step_by(step) {
        let word = &FRESH.words(page)[(page % 512) as usize];
        let found = word.load(Ordering::SeqCst);
        ensure!(found == 0, "page {page} begins with {found:#x}");
        word.store(page + 1, Ordering::SeqCst);
    }
    evict::frames(FRESH.frames()).map_err(|why| format!("{why:?}"))?;
    for page in (0..FRESH.count()).step_by(step) {
        let found = FRESH.words(page)[(page % 512) as usize].load(Ordering::SeqCst);
        ensure!(found == page + 1, "page {page} has {found:#x}");
    }
    Ok(())
}

const PAGES: Pages = Pages::new(256, 4);
/// How often all pages are evicted.
const EVICTIONS: u64 = 500;
static LEFT: AtomicU64 = AtomicU64::new(0);

fn keep_evicting(_: u64) {
    while LEFT.fetch_sub(1, Ordering::SeqCst) > 1 {
        let _ = evict::frames(PAGES.frames());
    }
}

/// One processor counts in pages that the other has evicted: each may go between any two accesses.
fn thrash() -> Outcome {
    smp::start().map_err(|why| format!("{why:?}"))?;
    LEFT.store(EVICTIONS, Ordering::SeqCst);
    smp::give(keep_evicting, 0);
    let (mut wrong, mut round) = (0, 0);
    while LEFT.load(Ordering::SeqCst) > 0 {
        let page = round % PAGES.count();
        for word in [0, 511] {
            let before = PAGES.words(page)[word].fetch_add(1, Ordering::SeqCst);
            wrong += u64::from(before != round / PAGES.count());
        }
        round += 1;
    }
    smp::wait();
    println!("measured: thrash rounds={round} evictions={EVICTIONS} wrong={wrong}");
    ensure!(wrong == 0, "{wrong} words are wrong");
    Ok(())
}

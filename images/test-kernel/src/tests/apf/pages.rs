//! The pages that these tests evict and touch, and those for areas.

use alloc::format;
use core::sync::atomic::Ordering;

use crate::memory::{self, Pages};
use crate::tests::Outcome;
use crate::{cpu, ensure, evict};

/// The pages that are evicted and touched; each holds [`value`].
pub(super) const PAGES: Pages = Pages::new(2 * 512, 512);
/// Pages for areas.
pub(super) const AREAS: Pages = Pages::new(512 + 128, 64);

/// An area within the page, not at its begin.
pub(super) fn area(page: u64) -> u64 {
    AREAS.address(page) + 64 * (page % 63 + 1)
}

fn value(page: u64) -> u64 {
    0x5eed_0000 + page
}

/// Writes to pages of [`PAGES`] and has them evicted.
pub(super) fn evict(pages: core::ops::Range<u64>) -> Outcome {
    let count = pages.end - pages.start;
    for page in pages.clone() {
        PAGES.words(page)[7].store(value(page), Ordering::SeqCst);
    }
    let gone = evict::frames(pages.map(|page| PAGES.frame(page)));
    let gone = gone.map_err(|why| format!("{why:?}"))?;
    ensure!(u64::from(gone) == count, "{gone} of {count} pages were evicted");
    Ok(())
}

/// Loads from a page, and compares.
pub(super) fn check(page: u64) -> Outcome {
    let found = PAGES.words(page)[7].load(Ordering::SeqCst);
    ensure!(found == value(page), "page {page} has {found:#x}");
    Ok(())
}

/// Loads from a page with interrupts on; with [`SKIP`] it may be skipped.
pub(super) fn touch(page: u64) {
    interrupts_on();
    memory::load_or_skip(PAGES.address(page));
    cpu::interrupts_off();
}

/// Interrupts on, and out of the shadow of STI.
pub(super) fn interrupts_on() {
    cpu::interrupts_on();
    cpu::relax();
}

/// An exit to user space that does nothing.
pub(super) fn exit() {
    const NOBODY: u16 = 0x80;
    cpu::out8(NOBODY, 0);
}

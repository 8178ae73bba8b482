//! Having pages evicted by the VMM, through the paging port.

use core::sync::atomic::Ordering;

use nowait_wire::paging::{HEADER_BYTES, MAX_GFNS, PORT, Status, answer_offset, evict_header};

use crate::{boot, cpu, memory, multiboot};

/// The pages for requests, one for each processor: the first of the pages of tests.
const REQUESTS: memory::Pages = memory::Pages::new(0, cpu::MAX_CPUS as u64);
/// How many of the pages of tests are taken by them.
pub(crate) const REQUEST_PAGES: u64 = REQUESTS.count();

/// Why not everything was evicted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum EvictError {
    /// Nobody answers at the paging port.
    NoAnswer,
    /// The VMM refused, or failed.
    Refused(Status),
}

/// Has these frames evicted, as many in one request as fit, and returns how many of them are not in memory
/// then. Pages that this code needs itself come back at once.
pub(crate) fn frames(frames: impl IntoIterator<Item = u64>) -> Result<u32, EvictError> {
    let mut frames = frames.into_iter().peekable();
    let mut evicted = 0;
    while frames.peek().is_some() {
        let request = prepare(frames.by_ref().take(MAX_GFNS));
        cpu::out32(PORT, request);
        evicted += answer()?;
    }
    Ok(evicted)
}

/// How often [`until`] asks.
const TRIES: u32 = 100;

/// Has these frames evicted until `wanted` of them are out of memory, or it does not get further; returns
/// how many are. Right after its first touch a page may be on its way into KVM's page tables, and be
/// wanted back for it.
pub(crate) fn until(wanted: u64, range: core::ops::Range<u64>) -> Result<u64, EvictError> {
    let mut gone = 0;
    for _ in 0..TRIES {
        gone = u64::from(frames(range.clone())?);
        if gone >= wanted {
            break;
        }
    }
    Ok(gone)
}

/// Has all of RAM evicted: in the end, in one request, what the kernel itself consists of.
pub(crate) fn everything() -> Result<u32, EvictError> {
    let kernel = boot::kernel_frames();
    let low = 0..kernel.start;
    let high = kernel.end..multiboot::ram_end() / memory::PAGE_BYTES;
    Ok(frames(low.chain(high))? + frames(kernel)?)
}

/// Has the kernel evicted: its code, data, stacks and page tables.
pub(crate) fn kernel() -> Result<u32, EvictError> {
    frames(boot::kernel_frames())
}

/// Writes a request for these frames, of which there are at most [`MAX_GFNS`]; returns what is to be
/// written to the paging port.
pub(crate) fn prepare(frames: impl Iterator<Item = u64>) -> u32 {
    let page = REQUESTS.words(cpu::number() as u64);
    let mut count = 0;
    for (word, frame) in page[HEADER_BYTES / 8..].iter().zip(frames) {
        word.store(frame, Ordering::SeqCst);
        count += 1;
    }
    // There are never more than fit.
    let header = evict_header(count).unwrap_or_default();
    for (word, bytes) in page.iter().zip(header.as_chunks().0) {
        word.store(u64::from_le_bytes(*bytes), Ordering::SeqCst);
    }
    REQUESTS.frame(cpu::number() as u64) as u32
}

/// What came of this processor's last request: how many of its pages are not in memory.
pub(crate) fn answer() -> Result<u32, EvictError> {
    let page = REQUESTS.words(cpu::number() as u64);
    let answer = page[answer_offset() / 8].load(Ordering::SeqCst);
    match Status::from_u32(answer as u32) {
        Some(Status::Done) => Ok((answer >> 32) as u32),
        Some(Status::Pending) | None => Err(EvictError::NoAnswer),
        Some(status) => Err(EvictError::Refused(status)),
    }
}

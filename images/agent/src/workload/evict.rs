//! Evicting pages: which guest frames they lie in, and asking the VMM for it.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;

use nowait_wire::paging::{self, Request, Status};

use super::WorkloadError;
use crate::sys::{PAGE_BYTES, Pages, PagingPort};

/// Why an entry of `/proc/self/pagemap` names no frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NoFrame {
    /// The page is not in memory.
    Absent,
    /// The kernel hides frame numbers from this process.
    Hidden,
}

/// The frame number in an entry of `/proc/self/pagemap`
/// (Documentation/admin-guide/mm/pagemap.rst: bit 63 present, bit 62 swapped, bits 0-54 frame).
pub(super) fn decode_pagemap(entry: u64) -> Result<u64, NoFrame> {
    const PRESENT: u64 = 1 << 63;
    const SWAPPED: u64 = 1 << 62;
    const FRAME: u64 = (1 << 55) - 1;
    match entry & FRAME {
        _ if entry & PRESENT == 0 || entry & SWAPPED != 0 => Err(NoFrame::Absent),
        0 => Err(NoFrame::Hidden),
        frame => Ok(frame),
    }
}

/// The guest frame numbers of all pages, in their order.
fn frames(pages: &Pages) -> Result<Vec<u64>, WorkloadError> {
    let mut entries = vec![0; 8 * pages.len()];
    File::open("/proc/self/pagemap")
        .and_then(|file| {
            file.read_exact_at(&mut entries, (pages.address() / PAGE_BYTES * 8) as u64)
        })
        .map_err(WorkloadError::Pagemap)?;
    entries
        .chunks_exact(8)
        .enumerate()
        .map(|(page, entry)| {
            let entry = u64::from_le_bytes(entry.try_into().unwrap_or_default());
            decode_pagemap(entry).map_err(|why| WorkloadError::NoFrame { page, why })
        })
        .collect()
}

/// Has the VMM evict all these pages. They must not be touched between this and the run.
pub(super) fn evict(pages: &Pages) -> Result<(), WorkloadError> {
    let frames = frames(pages)?;
    let request_page = Pages::new(1).map_err(WorkloadError::Memory)?;
    // A write makes it a page of its own; process memory is locked, so it stays where it is.
    request_page.page(0)[0].store(1, Ordering::Relaxed);
    let gfn = self::frames(&request_page)?[0];
    let gfn = u32::try_from(gfn).map_err(|_| WorkloadError::HighFrame(gfn))?;
    let port = PagingPort::open().map_err(WorkloadError::Port)?;
    for batch in frames.chunks(paging::MAX_GFNS) {
        ask(&port, &request_page, gfn, batch)?;
    }
    Ok(())
}

fn ask(port: &PagingPort, page: &Pages, gfn: u32, batch: &[u64]) -> Result<(), WorkloadError> {
    let mut bytes = [0; paging::PAGE_BYTES];
    Request::Evict(batch.to_vec()).encode(&mut bytes).map_err(WorkloadError::Encode)?;
    for (word, value) in page.page(0).iter().zip(bytes.chunks_exact(8)) {
        let value = u64::from_le_bytes(value.try_into().unwrap_or_default());
        word.store(value, Ordering::SeqCst);
    }
    port.request(gfn);
    for (word, value) in page.page(0).iter().zip(bytes.chunks_exact_mut(8)) {
        value.copy_from_slice(&word.load(Ordering::SeqCst).to_le_bytes());
    }
    match paging::decode_answer(&bytes) {
        (Some(Status::Done), _) => Ok(()),
        (Some(Status::Pending), _) => Err(WorkloadError::NoAnswer),
        (status, done) => Err(WorkloadError::Refused {
            status: status.map_or("unknown".into(), |status| format!("{status:?}")),
            done,
            asked: batch.len(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pagemap_entries() {
        assert_eq!(decode_pagemap(0), Err(NoFrame::Absent));
        assert_eq!(decode_pagemap(0x1234), Err(NoFrame::Absent));
        assert_eq!(decode_pagemap(1 << 63), Err(NoFrame::Hidden));
        assert_eq!(decode_pagemap(0xc000_0000_0000_1234), Err(NoFrame::Absent));
        // Soft-dirty (55), exclusively mapped (56) and file (61) are no part of the frame.
        assert_eq!(decode_pagemap(0xa180_0000_0003_0039), Ok(0x3_0039));
        assert_eq!(decode_pagemap(!(1 << 62)), Ok((1 << 55) - 1));
    }
}

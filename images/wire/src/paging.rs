//! The paging port: how a guest asks the VMM to evict pages of its RAM.
//!
//! The guest fills one page of its RAM with a [`Request`], writes the page's guest frame number with
//! a 32-bit `OUT` to [`PORT`], and reads the status from the same page when the instruction has
//! completed. All fields are little-endian:
//!
//! ```text
//!   0   u64  MAGIC
//!   8   u32  operation
//!   12  u32  count of frame numbers, at most MAX_GFNS
//!   16  u32  status      written by the host
//!   20  u32  pages done  written by the host
//!   24  u64  reserved, 0
//!   32  u64  guest frame numbers, `count` of them
//! ```

use alloc::vec::Vec;
use core::time::Duration;

/// The I/O port of the paging request, 32 bits wide.
pub const PORT: u16 = 0x6e70;
/// The I/O port of marks, 32 bits wide: a guest writes how many milliseconds a run is to last at its start,
/// [`MARK_LEAD`] before its start, and 0 at its end. What the VMM tells of a run is from between the two.
pub const MARK_PORT: u16 = 0x6e74;
/// How long before the start of a run its mark comes, at least: before the guest lets its threads go, so that none of
/// them can touch anything earlier.
pub const MARK_LEAD: Duration = Duration::from_millis(9);
/// The size of a request: one page, in bytes.
pub const PAGE_BYTES: usize = 4096;
/// The first eight bytes of every request.
pub const MAGIC: u64 = u64::from_le_bytes(*b"nwpaging");
/// The largest number of guest frame numbers in one request.
pub const MAX_GFNS: usize = (PAGE_BYTES - HEADER_BYTES) / 8;

/// Where the frame numbers begin, in bytes.
pub const HEADER_BYTES: usize = 32;
const STATUS_OFFSET: usize = 16;

/// The operation: evict the listed pages to the store.
pub const OP_EVICT: u32 = 1;

/// What became of a request; the host writes it at offset 16.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Status {
    /// The host has not answered. The guest puts this value there before it asks.
    Pending = 0,
    /// All pages were evicted or were not resident anyway.
    Done = 1,
    /// The request is malformed: magic, operation or count.
    Malformed = 2,
    /// Some frame number lies outside guest RAM; nothing was done.
    OutOfRange = 3,
    /// The host failed; `done` says how many pages were evicted before.
    Failed = 4,
}

impl Status {
    /// The status with this number, if there is one.
    #[must_use]
    pub fn from_u32(value: u32) -> Option<Self> {
        [Self::Pending, Self::Done, Self::Malformed, Self::OutOfRange, Self::Failed]
            .into_iter()
            .find(|status| *status as u32 == value)
    }
}

/// Why a request page could not be decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// The first eight bytes are not [`MAGIC`].
    #[error("the paging request does not begin with its magic number")]
    Magic,
    /// The operation is unknown.
    #[error("paging operation {0} is unknown")]
    Operation(u32),
    /// More frame numbers than fit.
    #[error("{0} frame numbers in one paging request: at most {MAX_GFNS}")]
    Count(u32),
}

/// A decoded request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// Evict these guest frames.
    Evict(Vec<u64>),
}

impl Request {
    /// Decodes a request page.
    ///
    /// # Errors
    /// When the magic number, the operation or the count is wrong.
    pub fn decode(page: &[u8; PAGE_BYTES]) -> Result<Self, DecodeError> {
        if read_u64(page, 0) != MAGIC {
            return Err(DecodeError::Magic);
        }
        let (op, count) = (read_u32(page, 8), read_u32(page, 12));
        if op != OP_EVICT {
            return Err(DecodeError::Operation(op));
        }
        if count as usize > MAX_GFNS {
            return Err(DecodeError::Count(count));
        }
        let gfns = (0..count as usize).map(|i| read_u64(page, HEADER_BYTES + 8 * i)).collect();
        Ok(Self::Evict(gfns))
    }

    /// Writes the request into `page`, with the status [`Status::Pending`].
    ///
    /// # Errors
    /// When there are more than [`MAX_GFNS`] frame numbers.
    pub fn encode(&self, page: &mut [u8; PAGE_BYTES]) -> Result<(), DecodeError> {
        let Self::Evict(gfns) = self;
        let header = evict_header(gfns.len())?;
        page.fill(0);
        page[..HEADER_BYTES].copy_from_slice(&header);
        for (slot, gfn) in page[HEADER_BYTES..].as_chunks_mut().0.iter_mut().zip(gfns) {
            *slot = gfn.to_le_bytes();
        }
        Ok(())
    }
}

/// The first bytes of a request to evict `count` frames, with the status [`Status::Pending`]; for guests
/// that write the frame numbers behind it themselves.
///
/// # Errors
/// When there are more than [`MAX_GFNS`].
pub fn evict_header(count: usize) -> Result<[u8; HEADER_BYTES], DecodeError> {
    let words = u32::try_from(count).unwrap_or(u32::MAX);
    if count > MAX_GFNS {
        return Err(DecodeError::Count(words));
    }
    let mut header = [0; HEADER_BYTES];
    header[0..8].copy_from_slice(&MAGIC.to_le_bytes());
    header[8..12].copy_from_slice(&OP_EVICT.to_le_bytes());
    header[12..16].copy_from_slice(&words.to_le_bytes());
    Ok(header)
}

/// The host's answer: status and pages done, in the eight bytes that stand at [`answer_offset`].
#[must_use]
pub fn encode_answer(status: Status, done: u32) -> [u8; 8] {
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&(status as u32).to_le_bytes());
    bytes[4..].copy_from_slice(&done.to_le_bytes());
    bytes
}

/// Where in the request page the answer is written, in bytes.
#[must_use]
pub const fn answer_offset() -> usize {
    STATUS_OFFSET
}

/// Reads the host's answer out of a request page: the status, if it is a known one, and the pages
/// done.
#[must_use]
pub fn decode_answer(page: &[u8; PAGE_BYTES]) -> (Option<Status>, u32) {
    (Status::from_u32(read_u32(page, STATUS_OFFSET)), read_u32(page, STATUS_OFFSET + 4))
}

fn read_u32(page: &[u8; PAGE_BYTES], at: usize) -> u32 {
    let mut bytes = [0; 4];
    bytes.copy_from_slice(&page[at..at + 4]);
    u32::from_le_bytes(bytes)
}

fn read_u64(page: &[u8; PAGE_BYTES], at: usize) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&page[at..at + 8]);
    u64::from_le_bytes(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_request_comes_back_as_it_was(gfns in prop::collection::vec(any::<u64>(), 0..=MAX_GFNS)) {
            let request = Request::Evict(gfns);
            let mut page = [0xa5; PAGE_BYTES];
            request.encode(&mut page).unwrap();
            prop_assert_eq!(Request::decode(&page).unwrap(), request);
            prop_assert_eq!(decode_answer(&page), (Some(Status::Pending), 0));
        }

        #[test]
        fn random_pages_never_panic(bytes in prop::collection::vec(any::<u8>(), PAGE_BYTES), magic: bool) {
            let mut page: [u8; PAGE_BYTES] = bytes.try_into().unwrap();
            if magic {
                page[..8].copy_from_slice(&MAGIC.to_le_bytes());
            }
            let _ = Request::decode(&page);
            let _ = decode_answer(&page);
        }
    }

    #[test]
    fn too_many_frames_are_refused() {
        let mut page = [0; PAGE_BYTES];
        let request = Request::Evict(vec![0; MAX_GFNS + 1]);
        assert_eq!(request.encode(&mut page), Err(DecodeError::Count(MAX_GFNS as u32 + 1)));
    }

    #[test]
    fn the_answer_is_read_where_it_is_written() {
        let mut page = [0; PAGE_BYTES];
        let at = answer_offset();
        page[at..at + 8].copy_from_slice(&encode_answer(Status::Failed, 7));
        assert_eq!(decode_answer(&page), (Some(Status::Failed), 7));
    }
}

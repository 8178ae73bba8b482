//! Memory that is counted: a range of addresses whose pages come when they are written and go when
//! they are given back.
// Unsafe: an anonymous mapping, and references to its bytes.
#![allow(unsafe_code)]

use std::io;
use std::ops::{Deref, DerefMut, Range};
use std::ptr::{self, NonNull};
use std::slice;

use super::keep_private;
use crate::address::PAGE_SIZE;

/// Zeroed memory, page by page on demand. Not in core dumps, not in child processes, and without
/// huge pages, which would take more than was written.
#[derive(Debug)]
pub(crate) struct Arena {
    address: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping belongs to the arena alone and is reached through its references only, which
// the borrow checker keeps apart; nothing about it is tied to a thread.
unsafe impl Send for Arena {}
// SAFETY: a shared reference to the arena gives shared references to its bytes and nothing else.
unsafe impl Sync for Arena {}

impl Arena {
    /// Reserves `len` bytes of addresses, at least one.
    pub(crate) fn new(len: usize) -> io::Result<Self> {
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory that exists.
        let address = unsafe {
            libc::mmap(
                ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let address = NonNull::new(address.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        // From here on, an error unmaps.
        let arena = Self { address, len };
        keep_private(address.as_ptr() as usize, len)?;
        Ok(arena)
    }

    /// Gives a range of whole pages back to the host. It is all zeros from then on.
    pub(crate) fn give_back(&mut self, range: Range<usize>) {
        assert!(range.start <= range.end && range.end <= self.len, "outside the arena: {range:?}");
        assert!(range.start.is_multiple_of(PAGE_SIZE) && range.end.is_multiple_of(PAGE_SIZE));
        // SAFETY: the range lies in this mapping and has whole pages; `&mut self` says that nobody
        // has a reference to its bytes, and zeros are bytes like others.
        let result = unsafe {
            let start = self.address.as_ptr().add(range.start);
            libc::madvise(start.cast(), range.len(), libc::MADV_DONTNEED)
        };
        debug_assert_eq!(result, 0, "madvise: {}", io::Error::last_os_error());
    }
}

impl Deref for Arena {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the mapping is `len` bytes, readable, initialised (zeros or what was written), and
        // lives as long as the arena.
        unsafe { slice::from_raw_parts(self.address.as_ptr(), self.len) }
    }
}

impl DerefMut for Arena {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above; `&mut self` makes the reference the only one.
        unsafe { slice::from_raw_parts_mut(self.address.as_ptr(), self.len) }
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: the mapping was made in `new` with this length, and with the arena goes the last
        // reference to its bytes.
        unsafe { libc::munmap(self.address.as_ptr().cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_given_back_is_zero_again() {
        let mut arena = Arena::new(4 * PAGE_SIZE).unwrap();
        assert!(arena.iter().all(|byte| *byte == 0));
        arena.fill(7);
        arena.give_back(PAGE_SIZE..3 * PAGE_SIZE);
        let expected = |at: usize| if (PAGE_SIZE..3 * PAGE_SIZE).contains(&at) { 0 } else { 7 };
        assert!(arena.iter().enumerate().all(|(at, byte)| *byte == expected(at)));
        arena.give_back(0..0);
    }
}

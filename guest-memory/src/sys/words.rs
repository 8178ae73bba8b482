//! A large array of zeros whose untouched part costs no memory.
// Unsafe: an anonymous mapping is owned here and lent out as a slice. `Vec` does not do: it aborts
// when there is no room, and transparent huge pages would make one touched word cost 2 MiB.
#![allow(unsafe_code)]

use std::io;
use std::ptr::{self, NonNull};
use std::sync::atomic::AtomicU64;

/// `u64`s that are 0 until they are written, in an anonymous mapping of their own.
pub(crate) struct ZeroedWords {
    words: NonNull<AtomicU64>,
    len: usize,
}

// SAFETY: the mapping belongs to this value alone, as a Vec's memory would.
unsafe impl Send for ZeroedWords {}
// SAFETY: all that is lent out are atomics.
unsafe impl Sync for ZeroedWords {}

impl ZeroedWords {
    /// `len` zeros; `len` is not 0.
    pub(crate) fn new(len: usize) -> io::Result<Self> {
        let bytes = len
            .checked_mul(size_of::<u64>())
            .ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))?;
        // SAFETY: a new private mapping at an address of the kernel's choice touches no memory that
        // exists; a bad length is an error.
        let address = unsafe {
            libc::mmap(
                ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // Advice only: a kernel without huge pages refuses it, and need not be told.
        // SAFETY: the range is the mapping just made; the advice does not change its bytes.
        unsafe { libc::madvise(address, bytes, libc::MADV_NOHUGEPAGE) };
        let words = NonNull::new(address.cast()).ok_or_else(io::Error::last_os_error)?;
        Ok(Self { words, len })
    }

    /// All of them.
    pub(crate) fn cells(&self) -> &[AtomicU64] {
        // SAFETY: the mapping holds `len` words, page-aligned, initialised to 0 by the kernel, lives as
        // long as `self`, and is only ever accessed through these atomics.
        unsafe { std::slice::from_raw_parts(self.words.as_ptr(), self.len) }
    }
}

impl Drop for ZeroedWords {
    fn drop(&mut self) {
        // SAFETY: the mapping was made in `new` with this length, and no slice of it outlives `self`.
        unsafe { libc::munmap(self.words.as_ptr().cast(), self.len * size_of::<u64>()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::Ordering;

    #[test]
    fn words_are_zero_until_they_are_written() {
        let words = ZeroedWords::new(1 << 20).unwrap();
        words.cells()[(1 << 20) - 1].store(7, Ordering::Relaxed);
        assert_eq!(words.cells().iter().map(|word| word.load(Ordering::Relaxed)).sum::<u64>(), 7);
    }

    #[test]
    fn too_many_words_are_an_error() {
        assert!(ZeroedWords::new(usize::MAX).is_err());
        assert!(ZeroedWords::new(usize::MAX / 16).is_err());
    }
}

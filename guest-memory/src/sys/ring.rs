//! Batches of page reads and writes of a file in one system call, with io_uring.
// Unsafe: the kernel reads and writes memory whose addresses stand in the submission queue.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::AsRawFd;
use std::time::Duration;

use io_uring::{IoUring, opcode, types};

use crate::address::{PAGE_SIZE, PageBytes};

/// The most pages of one batch.
pub(crate) const RING_PAGES: usize = 64;
/// How long to wait before asking again when the kernel is short of memory.
const BUSY_PAUSE: Duration = Duration::from_millis(1);
/// How often to ask again.
const MAX_BUSY: usize = 1000;

/// A page as O_DIRECT wants it.
#[derive(Clone)]
#[repr(C, align(4096))]
pub(crate) struct AlignedPage(pub(crate) PageBytes);

/// The pages of one batch.
pub(crate) fn aligned_pages() -> Box<[AlignedPage]> {
    vec![AlignedPage([0; PAGE_SIZE]); RING_PAGES].into()
}

/// Which way the bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    /// From the file to the ring's pages.
    Read,
    /// From the ring's pages to the file.
    Write,
}

/// A ring and the pages that it reads to and writes from. The kernel is given addresses of these
/// pages only, and they are not freed before it is done with them.
pub(crate) struct Ring {
    ring: ManuallyDrop<IoUring>,
    pages: ManuallyDrop<Box<[AlignedPage]>>,
    in_flight: usize,
}

impl Ring {
    /// A ring for batches of [`RING_PAGES`] pages.
    pub(crate) fn new() -> io::Result<Self> {
        let ring = IoUring::new(RING_PAGES as u32)?;
        let (ring, pages) = (ManuallyDrop::new(ring), ManuallyDrop::new(aligned_pages()));
        Ok(Self { ring, pages, in_flight: 0 })
    }

    /// The pages, the first of which is the first of a batch.
    pub(crate) fn pages(&mut self) -> &mut [AlignedPage] {
        assert_eq!(self.in_flight, 0, "the kernel has these pages");
        &mut self.pages
    }

    /// Reads or writes one page at each of the offsets, and waits for all of them. The results are as
    /// of `preadv`: a length, or a negated error number.
    ///
    /// # Errors
    /// When the kernel does not take the batch, or does not say what came of it. The ring is of no
    /// more use then.
    pub(crate) fn run(
        &mut self,
        file: &File,
        direction: Direction,
        offsets: &[u64],
    ) -> io::Result<Vec<i32>> {
        assert!(self.in_flight == 0 && offsets.len() <= RING_PAGES);
        let fd = types::Fd(file.as_raw_fd());
        for ((index, page), offset) in (0..).zip(self.pages.iter_mut()).zip(offsets) {
            let (address, len) = (page.0.as_mut_ptr(), PAGE_SIZE as u32);
            let entry = match direction {
                Direction::Read => opcode::Read::new(fd, address, len).offset(*offset).build(),
                Direction::Write => opcode::Write::new(fd, address, len).offset(*offset).build(),
            };
            // SAFETY: the page belongs to this ring. Nobody gets a reference to it while something
            // is in flight (`pages`), and `drop` leaks it in that case. The file is borrowed until
            // the entry is submitted, and from then on the kernel holds it.
            let pushed = unsafe { self.ring.submission().push(&entry.user_data(index)) };
            pushed.map_err(io::Error::other)?;
            self.in_flight += 1;
        }
        let mut results = vec![-libc::EIO; offsets.len()];
        let mut busy = 0;
        while self.in_flight > 0 {
            match self.ring.submit_and_wait(self.in_flight) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if is_busy(&error) && busy < MAX_BUSY => {
                    busy += 1;
                    std::thread::sleep(BUSY_PAUSE);
                }
                Err(error) => return Err(error),
            }
            for completion in self.ring.completion() {
                results[completion.user_data() as usize] = completion.result();
                self.in_flight -= 1;
            }
        }
        Ok(results)
    }
}

fn is_busy(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY))
}

impl Drop for Ring {
    fn drop(&mut self) {
        if self.in_flight > 0 {
            // The kernel may still write to the pages: they are leaked with the ring.
            return;
        }
        // SAFETY: neither is used after this, for the ring is gone; nothing is in flight.
        unsafe {
            ManuallyDrop::drop(&mut self.ring);
            ManuallyDrop::drop(&mut self.pages);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::address::PAGE_BYTES;
    use crate::sys::memfd;

    #[test]
    fn a_batch_is_written_and_read_back() {
        let Ok(mut ring) = Ring::new() else {
            println!("skipped: io_uring is not permitted here");
            return;
        };
        let file = memfd::create(c"test", 0).unwrap();
        let offsets: Vec<u64> = (0..RING_PAGES as u64).map(|n| n * 2 * PAGE_BYTES).collect();
        for (n, page) in ring.pages().iter_mut().enumerate() {
            page.0.fill(n as u8 + 1);
        }
        let results = ring.run(&file, Direction::Write, &offsets).unwrap();
        assert_eq!(results, [PAGE_SIZE as i32; RING_PAGES]);
        ring.pages().fill(AlignedPage([0; PAGE_SIZE]));
        let backwards: Vec<u64> = offsets.into_iter().rev().chain([]).collect();
        let results = ring.run(&file, Direction::Read, &backwards).unwrap();
        assert_eq!(results, [PAGE_SIZE as i32; RING_PAGES]);
        for (n, page) in ring.pages().iter().rev().enumerate() {
            assert_eq!(page.0, [n as u8 + 1; PAGE_SIZE]);
        }
        // Beyond the end, and a file that cannot be read.
        assert_eq!(ring.run(&file, Direction::Read, &[1 << 40]).unwrap(), [0]);
        let closed = File::options().write(true).open("/dev/null").unwrap();
        assert_eq!(ring.run(&closed, Direction::Read, &[0]).unwrap(), [-libc::EBADF]);
    }
}

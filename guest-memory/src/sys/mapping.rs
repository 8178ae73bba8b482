//! The guest mapping: the one that KVM and its guest see.
// Unsafe: raw mappings. Nothing here ever makes a reference to the mapped bytes.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr;

use crate::address::{PAGE_SIZE, PageIndex, PageRun};

/// A shared mapping of the whole RAM file, page by page in the file's order. The VMM itself never
/// reads or writes it: addresses are handed to KVM and to userfaultfd only.
#[derive(Debug)]
pub(crate) struct GuestMapping {
    address: usize,
    len: usize,
}

impl GuestMapping {
    /// Maps the first `len` bytes of the RAM file.
    pub(crate) fn new(file: &File, len: usize) -> io::Result<Self> {
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory that exists.
        let address = unsafe {
            libc::mmap(
                ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
                file.as_raw_fd(),
                0,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let address = address as usize;
        // From here on, an error unmaps.
        let mapping = Self { address, len };
        keep_private(address, len)?;
        Ok(mapping)
    }

    /// The address of the first byte.
    pub(crate) fn address(&self) -> usize {
        self.address
    }

    /// The length in bytes.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Takes the pages out of the guest's page tables, and thereby out of KVM's. Their bytes stay in
    /// the RAM file, and when this returns no vCPU can change them any more: the next access of each
    /// is a fault.
    pub(crate) fn unmap(&self, run: PageRun) -> io::Result<()> {
        let (offset, len) = (run.first().file_offset() as usize, run.byte_len() as usize);
        assert!(offset + len <= self.len, "pages outside the guest mapping: {run:?}");
        // SAFETY: the range lies in this mapping, which is shared: nothing is lost, only page table
        // entries go. No reference to these bytes exists anywhere in this process.
        let result = unsafe {
            libc::madvise((self.address + offset) as *mut libc::c_void, len, libc::MADV_DONTNEED)
        };
        check(result)
    }

    /// The page at this address; `None` outside the mapping.
    pub(crate) fn page_at(&self, address: usize) -> Option<PageIndex> {
        let offset = address.checked_sub(self.address)?;
        if offset >= self.len {
            return None;
        }
        PageIndex::containing(offset as u64)
    }
}

impl Drop for GuestMapping {
    fn drop(&mut self) {
        // SAFETY: the mapping was made in `new` with this length and nobody holds a reference to its
        // bytes. KVM, if it still has a memslot here, is told by the kernel and faults from then on.
        unsafe { libc::munmap(self.address as *mut libc::c_void, self.len) };
    }
}

/// Keeps a mapping of guest RAM out of core dumps and child processes, where a hole would be read
/// as zeros behind the pager's back, and free of huge pages, which would bring in more than asked.
pub(crate) fn keep_private(address: usize, len: usize) -> io::Result<()> {
    for advice in [libc::MADV_DONTDUMP, libc::MADV_DONTFORK] {
        // SAFETY: neither advice changes a byte or an access right in this process, whatever the
        // range is.
        check(unsafe { libc::madvise(address as *mut libc::c_void, len, advice) })?;
    }
    // SAFETY: as above.
    let result = unsafe { libc::madvise(address as *mut libc::c_void, len, libc::MADV_NOHUGEPAGE) };
    match check(result) {
        // A kernel that was built without huge pages.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
        other => other,
    }
}

/// Makes the pages of a slice of the alias present, if the kernel can (Linux 5.14).
pub(crate) fn populate(slice: &vm_memory::VolatileSlice<'_>) {
    let guard = slice.ptr_guard_mut();
    let address = guard.as_ptr() as usize;
    let start = address & !(PAGE_SIZE - 1);
    // SAFETY: the slice lies in a mapping that it borrows, and mappings have whole pages; the advice
    // changes no byte. Errors are the writer's to meet.
    unsafe {
        libc::madvise(
            start as *mut libc::c_void,
            address + slice.len() - start,
            libc::MADV_POPULATE_WRITE,
        )
    };
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

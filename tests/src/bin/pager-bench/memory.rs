//! Memory that threads touch as vCPUs would, ours and that of the loops that we are compared with.
// Unsafe: mappings, and words in them that the kernel fills while they are read.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, AsRawFd, FromRawFd};
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result};
use guest_memory::{PAGE_BYTES, PAGE_SIZE, PageBytes, Pager};

/// Words of a page.
pub(crate) const PAGE_WORDS: usize = PAGE_SIZE / 8;

/// Pages that somebody else keeps mapped.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pages<'a> {
    base: usize,
    count: u32,
    of: PhantomData<&'a ()>,
}

impl<'a> Pages<'a> {
    /// The low RAM of a pager.
    pub(crate) fn of(pager: &'a Pager) -> Result<Self> {
        let low = pager.slots().into_iter().next().context("guest RAM has a first slot")?;
        let count = u32::try_from(low.len / PAGE_BYTES)?;
        Ok(Self { base: usize::try_from(low.hva)?, count, of: PhantomData })
    }

    /// The first word of a page.
    pub(crate) fn touch(&self, page: u32) -> u64 {
        self.words(page)[0].load(Ordering::Relaxed)
    }

    /// Writes all of a page.
    pub(crate) fn fill(&self, page: u32, bytes: &PageBytes) {
        for (word, bytes) in self.words(page).iter().zip(bytes.as_chunks().0) {
            word.store(u64::from_ne_bytes(*bytes), Ordering::Relaxed);
        }
    }

    fn words(&self, page: u32) -> &'a [AtomicU64; PAGE_WORDS] {
        assert!(page < self.count, "page {page} of {}", self.count);
        let address = self.base + page as usize * PAGE_SIZE;
        // SAFETY: the page lies in a mapping that lives as long as 'a, is aligned, and is accessed
        // atomically only, or by the kernel.
        unsafe { &*(address as *const [AtomicU64; PAGE_WORDS]) }
    }
}

/// A mapping of our own.
#[derive(Debug)]
pub(crate) struct Mapping {
    address: usize,
    pages: u32,
}

impl Mapping {
    /// Anonymous memory.
    pub(crate) fn anonymous(pages: u32) -> io::Result<Self> {
        Self::new(pages, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1)
    }

    /// A memory file.
    pub(crate) fn shared(file: &File, pages: u32) -> io::Result<Self> {
        Self::new(pages, libc::MAP_SHARED, file.as_fd().as_raw_fd())
    }

    fn new(pages: u32, flags: libc::c_int, fd: libc::c_int) -> io::Result<Self> {
        let len = pages as usize * PAGE_SIZE;
        let rights = libc::PROT_READ | libc::PROT_WRITE;
        let flags = flags | libc::MAP_NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory that exists.
        let address = unsafe { libc::mmap(ptr::null_mut(), len, rights, flags, fd, 0) };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // As guest RAM is; a kernel without huge pages refuses the advice and needs none.
        // SAFETY: the range is the mapping just made; the advice does not change its bytes.
        unsafe { libc::madvise(address, len, libc::MADV_NOHUGEPAGE) };
        Ok(Self { address: address as usize, pages })
    }

    /// The address of a page.
    pub(crate) fn at(&self, page: u32) -> *mut libc::c_void {
        (self.address + page as usize * PAGE_SIZE) as *mut libc::c_void
    }

    /// The length in bytes.
    pub(crate) fn len(&self) -> usize {
        self.pages as usize * PAGE_SIZE
    }

    /// All of its pages.
    pub(crate) fn pages(&self) -> Pages<'_> {
        Pages { base: self.address, count: self.pages, of: PhantomData }
    }

    /// Unmaps all pages of a memory file, which keeps them.
    pub(crate) fn unmap(&self) -> io::Result<()> {
        // SAFETY: the range is this mapping, which is shared: no byte is lost.
        match unsafe { libc::madvise(self.at(0), self.len(), libc::MADV_DONTNEED) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// The page that has an address.
    pub(crate) fn page_at(&self, address: *const libc::c_void) -> u32 {
        ((address as usize - self.address) / PAGE_SIZE) as u32
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping was made in `new` with this length; borrows of its pages have ended.
        unsafe { libc::munmap(self.address as *mut libc::c_void, self.len()) };
    }
}

/// A memory file of so many pages, all of it a hole.
pub(crate) fn memory_file(pages: u32) -> io::Result<File> {
    // SAFETY: the name is a C string; the call touches no other memory.
    let fd = unsafe { libc::memfd_create(c"pager-bench".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and nobody else has it.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(u64::from(pages) * PAGE_BYTES)?;
    Ok(file)
}

//! Pages for tests, and the functions that compilers call without being asked.
// Unsafe: raw copies, and access to pages by their address.
#![allow(unsafe_code)]

use core::sync::atomic::AtomicU64;

/// A page, in bytes.
pub(crate) const PAGE_BYTES: u64 = 4096;
/// Words of a page.
pub(crate) const WORDS: usize = 512;

/// Pages outside of the kernel that tests may do with as they like: from 8 MiB on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pages {
    first: u64,
    count: u64,
}

/// Where the pages of tests begin.
const TEST_PAGES: u64 = 8 << 20;

impl Pages {
    /// `count` pages, `offset` pages into the area for tests.
    pub(crate) const fn new(offset: u64, count: u64) -> Self {
        let pages = Self { first: TEST_PAGES / PAGE_BYTES + offset, count };
        assert!((pages.first + count) * PAGE_BYTES <= crate::boot::SMALL_PAGES_END);
        pages
    }

    /// How many.
    pub(crate) const fn count(&self) -> u64 {
        self.count
    }

    /// The address of one.
    pub(crate) fn address(&self, page: u64) -> u64 {
        assert!(page < self.count);
        (self.first + page) * PAGE_BYTES
    }

    /// The frame number of one.
    pub(crate) fn frame(&self, page: u64) -> u64 {
        self.address(page) / PAGE_BYTES
    }

    /// All frame numbers.
    pub(crate) fn frames(&self) -> core::ops::Range<u64> {
        self.first..self.first + self.count
    }

    /// The words of one page.
    pub(crate) fn words(&self, page: u64) -> &'static [AtomicU64; WORDS] {
        words(self.address(page))
    }
}

/// The words of the page at this address.
pub(crate) fn words(address: u64) -> &'static [AtomicU64; WORDS] {
    assert!(address.is_multiple_of(PAGE_BYTES));
    // SAFETY: everything below 4 GiB is mapped for ever, and what is there is only accessed as atomics,
    // by assembly, or by the host.
    unsafe { &*(address as *const [AtomicU64; WORDS]) }
}

/// Loads from an address. A hook for #PF may go on at the address in R15, behind the load.
pub(crate) fn load_or_skip(address: u64) {
    // SAFETY: the word is thrown away; a fault is the hook's to handle.
    unsafe {
        core::arch::asm!(
            "lea r15, [rip + 2f]",
            "mov {0}, [{0}]",
            "2:",
            inout(reg) address => _,
            out("r15") _,
            options(nostack, preserves_flags),
        );
    }
}

#[cfg(panic = "abort")]
mod called_by_compilers {
    //! In assembly, so that they are not compiled to calls of themselves.

    use core::arch::asm;

    #[unsafe(no_mangle)]
    unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
        // SAFETY: the caller's promise: two ranges that do not overlap.
        unsafe {
            asm!("rep movsb", inout("rdi") to => _, inout("rsi") from => _, inout("rcx") len => _,
                options(nostack, preserves_flags));
        }
        to
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
        if (to as usize).wrapping_sub(from as usize) >= len {
            // SAFETY: forwards, nothing is overwritten before it is read.
            return unsafe { memcpy(to, from, len) };
        }
        // SAFETY: the caller's promise; backwards from the last byte, and `len` is not 0 here.
        unsafe {
            asm!("std; rep movsb; cld", inout("rdi") to.add(len - 1) => _,
                inout("rsi") from.add(len - 1) => _, inout("rcx") len => _, options(nostack));
        }
        to
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn memset(to: *mut u8, byte: i32, len: usize) -> *mut u8 {
        // SAFETY: the caller's promise: a range that may be written.
        unsafe {
            asm!("rep stosb", inout("rdi") to => _, in("al") byte as u8, inout("rcx") len => _,
                options(nostack, preserves_flags));
        }
        to
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn memcmp(a: *const u8, b: *const u8, len: usize) -> i32 {
        for at in 0..len {
            // SAFETY: the caller's promise: two ranges of this length; volatile, so that this loop does
            // not become a call of itself.
            let (a, b) = unsafe { (a.add(at).read_volatile(), b.add(at).read_volatile()) };
            if a != b {
                return i32::from(a) - i32::from(b);
            }
        }
        0
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn bcmp(a: *const u8, b: *const u8, len: usize) -> i32 {
        // SAFETY: as above.
        unsafe { memcmp(a, b, len) }
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn strlen(text: *const u8) -> usize {
        let mut len = 0;
        // SAFETY: the caller's promise: a string that ends with 0.
        while unsafe { text.add(len).read_volatile() } != 0 {
            len += 1;
        }
        len
    }

    // The precompiled core names it in tables for unwinding, which are dropped.
    #[unsafe(no_mangle)]
    extern "C" fn rust_eh_personality() {}
}

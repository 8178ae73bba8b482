//! The allocator: a heap that only grows. A kernel that runs a few tests and ends needs no more.
// Unsafe: GlobalAlloc is an unsafe trait.
#![allow(unsafe_code)]
#![cfg(panic = "abort")]

use core::alloc::{GlobalAlloc, Layout};
use core::cell::UnsafeCell;
use core::ptr;
use core::sync::atomic::{AtomicUsize, Ordering};

/// In bytes.
const HEAP_BYTES: usize = 256 << 10;

#[repr(C, align(4096))]
struct Heap {
    bytes: UnsafeCell<[u8; HEAP_BYTES]>,
    used: AtomicUsize,
}

// SAFETY: `used` hands each byte out once.
unsafe impl Sync for Heap {}

#[global_allocator]
static HEAP: Heap = Heap { bytes: UnsafeCell::new([0; HEAP_BYTES]), used: AtomicUsize::new(0) };

// SAFETY: every allocation is a part of `bytes` of its own, aligned as asked for up to a page.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let mut start = 0;
        let taken = self.used.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |used| {
            start = used.next_multiple_of(layout.align());
            let end = start.checked_add(layout.size())?;
            (end <= HEAP_BYTES).then_some(end)
        });
        match taken {
            // SAFETY: start is inside.
            Ok(_) => unsafe { self.bytes.get().cast::<u8>().add(start) },
            Err(_) => ptr::null_mut(),
        }
    }

    unsafe fn dealloc(&self, _: *mut u8, _: Layout) {}
}

//! One page to fewer bytes and back.

use std::cell::RefCell;

use lz4_flex::block::{self, CompressTable};

use super::slabs::MAX_OBJECT_BYTES;
use crate::address::{PAGE_SIZE, PageBytes};

/// A buffer for what a page becomes.
pub(super) type Packed = [u8; MAX_OBJECT_BYTES];

/// What LZ4 may need for a page that does not compress (its documented bound, rounded up).
const SCRATCH_BYTES: usize = PAGE_SIZE + PAGE_SIZE / 8 + 64;

struct Scratch {
    table: CompressTable,
    output: [u8; SCRATCH_BYTES],
}

thread_local! {
    static SCRATCH: RefCell<Box<Scratch>> = RefCell::new(Box::new(Scratch {
        table: CompressTable::small(),
        output: [0; SCRATCH_BYTES],
    }));
}

/// Compresses a page and says how many bytes it became; `None` when it does not get small enough.
pub(super) fn compress(page: &PageBytes, packed: &mut Packed) -> Option<usize> {
    SCRATCH.with_borrow_mut(|scratch| {
        let Scratch { table, output } = &mut **scratch;
        let len = block::compress_into_with_table(page, output, table).ok()?;
        packed.get_mut(..len)?.copy_from_slice(&output[..len]);
        Some(len)
    })
}

/// The bytes are not those of a page.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Corrupt;

/// The page that `packed` was.
pub(super) fn decompress(packed: &[u8], page: &mut PageBytes) -> Result<(), Corrupt> {
    match block::decompress_into(packed, page) {
        Ok(PAGE_SIZE) => Ok(()),
        _ => Err(Corrupt),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stores::testing;
    use proptest::prelude::*;

    #[test]
    fn the_scratch_is_large_enough() {
        assert!(block::get_maximum_output_size(PAGE_SIZE) <= SCRATCH_BYTES);
    }

    proptest! {
        #[test]
        fn pages_come_back(seed: u64) {
            let page = testing::page(seed);
            let mut packed = [0; MAX_OBJECT_BYTES];
            let len = compress(&page, &mut packed);
            prop_assert_eq!(len.is_none(), seed % 16 >= 10, "random bytes do not compress");
            if let Some(len) = len {
                let mut back = [1; PAGE_SIZE];
                prop_assert_eq!(decompress(&packed[..len], &mut back), Ok(()));
                prop_assert_eq!(back, page);
            }
        }

        #[test]
        fn any_bytes_give_a_verdict(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = decompress(&bytes, &mut [0; PAGE_SIZE]);
        }
    }
}

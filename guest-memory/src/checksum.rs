//! The checksum that goes with every stored page.

use xxhash_rust::xxh3::xxh3_64;

use crate::address::PageBytes;

/// XXH3, 64 bits (<https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md>). It finds what a
/// medium damages; it is no defence against who forges pages.
pub(crate) fn checksum(page: &PageBytes) -> u64 {
    xxh3_64(page)
}

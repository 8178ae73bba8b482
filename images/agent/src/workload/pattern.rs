//! What the pages hold and the order in which they are touched: pure functions of a seed, so that
//! a run can be repeated and a wrong byte is found.

use std::hint::black_box;
use std::sync::atomic::Ordering;

use crate::sys::{PAGE_BYTES, PAGE_WORDS, Pages};

/// Seeds the content of the pages.
const CONTENT_SEED: u64 = 0x6e6f_7761_6974_0001;
/// Seeds the order of the touches.
const ORDER_SEED: u64 = 0x6e6f_7761_6974_0002;
/// Seeds the file that `read(2)` copies from.
const FILE_SEED: u64 = 0x6e6f_7761_6974_0003;

/// The words of a page that compresses, which are there again and again: lz4 makes 0.6 KiB of it.
const PERIOD_WORDS: usize = 64;
/// Where in a page the first `read(2)` writes, in bytes: a multiple of 8.
const COPY_AT_BYTES: usize = 128;
/// How much `read(2)` writes, in bytes: a multiple of 8.
pub(super) const COPY_BYTES: usize = 64;
/// The size of the file that `read(2)` copies from, in bytes.
const FILE_BYTES: usize = 64 * 1024;

/// The generator xorshift64* (Vigna, "An experimental exploration of Marsaglia's xorshift
/// generators, scrambled", 2016).
#[derive(Clone)]
pub(super) struct Xorshift(u64);

impl Xorshift {
    /// A generator for one stream of a seed.
    pub(super) fn new(seed: u64, stream: u64) -> Self {
        // Spread neighbouring streams over the state space; the state must not be 0.
        let state = (seed ^ stream.wrapping_mul(0x9e37_79b9_7f4a_7c15)).rotate_left(29);
        Self(state.max(1))
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
}

fn words(seed: u64, stream: u64) -> impl Iterator<Item = u64> + Clone {
    let mut generator = Xorshift::new(seed, stream);
    std::iter::repeat_with(move || generator.next())
}

/// How many of 100 pages compress well; the rest does not compress at all. A store has something for each
/// of its tiers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Compressible(pub(super) u8);

/// Odd, so that the pages which compress are spread over every 100.
const SPREAD: usize = 61;

impl Compressible {
    fn page(self, index: usize) -> bool {
        index.wrapping_mul(SPREAD) % 100 < usize::from(self.0)
    }
}

/// The words that a page holds.
pub(super) fn page_words(index: usize, share: Compressible) -> impl Iterator<Item = u64> {
    let distinct = if share.page(index) { PERIOD_WORDS } else { PAGE_WORDS };
    words(CONTENT_SEED, index as u64).take(distinct).cycle().take(PAGE_WORDS)
}

/// What `read(2)` has put into a page.
#[derive(Clone, Copy)]
pub(super) struct Copied<'a> {
    /// Where it begins, in bytes.
    pub(super) at_bytes: usize,
    /// [`COPY_BYTES`] bytes.
    pub(super) bytes: &'a [u8],
}

impl Copied<'_> {
    /// The page's word with this number, if it is one of these.
    fn word(&self, at: usize) -> Option<u64> {
        let bytes = self.bytes.chunks_exact(8).nth(at.checked_sub(self.at_bytes / 8)?)?;
        Some(u64::from_le_bytes(bytes.try_into().unwrap_or_default()))
    }
}

/// Fills every page with its pattern.
pub(super) fn fill(pages: &Pages, share: Compressible) {
    for index in 0..pages.len() {
        for (word, value) in pages.page(index).iter().zip(page_words(index, share)) {
            word.store(value, Ordering::Relaxed);
        }
    }
}

/// Whether a page holds those bytes where `read(2)` put them and its pattern everywhere else. Always
/// reads the whole page.
pub(super) fn verify(
    pages: &Pages,
    share: Compressible,
    index: usize,
    copied: &[Copied<'_>],
) -> bool {
    let mut wrong = 0_usize;
    let words = page_words(index, share);
    for (at, (word, pattern)) in pages.page(index).iter().zip(words).enumerate() {
        let expected = copied.iter().find_map(|copied| copied.word(at)).unwrap_or(pattern);
        // The optimiser must not conclude what a page holds from what was once written to it.
        if black_box(word.load(Ordering::Relaxed)) != expected {
            wrong += 1;
        }
    }
    wrong == 0
}

/// The content of the file that `read(2)` copies from.
pub(super) fn file_content() -> Vec<u8> {
    words(FILE_SEED, 0).take(FILE_BYTES / 8).flat_map(u64::to_le_bytes).collect()
}

/// Where in that file the bytes for one version of one page begin.
pub(super) fn file_offset(index: usize, version: u32) -> usize {
    // An odd factor: neighbouring versions of a page differ, and of neighbouring pages, too.
    (index + 37 * version as usize) * COPY_BYTES % FILE_BYTES
}

/// Where in a page that version goes: two places take turns, so that a page that came back as it was
/// before the last copy is found out.
pub(super) fn copy_at_bytes(version: u32) -> usize {
    COPY_AT_BYTES + (version % 2) as usize * COPY_BYTES
}

/// The order in which pages are touched: a permutation (Fisher and Yates), always the same for the
/// same number of pages, so that neighbours in memory are not neighbours in time.
pub(super) fn order(pages: u32) -> Vec<u32> {
    let mut order: Vec<u32> = (0..pages).collect();
    let mut generator = Xorshift::new(ORDER_SEED, u64::from(pages));
    for last in (1..order.len()).rev() {
        let other = generator.next() % (last as u64 + 1);
        order.swap(last, other as usize);
    }
    order
}

const _: () = assert!(COPY_AT_BYTES.is_multiple_of(8) && COPY_BYTES.is_multiple_of(8));
const _: () = assert!(COPY_AT_BYTES + 2 * COPY_BYTES <= PAGE_BYTES);
const _: () = assert!(FILE_BYTES.is_multiple_of(COPY_BYTES));

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    const HALF: Compressible = Compressible(50);

    fn verify(pages: &Pages, index: usize, copied: &[Copied<'_>]) -> bool {
        super::verify(pages, HALF, index, copied)
    }

    fn fill(pages: &Pages) {
        super::fill(pages, HALF);
    }

    #[test]
    fn every_page_has_its_own_pattern() {
        let pages: HashSet<Vec<u64>> = (0..4096).map(|i| page_words(i, HALF).collect()).collect();
        assert_eq!(pages.len(), 4096);
        assert!(pages.iter().all(|page| page.len() == PAGE_WORDS));
        let first: HashSet<u64> = pages.iter().map(|page| page[0]).collect();
        assert_eq!(first.len(), 4096);
    }

    #[test]
    fn as_many_pages_repeat_themselves_as_are_asked_for() {
        for percent in [0, 10, 50, 90, 100] {
            let repeats = |index: &usize| {
                let words: HashSet<u64> = page_words(*index, Compressible(percent)).collect();
                words.len() == PERIOD_WORDS
            };
            let repeating = (0..200).filter(repeats).count();
            assert_eq!(repeating, 2 * usize::from(percent));
        }
    }

    #[test]
    fn the_order_is_a_permutation_and_shuffled() {
        for pages in [1, 2, 3, 1000] {
            let order = order(pages);
            let mut sorted = order.clone();
            sorted.sort_unstable();
            assert!(sorted.into_iter().eq(0..pages));
            assert_eq!(order, super::order(pages));
        }
        let neighbours = order(1000).windows(2).filter(|w| w[0].abs_diff(w[1]) == 1).count();
        assert!(neighbours < 20, "{neighbours} neighbours");
    }

    #[test]
    fn one_wrong_bit_is_seen_wherever_it_is() {
        let pages = Pages::new(3).unwrap();
        fill(&pages);
        assert!((0..3).all(|index| verify(&pages, index, &[])));
        for at in [0, 16, 23, 24, PAGE_WORDS - 1] {
            let word = &pages.page(1)[at];
            word.fetch_xor(1 << 63, Ordering::Relaxed);
            assert!(!verify(&pages, 1, &[]), "word {at}");
            assert!(verify(&pages, 0, &[]) && verify(&pages, 2, &[]));
            word.fetch_xor(1 << 63, Ordering::Relaxed);
        }
    }

    #[test]
    fn copied_bytes_are_expected_where_they_were_put_and_nowhere_else() {
        use std::io::Write;
        let pages = Pages::new(2).unwrap();
        fill(&pages);
        let content = file_content();
        let mut file = crate::sys::memory_file("test").unwrap();
        file.write_all(&content).unwrap();
        let copied = |version| {
            let (offset, at_bytes) = (file_offset(1, version), copy_at_bytes(version));
            (offset, Copied { at_bytes, bytes: &content[offset..offset + COPY_BYTES] })
        };
        let mut before = Vec::new();
        for version in [1, 2, 3] {
            let (offset, new) = copied(version);
            let all = [&[new], &before[..]].concat();
            assert!(!verify(&pages, 1, &all));
            let read = pages.read_file_into(&file, offset as u64, 1, new.at_bytes, COPY_BYTES);
            assert_eq!(read.unwrap(), COPY_BYTES);
            assert!(verify(&pages, 1, &all));
            assert!(!verify(&pages, 1, &[]) && !verify(&pages, 1, &before));
            before = vec![new];
        }
        assert!(verify(&pages, 0, &[]));
        pages.page(1)[40].fetch_xor(1, Ordering::Relaxed);
        assert!(!verify(&pages, 1, &[copied(3).1, copied(2).1]));
    }

    #[test]
    fn a_read_past_the_end_of_a_page_is_refused() {
        let pages = Pages::new(1).unwrap();
        let file = crate::sys::memory_file("test").unwrap();
        assert!(pages.read_file_into(&file, 0, 0, PAGE_BYTES, 1).is_err());
        assert!(pages.read_file_into(&file, 0, 0, usize::MAX, 2).is_err());
    }
}

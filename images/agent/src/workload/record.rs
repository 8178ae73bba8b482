//! Which pages the threads of a run touched, in one order for all of them.

use std::sync::atomic::{AtomicU16, AtomicUsize, Ordering};

/// Room for a number of touches; later ones are not kept.
pub(super) struct Record {
    pages: Vec<AtomicU16>,
    touched: AtomicUsize,
}

impl Record {
    /// Nothing yet.
    pub(super) fn new(touches: u32) -> Self {
        let pages = std::iter::repeat_with(|| AtomicU16::new(0)).take(touches as usize).collect();
        Self { pages, touched: AtomicUsize::new(0) }
    }

    /// A page is touched now.
    pub(super) fn touch(&self, page: usize) {
        let at = self.touched.fetch_add(1, Ordering::Relaxed);
        if let Some(place) = self.pages.get(at) {
            // A buffer has at most 65536 pages.
            place.store(page as u16, Ordering::Relaxed);
        }
    }

    /// The touches, two bytes each, when all threads have ended.
    pub(super) fn bytes(&self) -> Vec<u8> {
        let touched = self.touched.load(Ordering::Relaxed).min(self.pages.len());
        self.pages[..touched]
            .iter()
            .flat_map(|page| page.load(Ordering::Relaxed).to_le_bytes())
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::Record;

    #[test]
    fn the_first_touches_are_kept_in_their_order() {
        let record = Record::new(3);
        assert!(record.bytes().is_empty());
        [0x102, 7, 65_535, 9].into_iter().for_each(|page| record.touch(page));
        assert_eq!(record.bytes(), [2, 1, 7, 0, 0xff, 0xff]);
    }
}

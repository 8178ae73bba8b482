//! The policy's words and the four FIFO lists that are threaded through them: mapped and idle, each
//! for the small and the main queue.

use std::io;
use std::sync::atomic::Ordering;

use super::word::{MAX_PAGES, Place, Queue, Word};
use crate::address::PageIndex;
use crate::sys::ZeroedWords;

/// A list's ends; pages enter at the tail.
#[derive(Clone, Copy, Default)]
struct Ends {
    head: Option<PageIndex>,
    tail: Option<PageIndex>,
    len: u32,
}

/// All pages' words and the lists.
pub(super) struct Lists {
    words: ZeroedWords,
    pages: u32,
    ends: [Ends; 4],
}

impl Lists {
    pub(super) fn new(pages: u32) -> io::Result<Self> {
        if pages > MAX_PAGES {
            let message = format!(
                "the eviction policy cannot keep {pages} pages: give the guest at most {MAX_PAGES}"
            );
            return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
        }
        let words = ZeroedWords::new(pages.max(1) as usize)?;
        Ok(Self { words, pages, ends: [Ends::default(); 4] })
    }

    /// The number of pages that there are.
    pub(super) const fn pages(&self) -> u32 {
        self.pages
    }

    /// A page's word; a page beyond the last one is Out for ever.
    pub(super) fn word(&self, page: PageIndex) -> Word {
        self.words
            .cells()
            .get(page.0 as usize)
            .map_or(Word::OUT, |word| Word(word.load(Ordering::Relaxed)))
    }

    /// The number of pages in a list; 0 for places that have none.
    pub(super) fn len(&self, place: Place, queue: Queue) -> u32 {
        index(place, queue).map_or(0, |list| self.ends[list].len)
    }

    /// The page that has been in a list for longest.
    pub(super) fn head(&self, place: Place, queue: Queue) -> Option<PageIndex> {
        index(place, queue).and_then(|list| self.ends[list].head)
    }

    /// Takes the page out of its list, if it is in one, and gives it another word: at the tail of
    /// that word's list, if it has one. `word` is fresh: it has no links yet. A page beyond the last
    /// one is ignored.
    pub(super) fn put(&mut self, page: PageIndex, word: Word) {
        if page.0 >= self.pages || word == self.word(page) {
            return;
        }
        self.unlink(page);
        match index(word.place(), word.queue()) {
            None => self.write(page, word),
            Some(list) => {
                let old_tail = self.ends[list].tail.replace(page);
                self.ends[list].len += 1;
                self.write(page, word.with_prev(old_tail).with_next(None));
                match old_tail {
                    None => self.ends[list].head = Some(page),
                    Some(tail) => self.write(tail, self.word(tail).with_next(Some(page))),
                }
            }
        }
    }

    fn unlink(&mut self, page: PageIndex) {
        let word = self.word(page);
        let Some(list) = index(word.place(), word.queue()) else {
            return;
        };
        let (prev, next) = (word.prev(), word.next());
        match prev {
            None => self.ends[list].head = next,
            Some(prev) => self.write(prev, self.word(prev).with_next(next)),
        }
        match next {
            None => self.ends[list].tail = prev,
            Some(next) => self.write(next, self.word(next).with_prev(prev)),
        }
        self.ends[list].len -= 1;
    }

    /// Walks all lists both ways; every page that it met. For tests.
    #[cfg(test)]
    pub(super) fn check(&self) -> Vec<PageIndex> {
        let mut pages = Vec::new();
        for ends in self.ends {
            let start = pages.len();
            pages.extend(std::iter::successors(ends.head, |page| self.word(*page).next()));
            let back: Vec<_> =
                std::iter::successors(ends.tail, |page| self.word(*page).prev()).collect();
            assert!(pages[start..].iter().eq(back.iter().rev()), "the links do not agree");
            assert_eq!(back.len(), ends.len as usize);
        }
        pages
    }

    fn write(&mut self, page: PageIndex, word: Word) {
        if let Some(entry) = self.words.cells().get(page.0 as usize) {
            entry.store(word.0, Ordering::Relaxed);
        }
    }
}

const fn index(place: Place, queue: Queue) -> Option<usize> {
    match (place, queue) {
        (Place::Mapped, Queue::Small) => Some(0),
        (Place::Mapped, Queue::Main) => Some(1),
        (Place::Idle, Queue::Small) => Some(2),
        (Place::Idle, Queue::Main) => Some(3),
        _ => None,
    }
}

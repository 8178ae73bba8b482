//! Pages through all of their lives, in any order: a real userfaultfd and a real memory file, but one
//! thread. A script plays the guest, the workers, the evictor and the host; while the store reads or
//! writes, the script goes on, so that everything happens in the middle of everything else.
//!
//! The oracle: every byte read is the byte last written, a page that the pager calls mapped is mapped,
//! everybody who waits is told once, and in the end no page, slot or piece of room is missing.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Duration;

use super::core::Core;
use super::first::{First, Source};
use super::work::{Work, Workers};
use super::{Fault, PagerConfig, PagerError};
use crate::address::{PAGE_BYTES, PAGE_SIZE, PageBytes, PageIndex, PageRun};
use crate::layout::RamLayout;
use crate::pass::{MayWait, NoWait};
use crate::ram::GuestRam;
use crate::stores::testing::{self, Switch};
use crate::stores::{Read, Slot, Store, StoreError, TierReport, Write};
use crate::waiters::{PageEnd, Waiter, Wake};
use crate::word::{OnPin, PageState, PageWord};

/// Pages of RAM.
const PAGES: u32 = 64;
/// The resident limit at first, in pages.
const LIMIT_PAGES: u64 = 40;
/// What the store keeps compressed in memory, in bytes.
const COMPRESSED_BYTES: u64 = 48 << 10;
/// Pages of one block of fault-around.
const AROUND_PAGES: u32 = 4;
/// Work that waits for a worker, at most.
const QUEUE: usize = 32;
/// How deep steps are nested within the store's operations.
const MAX_DEPTH: u32 = 3;
/// Contents that pages are written with, all zero the first.
const CONTENTS: usize = 48;
/// How often what is left is done in the end before it counts as endless.
const LAST_ROUNDS: usize = 2000;

/// What became of a script.
#[derive(Debug, PartialEq, Eq)]
#[must_use]
pub enum Ran {
    /// It was played to its end.
    All,
    /// There is no userfaultfd here; why.
    Nothing(String),
}

/// Plays a script.
///
/// # Panics
/// When the oracle is not content.
pub fn page_lives(bytes: &[u8]) -> Ran {
    let bed = match Bed::new(bytes) {
        Ok(bed) => bed,
        Err(PagerError::Userfault(error)) => return Ran::Nothing(error.to_string()),
        Err(error) => panic!("{error}"),
    };
    while bed.step() {}
    bed.end();
    Ran::All
}

/// The machine, with nobody in it but the script.
struct Bed {
    core: Arc<Core>,
    queue: Arc<Queue>,
    told: Arc<Told>,
    switch: Switch,
    /// Of this process: whether a page is mapped, and its bytes where the guest has them.
    pagemap: File,
    memory: File,
    script: Vec<u8>,
    at: AtomicUsize,
    /// How many of the store's operations are under way.
    depth: AtomicU32,
    known: Mutex<Known>,
}

/// What the pages hold, and who waits.
#[derive(Default)]
struct Known {
    /// For each page the number of its content.
    contents: Vec<usize>,
    pins: Vec<PageIndex>,
    /// How many waits the pager has taken on.
    waits: u64,
}

/// Works that wait for a worker.
#[derive(Default)]
struct Queue {
    works: Mutex<Vec<Work>>,
    refuses: AtomicBool,
}

impl Workers for Queue {
    fn submit(&self, work: Work, _: Duration) -> Result<(), Work> {
        let mut works = lock(&self.works);
        if works.len() >= QUEUE || self.refuses.load(Ordering::Relaxed) {
            drop(works);
            return Err(work);
        }
        works.push(work);
        Ok(())
    }

    fn promote(&self, _: u64) {}
}

/// Counts who was told.
#[derive(Default)]
struct Told(Mutex<HashMap<u64, u32>>);

impl Wake for Told {
    fn wake(&self, token: u64, end: PageEnd) {
        assert_eq!(end, PageEnd::Ready, "nothing is lost here");
        *lock(&self.0).entry(token).or_default() += 1;
    }
}

/// A store in whose operations other things happen.
struct Meanwhile {
    store: Arc<dyn Store>,
    steps: Arc<OnceLock<Steps>>,
}

type Steps = Box<dyn Fn() + Send + Sync>;

impl Meanwhile {
    fn meanwhile(&self) {
        if let Some(steps) = self.steps.get() {
            steps();
        }
    }
}

impl Store for Meanwhile {
    fn read_now(
        &self,
        pass: &NoWait,
        slot: Slot,
        page: &mut PageBytes,
    ) -> Result<bool, StoreError> {
        self.store.read_now(pass, slot, page)
    }

    fn at_hand(&self, slot: Slot) -> bool {
        self.store.at_hand(slot)
    }

    fn read(&self, pass: &MayWait, reads: &mut [Read<'_>]) {
        self.meanwhile();
        self.store.read(pass, reads);
        self.meanwhile();
    }

    fn write(&self, pass: &MayWait, writes: &mut [Write<'_>]) {
        self.meanwhile();
        self.store.write(pass, writes);
        self.meanwhile();
    }

    fn free(&self, slot: Slot) -> Result<(), StoreError> {
        self.store.free(slot)
    }

    fn expected_read(&self) -> Duration {
        self.store.expected_read()
    }

    fn memory_bytes(&self) -> u64 {
        self.store.memory_bytes()
    }

    fn report(&self) -> Vec<TierReport> {
        self.store.report()
    }

    fn close(&self) {
        self.store.close();
    }
}

impl Bed {
    fn new(script: &[u8]) -> Result<Arc<Self>, PagerError> {
        let steps = Arc::<OnceLock<Steps>>::default();
        let meanwhile =
            |store| -> Arc<dyn Store> { Arc::new(Meanwhile { store, steps: Arc::clone(&steps) }) };
        let (behind, switch) = testing::switchable(testing::open("raw+memory")?);
        let store = meanwhile(testing::compressed_before(COMPRESSED_BYTES, meanwhile(behind))?);
        let config = PagerConfig {
            fault_around_bytes: u64::from(AROUND_PAGES) * PAGE_BYTES,
            resident_limit_bytes: Some(super::MIN_RESIDENT_LIMIT_BYTES),
            markers: script.first().is_some_and(|byte| byte & 1 == 1),
            ..PagerConfig::default()
        };
        let layout = RamLayout::new(u64::from(PAGES) * PAGE_BYTES).expect("a small guest");
        let queue = Arc::<Queue>::default();
        let workers: Arc<dyn Workers> = Arc::<Queue>::clone(&queue);
        let ram = GuestRam::new(&layout).expect("a memory file");
        let core = Arc::new(ram.prepare(&config, workers, store)?);
        core.set_limit(Some(LIMIT_PAGES * PAGE_BYTES));
        let open = |path: &str| File::options().read(true).write(path.ends_with("mem")).open(path);
        let bed = Arc::new(Self {
            core,
            queue,
            told: Arc::default(),
            switch,
            pagemap: open("/proc/self/pagemap").expect("a page map"),
            memory: open("/proc/self/mem").expect("one's own memory"),
            script: script.to_vec(),
            at: AtomicUsize::new(1),
            depth: AtomicU32::new(0),
            known: Mutex::new(Known { contents: vec![0; PAGES as usize], ..Known::default() }),
        });
        let weak: Weak<Self> = Arc::downgrade(&bed);
        let _first = steps.set(Box::new(move || {
            if let Some(bed) = weak.upgrade() {
                bed.meanwhile();
            }
        }));
        Ok(bed)
    }

    fn next(&self) -> Option<u8> {
        self.script.get(self.at.fetch_add(1, Ordering::Relaxed)).copied()
    }

    fn below(&self, bound: usize) -> usize {
        usize::from(self.next().unwrap_or(0)) % bound
    }

    fn page(&self) -> PageIndex {
        PageIndex(self.below(PAGES as usize) as u32)
    }

    /// Some steps while the store is at work.
    fn meanwhile(&self) {
        if self.depth.fetch_add(1, Ordering::Relaxed) < MAX_DEPTH {
            for _ in 0..self.below(8).saturating_sub(3) {
                self.step();
            }
        }
        self.depth.fetch_sub(1, Ordering::Relaxed);
    }

    /// The next step; false at the end of the script.
    fn step(&self) -> bool {
        let Some(step) = self.next() else { return false };
        match step % 16 {
            0..3 => self.touch(self.page(), None),
            3..6 => {
                let content = self.below(CONTENTS);
                self.touch(self.page(), Some(content));
            }
            6 => self.ask(self.page()),
            7..10 => self.work(),
            10 => self.evict(),
            11 => self.unmap(),
            12 => self.make_room(),
            13 => self.host_takes(self.page()),
            14 => self.pin(),
            _ => self.change(),
        }
        true
    }

    /// Is there room for a page or a block of them, and for what goes on around this step? A worker would
    /// wait for it, and nobody else is there to make it.
    fn has_room(&self) -> bool {
        let pages = u64::from(AROUND_PAGES) + u64::from(self.depth());
        self.core.room.free_pages() >= pages
    }

    /// How many of the store's operations are under way.
    fn depth(&self) -> u32 {
        self.depth.load(Ordering::Relaxed)
    }

    /// The guest reads or writes a page.
    fn touch(&self, page: PageIndex, content: Option<usize>) {
        // A first pass does not wait.
        if self.depth() > 0 && !self.has_room() {
            return;
        }
        if !self.is_mapped(page) {
            match self.core.first_pass(page, Source::Userfault) {
                First::Hit(_) => {}
                First::Joined => return,
                First::Lost => panic!("{page:?} is lost"),
                First::Retry(retry) => return drop(self.queue.submit(retry.0, Duration::ZERO)),
                First::Present => {
                    match self.core.remap(page) {
                        Some(retry) => drop(self.queue.submit(retry.0, Duration::ZERO)),
                        None => panic!("{page:?} cannot be mapped anew"),
                    }
                    return;
                }
            }
            assert!(self.is_mapped(page), "{page:?} was a hit, and is not mapped");
        }
        let state = self.core.table.state(page);
        assert!(
            matches!(state, PageState::Mapped | PageState::Installing),
            "the guest reaches {page:?}, which is {state:?}"
        );
        let mut known = lock(&self.known);
        let held = &mut known.contents[page.0 as usize];
        let at = self.address(page);
        let mut bytes = [0; PAGE_SIZE];
        self.memory.read_exact_at(&mut bytes, at).expect("it is mapped");
        assert!(bytes == contents()[*held], "{page:?} has not what was written last");
        if let Some(content) = content {
            self.memory.write_all_at(&contents()[content], at).expect("it is mapped");
            *held = content;
        }
    }

    /// A thread outside of the kernel asks for a page, and may wait for it.
    fn ask(&self, page: PageIndex) {
        if self.depth() > 0 && !self.has_room() {
            return;
        }
        let token = {
            let mut known = lock(&self.known);
            known.waits += 1;
            known.waits
        };
        let waiter = Waiter { wake: Arc::<Told>::clone(&self.told), token };
        match self.core.fault(page, 1, &waiter) {
            Fault::Waits { .. } => {}
            Fault::Hit(_) | Fault::Present => {
                let told = lock(&self.told.0).insert(token, 1);
                assert_eq!(told, None, "told, though it does not wait");
            }
            Fault::Lost => panic!("{page:?} is lost"),
        }
    }

    /// A worker does something, or it is dropped.
    fn work(&self) {
        if !self.has_room() {
            return self.make_room();
        }
        let which = self.next().unwrap_or(0);
        let work = {
            let mut works = lock(&self.queue.works);
            if works.is_empty() {
                return;
            }
            let index = usize::from(which) % works.len();
            works.swap_remove(index)
        };
        if which >= 0xf0 { drop(work) } else { work.run() }
    }

    /// Neighbours are moved to the store at once.
    fn evict(&self) {
        let (PageIndex(first), count) = (self.page(), 1 + self.below(12) as u32);
        let pages: Vec<_> = (first..PAGES.min(first + count))
            .map(PageIndex)
            .filter(|page| !self.is_owned(*page))
            .collect();
        if !pages.is_empty() {
            match self.core.evict(&pages) {
                Ok(_) | Err(PagerError::Evict { .. }) => {}
                Err(error) => panic!("{error}"),
            }
        }
    }

    fn unmap(&self) {
        let (PageIndex(first), count) = (self.page(), 1 + self.below(12) as u32);
        let pages: Vec<_> = (first..PAGES.min(first + count)).map(PageIndex).collect();
        self.core.unmap(&pages).expect("pages can be unmapped");
    }

    /// The evictor's turn, and what it has for the workers.
    fn make_room(&self) {
        self.core.make_room();
        let pass = MayWait::second_pass();
        for _ in 0..self.below(4) {
            self.core.write_back_next(&pass);
        }
    }

    /// The host takes a page out of the guest mapping, as its reclaim does.
    fn host_takes(&self, page: PageIndex) {
        // A marker would go with it, which only we put there.
        if self.is_mapped(page) && !self.is_owned(page) {
            self.core.mapping.unmap(PageRun::single(page)).expect("it can be unmapped");
        }
    }

    /// A device holds a page, or lets go of the one that it has held for longest.
    fn pin(&self) {
        let page = self.page();
        let mut known = lock(&self.known);
        if known.pins.len() >= 4 {
            return self.unpin(&mut known);
        }
        if self.core.table.edge(page, PageWord::pin) == OnPin::Pinned {
            known.pins.push(page);
        }
    }

    fn unpin(&self, known: &mut Known) {
        let page = known.pins.remove(0);
        let mut bytes = [0; PAGE_SIZE];
        self.core.file.read_exact_at(&mut bytes, page.file_offset()).expect("it is a file");
        let held = known.contents[page.0 as usize];
        assert!(bytes == contents()[held], "the pinned {page:?} has not what was written last");
        self.core.table.edge(page, PageWord::unpin);
    }

    /// The world changes: the store's medium, the workers, the limit.
    fn change(&self) {
        match self.below(8) {
            0 => self.switch.down(),
            1 | 2 => self.switch.up(),
            3 => self.queue.refuses.store(true, Ordering::Relaxed),
            4 | 5 => self.queue.refuses.store(false, Ordering::Relaxed),
            // Not while somebody counts on it.
            _ if self.depth() > 0 => {}
            _ => {
                let pages = 24 + self.below(PAGES as usize) as u64;
                self.core.set_limit(Some(pages * PAGE_BYTES));
            }
        }
    }

    /// All is well again: everything that waits is done, every page is read, the books are looked at.
    fn end(&self) {
        self.switch.up();
        self.queue.refuses.store(false, Ordering::Relaxed);
        // Room for all, and a limit all the same, so that the policy keeps its books.
        self.core.set_limit(Some(super::MIN_RESIDENT_LIMIT_BYTES));
        let mut known = lock(&self.known);
        while !known.pins.is_empty() {
            self.unpin(&mut known);
        }
        drop(known);
        let pass = MayWait::second_pass();
        let (mut rounds, mut first) = (0, 0);
        loop {
            rounds += 1;
            assert!(rounds < LAST_ROUNDS, "there is always something left to do");
            let work = lock(&self.queue.works).pop();
            match work {
                Some(work) => work.run(),
                None if self.core.write_back_next(&pass) => {}
                // What is mapped stays mapped from here on.
                None => match (first..PAGES).find(|page| !self.is_mapped(PageIndex(*page))) {
                    Some(page) => {
                        first = page;
                        self.touch(PageIndex(page), None);
                    }
                    None => break,
                },
            }
        }
        (0..PAGES).for_each(|page| self.touch(PageIndex(page), None));
        self.check_books();
    }

    fn check_books(&self) {
        let core = &self.core;
        assert!(core.failure.get().is_none(), "{:?}", core.failure.get());
        core.evictions_work();
        assert_eq!(core.health(), super::Health::default());
        let words: Vec<_> = (0..PAGES).map(|page| core.table.word(PageIndex(page))).collect();
        assert!(words.iter().all(|word| word.state() == PageState::Mapped && word.pins() == 0));
        assert!(words.iter().all(|word| !word.is_wanted()));
        let told = lock(&self.told.0);
        let all = lock(&self.known).waits;
        assert!((1..=all).all(|token| told.get(&token) == Some(&1)), "of {all}: {told:?}");
        let slots = words.iter().filter(|word| word.slot().is_some()).count() as u64;
        let stats = core.stats(core.file.metadata().map_or(0, |metadata| metadata.blocks() * 512));
        let stored: u64 = stats.tiers.iter().map(|tier| tier.pages).sum();
        assert_eq!(slots, stored, "copies that pages know of, and copies in the store");
        assert_eq!(core.room.used_pages(), u64::from(PAGES));
        assert_eq!(stats.resident_bytes, u64::from(PAGES) * PAGE_BYTES);
        assert_eq!((stats.outstanding, stats.stored_bytes), (0, 0));
        assert_eq!(stats.pages_touched, u64::from(PAGES));
        assert_eq!(stats.mapped_pages, u64::from(PAGES), "the policy knows of all");
    }

    /// Has somebody the page in hand?
    fn is_owned(&self, page: PageIndex) -> bool {
        use PageState as S;
        matches!(
            self.core.table.state(page),
            S::Installing | S::Unmapping | S::Dropping | S::Fetching
        )
    }

    fn address(&self, page: PageIndex) -> u64 {
        self.core.mapping.address() as u64 + page.file_offset()
    }

    /// Does the guest reach the page without a fault?
    fn is_mapped(&self, page: PageIndex) -> bool {
        const PRESENT: u64 = 1 << 63;
        let mut entry = [0; 8];
        let at = self.address(page) / PAGE_BYTES * 8;
        self.pagemap.read_exact_at(&mut entry, at).expect("a page has an entry");
        u64::from_ne_bytes(entry) & PRESENT != 0
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        // Works have the core, and the core has the queue.
        self.core.closing.store(true, Ordering::SeqCst);
        let works = std::mem::take(&mut *lock(&self.queue.works));
        drop((works, std::mem::take(&mut *self.core.parked())));
    }
}

/// What pages are written with: zeros, one word, bytes that compress and bytes that do not.
fn contents() -> &'static [PageBytes] {
    static CONTENTS_OF: OnceLock<Vec<PageBytes>> = OnceLock::new();
    CONTENTS_OF.get_or_init(|| (0..CONTENTS as u64).map(testing::page).collect())
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

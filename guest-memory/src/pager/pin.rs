//! The VMM's own accesses to guest RAM: pages are brought in, kept from leaving while they are used, and
//! seen through the alias. Nothing else touches the alias once the guest runs: a hole in it would read
//! as zeros, and be taken for the page.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap};

use super::core::Core;
use super::{Fault, Pager, PagerError};
use crate::address::{Gfn, Gpa, PAGE_BYTES, PAGE_SIZE, PageBytes, PageIndex};
use crate::sys::view;
use crate::waiters::{Sleeper, Woken};
use crate::word::{OnPin, PageState, PageWord};

/// The most pages of one pin.
const MAX_PIN_PAGES: u64 = 512;
/// All pins together may have this part of the resident limit.
const PIN_SHARE: u64 = 4;
/// The longest wait for a page of a pin.
const PIN_LIMIT: Duration = Duration::from_secs(30);
/// How often a page that left again before it was pinned is brought in.
const PIN_TRIES: u32 = 1000;
/// The lane of the VMM's own faults.
const LANE: u16 = 0;

/// Parts of guest RAM that are in memory, and stay there until this is dropped: a view that has exactly
/// these, by guest physical address. Short-lived: pinned pages cannot be evicted.
pub struct Pinned {
    view: GuestMemoryMmap,
    _pins: Pins,
}

/// Not the view itself, which could be cloned and outlive the pins.
impl GuestMemoryBackend for Pinned {
    type R = GuestRegionMmap;

    fn iter(&self) -> impl Iterator<Item = &GuestRegionMmap> {
        GuestMemoryBackend::iter(&self.view)
    }
}

impl std::fmt::Debug for Pinned {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pinned").field("view", &self.view).finish_non_exhaustive()
    }
}

/// Pins that end when this is dropped.
struct Pins {
    core: Arc<Core>,
    pages: Vec<PageIndex>,
    /// How many there will be; counted for all pins together.
    announced: u64,
}

impl Pins {
    /// No pins yet, for so many pages. All pins together may have a quarter of the resident limit: what
    /// is pinned cannot make room.
    fn new(core: &Arc<Core>, pages: u64) -> Result<Self, PagerError> {
        let most = most_pins(core);
        let before = core.pinned_pages.fetch_add(pages, Ordering::Relaxed);
        let pins = Self { core: Arc::clone(core), pages: Vec::new(), announced: pages };
        if before + pages > most {
            return Err(PagerError::Busy { what: "pinned pages", limit: most as usize });
        }
        Ok(pins)
    }
}

/// How many pages may be pinned.
fn most_pins(core: &Core) -> u64 {
    core.room.limit_bytes().map_or(u64::MAX, |bytes| bytes / PAGE_BYTES / PIN_SHARE)
}

impl Drop for Pins {
    fn drop(&mut self) {
        self.core.pinned_pages.fetch_sub(self.announced, Ordering::Relaxed);
        for page in &self.pages {
            self.core.table.edge(*page, PageWord::unpin);
        }
    }
}

impl Pager {
    /// Brings ranges of RAM in (address and length in bytes) and keeps them there; waits for the store,
    /// up to half a minute a page, or until `by` is closed.
    ///
    /// # Errors
    /// [`PagerError::OutOfRange`] and [`PagerError::PinTooLarge`] before anything is done;
    /// [`PagerError::Lost`], [`PagerError::Busy`], [`PagerError::Interrupted`],
    /// [`PagerError::TimedOut`], [`PagerError::Stopped`]; nothing stays pinned then.
    pub fn pin(&self, ranges: &[(Gpa, u64)], by: &Arc<Sleeper>) -> Result<Pinned, PagerError> {
        let mut pages = Vec::new();
        for (gpa, bytes) in ranges.iter().filter(|(_, bytes)| *bytes > 0) {
            let last = gpa.0.checked_add(bytes - 1).ok_or(PagerError::OutOfRange(gpa.gfn()))?;
            let frames = gpa.gfn().0..=Gpa(last).gfn().0;
            if frames.end() - frames.start() >= MAX_PIN_PAGES {
                return Err(PagerError::PinTooLarge { bytes: *bytes });
            }
            for gfn in frames {
                pages.push(self.page_of(Gfn(gfn))?);
            }
        }
        pages.sort_unstable();
        pages.dedup();
        if pages.len() as u64 > MAX_PIN_PAGES {
            return Err(PagerError::PinTooLarge { bytes: pages.len() as u64 * PAGE_BYTES });
        }
        let mut pins = Pins::new(&self.core, pages.len() as u64)?;
        for page in &pages {
            self.core.pin(*page, by)?;
            pins.pages.push(*page);
        }
        let view = view::of(&self.core.alias, &self.core.layout, &pages);
        Ok(Pinned { view: view.map_err(super::system("view pinned pages"))?, _pins: pins })
    }

    /// Is half of what may be pinned, pinned? Then the rest is for those who cannot do without. This never
    /// waits.
    #[must_use]
    pub fn pins_are_scarce(&self) -> bool {
        self.core.pinned_pages.load(Ordering::Relaxed) >= most_pins(&self.core) / 2
    }

    /// Reads a page of guest RAM, fetching it if need be. A page that was never touched reads as zeros,
    /// and stays untouched.
    ///
    /// # Errors
    /// As [`Pager::pin`].
    pub fn read_page(
        &self,
        gfn: Gfn,
        bytes: &mut PageBytes,
        by: &Arc<Sleeper>,
    ) -> Result<(), PagerError> {
        if self.core.table.state(self.page_of(gfn)?) == PageState::Zero {
            bytes.fill(0);
            return Ok(());
        }
        let gpa = gfn.gpa().ok_or(PagerError::OutOfRange(gfn))?;
        let pinned = self.pin(&[(gpa, PAGE_BYTES)], by)?;
        pinned
            .read_slice(&mut bytes[..], GuestAddress(gpa.0))
            .map_err(|_| PagerError::OutOfRange(gfn))
    }

    /// Writes into a page of guest RAM, fetching it if need be; `offset` in bytes.
    ///
    /// # Errors
    /// [`PagerError::BeyondPage`], and as [`Pager::pin`].
    pub fn write_bytes(
        &self,
        gfn: Gfn,
        offset: usize,
        bytes: &[u8],
        by: &Arc<Sleeper>,
    ) -> Result<(), PagerError> {
        self.page_of(gfn)?;
        if offset > PAGE_SIZE || bytes.len() > PAGE_SIZE - offset {
            let len = bytes.len();
            return Err(PagerError::BeyondPage { offset, len });
        }
        let gpa = gfn.gpa().ok_or(PagerError::OutOfRange(gfn))?;
        let at = Gpa(gpa.0 + offset as u64);
        let pinned = self.pin(&[(at, bytes.len() as u64)], by)?;
        pinned.write_slice(bytes, GuestAddress(at.0)).map_err(|_| PagerError::OutOfRange(gfn))
    }
}

impl Core {
    fn pin(self: &Arc<Self>, page: PageIndex, by: &Arc<Sleeper>) -> Result<(), PagerError> {
        let gfn = self.layout.gfn_of(page);
        let until = Instant::now() + PIN_LIMIT;
        for _ in 0..PIN_TRIES {
            if self.is_closing() {
                return Err(PagerError::Stopped);
            }
            match self.table.edge(page, PageWord::pin) {
                OnPin::Pinned => return Ok(()),
                OnPin::TooMany => {
                    return Err(PagerError::Busy {
                        what: "pins of one page",
                        limit: crate::word::MAX_PINS as usize,
                    });
                }
                OnPin::Absent => {}
            }
            let waiter = by.begin();
            match self.fault(page, LANE, &waiter) {
                Fault::Hit(_) | Fault::Present => {}
                Fault::Lost => return Err(PagerError::Lost(gfn)),
                Fault::Waits { .. } => {
                    let left = || until.saturating_duration_since(Instant::now());
                    // What this is for cannot be left half done: only the end of all ends it.
                    let woken = loop {
                        match by.wait(Some(left())) {
                            Woken::Interrupted => {}
                            other => break other,
                        }
                    };
                    if !matches!(woken, Woken::Page(_)) {
                        self.waiters.leave(page, &waiter);
                    }
                    match woken {
                        Woken::TimedOut => return Err(PagerError::TimedOut(gfn)),
                        Woken::Closed => return Err(PagerError::Interrupted(gfn)),
                        Woken::Page(_) | Woken::Interrupted => {}
                    }
                }
            }
        }
        Err(PagerError::Busy { what: "tries to pin a page", limit: PIN_TRIES as usize })
    }
}

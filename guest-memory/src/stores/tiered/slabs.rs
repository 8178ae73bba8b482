//! Room for objects of some bytes to some thousand in a bounded piece of memory.
//!
//! ```text
//!   memory   [ slab | slab | slab | ...                      ]   16 KiB each
//!   slab     [ object | object | object | ... | rest ]           all of one class
//! ```
//! An object's class is its length in units of 64 bytes, rounded up. A slab whose last object goes
//! gives its memory back to the host and may be of another class next time.

use std::io;
use std::ops::Range;

use crate::sys::Arena;

/// The size of a slab, in bytes.
pub(super) const SLAB_BYTES: usize = 16 << 10;
/// The largest object, in bytes. A larger one saves too little to be worth its time.
pub(super) const MAX_OBJECT_BYTES: usize = 3 << 10;
/// Classes are multiples of this many bytes.
const UNIT_BYTES: usize = 64;
const CLASSES: usize = MAX_OBJECT_BYTES / UNIT_BYTES;
/// The most objects of a slab.
const MAX_OBJECTS: usize = SLAB_BYTES / UNIT_BYTES;
/// The most slabs, so that a [`Place`] has 32 bits.
pub(super) const MAX_SLABS: usize = 1 << 24;
/// How much larger a class than its own an object may use when there is no slab left.
const MAX_STRETCH: usize = 4;

/// Where an object is: the slab's number, and in the low 8 bits the object's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place(u32);

impl Place {
    fn slab(self) -> usize {
        self.0 as usize / MAX_OBJECTS
    }

    fn object(self) -> usize {
        self.0 as usize % MAX_OBJECTS
    }
}

/// One slab that was ever used.
#[derive(Clone, Debug)]
struct Slab {
    /// The bytes of each object, in units.
    units: u8,
    /// How many objects it has.
    live: u16,
    /// Its index in the list of its class, if it has room.
    listed: u32,
    /// Which objects there are.
    taken: [u64; MAX_OBJECTS / 64],
}

/// The objects.
#[derive(Debug)]
pub(super) struct Slabs {
    arena: Arena,
    slabs: Vec<Slab>,
    /// Used slabs that hold nothing.
    empty: Vec<u32>,
    /// By class: slabs with objects and with room.
    partial: [Vec<u32>; CLASSES],
    object_bytes: u64,
}

impl Slabs {
    /// Room for `budget_bytes` bytes, rounded down to whole slabs.
    pub(super) fn new(budget_bytes: u64) -> io::Result<Self> {
        let slabs = (budget_bytes as usize / SLAB_BYTES).clamp(1, MAX_SLABS);
        Ok(Self {
            arena: Arena::new(slabs * SLAB_BYTES)?,
            slabs: Vec::new(),
            empty: Vec::new(),
            partial: [const { Vec::new() }; CLASSES],
            object_bytes: 0,
        })
    }

    /// Puts an object of 1 to [`MAX_OBJECT_BYTES`] bytes somewhere; `None` when there is no room.
    pub(super) fn insert(&mut self, bytes: &[u8]) -> Option<Place> {
        let class = class(bytes.len());
        let number = match self.partial[class].last() {
            Some(number) => *number,
            None => self.new_slab(class).or_else(|| {
                let larger = &self.partial[class..CLASSES.min(class + MAX_STRETCH)];
                larger.iter().find_map(|slabs| slabs.last().copied())
            })?,
        };
        let slab = &mut self.slabs[number as usize];
        let free = slab.taken.iter().position(|word| *word != u64::MAX)?;
        let bit = slab.taken[free].trailing_ones();
        slab.taken[free] |= 1 << bit;
        slab.live += 1;
        if usize::from(slab.live) == slab.objects() {
            self.unlist(number);
        }
        let place = Place(number * MAX_OBJECTS as u32 + free as u32 * 64 + bit);
        let range = self.range(place, bytes.len());
        self.arena[range].copy_from_slice(bytes);
        self.object_bytes += bytes.len() as u64;
        Some(place)
    }

    /// The bytes of an object that was `len` bytes.
    pub(super) fn get(&self, place: Place, len: usize) -> &[u8] {
        &self.arena[self.range(place, len)]
    }

    /// Removes an object of `len` bytes.
    pub(super) fn remove(&mut self, place: Place, len: usize) {
        let slab = &mut self.slabs[place.slab()];
        let bit = 1 << (place.object() % 64);
        assert!(slab.taken[place.object() / 64] & bit != 0, "no object at {place:?}");
        let was_full = usize::from(slab.live) == slab.objects();
        slab.taken[place.object() / 64] &= !bit;
        slab.live -= 1;
        self.object_bytes -= len as u64;
        let (live, number) = (slab.live, place.slab() as u32);
        if was_full {
            self.list(number);
        }
        if live == 0 {
            self.unlist(number);
            self.empty.push(number);
            let start = place.slab() * SLAB_BYTES;
            self.arena.give_back(start..start + SLAB_BYTES);
        }
    }

    /// The memory that slabs take, in bytes.
    pub(super) fn memory_bytes(&self) -> u64 {
        ((self.slabs.len() - self.empty.len()) * SLAB_BYTES) as u64
    }

    /// The length of all objects, in bytes.
    pub(super) fn object_bytes(&self) -> u64 {
        self.object_bytes
    }

    /// What these tables take, in bytes.
    pub(super) fn metadata_bytes(&self) -> u64 {
        let listed: usize = self.partial.iter().map(Vec::capacity).sum();
        let numbers = self.empty.capacity() + listed;
        (self.slabs.capacity() * size_of::<Slab>() + numbers * 4) as u64
    }

    fn new_slab(&mut self, class: usize) -> Option<u32> {
        let units = class as u8 + 1;
        let mut slab = Slab { units, live: 0, listed: 0, taken: [0; MAX_OBJECTS / 64] };
        // What is beyond the slab's end counts as taken.
        for object in slab.objects()..MAX_OBJECTS {
            slab.taken[object / 64] |= 1 << (object % 64);
        }
        let number = match self.empty.pop() {
            Some(number) => {
                self.slabs[number as usize] = slab;
                number
            }
            None if self.slabs.len() * SLAB_BYTES < self.arena.len() => {
                self.slabs.push(slab);
                self.slabs.len() as u32 - 1
            }
            None => return None,
        };
        self.list(number);
        Some(number)
    }

    /// The slab has room.
    fn list(&mut self, number: u32) {
        let slab = &mut self.slabs[number as usize];
        let list = &mut self.partial[slab.class()];
        slab.listed = list.len() as u32;
        list.push(number);
    }

    /// The slab has no room any more, or no objects.
    fn unlist(&mut self, number: u32) {
        let Slab { listed, .. } = self.slabs[number as usize];
        let list = &mut self.partial[self.slabs[number as usize].class()];
        list.swap_remove(listed as usize);
        if let Some(moved) = list.get(listed as usize) {
            self.slabs[*moved as usize].listed = listed;
        }
    }

    fn range(&self, place: Place, len: usize) -> Range<usize> {
        let slab = &self.slabs[place.slab()];
        debug_assert!(len <= slab.object_bytes() && place.object() < slab.objects());
        let start = place.slab() * SLAB_BYTES + place.object() * slab.object_bytes();
        start..start + len
    }
}

impl Slab {
    fn class(&self) -> usize {
        usize::from(self.units) - 1
    }

    fn object_bytes(&self) -> usize {
        usize::from(self.units) * UNIT_BYTES
    }

    fn objects(&self) -> usize {
        SLAB_BYTES / self.object_bytes()
    }
}

fn class(len: usize) -> usize {
    assert!((1..=MAX_OBJECT_BYTES).contains(&len), "no object has {len} bytes");
    (len - 1) / UNIT_BYTES
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    #[test]
    fn memory_comes_back_with_the_last_object() {
        let mut slabs = Slabs::new(4 * SLAB_BYTES as u64).unwrap();
        let places: Vec<_> = (0..=255).map_while(|n| slabs.insert(&[n; 3000])).collect();
        assert_eq!(places.len(), 4 * (SLAB_BYTES / 3008));
        assert_eq!(slabs.memory_bytes(), 4 * SLAB_BYTES as u64);
        assert_eq!(slabs.insert(&[1]), None, "no slab is left");
        for (n, place) in places.iter().enumerate() {
            assert_eq!(slabs.get(*place, 3000), [n as u8; 3000]);
            slabs.remove(*place, 3000);
        }
        assert_eq!((slabs.memory_bytes(), slabs.object_bytes()), (0, 0));
        assert_eq!((0..).map_while(|_: u32| slabs.insert(&[1])).count(), 4 * MAX_OBJECTS);
    }

    #[test]
    fn a_larger_object_serves_when_no_slab_is_left() {
        let mut slabs = Slabs::new(SLAB_BYTES as u64).unwrap();
        assert!(slabs.insert(&[1; 1000]).is_some());
        assert!(slabs.insert(&[2; 900]).is_some());
        assert!(slabs.insert(&[2; 100]).is_none(), "that would waste too much");
        assert_eq!(slabs.object_bytes(), 1900);
    }

    proptest! {
        #[test]
        fn objects_keep_their_bytes_and_their_distance(
            ops in prop::collection::vec((0..5_u8, 1..=MAX_OBJECT_BYTES, any::<usize>()), 1..400)
        ) {
            let mut slabs = Slabs::new(8 * SLAB_BYTES as u64).unwrap();
            let mut model = BTreeMap::new();
            for (fill, (op, len, which)) in ops.into_iter().enumerate() {
                if op < 3 {
                    let bytes = vec![fill as u8; len];
                    if let Some(place) = slabs.insert(&bytes) {
                        prop_assert_eq!(model.insert(place.0, bytes), None);
                    }
                } else if !model.is_empty() {
                    let place = *model.keys().nth(which % model.len()).unwrap();
                    let bytes = model.remove(&place).unwrap();
                    prop_assert_eq!(slabs.get(Place(place), bytes.len()), &bytes[..]);
                    slabs.remove(Place(place), bytes.len());
                }
                let total: usize = model.values().map(Vec::len).sum();
                prop_assert_eq!(slabs.object_bytes(), total as u64);
                let used: std::collections::BTreeSet<_> = model.keys().map(|place| Place(*place).slab()).collect();
                prop_assert_eq!(slabs.memory_bytes(), (used.len() * SLAB_BYTES) as u64);
            }
            for (place, bytes) in &model {
                prop_assert_eq!(slabs.get(Place(*place), bytes.len()), &bytes[..]);
            }
        }
    }
}

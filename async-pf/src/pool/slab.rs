//! Numbered places for things that come and go: numbers stay small, memory is used again.

/// No place.
pub(super) const NIL: u32 = u32::MAX;

/// The places.
#[derive(Debug)]
pub(super) struct Slab<T> {
    places: Vec<Place<T>>,
    free: u32,
    len: usize,
}

#[derive(Debug)]
enum Place<T> {
    Taken(T),
    /// The next free place.
    Free(u32),
}

impl<T> Slab<T> {
    pub(super) fn new() -> Self {
        Self { places: Vec::new(), free: NIL, len: 0 }
    }

    /// How many places are taken.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Puts a thing into a free place; the place's number.
    pub(super) fn insert(&mut self, thing: T) -> u32 {
        self.len += 1;
        match self.places.get_mut(self.free as usize) {
            Some(place) => {
                let number = self.free;
                if let Place::Free(next) = std::mem::replace(place, Place::Taken(thing)) {
                    self.free = next;
                }
                number
            }
            None => {
                self.places.push(Place::Taken(thing));
                // The bounds of a pool's queues and workers keep this far below u32::MAX.
                self.places.len() as u32 - 1
            }
        }
    }

    /// Takes a thing out of its place.
    pub(super) fn remove(&mut self, number: u32) -> Option<T> {
        let place = self.places.get_mut(number as usize)?;
        if let Place::Free(_) = place {
            return None;
        }
        let Place::Taken(thing) = std::mem::replace(place, Place::Free(self.free)) else {
            return None;
        };
        self.free = number;
        self.len -= 1;
        Some(thing)
    }

    pub(super) fn get(&self, number: u32) -> Option<&T> {
        match self.places.get(number as usize) {
            Some(Place::Taken(thing)) => Some(thing),
            _ => None,
        }
    }

    pub(super) fn get_mut(&mut self, number: u32) -> Option<&mut T> {
        match self.places.get_mut(number as usize) {
            Some(Place::Taken(thing)) => Some(thing),
            _ => None,
        }
    }

    /// Every taken place.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u32, &T)> {
        (0..).zip(&self.places).filter_map(|(number, place)| match place {
            Place::Taken(thing) => Some((number, thing)),
            Place::Free(_) => None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::Slab;

    #[test]
    fn places_are_used_again() {
        let mut slab = Slab::new();
        let (a, b) = (slab.insert('a'), slab.insert('b'));
        assert_eq!(slab.remove(a), Some('a'));
        assert_eq!(slab.remove(a), None);
        assert_eq!(slab.insert('c'), a);
        assert_eq!((slab.get(a), slab.get(b), slab.get(7)), (Some(&'c'), Some(&'b'), None));
        assert_eq!(slab.iter().collect::<Vec<_>>(), [(a, &'c'), (b, &'b')]);
        assert_eq!(slab.len(), 2);
    }
}

//! Tokens: what an outstanding page is called between a guest and us. A bounded slab per vCPU, so that a
//! guest that never acknowledges costs no memory; a generation per place, so that a late completion
//! finds nothing.
//!
//! ```text
//!   bit  31        24 23        16 15                 0
//!        +-----------+-----------+--------------------+
//!        |   vCPU    |   place   |     generation     |
//!        +-----------+-----------+--------------------+
//! ```
//!
//! A generation is never 0, so a token is not either; a vCPU's number is never 255, so none is
//! [`WAKE_ALL`].

use std::num::NonZeroU16;

/// The most pages that one vCPU may have outstanding or unacknowledged. KVM's own limit is 64.
pub const MAX_OUTSTANDING: usize = 256;
/// The largest number of a vCPU.
pub const MAX_VCPU: u8 = 254;
/// The token that wakes every task that waits on the vCPU (msr.rst).
pub const WAKE_ALL: u32 = !0;

/// Names one outstanding page of one vCPU. Unique among all vCPUs of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Token(u32);

impl Token {
    fn new(vcpu: u8, place: u8, generation: NonZeroU16) -> Self {
        Self(u32::from(vcpu) << 24 | u32::from(place) << 16 | u32::from(generation.get()))
    }

    /// As the guest sees it: the fault's address (CR2), and later the token word.
    #[must_use]
    pub fn raw(self) -> u32 {
        self.0
    }

    /// A token that came back from outside; it may name nothing any more.
    #[must_use]
    pub fn from_raw(raw: u32) -> Self {
        Self(raw)
    }

    fn place(self) -> usize {
        (self.0 >> 16 & 0xff) as usize
    }

    fn generation(self) -> u16 {
        self.0 as u16
    }

    fn vcpu(self) -> u8 {
        (self.0 >> 24) as u8
    }
}

/// Things under tokens.
#[derive(Clone, Debug)]
pub(super) struct Slab<T> {
    vcpu: u8,
    places: Vec<Place<T>>,
    free: Vec<u8>,
}

#[derive(Clone, Debug)]
struct Place<T> {
    /// Of the last token that was made here.
    generation: u16,
    thing: Option<T>,
}

impl<T> Slab<T> {
    /// Where no token was ever made.
    ///
    /// # Panics
    /// When `vcpu` is larger than [`MAX_VCPU`].
    pub(super) fn new(vcpu: u8) -> Self {
        assert!(vcpu <= MAX_VCPU, "a vCPU's number is at most {MAX_VCPU}");
        Self { vcpu, places: Vec::new(), free: Vec::new() }
    }

    /// Goes on where the tokens with these generations were made.
    pub(super) fn after(vcpu: u8, generations: &[u16]) -> Self {
        let mut slab = Self::new(vcpu);
        let generations = generations.iter().take(MAX_OUTSTANDING);
        slab.places = generations.map(|&generation| Place { generation, thing: None }).collect();
        slab.free = (0..slab.places.len()).rev().map(|place| place as u8).collect();
        slab
    }

    /// The generation of the last token of each place.
    pub(super) fn generations(&self) -> Vec<u16> {
        self.places.iter().map(|place| place.generation).collect()
    }

    /// Makes a token; `None` when there are [`MAX_OUTSTANDING`].
    pub(super) fn insert(&mut self, thing: T) -> Option<Token> {
        let number = match self.free.pop() {
            Some(number) => number,
            None if self.places.len() < MAX_OUTSTANDING => {
                self.places.push(Place { generation: 0, thing: None });
                (self.places.len() - 1) as u8
            }
            None => return None,
        };
        let place = &mut self.places[usize::from(number)];
        let generation = NonZeroU16::new(place.generation.wrapping_add(1));
        let generation = generation.unwrap_or(NonZeroU16::MIN);
        place.generation = generation.get();
        place.thing = Some(thing);
        Some(Token::new(self.vcpu, number, generation))
    }

    pub(super) fn get_mut(&mut self, token: Token) -> Option<&mut T> {
        let vcpu = self.vcpu;
        let place = self.places.get_mut(token.place())?;
        let current = token.vcpu() == vcpu && place.generation == token.generation();
        place.thing.as_mut().filter(|_| current)
    }

    /// Ends a token.
    pub(super) fn remove(&mut self, token: Token) -> Option<T> {
        self.get_mut(token)?;
        let thing = self.places[token.place()].thing.take();
        self.free.push(token.place() as u8);
        thing
    }

    /// How many tokens there are.
    pub(super) fn len(&self) -> usize {
        self.places.len() - self.free.len()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &T> {
        self.places.iter().filter_map(|place| place.thing.as_ref())
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.places.iter_mut().filter_map(|place| place.thing.as_mut())
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_bounded_and_never_what_the_protocol_reserves() {
        let mut slab = Slab::new(MAX_VCPU);
        let tokens: Vec<_> = (0..MAX_OUTSTANDING).map(|n| slab.insert(n).unwrap()).collect();
        assert_eq!(slab.insert(0), None);
        assert_eq!(slab.len(), MAX_OUTSTANDING);
        assert!(tokens.iter().all(|token| ![0, WAKE_ALL].contains(&token.raw())));
        assert_eq!(slab.remove(tokens[7]), Some(7));
        assert_eq!(slab.remove(tokens[7]), None);
        let new = slab.insert(99).unwrap();
        assert_ne!(new, tokens[7]);
        assert_eq!(slab.get_mut(tokens[7]), None);
        assert_eq!(slab.get_mut(new), Some(&mut 99));
    }

    #[test]
    fn a_generation_is_never_zero() {
        let mut slab = Slab::new(0);
        for _ in 0..=u32::from(u16::MAX) + 2 {
            let token = slab.insert(()).unwrap();
            assert_ne!(token.raw(), 0);
            slab.remove(token);
        }
    }

    #[test]
    fn another_vcpus_token_names_nothing() {
        let (mut a, mut b) = (Slab::new(1), Slab::new(2));
        let (of_a, _of_b) = (a.insert('a').unwrap(), b.insert('b').unwrap());
        assert_eq!(b.get_mut(of_a), None);
        assert_eq!(b.remove(of_a), None);
    }

    #[test]
    fn tokens_of_before_a_restore_are_not_made_again() {
        let mut slab = Slab::new(3);
        let before: Vec<_> = (0..5).map(|n| slab.insert(n).unwrap()).collect();
        let mut restored = Slab::after(3, &slab.generations());
        assert_eq!(restored.len(), 0);
        for _ in 0..5 {
            let token = restored.insert(0).unwrap();
            assert!(!before.contains(&token));
        }
        assert!(before.iter().all(|token| restored.get_mut(*token).is_none()));
    }
}

//! Which requests wait for a reply. A cookie is a place in the table and a number that is never used
//! again on the same connection, so that no reply completes a request that it is not for.

use super::wire::Cookie;

/// The requests of one connection.
#[derive(Debug)]
pub(super) struct Pending<T> {
    entries: Vec<Option<(Cookie, T)>>,
    free: Vec<u32>,
    next: u32,
}

impl<T> Pending<T> {
    /// No requests. Numbers begin anywhere, so that those of an earlier connection are not met again.
    pub(super) fn new(first: u32) -> Self {
        Self { entries: Vec::new(), free: Vec::new(), next: first }
    }

    /// How many requests wait.
    pub(super) fn len(&self) -> usize {
        self.entries.len() - self.free.len()
    }

    /// Adds a request.
    pub(super) fn insert(&mut self, request: T) -> Cookie {
        let index = self.free.pop().unwrap_or_else(|| {
            self.entries.push(None);
            self.entries.len() as u32 - 1
        });
        let cookie = Cookie(u64::from(self.next) << 32 | u64::from(index));
        self.next = self.next.wrapping_add(1);
        self.entries[index as usize] = Some((cookie, request));
        cookie
    }

    /// The request with this cookie.
    pub(super) fn get(&self, cookie: Cookie) -> Option<&T> {
        let (found, request) = self.entries.get(index(cookie))?.as_ref()?;
        (*found == cookie).then_some(request)
    }

    /// Removes the request with this cookie.
    pub(super) fn remove(&mut self, cookie: Cookie) -> Option<T> {
        self.get(cookie)?;
        let (_, request) = self.entries[index(cookie)].take()?;
        self.free.push(index(cookie) as u32);
        Some(request)
    }

    /// Removes all requests.
    pub(super) fn drain(&mut self) -> Vec<T> {
        self.free.clear();
        self.entries.drain(..).flatten().map(|(_, request)| request).collect()
    }
}

fn index(cookie: Cookie) -> usize {
    (cookie.0 & u64::from(u32::MAX)) as usize
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    proptest! {
        #[test]
        fn a_cookie_names_its_own_request_only(ops in prop::collection::vec((0..4_u8, any::<usize>()), 1..200), first: u32) {
            let mut pending = Pending::new(first);
            let mut model: HashMap<u64, usize> = HashMap::new();
            let mut gone = Vec::new();
            for (number, (op, which)) in ops.into_iter().enumerate() {
                let any = model.keys().copied().nth(which % model.len().max(1));
                match (op, any) {
                    (0 | 1, _) => {
                        let Cookie(cookie) = pending.insert(number);
                        prop_assert!(!gone.contains(&cookie));
                        prop_assert_eq!(model.insert(cookie, number), None);
                    }
                    (2, Some(cookie)) => {
                        prop_assert_eq!(pending.remove(Cookie(cookie)), model.remove(&cookie));
                        gone.push(cookie);
                    }
                    (3, _) if which % 8 == 0 => {
                        let mut drained = pending.drain();
                        let mut expected: Vec<_> = model.drain().map(|(cookie, number)| { gone.push(cookie); number }).collect();
                        drained.sort_unstable();
                        expected.sort_unstable();
                        prop_assert_eq!(drained, expected);
                    }
                    _ => prop_assert_eq!(pending.remove(Cookie(which as u64)), model.remove(&(which as u64))),
                }
                prop_assert_eq!(pending.len(), model.len());
                prop_assert!(gone.iter().all(|cookie| pending.get(Cookie(*cookie)).is_none()));
                prop_assert!(model.iter().all(|(cookie, number)| pending.get(Cookie(*cookie)) == Some(number)));
            }
        }
    }
}

//! A store that fails when it is told to: for tests.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use fastrand::Rng;

use super::meter::TierReport;
use super::spec::{FailKind, FailSpec, FailWhen, Operation};
use super::{Read, Slot, Store, StoreError, Write};
use crate::address::PageBytes;
use crate::pass::{MayWait, NoWait};

const TIER: &str = "fail";

/// Another store of which some reads or writes fail. Pages count one by one, also in batches.
pub(crate) struct Fail {
    behind: Arc<dyn Store>,
    rule: Option<FailSpec>,
    dice: Mutex<Dice>,
    switch: Switch,
}

/// Turns a store's medium off and on again.
#[derive(Clone, Debug, Default)]
pub struct Switch(Arc<AtomicBool>);

impl Switch {
    /// From now on nothing answers.
    pub fn down(&self) {
        self.0.store(true, Ordering::SeqCst);
    }

    /// From now on everything does again.
    pub fn up(&self) {
        self.0.store(false, Ordering::SeqCst);
    }

    fn is_down(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}

/// What decides which operation fails.
struct Dice {
    random: Rng,
    operations: u64,
}

impl Fail {
    /// Makes operations on `behind` fail as `rule` says.
    pub(crate) fn new(behind: Arc<dyn Store>, rule: FailSpec) -> Self {
        Self {
            behind,
            rule: Some(rule),
            dice: Mutex::new(Dice { random: Rng::with_seed(rule.seed), operations: 0 }),
            switch: Switch::default(),
        }
    }

    /// A store that can be turned off and on.
    pub(crate) fn switched(behind: Arc<dyn Store>) -> (Self, Switch) {
        let switch = Switch::default();
        let dice = Mutex::new(Dice { random: Rng::with_seed(0), operations: 0 });
        (Self { behind, rule: None, dice, switch: switch.clone() }, switch)
    }

    /// How the next operation of this kind fails, if it does.
    fn roll(&self, operation: Operation) -> Option<FailKind> {
        if self.switch.is_down() {
            return Some(FailKind::Transient);
        }
        let rule = self.rule.filter(|rule| rule.operation == operation)?;
        let mut dice = self.dice.lock().expect("nothing panics with this lock held");
        dice.operations += 1;
        let fails = match rule.when {
            FailWhen::Nth(nth) => dice.operations == nth,
            FailWhen::Rate { millionths } => dice.random.u32(0..1_000_000) < millionths,
        };
        fails.then_some(rule.kind)
    }

    /// What becomes of a read that succeeded.
    fn after_read(&self, slot: Slot, page: &mut PageBytes) -> Result<(), StoreError> {
        match self.roll(Operation::Read) {
            None => Ok(()),
            Some(FailKind::Corrupt) => {
                let mut dice = self.dice.lock().expect("nothing panics with this lock held");
                let bit = dice.random.usize(0..page.len() * 8);
                page[bit / 8] ^= 1 << (bit % 8);
                Ok(())
            }
            Some(FailKind::Lost) => {
                Err(StoreError::Lost { tier: TIER, slot, reason: "the store was told to lose it" })
            }
            Some(FailKind::Transient | FailKind::Full) => Err(transient("read")),
        }
    }
}

fn transient(action: &'static str) -> StoreError {
    StoreError::Unavailable {
        tier: TIER,
        action,
        source: io::Error::other("the store was told to fail"),
    }
}

impl Store for Fail {
    fn read_now(
        &self,
        pass: &NoWait,
        slot: Slot,
        page: &mut PageBytes,
    ) -> Result<bool, StoreError> {
        if self.behind.read_now(pass, slot, page)? {
            return self.after_read(slot, page).map(|()| true);
        }
        Ok(false)
    }

    fn at_hand(&self, slot: Slot) -> bool {
        self.behind.at_hand(slot)
    }

    fn read(&self, pass: &MayWait, reads: &mut [Read<'_>]) {
        self.behind.read(pass, reads);
        for read in reads {
            if read.result.is_ok() {
                read.result = self.after_read(read.slot, read.page);
            }
        }
    }

    fn write(&self, pass: &MayWait, writes: &mut [Write<'_>]) {
        let mut passed_on = Vec::new();
        for write in writes {
            match self.roll(Operation::Write) {
                None => passed_on.push(write),
                Some(FailKind::Full) => {
                    write.result = Err(StoreError::Full { tier: TIER, capacity_bytes: 0 });
                }
                Some(_) => write.result = Err(transient("write")),
            }
        }
        if passed_on.is_empty() {
            return;
        }
        let mut inner: Vec<_> = passed_on.iter().map(|write| Write::new(write.page)).collect();
        self.behind.write(pass, &mut inner);
        for (write, inner) in passed_on.into_iter().zip(inner) {
            write.result = inner.result;
        }
    }

    fn free(&self, slot: Slot) -> Result<(), StoreError> {
        self.behind.free(slot)
    }

    fn expected_read(&self) -> Duration {
        self.behind.expected_read()
    }

    fn memory_bytes(&self) -> u64 {
        self.behind.memory_bytes()
    }

    fn report(&self) -> Vec<TierReport> {
        self.behind.report()
    }

    fn close(&self) {
        self.behind.close();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stores::Trouble;
    use crate::stores::testing::{self, page, read, write};

    fn failing(text: &str) -> Arc<dyn Store> {
        testing::open(&format!("raw+{text}")).unwrap()
    }

    #[test]
    fn the_nth_operation_fails_and_keeps_nothing() {
        let store = failing("fail=write:nth=2,kind=full+fail=read:nth=3");
        let slot = write(&*store, &page(2)).unwrap();
        assert_eq!(write(&*store, &page(3)).unwrap_err().trouble(), Trouble::Full);
        assert_eq!(store.report()[0].pages, 1);
        write(&*store, &page(4)).unwrap();
        let troubles: Vec<_> =
            (0..5).map(|_| read(&*store, slot).err().map(|error| error.trouble())).collect();
        assert_eq!(troubles, [None, None, Some(Trouble::Transient), None, None]);
    }

    #[test]
    fn a_rate_and_its_seed_say_which_fail() {
        let failures = |seed: u64| -> Vec<bool> {
            let store = failing(&format!("fail=write:rate=0.1,seed={seed}"));
            (0..1000).map(|_| write(&*store, &page(2)).is_err()).collect()
        };
        let first = failures(7);
        let count = first.iter().filter(|failed| **failed).count();
        assert!((60..150).contains(&count), "{count} of 1000");
        assert_eq!(first, failures(7));
        assert_ne!(first, failures(8));
    }

    #[test]
    fn corruption_is_one_bit_and_only_once() {
        let store = failing("fail=read:nth=1,kind=corrupt");
        let slot = write(&*store, &page(2)).unwrap();
        let bits = |a: &PageBytes, b: &PageBytes| -> u32 {
            a.iter().zip(b).map(|(a, b)| (a ^ b).count_ones()).sum()
        };
        assert_eq!(bits(&read(&*store, slot).unwrap(), &page(2)), 1);
        assert_eq!(bits(&read(&*store, slot).unwrap(), &page(2)), 0);
        let store = failing("fail=read:nth=1,kind=lost");
        let slot = write(&*store, &page(2)).unwrap();
        assert_eq!(read(&*store, slot).unwrap_err().trouble(), Trouble::Lost);
    }

    #[test]
    fn a_dead_store_comes_back_with_its_pages() {
        let (store, switch) = testing::switchable(failing("memory"));
        let slot = write(&*store, &page(2)).unwrap();
        switch.down();
        assert_eq!(write(&*store, &page(3)).unwrap_err().trouble(), Trouble::Transient);
        assert_eq!(read(&*store, slot).unwrap_err().trouble(), Trouble::Transient);
        switch.up();
        assert_eq!(read(&*store, slot).unwrap(), page(2));
        store.free(slot).unwrap();
    }
}

//! Models of the protocol between its two sides: every interleaving of a vCPU's thread with threads that
//! complete its pages. `cargo xtask test` runs them; by hand as in loom_pool.rs.
#![cfg(loom)]

use std::sync::Mutex;

use async_pf::protocol::{
    Area, AsyncPf, Begun, Completed, Decision, En, GuestState, Interrupt, Machine, Page, Taken,
    Token, WAKE_ALL,
};
use loom::sync::Arc;
use loom::thread;

/// Flags and token; what was sent and when it was acknowledged.
#[derive(Default)]
struct Guest {
    words: Mutex<(u32, u32)>,
    interrupts: Mutex<Vec<u32>>,
}

#[derive(Clone)]
struct Seen(std::sync::Arc<Guest>);

impl Area for Seen {
    fn flags(&self) -> u32 {
        self.0.words.lock().unwrap().0
    }
    fn set_flags(&mut self, flags: u32) {
        self.0.words.lock().unwrap().0 = flags;
    }
    fn token(&self) -> u32 {
        self.0.words.lock().unwrap().1
    }
    fn set_token(&mut self, token: u32) {
        self.0.words.lock().unwrap().1 = token;
    }
}

impl Interrupt for Seen {
    fn raise(&mut self, _: u8) -> Taken {
        let token = self.0.words.lock().unwrap().1;
        self.0.interrupts.lock().unwrap().push(token);
        Taken::Yes
    }
}

const USER: GuestState =
    GuestState { cpl: 3, interrupts: true, shadow: false, event: false, paging: true };

struct Bed {
    apf: Arc<AsyncPf<Seen, Seen>>,
    guest: std::sync::Arc<Guest>,
}

impl Bed {
    fn new() -> Self {
        let guest = std::sync::Arc::new(Guest::default());
        let apf = AsyncPf::new(Machine::new(0), None, Seen(guest.clone()));
        let bed = Self { apf: Arc::new(apf), guest };
        bed.apf.set_int(0xf3).unwrap();
        bed.apf.set_en(En::new(0x1009).unwrap(), Some(Seen(bed.guest.clone())));
        assert_eq!(bed.take(), [WAKE_ALL]);
        bed
    }

    fn begin(&self, page: u64) -> Token {
        match self.apf.begin(Page(page)) {
            Begun::New(token) => token,
            other => panic!("{other:?}"),
        }
    }

    fn completes(&self, token: Token) -> thread::JoinHandle<Completed> {
        let apf = self.apf.clone();
        thread::spawn(move || apf.complete(token))
    }

    /// The guest takes what was sent, and acknowledges until nothing is left.
    fn take(&self) -> Vec<u32> {
        let mut taken = Vec::new();
        loop {
            let sent = std::mem::take(&mut *self.guest.interrupts.lock().unwrap());
            assert!(sent.len() <= 1, "{sent:?} without an ACK between");
            if sent.is_empty() {
                return taken;
            }
            taken.extend(sent);
            self.guest.words.lock().unwrap().1 = 0;
            self.apf.write_ack(1);
        }
    }
}

#[test]
fn a_page_is_announced_twice_or_not_at_all() {
    loom::model(|| {
        let bed = Bed::new();
        let token = bed.begin(1);
        let completion = bed.completes(token);
        let decision = bed.apf.decide(token, USER);
        assert_eq!(completion.join().unwrap(), Completed::Nothing);
        match decision {
            Decision::Arrived => {
                assert!(bed.take().is_empty());
                assert_eq!(bed.guest.words.lock().unwrap().0, 0);
            }
            Decision::Notify { cr2 } => {
                assert_eq!(cr2, u64::from(token.raw()));
                assert_eq!(bed.take(), [token.raw()]);
                assert_eq!(bed.guest.words.lock().unwrap().0, 1);
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(bed.apf.outstanding(), 0);
    });
}

#[test]
fn a_halted_or_waiting_vcpu_is_woken() {
    for (guest, decided, end) in [
        (GuestState { cpl: 0, ..USER }, Decision::Halt, Completed::EndHalt),
        (GuestState { interrupts: false, ..USER }, Decision::Wait, Completed::EndWait),
    ] {
        loom::model(move || {
            let bed = Bed::new();
            let token = bed.begin(1);
            let completion = bed.completes(token);
            let decision = bed.apf.decide(token, guest);
            let completed = completion.join().unwrap();
            match decision {
                Decision::Arrived => assert_eq!(completed, Completed::Nothing),
                other => assert_eq!((other, completed), (decided, end)),
            }
        });
    }
}

#[test]
fn the_second_page_waits_for_the_ack_of_the_first() {
    loom::model(|| {
        let bed = Bed::new();
        let tokens = [bed.begin(1), bed.begin(2)];
        for token in tokens {
            assert!(matches!(bed.apf.decide(token, USER), Decision::Notify { .. }));
            bed.guest.words.lock().unwrap().0 = 0;
        }
        let completions = tokens.map(|token| bed.completes(token));
        let mut taken = bed.take();
        for completion in completions {
            let _ = completion.join().unwrap();
        }
        taken.extend(bed.take());
        taken.sort_unstable();
        let mut expected = tokens.map(Token::raw);
        expected.sort_unstable();
        assert_eq!(taken, expected);
        assert_eq!(bed.apf.outstanding(), 0);
    });
}

#[test]
fn nothing_is_sent_after_it_was_turned_off() {
    loom::model(|| {
        let bed = Bed::new();
        let token = bed.begin(1);
        assert!(matches!(bed.apf.decide(token, USER), Decision::Notify { .. }));
        let completion = bed.completes(token);
        bed.apf.set_en(En::new(0).unwrap(), None);
        let before = bed.guest.interrupts.lock().unwrap().len();
        let _ = completion.join().unwrap();
        assert_eq!(bed.guest.interrupts.lock().unwrap().len(), before);
        assert_eq!(bed.apf.outstanding(), 0);
        assert_eq!(bed.apf.stats().ready_sent - 1 + bed.apf.stats().cancelled, 1);
    });
}

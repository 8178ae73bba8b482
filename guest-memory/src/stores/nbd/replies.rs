//! From the server's replies to those who wait for them.

use std::io::{self, Read};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use super::pending::Pending;
use super::wire::{self, REPLY_BYTES};
use crate::address::{PAGE_SIZE, PageBytes};
use crate::stores::Slot;

/// Pages of the export that follow one another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) first: Slot,
    pub(super) pages: u32,
}

/// What became of an operation; a read has a page.
pub(super) type Answer = Result<Option<Box<PageBytes>>, Failure>;

/// Why there is no answer, or a bad one.
#[derive(Clone, Debug)]
pub(super) enum Failure {
    /// There is no connection: the server has not seen the request.
    NotSent(Arc<str>),
    /// The connection was lost: the server may still do what was asked.
    Lost(Arc<str>),
    /// The server's error number.
    Server(u32),
    /// The client is closed.
    Closed,
}

/// One request that waits for its reply.
#[derive(Debug)]
pub(super) enum Request {
    Page { batch: Arc<Batch>, index: usize, is_read: bool },
    Trim(Run),
}

/// The operations of one caller.
#[derive(Debug)]
pub(super) struct Batch {
    answers: Mutex<Answers>,
    all_there: Condvar,
}

#[derive(Debug)]
struct Answers {
    answers: Vec<Option<Answer>>,
    missing: usize,
}

/// Who waits for the replies of one connection.
#[derive(Debug)]
pub(super) struct Waiting {
    pub(super) pending: Pending<Request>,
    /// Runs that the server has trimmed.
    pub(super) trimmed: Vec<Run>,
}

impl Waiting {
    /// Nobody yet.
    pub(super) fn new() -> Self {
        Self { pending: Pending::new(fastrand::u32(..)), trimmed: Vec::new() }
    }

    /// Forgets the requests of the last connection.
    pub(super) fn begin_connection(&mut self) {
        self.pending = Pending::new(fastrand::u32(..));
    }
}

impl AsMut<Self> for Waiting {
    fn as_mut(&mut self) -> &mut Self {
        self
    }
}

/// Takes one reply from the server to whoever waits for it.
///
/// # Errors
/// When the connection ends, or what comes is no reply to anything that was asked. Then nobody was
/// told anything.
pub(super) fn receive<S: AsMut<Waiting>>(
    stream: &mut impl Read,
    state: &Mutex<S>,
) -> io::Result<()> {
    let lock = || state.lock().expect("nothing panics with this lock held");
    let mut header = [0; REPLY_BYTES];
    stream.read_exact(&mut header)?;
    let reply = wire::parse_reply(&header)
        .map_err(|wire::NoReply| io::Error::other("the server sent what is no simple reply"))?;
    let not_asked = || io::Error::other("the server replied to what was not asked");
    let is_read = match lock().as_mut().pending.get(reply.cookie).ok_or_else(not_asked)? {
        Request::Page { is_read, .. } => *is_read,
        Request::Trim(_) => false,
    };
    let answer = match reply.error {
        0 if is_read => {
            let mut page = Box::new([0; PAGE_SIZE]);
            stream.read_exact(&mut *page)?;
            Ok(Some(page))
        }
        0 => Ok(None),
        error => Err(Failure::Server(error)),
    };
    let mut state = lock();
    match state.as_mut().pending.remove(reply.cookie).ok_or_else(not_asked)? {
        Request::Page { batch, index, .. } => {
            drop(state);
            batch.deliver(index, answer);
        }
        // A server that cannot trim has kept the bytes, and that is all.
        Request::Trim(run) => state.as_mut().trimmed.push(run),
    }
    Ok(())
}

impl Batch {
    /// No answers yet.
    pub(super) fn new(operations: usize) -> Self {
        let answers = (0..operations).map(|_| None).collect();
        let answers = Mutex::new(Answers { answers, missing: operations });
        Self { answers, all_there: Condvar::new() }
    }

    /// An answer, once for each operation.
    pub(super) fn deliver(&self, index: usize, answer: Answer) {
        let mut answers = self.answers.lock().expect("nothing panics with this lock held");
        let place = &mut answers.answers[index];
        debug_assert!(place.is_none(), "a second answer");
        *place = Some(answer);
        answers.missing -= 1;
        if answers.missing == 0 {
            self.all_there.notify_one();
        }
    }

    /// Waits for all answers. After `timeout` the caller has to give up the connection, which answers
    /// the rest.
    pub(super) fn wait(&self, timeout: Duration, give_up: impl FnOnce()) -> Vec<Answer> {
        let some_missing = |answers: &mut Answers| answers.missing > 0;
        let answers = self.answers.lock().expect("nothing panics with this lock held");
        let (mut answers, waited) = self
            .all_there
            .wait_timeout_while(answers, timeout, some_missing)
            .expect("nothing panics with this lock held");
        if waited.timed_out() {
            drop(answers);
            give_up();
            answers = self.answers.lock().expect("nothing panics with this lock held");
            answers = self
                .all_there
                .wait_while(answers, some_missing)
                .expect("nothing panics with this lock held");
        }
        answers.answers.drain(..).map(|answer| answer.unwrap_or(Err(Failure::Closed))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::super::wire::Cookie;
    use super::*;
    use proptest::prelude::*;

    fn reply(cookie: Cookie, error: u32, data: &[u8]) -> Vec<u8> {
        let head = [0x6744_6698_u32.to_be_bytes(), error.to_be_bytes()].concat();
        [&head[..], &cookie.0.to_be_bytes(), data].concat()
    }

    /// One of each kind of request, in batches of their own.
    fn three_requests() -> (Mutex<Waiting>, [Arc<Batch>; 2], [Cookie; 3]) {
        let mut state = Waiting::new();
        let batches = [Arc::new(Batch::new(1)), Arc::new(Batch::new(1))];
        let page =
            |batch: &Arc<Batch>, is_read| Request::Page { batch: batch.clone(), index: 0, is_read };
        let cookies = [
            state.pending.insert(page(&batches[0], true)),
            state.pending.insert(page(&batches[1], false)),
            state.pending.insert(Request::Trim(Run { first: Slot(3), pages: 2 })),
        ];
        (Mutex::new(state), batches, cookies)
    }

    fn is_answered(batch: &Batch) -> bool {
        batch.answers.lock().unwrap().missing == 0
    }

    #[test]
    fn replies_in_any_order_reach_their_requests() {
        let (state, batches, [read, write, trim]) = three_requests();
        let page = [7; PAGE_SIZE];
        let bytes = [reply(trim, 0, &[]), reply(read, 0, &page), reply(write, 28, &[])].concat();
        let mut stream = &bytes[..];
        for _ in 0..3 {
            receive(&mut stream, &state).unwrap();
        }
        assert!(receive(&mut stream, &state).is_err());
        let answers = |batch: &Batch| batch.answers.lock().unwrap().answers.pop().unwrap().unwrap();
        assert_eq!(**answers(&batches[0]).unwrap().as_ref().unwrap(), page);
        assert!(matches!(answers(&batches[1]), Err(Failure::Server(28))));
        assert_eq!(state.lock().unwrap().trimmed, [Run { first: Slot(3), pages: 2 }]);
    }

    proptest! {
        /// A request is answered by its own cookie in a whole reply, or not at all.
        #[test]
        fn no_bytes_answer_a_wrong_request(
            noise in prop::collection::vec(any::<u8>(), 0..40),
            magic: bool,
            near in prop::option::of((0..3_usize, 0..64_u32)),
            len in 0..5000_usize,
        ) {
            let (state, batches, cookies) = three_requests();
            let mut bytes = noise;
            let mut flipped = None;
            if magic {
                bytes.resize(16, 0);
                bytes[..4].copy_from_slice(&0x6744_6698_u32.to_be_bytes());
            }
            if let Some((which, bit)) = near {
                // A cookie that differs in one bit from one that is waited for.
                let cookie = Cookie(cookies[which].0 ^ 1 << bit);
                flipped = Some(cookie);
                bytes = reply(cookie, 0, &[]);
            }
            bytes.resize(bytes.len() + len, 9);
            let given: [u8; 8] = bytes.get(8..16).map_or([0; 8], |cookie| cookie.try_into().unwrap());
            let given = Cookie(u64::from_be_bytes(given));
            let received = receive(&mut &bytes[..], &state);
            let known = cookies.iter().position(|cookie| *cookie == given);
            prop_assert!(received.is_err() || known.is_some());
            for (index, batch) in batches.iter().enumerate() {
                prop_assert!(!is_answered(batch) || known == Some(index));
            }
            let trimmed = state.lock().unwrap().trimmed.len();
            prop_assert!(trimmed == 0 || known == Some(2));
            if let Some(cookie) = flipped {
                prop_assert_eq!(cookies.contains(&cookie) && received.is_ok(), received.is_ok());
            }
        }

        #[test]
        fn half_a_page_is_no_answer(len in 0..PAGE_SIZE) {
            let (state, batches, [read, ..]) = three_requests();
            let bytes = reply(read, 0, &vec![1; len]);
            prop_assert!(receive(&mut &bytes[..], &state).is_err());
            prop_assert!(!is_answered(&batches[0]));
            prop_assert_eq!(state.lock().unwrap().pending.len(), 3, "it is failed with the others");
        }
    }
}

//! What a server may send, against references that are written down once more: the handshake as bytes,
//! and replies to a real client over a real socket.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use super::client::{Client, Operation, Timing};
use super::handshake::{Geometry, Handshake, Progress};
use super::replies::{Answer, Failure, Run};
use super::socket::Socket;
use super::wire::{REPLY_BYTES, REQUEST_BYTES};
use crate::address::{PAGE_SIZE, PageBytes};
use crate::fuzzing::Script;
use crate::stores::{NbdSpec, ServerAddress, Slot};

/// No server sends more before it is ready or refused: the hello, and 64 replies to the option.
const MAX_HANDSHAKE_BYTES: usize = 18 + 64 * (20 + (16 << 10));
/// How long a connection may take to be closed that has to be.
const LIMIT: Duration = Duration::from_secs(10);
/// Batches of requests over one connection.
const ROUNDS: usize = 3;
/// How many things the server says to one batch.
const SAYINGS: usize = 24;

/// What the server says in the handshake.
///
/// # Panics
/// When the client takes something else for an export, or anything for one that is none.
pub fn handshake(bytes: &[u8]) {
    let mut handshake = Handshake::new("disk");
    let mut rest = bytes;
    let found = loop {
        assert!(handshake.wants() > 0, "it waits for nothing");
        let Some((now, later)) = rest.split_at_checked(handshake.wants()) else { break None };
        rest = later;
        let fed = bytes.len() - rest.len();
        assert!(fed <= MAX_HANDSHAKE_BYTES, "{fed} bytes, and no end");
        match handshake.feed(now) {
            Ok(Progress::Done(geometry)) => break Some(Ok((geometry, rest.len()))),
            Ok(Progress::More | Progress::Send(_)) => {}
            Err(_) => break Some(Err(())),
        }
    };
    assert_eq!(found, reference_handshake(bytes).transpose());
}

/// The same in the words of the protocol: `Ok(None)` when more has to come.
fn reference_handshake(bytes: &[u8]) -> Result<Option<(Geometry, usize)>, ()> {
    let mut script = Script::new(bytes);
    let hello = script.bytes(18);
    let Ok(hello) = <[u8; 18]>::try_from(hello) else { return Ok(None) };
    if &hello[..16] != b"NBDMAGICIHAVEOPT" || hello[17] & 1 == 0 {
        return Err(());
    }
    let (mut export, mut min_block_bytes) = (None, 0);
    for _ in 0..64 {
        let Ok(head) = <[u8; 20]>::try_from(script.bytes(20)) else { return Ok(None) };
        let len = u32::from_be_bytes(*head.last_chunk().ok_or(())?) as usize;
        if head[..12] != *b"\0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x07" || len > 16 << 10 {
            return Err(());
        }
        let data = script.bytes(len);
        if data.len() < len {
            return Ok(None);
        }
        match (&head[12..16], data.split_at_checked(2)) {
            (b"\0\0\0\x01", _) => {
                let (size_bytes, flags) = export.ok_or(())?;
                let geometry = Geometry { size_bytes, flags, min_block_bytes };
                return Ok(Some((geometry, script.bytes(usize::MAX).len())));
            }
            (b"\0\0\0\x03", Some((b"\0\0", data))) => {
                let size = data.first_chunk().ok_or(())?;
                let flags = data[8..].first_chunk().ok_or(())?;
                export = Some((u64::from_be_bytes(*size), u16::from_be_bytes(*flags)));
            }
            (b"\0\0\0\x03", Some((b"\0\x03", data))) => {
                min_block_bytes = u32::from_be_bytes(*data.first_chunk().ok_or(())?);
            }
            (b"\0\0\0\x03", Some(_)) => {}
            _ => return Err(()),
        }
    }
    // One reply too many, if it comes.
    if script.bytes(20).len() < 20 { Ok(None) } else { Err(()) }
}

/// A request as the server got it.
#[derive(Clone, Copy, Debug)]
struct Asked {
    command: u16,
    cookie: [u8; 8],
}

/// What the server's bytes are for one batch of requests.
#[derive(Debug, Default)]
struct Meaning {
    /// For each request its error and the bytes that follow, once it is answered.
    answers: Vec<Option<(u32, Vec<u8>)>>,
    /// The bytes are no reply, or none to what was asked: the connection has to be closed.
    is_broken: bool,
    /// The bytes end within a reply.
    is_torn: bool,
}

/// What the server answers to a client's requests.
///
/// # Panics
/// When a request is answered by anything but a whole reply of its own, or the connection outlives a
/// reply to what was not asked.
pub fn replies(bytes: &[u8]) {
    let mut script = Script::new(bytes);
    let (ours, mut server) = UnixStream::pair().expect("a pair of sockets");
    server.set_read_timeout(Some(LIMIT)).expect("a time-out");
    // Nobody is there: a connection that is lost stays lost.
    let address = ServerAddress::Unix(PathBuf::from("/nowhere/at/all"));
    let spec = NbdSpec { server: address, export: String::new(), size_bytes: None };
    let timing = Timing { request: 2 * LIMIT, ..Timing::default() };
    let geometry = Geometry { size_bytes: 1 << 30, flags: 1 | 1 << 5, min_block_bytes: 0 };
    let client = Client::over(&spec, timing, Socket::Unix(ours), geometry).expect("a thread");
    let mut earlier = Vec::new();
    for _ in 0..ROUNDS {
        if !round(&client, &mut server, &mut script, &mut earlier) {
            break;
        }
    }
}

/// One batch of requests and its replies; does the connection live on?
fn round(
    client: &Client,
    server: &mut UnixStream,
    script: &mut Script<'_>,
    earlier: &mut Vec<[u8; 8]>,
) -> bool {
    let (reads, writes, trims) = (script.below(5), script.below(3), script.below(3));
    let page = [0x77; PAGE_SIZE];
    let mut operations: Vec<_> = (0..reads as u32).map(|n| Operation::Read(Slot(n))).collect();
    operations.extend((0..writes as u32).map(|n| Operation::Write(Slot(100 + n), &page)));
    if operations.is_empty() {
        return false;
    }
    let trims: Vec<_> =
        (0..trims as u32).map(|n| Run { first: Slot(200 + 10 * n), pages: n + 1 }).collect();
    thread::scope(|scope| {
        let caller = scope.spawn(|| client.run(&operations, &trims));
        let asked: Vec<_> =
            (0..operations.len() + trims.len()).map(|_| read_request(server)).collect();
        let bytes = say(script, &asked, earlier);
        let meaning = understand(&bytes, &asked);
        let all = meaning.answers.iter().all(Option::is_some);
        let goes_on = all && !meaning.is_broken && !meaning.is_torn;
        // Fails when the client has closed the connection, as it is to.
        let _ = server.write_all(&bytes);
        if meaning.is_broken {
            let mut more = [0; 64];
            let end = loop {
                match server.read(&mut more) {
                    Ok(0) => break Ok(()),
                    Ok(_) => {}
                    Err(error) if error.kind() == ErrorKind::Interrupted => {}
                    Err(error) => break Err(error.kind()),
                }
            };
            let closed = matches!(end, Ok(()) | Err(ErrorKind::ConnectionReset));
            assert!(closed, "the connection stays after what is no reply: {end:?}");
        } else if !goes_on {
            let _ = server.shutdown(Shutdown::Write);
        }
        let (answers, sent) = caller.join().expect("the client does not panic");
        assert!(sent && answers.len() == operations.len());
        for (answer, expected) in answers.iter().zip(&meaning.answers) {
            compare(answer, expected.as_ref());
        }
        // Nobody waits for a trim, and so for the end of a connection that leaves only trims open.
        if meaning.answers[..operations.len()].iter().any(Option::is_none) {
            let note = client.note();
            assert!(note.starts_with("not connected"), "{note}");
        }
        let expected: Vec<_> = trims
            .iter()
            .zip(&meaning.answers[operations.len()..])
            .filter_map(|(run, answer)| answer.as_ref().map(|_| *run))
            .collect();
        // The client's thread may be a moment behind with those that nobody waits for.
        let (mut trimmed, began) = (client.take_trimmed(), Instant::now());
        while trimmed.len() < expected.len() && began.elapsed() < LIMIT {
            thread::yield_now();
            trimmed.extend(client.take_trimmed());
        }
        let firsts = |runs: &[Run]| {
            let mut firsts: Vec<_> = runs.iter().map(|run| (run.first, run.pages)).collect();
            firsts.sort_unstable();
            firsts
        };
        assert_eq!(firsts(&trimmed), firsts(&expected));
        earlier.extend(asked.iter().map(|asked| asked.cookie));
        goes_on
    })
}

fn compare(answer: &Answer, expected: Option<&(u32, Vec<u8>)>) {
    match (answer, expected) {
        (Ok(Some(page)), Some((0, bytes))) => assert!(page[..] == bytes[..], "other bytes"),
        (Ok(None), Some((0, bytes))) => assert!(bytes.is_empty(), "a read without bytes"),
        (Err(Failure::Server(code)), Some((error, _))) if code == error => {}
        (Err(Failure::Lost(_)), None) => {}
        other => panic!("{other:?}"),
    }
}

fn read_request(server: &mut UnixStream) -> Asked {
    let mut head = [0; REQUEST_BYTES];
    server.read_exact(&mut head).expect("a request");
    assert_eq!(head[..4], 0x2560_9513_u32.to_be_bytes());
    let command = u16::from_be_bytes([head[6], head[7]]);
    let mut cookie = [0; 8];
    cookie.copy_from_slice(&head[8..16]);
    if command == 1 {
        let mut page: PageBytes = [0; PAGE_SIZE];
        server.read_exact(&mut page).expect("a page to write");
    }
    Asked { command, cookie }
}

/// What the script has the server say.
fn say(script: &mut Script<'_>, asked: &[Asked], earlier: &[[u8; 8]]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for said in 0..SAYINGS as u8 {
        let Some(kind) = script.next() else { break };
        let mut request = asked[script.below(asked.len())];
        let error = if kind & 0x20 == 0 { 0_u32 } else { 28 };
        match kind % 8 {
            0..4 => {}
            4 => request.cookie[script.below(8)] ^= 1 << script.below(8),
            5 => request.cookie = *earlier.get(script.below(16)).unwrap_or(&request.cookie),
            6 => request.command = if request.command == 0 { 1 } else { 0 },
            _ => {
                let len = script.below(64);
                bytes.extend(script.bytes(len));
                continue;
            }
        }
        bytes.extend(0x6744_6698_u32.to_be_bytes());
        bytes.extend(error.to_be_bytes());
        bytes.extend(request.cookie);
        if request.command == 0 && error == 0 {
            let short = if kind & 0x40 == 0 { 0 } else { script.below(256) };
            let mut page = [said; PAGE_SIZE];
            page[..8].copy_from_slice(&request.cookie);
            bytes.extend(&page[..PAGE_SIZE - short]);
        }
    }
    bytes
}

/// What the protocol makes of these bytes.
fn understand(mut bytes: &[u8], asked: &[Asked]) -> Meaning {
    let mut meaning = Meaning { answers: vec![None; asked.len()], ..Meaning::default() };
    while let Some((head, rest)) = bytes.split_first_chunk::<REPLY_BYTES>() {
        let is_asked = |(index, asked): &(usize, &Asked)| {
            asked.cookie == head[8..] && meaning.answers[*index].is_none()
        };
        let found = asked.iter().enumerate().find(is_asked);
        let (Some((index, request)), [0x67, 0x44, 0x66, 0x98]) = (found, &head[..4]) else {
            meaning.is_broken = true;
            return meaning;
        };
        let error = u32::from_be_bytes([head[4], head[5], head[6], head[7]]);
        let len = if request.command == 0 && error == 0 { PAGE_SIZE } else { 0 };
        let Some((data, rest)) = rest.split_at_checked(len) else {
            meaning.is_torn = true;
            return meaning;
        };
        meaning.answers[index] = Some((error, data.to_vec()));
        bytes = rest;
    }
    meaning.is_torn = !bytes.is_empty();
    meaning
}

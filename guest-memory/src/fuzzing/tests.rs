//! Replays the corpus of each target, and then random bytes for a moment.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use super::*;

/// How long random bytes are tried; libFuzzer, which is told what they reach, is `cargo xtask fuzz`.
const TIME: Duration = Duration::from_secs(2);
const MAX_BYTES: usize = 600;

fn replay_and_try(target: &str, body: impl Fn(&[u8]) -> Ran) {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(target);
    let mut files: Vec<_> =
        fs::read_dir(&corpus).expect("a corpus").map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert!(!files.is_empty());
    for file in &files {
        println!("{}", file.display());
        if let Ran::Nothing(why) = body(&fs::read(file).unwrap()) {
            println!("SKIP: {why}");
            return;
        }
    }
    let given = std::env::var("NOWAIT_TEST_SEED").ok();
    let seed = match given.map(|seed| seed.parse()) {
        Some(seed) => seed.expect("NOWAIT_TEST_SEED is a number"),
        None => fastrand::u64(..),
    };
    println!("seed: run again with NOWAIT_TEST_SEED={seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let (start, mut runs) = (Instant::now(), 0);
    while start.elapsed() < TIME {
        let mut bytes = vec![0; random.usize(0..MAX_BYTES)];
        random.fill(&mut bytes);
        let _done = body(&bytes);
        runs += 1;
    }
    println!("{} files, {runs} random scripts", files.len());
}

#[test]
fn nbd_handshake() {
    replay_and_try("nbd_handshake", |bytes| {
        handshake(bytes);
        Ran::All
    });
}

#[test]
fn nbd_replies() {
    replay_and_try("nbd_replies", |bytes| {
        replies(bytes);
        Ran::All
    });
}

#[test]
fn pages() {
    replay_and_try("page_lives", page_lives);
}

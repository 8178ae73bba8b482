//! The whole control socket over a real pager: metrics, pages by state, and what is refused.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use guest_memory::PAGE_BYTES;
use serde_json::Value;

use super::bed::{Bed, MEMORY_BYTES};

const STORE: &str = "lz4=4M+delay=50ms+memory";
/// Longer than an answer takes on a busy machine, and shorter than the store.
const SOON: Duration = Duration::from_millis(500);
const LIMIT: Duration = Duration::from_secs(20);

fn start(store: &str) -> Option<(Bed, PathBuf, tempfile::TempDir)> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("control");
    match Bed::start(&path, 2, store) {
        Ok(bed) => Some((bed, path, dir)),
        Err(why) => {
            println!("SKIP: {why}");
            None
        }
    }
}

fn ask(path: &Path, first_line: &str, body: &str) -> (u16, String) {
    let asked = Instant::now();
    let mut stream = UnixStream::connect(path).unwrap();
    let length = body.len();
    write!(stream, "{first_line} HTTP/1.1\r\nContent-Length: {length}\r\n\r\n{body}").unwrap();
    let mut reply = String::new();
    stream.read_to_string(&mut reply).unwrap();
    assert!(asked.elapsed() < SOON, "{first_line} took {:?}", asked.elapsed());
    let (head, body) = reply.split_once("\r\n\r\n").unwrap();
    (head[9..12].parse().unwrap(), body.to_owned())
}

fn metric(path: &Path, series: &str) -> f64 {
    let (_, text) = ask(path, "GET /metrics", "");
    let mut lines = text.lines().filter_map(|line| line.rsplit_once(' '));
    lines.find(|(name, _)| *name == series).map_or(f64::NAN, |(_, value)| value.parse().unwrap())
}

fn wait_until(what: &str, holds: impl Fn() -> bool) {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < LIMIT, "never: {what}");
        thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn pages_are_counted_by_state() {
    let Some((bed, path, _dir)) = start(STORE) else { return };
    wait_until("pages in the store", || bed.pager().stats().stored_bytes > 0);
    for cells in [1_usize, 7, 64, 1024] {
        let (code, body) = ask(&path, &format!("GET /pages?cells={cells}"), "");
        assert_eq!(code, 200, "{body}");
        let answer: Value = serde_json::from_str(&body).unwrap();
        assert_eq!(answer["pages"], MEMORY_BYTES / PAGE_BYTES);
        assert_eq!(answer["sampled"], false);
        let all = answer["cells"].as_array().unwrap();
        assert_eq!(all.len(), cells);
        let sum = |state: &str| all.iter().map(|cell| cell[state].as_u64().unwrap()).sum::<u64>();
        let states =
            ["mapped", "pinned", "idle", "at_hand", "stored", "absent", "under_way", "lost"];
        let states: Vec<u64> = states.iter().map(|state| sum(state)).collect();
        assert_eq!(states.iter().sum::<u64>(), MEMORY_BYTES / PAGE_BYTES, "{states:?}");
        assert_eq!(sum("looked_at"), MEMORY_BYTES / PAGE_BYTES);
        assert!(sum("mapped") > 0 && sum("stored") > 0 && sum("at_hand") > 0, "{states:?}");
    }
    assert_eq!(ask(&path, "GET /pages?cells=2000", "").0, 400);
}

#[test]
fn stalls_and_ages_are_shown_while_they_last() {
    let Some((_bed, path, _dir)) = start("delay=2s") else { return };
    let oldest = || metric(&path, "nowait_outstanding_oldest_seconds");
    wait_until("a fetch that is old", || oldest() > 1.0);
    wait_until("the bucket of its age", || {
        metric(&path, r#"nowait_outstanding_by_age{below="+Inf"}"#) > 0.0
    });
    wait_until("a stall of a second", || {
        metric(&path, r#"nowait_vcpu_stalled_seconds{vcpu="1"}"#) > 1.0
    });
    let waited = r#"nowait_vcpu_stalls_total{vcpu="1",cause="waited"}"#;
    wait_until("a stall that is over", || metric(&path, waited) >= 1.0);
}

#[test]
fn a_threshold_is_refused_where_nobody_is_told() {
    let Some((_bed, path, _dir)) = start(STORE) else { return };
    for body in ["500us", "auto"] {
        let (code, line) = ask(&path, "PUT /threshold", body);
        assert_eq!(code, 409, "{line}");
        assert!(line.contains("--apf off") && line.contains("--apf user"), "{line}");
    }
    assert_eq!(ask(&path, "PUT /threshold", "soon").0, 400);
}

#[test]
fn ages_and_outstanding_agree_when_the_guest_is_paused() {
    let Some((_bed, path, _dir)) = start(STORE) else { return };
    wait_until("fetches", || metric(&path, "nowait_fetched_pages_total") > 10.0);
    ask(&path, "POST /pause", "");
    wait_until("the last fetch", || metric(&path, "nowait_outstanding") == 0.0);
    assert_eq!(metric(&path, "nowait_vcpus_paused"), 2.0);
    wait_until("the last work", || metric(&path, "nowait_outstanding_oldest_seconds") == 0.0);
    ask(&path, "POST /resume", "");
    let before = metric(&path, "nowait_fetched_pages_total");
    wait_until("more fetches", || metric(&path, "nowait_fetched_pages_total") > before);
}

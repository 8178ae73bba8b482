//! Against the servers that people run: nbdkit and qemu-nbd.

use std::fs::{self, File};
use std::net::TcpListener;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;

use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use rustix::process::{Pid, Signal, kill_process};

use super::*;
use crate::stores::testing::{self, Model, page, read, write};
use crate::stores::{ServerAddress, Trouble};

/// No test waits longer for anything.
const PATIENCE: Duration = Duration::from_secs(20);

/// A server that goes with this value.
struct Server {
    child: Child,
    dir: PathBuf,
}

impl Server {
    /// Starts it on the socket `dir/socket`; `None` when it is not installed.
    fn start(dir: &Path, program: &str, arguments: &[&str]) -> Option<Self> {
        let socket = dir.join("socket");
        let _ = fs::remove_file(&socket);
        let mut command = Command::new(program);
        match program {
            "nbdkit" => command.args(["--foreground", "--unix"]).arg(&socket),
            _ => command.args(["--persistent", "--shared=4", "--socket"]).arg(&socket),
        };
        command.args(arguments).current_dir(dir).stdin(Stdio::null()).stderr(Stdio::null());
        let Ok(child) = command.spawn() else {
            println!("skipped: {program} is not installed");
            return None;
        };
        let server = Self { child, dir: dir.to_owned() };
        wait_for("the server", || UnixStream::connect(&socket).is_ok());
        Some(server)
    }

    fn spec(&self) -> NbdSpec {
        let server = ServerAddress::Unix(self.dir.join("socket"));
        NbdSpec { server, export: String::new(), size_bytes: None }
    }

    fn store(&self) -> Nbd {
        Nbd::with_timing(&self.spec(), QUICK).unwrap()
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

const QUICK: Timing = Timing {
    connect: Duration::from_secs(5),
    request: Duration::from_secs(10),
    min_pause: Duration::from_millis(5),
    max_pause: Duration::from_millis(50),
};

fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < PATIENCE, "waited for {what} for {PATIENCE:?}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// A directory with a sparse file of 16 MiB.
fn disk() -> tempfile::TempDir {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    File::create_new(dir.path().join("disk")).unwrap().set_len(16 << 20).unwrap();
    dir
}

const QEMU: [&str; 3] = ["--format=raw", "--discard=unmap", "disk"];

fn compare_with_a_map(store: &Nbd) {
    let mut runner = TestRunner::new(ProptestConfig {
        cases: 6,
        failure_persistence: None,
        ..ProptestConfig::default()
    });
    let compared = runner.run(&testing::operations(40), |steps| {
        Model::new(None).run(store, &steps)?;
        Ok(())
    });
    compared.unwrap();
}

#[test]
fn nbdkit_keeps_what_a_map_keeps() {
    let dir = disk();
    let Some(server) = Server::start(dir.path(), "nbdkit", &["memory", "16M"]) else { return };
    compare_with_a_map(&server.store());
}

#[test]
fn qemu_nbd_keeps_what_a_map_keeps() {
    let dir = disk();
    let Some(server) = Server::start(dir.path(), "qemu-nbd", &QEMU) else { return };
    compare_with_a_map(&server.store());
}

#[test]
fn tcp_and_export_names_work() {
    let dir = disk();
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let (argument, disk) = (format!("--port={port}"), dir.path().join("disk"));
    let mut command = Command::new("qemu-nbd");
    command.args(["--persistent", "--bind=127.0.0.1", "--format=raw", "--export-name=a b"]);
    let Ok(child) = command.arg(argument).arg(disk).spawn() else {
        println!("skipped: qemu-nbd is not installed");
        return;
    };
    let server = Server { child, dir: dir.path().to_owned() };
    let text = format!("raw+nbd://127.0.0.1:{port}/a%20b,size=1M");
    let mut store = None;
    wait_for("the server", || {
        store = testing::open(&text).ok();
        store.is_some()
    });
    let store = store.unwrap();
    let slot = write(&*store, &page(10)).unwrap();
    assert_eq!(read(&*store, slot).unwrap(), page(10));
    assert_eq!(store.report()[0].capacity_bytes, Some(1 << 20));
    assert_eq!(format!("raw+{}", store.report()[0].name), text);
    drop(store);
    let refused = testing::open(&format!("nbd://127.0.0.1:{port}/c")).map(|_| ()).unwrap_err();
    assert!(refused.to_string().contains("the server has no export \"c\""), "{refused}");
    drop(server);
    let refused = testing::open(&text).map(|_| ()).unwrap_err().to_string();
    assert!(refused.contains("Connection refused") && refused.contains("nbdkit"), "{refused}");
}

#[test]
fn requests_are_served_side_by_side() {
    let dir = disk();
    let delayed = ["--filter=delay", "memory", "16M", "rdelay=50ms"];
    let Some(server) = Server::start(dir.path(), "nbdkit", &delayed) else { return };
    let store = server.store();
    let pages: Vec<_> = (0..64).map(page).collect();
    let mut writes: Vec<_> = pages.iter().map(Write::new).collect();
    store.write(&testing::may_wait(), &mut writes);
    let slots: Vec<_> = writes.into_iter().map(|write| write.result.unwrap()).collect();
    let mut buffers = vec![[0; PAGE_SIZE]; 64];
    let mut reads: Vec<_> =
        slots.iter().zip(&mut buffers).map(|(slot, page)| Read::new(*slot, page)).collect();
    let start = Instant::now();
    store.read(&testing::may_wait(), &mut reads);
    let took = start.elapsed();
    assert_eq!(buffers, pages);
    assert!(took < Duration::from_millis(64 * 50 / 2), "{took:?} for 64 reads of 50 ms");
    assert!(store.expected_read() > Duration::from_millis(5));
}

/// Kills the server under load, and starts it again on the same disk.
fn survives_a_killed_server(program: &str, arguments: &[&str]) {
    let dir = disk();
    let Some(mut server) = Server::start(dir.path(), program, arguments) else { return };
    let store = server.store();
    let stored: Mutex<Vec<(Slot, u64)>> = Mutex::default();
    let stop = std::sync::atomic::AtomicBool::new(false);
    thread::scope(|scope| {
        for thread in 0..3_u64 {
            let (store, stored, stop) = (&store, &stored, &stop);
            scope.spawn(move || {
                let mut seed = thread << 32 | 10;
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    seed += 16;
                    match write(store, &page(seed)) {
                        Ok(slot) if seed % 48 == 10 => stored.lock().unwrap().push((slot, seed)),
                        Ok(slot) => store.free(slot).unwrap(),
                        Err(error) => match error.trouble() {
                            Trouble::Full => thread::sleep(Duration::from_millis(10)),
                            trouble => assert_eq!(trouble, Trouble::Transient, "{error}"),
                        },
                    }
                }
            });
        }
        for _ in 0..2 {
            thread::sleep(Duration::from_millis(60));
            server.signal(Signal::KILL);
            wait_for("the loss", || store.client.note().starts_with("not connected"));
            let error = write(&store, &page(10)).unwrap_err();
            assert_eq!(error.trouble(), Trouble::Transient, "{error}");
            drop(std::mem::replace(
                &mut server,
                Server::start(dir.path(), program, arguments).unwrap(),
            ));
            wait_for("the connection", || store.client.note().starts_with("connected"));
        }
        thread::sleep(Duration::from_millis(60));
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    let stored = stored.into_inner().unwrap();
    assert!(stored.len() > 10);
    for (slot, seed) in &stored {
        assert_eq!(read(&store, *slot).unwrap(), page(*seed), "slot {slot}");
    }
    println!("{} pages; {:?}", stored.len(), store.report()[0].notes);
}

#[test]
fn pages_survive_a_killed_qemu_nbd() {
    survives_a_killed_server("qemu-nbd", &QEMU);
}

#[test]
fn pages_survive_a_killed_nbdkit() {
    survives_a_killed_server("nbdkit", &["file", "disk"]);
}

#[test]
fn a_server_that_hangs_is_given_up_and_found_again() {
    let dir = disk();
    let Some(server) = Server::start(dir.path(), "nbdkit", &["memory", "16M"]) else { return };
    let timing = Timing { request: Duration::from_millis(200), ..QUICK };
    let store = Nbd::with_timing(&server.spec(), timing).unwrap();
    let slot = write(&store, &page(10)).unwrap();
    server.signal(Signal::STOP);
    // It may take a moment to stop.
    let mut written = Vec::new();
    let error = loop {
        match write(&store, &page(11)) {
            Ok(slot) => written.push(slot),
            Err(error) => break error,
        }
    };
    assert_eq!(error.trouble(), Trouble::Transient, "{error}");
    assert_eq!(store.space().quarantined, 1);
    let given_up = Slot(written.len() as u32 + 1);
    server.signal(Signal::CONT);
    wait_for("the page", || read(&store, slot).is_ok_and(|bytes| bytes == page(10)));
    let notes = &store.report()[0].notes;
    assert!(notes[0].contains("losses") && notes[1].contains("4K given up"), "{notes:?}");
    assert_ne!(write(&store, &page(12)).unwrap(), given_up, "that one may still be written");
}

#[test]
fn another_export_is_not_taken_for_the_old_one() {
    let dir = disk();
    let start = |size| Server::start(dir.path(), "nbdkit", &["memory", size]);
    let Some(server) = start("16M") else { return };
    let store = server.store();
    drop(server);
    let smaller = start("8M").unwrap();
    wait_for("the refusal", || store.client.note().contains("8388608 bytes"));
    let error = write(&store, &page(10)).unwrap_err();
    assert!(error.to_string().contains("another export"), "{error}");
    drop(smaller);
    let _server = start("16M").unwrap();
    wait_for("the connection", || write(&store, &page(10)).is_ok());
}

#[test]
fn servers_that_are_of_no_use_are_refused() {
    let dir = disk();
    let refusal = |arguments: &[&str], size_bytes| {
        let server = Server::start(dir.path(), "nbdkit", arguments)?;
        let spec = NbdSpec { size_bytes, ..server.spec() };
        Some(Nbd::with_timing(&spec, QUICK).err().expect("it is of no use").to_string())
    };
    for (arguments, size_bytes, expected) in [
        (&["--readonly", "memory", "1M"][..], None, "read-only"),
        (&["memory", "1000"], None, "1000 bytes, 4096 are wanted"),
        (&["memory", "1M"], Some(2 << 20), "1048576 bytes, 2097152 are wanted"),
        (&["--oldstyle", "memory", "1M"], None, "too old"),
        (&["--tls=require", "--tls-psk=disk", "memory", "1M"], None, "TLS"),
    ] {
        let Some(text) = refusal(arguments, size_bytes) else { return };
        assert!(text.contains(expected), "{text}");
        assert!(text.contains(&format!("socket={}", dir.path().display())), "{text}");
    }
}

#[test]
fn strangers_and_silence_are_refused_in_time() {
    let dir = disk();
    let path = dir.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let server = ServerAddress::Unix(path);
    let spec = NbdSpec { server, export: String::new(), size_bytes: None };
    let refusal = |timing| Nbd::with_timing(&spec, timing).err().unwrap().to_string();
    let short = Timing { connect: Duration::from_millis(100), ..QUICK };
    let start = Instant::now();
    let text = refusal(short);
    assert!(text.contains("does not answer in time"), "{text}");
    assert!(start.elapsed() < QUICK.connect);
    let (_silent, _) = listener.accept().unwrap();
    let stranger = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        io::Write::write_all(&mut stream, b"220 mail.example.org ESMTP\r\n").unwrap();
        (stream, listener)
    });
    let text = refusal(QUICK);
    assert!(text.contains("no NBD server"), "{text}");
    drop(stranger.join().unwrap());
    let text = refusal(QUICK);
    assert!(text.contains("Connection refused"), "{text}");
}

#[test]
fn the_servers_errors_are_told_apart() {
    let dir = disk();
    for (option, on_write, on_read) in [
        ("error-pwrite=ENOSPC", Some(Trouble::Full), None),
        ("error-pread=EIO", None, Some(Trouble::Transient)),
    ] {
        let rate = format!("{}-rate=100%", option.split_once('=').unwrap().0);
        let arguments = ["--filter=error", "memory", "1M", option, &rate];
        let Some(server) = Server::start(dir.path(), "nbdkit", &arguments) else { return };
        let store = server.store();
        let written = write(&store, &page(10));
        assert_eq!(written.as_ref().err().map(StoreError::trouble), on_write);
        if let Ok(slot) = written {
            assert_eq!(read(&store, slot).err().map(|error| error.trouble()), on_read);
        }
    }
}

#[test]
fn closing_ends_the_waits() {
    let dir = disk();
    let slow = ["--filter=delay", "memory", "1M", "rdelay=30"];
    let Some(server) = Server::start(dir.path(), "nbdkit", &slow) else { return };
    let store = server.store();
    let slot = write(&store, &page(10)).unwrap();
    let start = Instant::now();
    thread::scope(|scope| {
        let reader = scope.spawn(|| read(&store, slot));
        thread::sleep(Duration::from_millis(50));
        store.close();
        assert!(matches!(reader.join().unwrap(), Err(StoreError::Closed)));
    });
    assert!(matches!(write(&store, &page(10)), Err(StoreError::Closed)));
    assert!(start.elapsed() < Duration::from_secs(5));
}

#[test]
fn what_is_freed_is_trimmed() {
    let dir = disk();
    let Some(server) = Server::start(dir.path(), "qemu-nbd", &QEMU) else { return };
    let store = server.store();
    let bytes = || fs::metadata(dir.path().join("disk")).unwrap().blocks() * 512;
    let pages: Vec<_> = (0..1024).map(|n| page(n * 16 + 10)).collect();
    let mut slots = Vec::new();
    for batch in pages.chunks(MAX_BATCH) {
        let mut writes: Vec<_> = batch.iter().map(Write::new).collect();
        store.write(&testing::may_wait(), &mut writes);
        slots.extend(writes.into_iter().map(|write| write.result.unwrap()));
    }
    let full = bytes();
    assert!(full >= 4 << 20);
    slots.drain(..900).for_each(|slot| store.free(slot).unwrap());
    for _ in 0..10 {
        let slot = write(&store, &page(10)).unwrap();
        store.free(slot).unwrap();
    }
    wait_for("the trims", || bytes() <= full - (500 << 12));
    for (slot, page) in slots.iter().zip(&pages[900..]) {
        assert_eq!(read(&store, *slot).unwrap(), *page);
    }
}

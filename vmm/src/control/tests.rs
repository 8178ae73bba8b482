//! The server with real sockets: clients that are in order, slow, hostile or many.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use super::server::{EXCHANGE_LIMIT, MAX_CONNECTIONS};
use super::{Command, Control, ControlSocket, END_LIMIT, Reply};

/// Longer than anything here takes on a busy machine, and shorter than what a client may take.
const SOON: Duration = Duration::from_millis(1500);

struct Server {
    control: Option<Control>,
    path: PathBuf,
    _dir: tempfile::TempDir,
}

impl Server {
    fn start(answer: impl FnMut(Command) -> Reply + Send + 'static) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control");
        let socket = ControlSocket::bind(&path).unwrap();
        let (alive, ended) = channel();
        let control = Control::serve(socket, answer, alive, ended).unwrap();
        Self { control: Some(control), path, _dir: dir }
    }

    /// It answers with what was asked for.
    fn echo() -> Self {
        Self::start(|command| Reply::text(format!("{command:?}\n")))
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.path).unwrap();
        stream.set_read_timeout(Some(2 * EXCHANGE_LIMIT)).unwrap();
        stream
    }

    fn ask(&self, request: &str) -> String {
        let mut stream = self.connect();
        stream.write_all(request.as_bytes()).unwrap();
        read_all(stream)
    }

    /// It answers now, whoever else is there.
    fn expect_well(&self) {
        let asked = Instant::now();
        let reply = self.ask("GET /metrics HTTP/1.1\r\n\r\n");
        assert!(
            reply.starts_with("HTTP/1.1 200 OK\r\n") && reply.ends_with("\r\n\r\nMetrics\n"),
            "{reply}"
        );
        assert!(asked.elapsed() < SOON, "{:?}", asked.elapsed());
    }
}

fn read_all(mut stream: UnixStream) -> String {
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}

fn descriptors(path: &Path) -> usize {
    std::fs::read_dir(path).unwrap().count()
}

#[test]
fn a_client_is_answered_and_the_connection_closed() {
    let server = Server::echo();
    server.expect_well();
    let reply = server.ask("PUT /limit HTTP/1.1\r\nContent-Length: 3\r\n\r\n64M");
    assert!(reply.ends_with("\r\n\r\nLimit(Some(67108864))\n"), "{reply}");
    let reply = server.ask("DELETE /limit HTTP/1.1\r\n\r\n");
    assert!(
        reply.starts_with("HTTP/1.1 405 ") && reply.contains("Allow: PUT, POST\r\n"),
        "{reply}"
    );
    // Bytes that nobody asked for do not cost the answer.
    let reply = server.ask(&format!("GET / HTTP/1.1\r\n\r\n{}", "x".repeat(20_000)));
    assert!(reply.starts_with("HTTP/1.1 404 "), "{reply}");
}

#[test]
fn curl_understands_it() {
    let server = Server::echo();
    let curl = |args: &[&str]| {
        std::process::Command::new("curl")
            .args(["--silent", "--show-error", "--max-time", "5", "--unix-socket"])
            .arg(&server.path)
            .args(args)
            .output()
    };
    // Where there is no curl, the other tests have to do.
    let Ok(output) = curl(&["http://nowait/metrics"]) else { return };
    assert_eq!(String::from_utf8_lossy(&output.stdout), "Metrics\n", "{output:?}");
    let output = curl(&["-X", "PUT", "-d", "none", "http://nowait/limit"]).unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), "Limit(None)\n", "{output:?}");
}

#[test]
fn a_request_in_pieces_is_put_together() {
    let server = Server::echo();
    let mut stream = server.connect();
    for byte in b"POST /pause HTTP/1.1\r\nHost: x\r\n\r\n" {
        stream.write_all(&[*byte]).unwrap();
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(read_all(stream).ends_with("Pause\n"));
}

#[test]
fn clients_that_hang_keep_nobody_waiting_and_do_not_stay() {
    let server = Server::start(|_| Reply::text("Metrics\n".repeat(200_000)));
    // These say nothing, half a request, or do not read the answer.
    let opened = Instant::now();
    let mut silent = server.connect();
    let mut half = server.connect();
    half.write_all(b"GET /metr").unwrap();
    let mut deaf = server.connect();
    deaf.write_all(b"GET /metrics HTTP/1.1\r\n\r\n").unwrap();
    server.ask("GET /metrics HTTP/1.1\r\n\r\n");
    assert!(opened.elapsed() < SOON, "{:?}", opened.elapsed());
    let (mut silent_end, mut half_end) = (String::new(), String::new());
    silent.read_to_string(&mut silent_end).unwrap();
    half.read_to_string(&mut half_end).unwrap();
    assert!(opened.elapsed() >= EXCHANGE_LIMIT, "{:?}", opened.elapsed());
    for end in [silent_end, half_end] {
        assert!(end.starts_with("HTTP/1.1 408 ") && end.contains("within 2s\n"), "{end}");
    }
    let mut cut = Vec::new();
    let _ = deaf.read_to_end(&mut cut);
    assert!(cut.len() < 8 * 200_000, "{}", cut.len());
}

#[test]
fn many_clients_that_say_nothing_keep_nobody_out() {
    let server = Server::echo();
    let before = descriptors(Path::new("/proc/self/fd"));
    let mut idle = Vec::new();
    for _ in 0..4 * MAX_CONNECTIONS {
        idle.push(server.connect());
        server.expect_well();
    }
    // The clients' ends, and no more of ours than the bound; other tests have some, too.
    let now = descriptors(Path::new("/proc/self/fd"));
    assert!(now < before + idle.len() + MAX_CONNECTIONS + 64, "{now}, {before} before");
    // The oldest ones had to make way.
    assert_eq!(idle[0].read(&mut [0; 1]).unwrap(), 0);
}

#[test]
fn rubbish_is_refused_and_harms_nobody() {
    let server = Server::echo();
    let mut random = 0x9e37_79b9_u32;
    for round in 0..200 {
        let mut stream = server.connect();
        let bytes: Vec<u8> = (0..round * 50)
            .map(|_| {
                random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (random >> 24) as u8
            })
            .collect();
        let _ = stream.write_all(&bytes);
    }
    server.expect_well();
}

#[test]
fn it_ends_at_once_with_clients_that_hang_and_takes_its_socket_along() {
    let mut server = Server::echo();
    let hanging: Vec<_> = (0..3).map(|_| server.connect()).collect();
    server.expect_well();
    let asked = Instant::now();
    drop(server.control.take());
    assert!(asked.elapsed() < END_LIMIT / 2, "{:?}", asked.elapsed());
    assert!(!server.path.exists());
    for mut stream in hanging {
        assert_eq!(stream.read(&mut [0; 1]).unwrap_or(0), 0);
    }
}

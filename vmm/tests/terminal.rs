//! `nowait top` in a terminal (tmux), over the real control socket of a real pager; its vCPUs are threads, so
//! that no guest is needed. `cargo xtask test` runs it as the step "terminal".
//!
//! Where there is no tmux or no userfaultfd, the tests are skipped and say so.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, geteuid, kill_process};
use vmm::bed::{Bed, LIMIT_BYTES};

const STORE: &str = "lz4=4M+delay=20ms+memory";
const LIMIT: Duration = Duration::from_secs(30);
const NOBODY: u32 = 65534;

fn nowait() -> Command {
    Command::new(env!("CARGO_BIN_EXE_nowait"))
}

/// A directory with a control socket at work in it.
struct Served {
    bed: Option<Bed>,
    path: PathBuf,
    dir: tempfile::TempDir,
}

impl Served {
    fn start() -> Option<Self> {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("control");
        match Bed::start(&path, 4, STORE) {
            Ok(bed) => Some(Self { bed: Some(bed), path, dir }),
            Err(why) => {
                println!("SKIP: {why}");
                None
            }
        }
    }

    fn metric(&self, series: &str) -> f64 {
        let mut stream = UnixStream::connect(&self.path).expect("it listens");
        stream.write_all(b"GET /metrics HTTP/1.1\r\n\r\n").expect("it reads");
        let mut text = String::new();
        stream.read_to_string(&mut text).expect("it answers");
        let mut lines = text.lines().filter_map(|line| line.rsplit_once(' '));
        let found = lines.find(|(name, _)| *name == series);
        found.map_or(f64::NAN, |(_, value)| value.parse().expect("a number"))
    }

    fn wait_for(&self, series: &str, holds: impl Fn(f64) -> bool) {
        let began = Instant::now();
        while !holds(self.metric(series)) {
            assert!(began.elapsed() < LIMIT, "{series} stays at {}", self.metric(series));
            thread::sleep(Duration::from_millis(20));
        }
    }
}

/// A tmux server of its own with one window, in which a shell runs `nowait top` and tells its exit code.
struct Tmux {
    socket: PathBuf,
}

impl Tmux {
    fn start(served: &Served, columns: u16, rows: u16) -> Option<Self> {
        let socket = served.dir.path().join(format!("tmux-{columns}"));
        let nowait = env!("CARGO_BIN_EXE_nowait");
        // After it, the mode of the terminal: echo is on if it was given back.
        let script = format!(
            "'{nowait}' top '{}'; echo \"code $?\"; stty -a | grep -o '[-]*echo ' | head -n 1; exec cat",
            served.path.display()
        );
        let tmux = Self { socket };
        let (columns, rows) = (columns.to_string(), rows.to_string());
        let args = ["-f", "/dev/null", "new-session", "-d", "-x", &columns, "-y", &rows, &script];
        match tmux.command(&args) {
            None => {
                println!("SKIP: there is no tmux here");
                return None;
            }
            Some(output) => assert!(output.status.success(), "{output:?}"),
        }
        Some(tmux)
    }

    fn command(&self, args: &[&str]) -> Option<Output> {
        let mut tmux = Command::new("tmux");
        // It draws lines as such in any locale with -u.
        tmux.arg("-u").arg("-S").arg(&self.socket).args(args).env("TERM", "xterm-256color");
        tmux.env("LC_ALL", "C.UTF-8").env_remove("TMUX").stdin(Stdio::null()).output().ok()
    }

    fn screen(&self) -> String {
        let output = self.command(&["capture-pane", "-p"]).expect("tmux was here");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    fn keys(&self, keys: &str) {
        let output = self.command(&["send-keys", keys]).expect("tmux was here");
        assert!(output.status.success(), "{output:?}");
    }

    fn wait_for(&self, text: &str) -> String {
        self.wait_until(text, |screen| screen.contains(text))
    }

    fn wait_until(&self, what: &str, holds: impl Fn(&str) -> bool) -> String {
        let began = Instant::now();
        loop {
            let screen = self.screen();
            if holds(&screen) {
                return screen;
            }
            assert!(began.elapsed() < LIMIT, "never: {what}\n{screen}");
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// The child of the shell in its window.
    fn top_pid(&self) -> Pid {
        let output = self.command(&["list-panes", "-F", "#{pane_pid}"]).expect("tmux was here");
        let shell = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        let children = fs::read_to_string(format!("/proc/{shell}/task/{shell}/children"));
        let children = children.expect("a shell has children");
        let pid = children.split_whitespace().next().and_then(|pid| pid.parse().ok());
        pid.and_then(Pid::from_raw).expect("a pid")
    }

    /// It ended with this code and gave the terminal back: the shell's screen is there, with echo.
    fn expect_end(&self, code: u8) -> String {
        let screen = self.wait_until("the end", |s| s.lines().any(|line| line.trim() == "echo"));
        assert!(screen.contains(&format!("code {code}")), "{screen}");
        assert!(!screen.contains("Outstanding"), "the other screen is left:\n{screen}");
        screen
    }
}

impl Drop for Tmux {
    fn drop(&mut self) {
        let _ = self.command(&["kill-server"]);
    }
}

#[test]
fn rows_appear_and_keys_act() {
    let Some(served) = Served::start() else { return };
    let Some(tmux) = Tmux::start(&served, 120, 40) else { return };
    for section in ["Stalls", "Faults", "Outstanding", "Memory", "Store", "Async faults"] {
        tmux.wait_for(section);
    }
    let row = |vcpu: usize| {
        move |screen: &str| {
            let row = screen.lines().find(|line| line.starts_with(&format!("  {vcpu}    ")));
            row.is_some_and(|row| row.contains(|sign| ('▁'..='█').contains(&sign)))
        }
    };
    for vcpu in 0..4 {
        tmux.wait_until("a vCPU with stalls", row(vcpu));
    }
    tmux.wait_for("mapped 1");
    thread::sleep(Duration::from_secs(3));
    println!("{}", tmux.screen());

    tmux.keys("p");
    tmux.wait_for("PAUSED: user");
    tmux.wait_for("pause: paused");
    served.wait_for(r#"nowait_paused{reason="user"}"#, |paused| paused == 1.0);
    tmux.keys("r");
    tmux.wait_until("it goes on", |screen| !screen.contains("PAUSED"));
    served.wait_for(r#"nowait_paused{reason="user"}"#, |paused| paused == 0.0);

    let limit = "nowait_resident_limit_bytes";
    assert_eq!(served.metric(limit), LIMIT_BYTES as f64);
    tmux.keys("+");
    served.wait_for(limit, |bytes| (1.09..1.11).contains(&(bytes / LIMIT_BYTES as f64)));
    tmux.wait_for("limit: the resident limit becomes");
    tmux.wait_for("of limit 26.4M");
    tmux.keys("L");
    served.wait_for(limit, |bytes| (0.98..1.0).contains(&(bytes / LIMIT_BYTES as f64)));

    tmux.keys("t");
    tmux.wait_for("threshold: --apf off has no threshold");
    tmux.keys("e");
    tmux.wait_for("y/n");
    tmux.keys("n");
    tmux.wait_for("nothing was evicted");
    tmux.keys("e");
    tmux.wait_for("y/n");
    let evicted = served.metric("nowait_evicted_pages_total");
    tmux.keys("y");
    tmux.wait_for("evict: all of guest RAM is being evicted");
    served.wait_for("nowait_evicted_pages_total", |pages| pages > evicted + 1000.0);

    tmux.keys("?");
    tmux.wait_for("double the async page fault threshold");
    tmux.keys("?");
    tmux.wait_until("the help goes", |screen| !screen.contains("double the"));
    tmux.keys("q");
    tmux.expect_end(0);
    // The run goes on.
    served.metric(limit);
}

#[test]
fn the_end_of_the_run_is_told_and_gives_the_terminal_back() {
    let Some(mut served) = Served::start() else { return };
    let Some(tmux) = Tmux::start(&served, 100, 30) else { return };
    tmux.wait_for("Outstanding");
    drop(served.bed.take());
    let screen = tmux.expect_end(0);
    assert!(screen.contains("has ended"), "{screen}");
}

#[test]
fn a_small_terminal_is_told_so_and_can_grow() {
    let Some(served) = Served::start() else { return };
    let Some(tmux) = Tmux::start(&served, 40, 10) else { return };
    tmux.wait_for("40 columns and 10");
    let resized = tmux.command(&["resize-window", "-x", "80", "-y", "24"]).expect("tmux was here");
    assert!(resized.status.success(), "{resized:?}");
    tmux.wait_for("Async faults");
    let _ = tmux.command(&["resize-window", "-x", "1", "-y", "1"]);
    thread::sleep(Duration::from_millis(300));
    let _ = tmux.command(&["resize-window", "-x", "80", "-y", "24"]);
    tmux.wait_for("Async faults");
    tmux.keys("C-c");
    tmux.expect_end(16);
}

#[test]
fn signals_give_the_terminal_back() {
    let Some(served) = Served::start() else { return };
    for (columns, signal) in [(81, Signal::TERM), (82, Signal::INT), (83, Signal::QUIT)] {
        let Some(tmux) = Tmux::start(&served, columns, 24) else { return };
        tmux.wait_for("Outstanding");
        kill_process(tmux.top_pid(), signal).expect("it runs");
        tmux.expect_end(16);
    }
}

#[test]
fn a_terminal_that_goes_away_leaves_no_process_behind() {
    let Some(served) = Served::start() else { return };
    let Some(tmux) = Tmux::start(&served, 84, 24) else { return };
    tmux.wait_for("Outstanding");
    let pid = tmux.top_pid();
    drop(tmux);
    let began = Instant::now();
    while rustix::process::test_kill_process(pid).is_ok() {
        assert!(began.elapsed() < LIMIT, "it is left");
        thread::sleep(Duration::from_millis(20));
    }
}

/// One line on standard error, with this code and these words.
fn refused(command: &mut Command, words: &[&str]) {
    let output = command.stdin(Stdio::null()).output().expect("it starts");
    let line = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(4), "{line}");
    assert_eq!(line.lines().count(), 1, "{line}");
    for word in words {
        assert!(line.contains(word), "'{word}' is not in: {line}");
    }
}

#[test]
fn what_is_no_socket_of_a_run_is_refused() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let at = |name: &str| dir.path().join(name);
    let top = |path: &Path| {
        let mut command = nowait();
        command.arg("top").arg(path);
        command
    };
    refused(&mut top(&at("nothing")), &["does not exist", "nowait run --control"]);
    drop(UnixListener::bind(at("stale")).expect("a socket"));
    refused(&mut top(&at("stale")), &["nobody listens", "ended"]);
    fs::write(at("file"), "x").expect("a file");
    refused(&mut top(&at("file")), &["a regular file"]);
    let garbage = UnixListener::bind(at("garbage")).expect("a socket");
    thread::spawn(move || {
        for stream in garbage.incoming() {
            let _ =
                stream.and_then(|mut stream| stream.write_all(b"220 mail.example.org ESMTP\r\n"));
        }
    });
    refused(&mut top(&at("garbage")), &["not the control socket of a nowait run"]);
    let other = UnixListener::bind(at("other")).expect("a socket");
    thread::spawn(move || {
        for stream in other.incoming() {
            let answer = b"HTTP/1.1 200 OK\r\n\r\ngo_goroutines 7\n";
            let _ = stream.and_then(|mut stream| stream.write_all(answer));
        }
    });
    refused(&mut top(&at("other")), &["not the control socket of a nowait run", "nowait_info"]);
}

#[test]
fn what_belongs_to_somebody_else_is_refused() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().expect("a temporary directory");
    let mode = |path: &Path, mode| {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("it is ours");
    };
    let path = dir.path().join("control");
    let _listener = UnixListener::bind(&path).expect("a socket");
    let bin = dir.path().join("nowait");
    fs::copy(env!("CARGO_BIN_EXE_nowait"), &bin).expect("a copy");
    mode(&bin, 0o755);
    mode(dir.path(), 0o755);
    // Root may connect to anything; an ordinary user may not even to a socket of its own without the bits.
    let root = geteuid().is_root();
    let top = |path: &Path| {
        let mut command = Command::new(&bin);
        command.arg("top").arg(path);
        if root {
            command.uid(NOBODY).gid(NOBODY);
        }
        command
    };
    mode(&path, if root { 0o600 } else { 0 });
    let owner = format!("belongs to user {}", geteuid().as_raw());
    refused(&mut top(&path), &[&owner, "sudo"]);
    let hidden = dir.path().join("hidden");
    fs::create_dir(&hidden).expect("a directory");
    mode(&hidden, if root { 0o700 } else { 0 });
    refused(&mut top(&hidden.join("control")), &["permission denied"]);
    mode(&hidden, 0o700);
}

#[test]
fn an_output_that_is_no_terminal_is_refused_with_what_to_do() {
    let Some(served) = Served::start() else { return };
    let mut command = nowait();
    command.arg("top").arg(&served.path);
    refused(&mut command, &["not a terminal", "curl --unix-socket", "/metrics"]);
}

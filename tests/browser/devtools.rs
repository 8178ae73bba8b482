//! A headless Chromium, spoken to over a pipe: its DevTools protocol, a JSON text and a zero byte for each message
//! (`--remote-debugging-pipe`).

use std::cell::{Cell, RefCell};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};
use std::{env, thread};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use tempfile::TempDir;

/// The environment variable that names Chromium's program.
pub(crate) const PROGRAM: &str = "CHROMIUM";
/// What it is called where the variable is not set.
const NAMES: [&str; 3] = ["chromium", "google-chrome-stable", "google-chrome"];
/// How long the browser may take for one thing.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
/// How long it may take to end.
const END: Duration = Duration::from_secs(5);
/// The browser reads descriptor 3 and writes 4, which are our end of its standard streams.
const SHELL: &str = "exec \"$0\" \"$@\" 3<&0 4>&1 1>&2 2>/dev/null";

/// Chromium's program, if there is one.
pub(crate) fn program() -> Option<PathBuf> {
    if let Some(program) = env::var_os(PROGRAM) {
        return Some(program.into());
    }
    let path = env::var_os("PATH").unwrap_or_default();
    let found =
        |name: &str| env::split_paths(&path).map(|dir| dir.join(name)).find(|file| file.is_file());
    NAMES.iter().find_map(|name| found(name))
}

/// A browser with one page.
pub(crate) struct Devtools {
    browser: Child,
    input: RefCell<ChildStdin>,
    messages: Receiver<Value>,
    last_id: Cell<u64>,
    session: Option<String>,
    events: RefCell<Vec<Value>>,
    _profile: TempDir,
}

impl Devtools {
    /// Starts a browser with an empty page.
    pub(crate) fn start(program: &Path) -> Result<Self> {
        let profile = TempDir::new()?;
        let mut command = Command::new("sh");
        command.args(["-c", SHELL]).arg(program);
        command.args(["--headless=new", "--remote-debugging-pipe", "--no-first-run"]);
        command.args(["--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]);
        // Its own business with its makers.
        command.args(["--disable-background-networking", "--disable-component-update"]);
        command.args(["--disable-sync", "--no-default-browser-check", "--metrics-recording-only"]);
        command.arg(format!("--user-data-dir={}", profile.path().display()));
        if rustix::process::geteuid().is_root() {
            // It refuses its sandbox to root; the pages are our own.
            command.arg("--no-sandbox");
        }
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut browser = command.spawn().context("cannot start a browser")?;
        let (input, output) = (browser.stdin.take(), browser.stdout.take());
        let (input, output) = (input.context("its input")?, output.context("its output")?);
        let (sender, messages) = channel();
        thread::spawn(move || {
            for message in BufReader::new(output).split(0) {
                let message = message.ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
                let Some(message) = message else { break };
                if sender.send(message).is_err() {
                    break;
                }
            }
        });
        let mut devtools = Self {
            browser,
            input: RefCell::new(input),
            messages,
            last_id: Cell::new(0),
            session: None,
            events: RefCell::default(),
            _profile: profile,
        };
        let page = devtools.call("Target.createTarget", json!({"url": "about:blank"}))?;
        let target = json!({"targetId": page["targetId"], "flatten": true});
        let attached = devtools.call("Target.attachToTarget", target)?;
        devtools.session = attached["sessionId"].as_str().map(str::to_owned);
        Ok(devtools)
    }

    /// Sends a command and waits for its answer; events that come meanwhile are kept.
    pub(crate) fn call(&self, method: &str, params: Value) -> Result<Value> {
        let id = self.last_id.get() + 1;
        self.last_id.set(id);
        let mut message = json!({"id": id, "method": method, "params": params});
        if let Some(session) = &self.session {
            message["sessionId"] = session.as_str().into();
        }
        let mut bytes = serde_json::to_vec(&message)?;
        bytes.push(0);
        self.input.borrow_mut().write_all(&bytes).context("the browser is gone")?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let mut message = match self.messages.recv_timeout(left) {
                Ok(message) => message,
                Err(RecvTimeoutError::Timeout) => bail!("{method}: no answer"),
                Err(RecvTimeoutError::Disconnected) => bail!("{method}: the browser is gone"),
            };
            if message["id"] != id {
                self.events.borrow_mut().push(message);
            } else if message["error"].is_null() {
                return Ok(message["result"].take());
            } else {
                bail!("{method}: {}", message["error"]);
            }
        }
    }

    /// The events until now.
    pub(crate) fn events(&self) -> Vec<Value> {
        self.events.borrow().clone()
    }
}

impl Drop for Devtools {
    fn drop(&mut self) {
        self.session = None;
        let _ = self.call("Browser.close", json!({}));
        let deadline = Instant::now() + END;
        while Instant::now() < deadline {
            if !matches!(self.browser.try_wait(), Ok(None)) {
                return;
            }
            thread::sleep(Duration::from_millis(20));
        }
        let _ = self.browser.kill();
        let _ = self.browser.wait();
    }
}

//! A page in a browser that is watched: errors, and requests for anything but the page.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use std::{env, fs, thread};

use anyhow::{Context, Result, bail};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use crate::devtools::{Devtools, PATIENCE, PROGRAM, program};

/// The environment variable that names a directory for pictures.
const PICTURES: &str = "NOWAIT_PICTURES";

/// A page that is watched.
pub(crate) struct Page {
    devtools: Devtools,
    address: String,
}

/// How a page is looked at.
#[derive(Clone, Copy)]
pub(crate) struct View {
    pub(crate) width: u32,
    pub(crate) height: u32,
    pub(crate) scheme: &'static str,
}

impl View {
    pub(crate) const DESK: Self = Self { width: 1280, height: 900, scheme: "light" };
    pub(crate) const PHONE: Self = Self { width: 360, height: 740, scheme: "light" };
}

impl Page {
    /// Opens a file and waits until its script is done; without a browser it says so.
    pub(crate) fn open(file: &Path, view: View) -> Result<Option<Self>> {
        let Some(program) = program() else {
            println!("SKIP: no Chromium: set {PROGRAM} to its program");
            return Ok(None);
        };
        let address = format!("file://{}", file.display());
        let page = Self { devtools: Devtools::start(&program)?, address: address.clone() };
        for domain in ["Runtime", "Log", "Network", "Page"] {
            page.devtools.call(&format!("{domain}.enable"), json!({}))?;
        }
        page.look(view)?;
        page.devtools.call("Page.navigate", json!({"url": address}))?;
        page.wait_for("document.documentElement?.hasAttribute('data-ready') ?? false")?;
        Ok(Some(page))
    }

    /// Changes the width, and light to dark.
    pub(crate) fn look(&self, View { width, height, scheme }: View) -> Result<()> {
        let features = json!([{"name": "prefers-color-scheme", "value": scheme}]);
        self.devtools.call("Emulation.setEmulatedMedia", json!({"features": features}))?;
        self.size(width, height)
    }

    fn size(&self, width: u32, height: u32) -> Result<()> {
        let metrics =
            json!({"width": width, "height": height, "deviceScaleFactor": 1.5, "mobile": false});
        self.devtools.call("Emulation.setDeviceMetricsOverride", metrics)?;
        Ok(())
    }

    /// The value of an expression.
    pub(crate) fn get(&self, expression: &str) -> Result<Value> {
        let evaluate = json!({"expression": expression, "returnByValue": true});
        let mut answer = self.devtools.call("Runtime.evaluate", evaluate)?;
        match answer["exceptionDetails"].take() {
            Value::Null => Ok(answer["result"]["value"].take()),
            exception => bail!("{expression}: {exception}"),
        }
    }

    /// The text of each element that a selector finds.
    pub(crate) fn texts(&self, selector: &str) -> Result<Vec<String>> {
        let found = self.get(&format!(
            "[...document.querySelectorAll({selector:?})].map((e) => e.innerText.trim())"
        ))?;
        Ok(serde_json::from_value(found)?)
    }

    /// Chooses in a select.
    pub(crate) fn choose(&self, id: &str, value: u32) -> Result<()> {
        let found = format!("document.getElementById({id:?})");
        self.get(&format!("{found}.value = {value}; {found}.dispatchEvent(new Event('change'))"))?;
        Ok(())
    }

    /// Waits until an expression is true.
    pub(crate) fn wait_for(&self, expression: &str) -> Result<()> {
        let start = Instant::now();
        while self.get(expression)? != true {
            if start.elapsed() > PATIENCE {
                bail!("it never became true: {expression}; {:?}", self.complaints()?);
            }
            thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    /// Drags the mouse from one place of the view to another.
    pub(crate) fn drag(&self, from: (f64, f64), to: (f64, f64)) -> Result<()> {
        self.mouse("mouseMoved", from, 0, 0)?;
        self.mouse("mousePressed", from, 1, 1)?;
        self.mouse("mouseMoved", to, 1, 0)?;
        self.mouse("mouseReleased", to, 0, 1)
    }

    /// Clicks twice.
    pub(crate) fn double_click(&self, at: (f64, f64)) -> Result<()> {
        for count in [1, 2] {
            self.mouse("mousePressed", at, 1, count)?;
            self.mouse("mouseReleased", at, 0, count)?;
        }
        Ok(())
    }

    fn mouse(&self, kind: &str, (x, y): (f64, f64), buttons: u32, clicks: u32) -> Result<()> {
        let button = if kind == "mouseMoved" && buttons == 0 { "none" } else { "left" };
        let event = json!({"type": kind, "x": x, "y": y, "button": button, "buttons": buttons,
            "clickCount": clicks});
        self.devtools.call("Input.dispatchMouseEvent", event)?;
        Ok(())
    }

    /// The whole page as a picture, if somebody asked for pictures.
    pub(crate) fn picture(&self, name: &str) -> Result<()> {
        if env::var_os(PICTURES).is_none() {
            return Ok(());
        }
        let size = self.get("[innerWidth, document.documentElement.scrollHeight]")?;
        let number =
            |index: usize| size[index].as_u64().and_then(|number| u32::try_from(number).ok());
        let (width, height) = (number(0).context("a width")?, number(1).context("a height")?);
        // All of it is in view: what is beyond is not always painted.
        self.size(width, height)?;
        let frames =
            "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))";
        let painted = json!({"expression": frames, "awaitPromise": true});
        self.devtools.call("Runtime.evaluate", painted)?;
        let shot = self.devtools.call("Page.captureScreenshot", json!({"format": "png"}))?;
        keep(&format!("{name}.png"), &decode(&shot)?)
    }

    /// The page as it would be printed; kept beside the pictures.
    pub(crate) fn print(&self, name: &str) -> Result<Vec<u8>> {
        let pdf = decode(&self.devtools.call("Page.printToPDF", json!({}))?)?;
        keep(&format!("{name}.pdf"), &pdf)?;
        Ok(pdf)
    }

    /// What went wrong until now: exceptions, what the console says, requests for anything but the page.
    pub(crate) fn complaints(&self) -> Result<Vec<String>> {
        // Whatever happened before this has its event before its answer.
        self.devtools.call("Runtime.evaluate", json!({"expression": "0"}))?;
        let complaint = |event: &Value| {
            let params = &event["params"];
            match event["method"].as_str()? {
                "Runtime.exceptionThrown" => Some(format!("exception: {params}")),
                "Runtime.consoleAPICalled" => Some(format!("console: {params}")),
                "Log.entryAdded" => Some(format!("log: {}", params["entry"]["text"])),
                "Network.requestWillBeSent" => {
                    let url = params["request"]["url"].as_str().unwrap_or_default();
                    let own = url == self.address || url.starts_with("data:");
                    (!own).then(|| format!("request: {url}"))
                }
                _ => None,
            }
        };
        Ok(self.devtools.events().iter().filter_map(complaint).collect())
    }
}

fn decode(answer: &Value) -> Result<Vec<u8>> {
    Ok(STANDARD.decode(answer["data"].as_str().context("no data")?)?)
}

fn keep(name: &str, bytes: &[u8]) -> Result<()> {
    let Some(dir) = env::var_os(PICTURES).map(PathBuf::from) else { return Ok(()) };
    fs::create_dir_all(&dir)?;
    Ok(fs::write(dir.join(name), bytes)?)
}

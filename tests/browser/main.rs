//! The page of `nowait stall --html` in a real browser: what it shows is what the result has, it is readable on a
//! desk and on a phone, and it asks nobody for anything.
//!
//! `NOWAIT_BIN` is the program, `CHROMIUM` the browser, `NOWAIT_PICTURES` a directory for pictures of the pages.

mod devtools;
mod page;
mod sample;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use page::{Page, View};
use sample::Sample;
use serde_json::{Value, json};
use tempfile::TempDir;

/// A page of a result, in a directory that lives as long as it.
fn open(sample: &Sample, view: View) -> Result<Option<(Page, TempDir)>> {
    let dir = TempDir::new()?;
    let html = render(sample, dir.path())?;
    Ok(Page::open(&html, view)?.map(|page| (page, dir)))
}

/// Has the program make a page.
fn render(sample: &Sample, dir: &Path) -> Result<PathBuf> {
    let (json, html) = (dir.join("result.json"), dir.join("page.html"));
    std::fs::write(&json, serde_json::to_vec(&sample.0)?)?;
    let program = std::env::var_os("NOWAIT_BIN").map_or_else(|| "nowait".into(), PathBuf::from);
    let status = std::process::Command::new(&program)
        .args(["report".as_ref(), json.as_os_str(), "--html".as_ref(), html.as_os_str()])
        .status()
        .with_context(|| format!("cannot start {}", program.display()))?;
    anyhow::ensure!(status.success(), "nowait report: {status}");
    Ok(html)
}

/// A time as the page shows it, in microseconds.
fn microseconds(text: &str) -> f64 {
    let mut words = text.split_whitespace();
    let (number, unit) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let factor = match unit {
        "µs" => 1.0,
        "ms" => 1e3,
        "s" => 1e6,
        other => panic!("'{other}' in '{text}'"),
    };
    number.parse::<f64>().unwrap_or_else(|_| panic!("'{text}'")) * factor
}

/// Three digits are shown.
fn assert_close(shown: f64, expected: f64, what: &str) {
    assert!(
        (shown - expected).abs() <= expected.abs() * 0.006 + 0.5,
        "{what}: {shown}, not {expected}"
    );
}

#[test]
fn the_table_has_the_numbers_of_the_result() -> Result<()> {
    let sample = Sample::load()?;
    let Some((page, _dir)) = open(&sample, View::DESK)? else { return Ok(()) };
    let rows = page.get(
        "[...document.querySelectorAll('#summary-table tbody tr')].filter((tr) => tr.cells.length > 1)\
         .map((tr) => [...tr.cells].map((cell) => cell.firstChild.textContent))",
    )?;
    let rows: Vec<Vec<String>> = serde_json::from_value(rows)?;
    let modes: Vec<&Value> = sample.modes().collect();
    assert_eq!(rows.len(), modes.len());
    for (row, mode) in rows.iter().zip(modes) {
        assert_eq!(row[0], mode["apf"]);
        let value = |pointer: &str| mode.pointer(pointer).and_then(Value::as_f64);
        for (column, pointer) in [(1, "/overrun_us/p50/value"), (3, "/overrun_us/p99/value")] {
            assert_close(microseconds(&row[column]), value(pointer).context("a value")?, pointer);
        }
        match value("/access_us/p50/value") {
            Some(us) => assert_close(microseconds(&row[6]), us, "access"),
            None => assert_eq!(row[6], "–"),
        }
        match value("/over_baseline/overrun_p50/value") {
            Some(ratio) => assert!((row[2].parse::<f64>()? - ratio).abs() <= ratio * 0.006 + 0.006),
            None => assert_eq!(row[2], "–"),
        }
    }
    let gates = page.texts("#gates-table tbody tr td:first-child")?;
    assert_eq!(gates, ["✓ passed", "✓ passed", "✗ failed"]);
    assert_eq!(
        page.texts("#runs-table tbody tr")?.len(),
        sample.0["runs"].as_array().map_or(0, Vec::len)
    );
    assert_eq!(page.complaints()?, [""; 0]);
    Ok(())
}

#[test]
fn curves_are_those_of_the_histograms_and_the_title_says_what_they_show() -> Result<()> {
    let sample = Sample::load()?;
    let Some((page, _dir)) = open(&sample, View::DESK)? else { return Ok(()) };
    let first = page.get(
        "nowait.plots().map(({element, u}) => ({key: element.dataset.plot, x: u.data[0], \
        names: u.series.map((s) => s.name), data: u.data}))[0]",
    )?;
    let data = &first["data"];
    let x: Vec<f64> = serde_json::from_value(first["x"].clone())?;
    for (index, mode) in ["off", "host", "kernel", "user"].into_iter().enumerate() {
        assert_eq!(first["names"][index + 1], mode);
        let histogram = sample.overruns(mode, "user", 8)?;
        for (quantile, place) in [(0.5, 2_f64.log10()), (0.9, 1.0), (0.99, 2.0), (0.999, 3.0)] {
            let at = x.iter().position(|x| (x - place).abs() < 1e-9).context("a point")?;
            let shown = data[index + 1][at].as_f64().context("a number")?;
            let exact = histogram.value_at_quantile(quantile);
            assert!(
                histogram.equivalent(shown as u64, exact),
                "{mode} {quantile}: {shown}, {exact}"
            );
        }
        let last = data[index + 1][x.len() - 1].as_f64();
        assert_eq!(last, Some(histogram.max() as f64));
    }
    let title = page.texts("#finding [data-group]:not([hidden]) h3")?.concat();
    assert!(
        title.starts_with("With 8 threads in user mode, on 2 vCPUs, the heartbeat is late by "),
        "{title}"
    );
    // "155 us (mode host, user), 9 ms (off)"
    let title = title.replace("(mode ", "(");
    let (_, values) = title.split_once(" late by ").context("values")?;
    let values: Vec<_> = values.split(')').filter_map(|part| part.split_once('(')).collect();
    for mode in sample.group("user").as_array().context("modes")? {
        let name = mode["apf"].as_str().context("a mode")?;
        let shown = values.iter().find(|(_, names)| names.split(", ").any(|each| each == name));
        let (shown, _) = shown.with_context(|| title.clone())?;
        let exact = mode.pointer("/overrun_us/p50/value").and_then(Value::as_f64);
        assert_close(microseconds(shown.trim_start_matches(',')), exact.context("p50")?, name);
    }
    // "Meanwhile they touch 1 582 (user), 900 (host) pages per second."
    let progress = page.texts("#finding [data-group]:not([hidden]) .progress")?.concat();
    let rates: Vec<_> = progress.split(')').filter_map(|part| part.split_once('(')).collect();
    for mode in sample.group("user").as_array().context("modes")? {
        let name = mode["apf"].as_str().context("a mode")?;
        let (shown, _) = rates.iter().find(|(_, each)| *each == name).context("a rate")?;
        let digits: String = shown.chars().filter(char::is_ascii_digit).collect();
        let exact = mode.pointer("/pages_per_s/value").and_then(Value::as_f64).context("a rate")?;
        assert_close(digits.parse()?, exact, name);
    }
    let told = page.texts("#finding .modes dt")?;
    assert_eq!(told, ["off", "host", "kernel", "user"]);
    assert_eq!(page.complaints()?, [""; 0]);
    Ok(())
}

#[test]
fn nothing_is_wider_than_the_view() -> Result<()> {
    let mut long = Sample::load()?;
    let word = "x".repeat(300);
    long.0["config"]["kernel"] = word.clone().into();
    long.0["config"]["scenario"]["about"] = word.clone().into();
    long.0["warnings"] = json!([word.clone()]);
    long.0["gates"][0]["gate"] = word.into();
    for (name, sample) in [("sample", Sample::load()?), ("long", long)] {
        let Some((page, _dir)) = open(&sample, View::DESK)? else { return Ok(()) };
        for view in [
            View::DESK,
            View { scheme: "dark", ..View::DESK },
            View { width: 768, ..View::DESK },
            View::PHONE,
            View { scheme: "dark", ..View::PHONE },
        ] {
            page.look(view)?;
            let (width, scheme) = (view.width, view.scheme);
            page.wait_for(&format!("innerWidth === {width}"))?;
            page.wait_for(
                "nowait.plots().every(({element, u}) => u.width === element.clientWidth)",
            )?;
            let wide = page.get("document.documentElement.scrollWidth <= innerWidth")?;
            assert_eq!(wide, Value::Bool(true), "{name}, {width}, {scheme}");
            let ground = page.get("getComputedStyle(document.body).backgroundColor")?;
            assert_eq!(ground == "rgb(255, 255, 255)", scheme == "light", "{ground}");
            if name == "sample" {
                page.picture(&format!("{width}-{scheme}"))?;
            }
        }
        assert_eq!(page.complaints()?, [""; 0]);
    }
    Ok(())
}

#[test]
fn another_workload_and_another_round_are_shown_and_a_drag_zooms() -> Result<()> {
    let sample = Sample::load()?;
    let Some((page, _dir)) = open(&sample, View::DESK)? else { return Ok(()) };
    let keys =
        || page.get("nowait.plots().map(({element}) => element.dataset.plot).filter(Boolean)");
    assert_eq!(keys()?, json!(["1/overrun", "1/stall", "1/access"]));
    // The first slices of the first vCPU's time line.
    let slices = "nowait.plots().find(({element}) => element.closest('#time-line-plots')).u.data[1].slice(0, 3)";
    let expected =
        |round: u64| sample.run("off", "user", round)["heartbeats"][0]["slices_us"].clone();
    let first = page.get(slices)?;
    assert_eq!(first.as_array().map(Vec::as_slice), expected(1).as_array().map(|all| &all[..3]));
    page.choose("round", 2)?;
    assert_eq!(
        page.get(slices)?.as_array().map(Vec::as_slice),
        expected(2).as_array().map(|all| &all[..3])
    );
    page.choose("detail-group", 2)?;
    assert_eq!(keys()?, json!(["2/overrun", "2/stall", "2/access"]));
    assert_eq!(page.get("document.getElementById('finding-group').value")?, "2");
    let title = page.texts("#finding [data-group]:not([hidden]) h3")?.concat();
    assert!(title.starts_with("With 8 threads in read(2)"), "{title}");

    page.get("document.querySelector('#time-lines').scrollIntoView()")?;
    let scale = "(() => { const u = nowait.plots().find(({element}) => element.closest('#time-line-plots')).u; \
        const r = u.over.getBoundingClientRect(); return [u.scales.x.min, u.scales.x.max, r.left, r.top, r.width, r.height]; })()";
    let numbers = || -> Result<Vec<f64>> { Ok(serde_json::from_value(page.get(scale)?)?) };
    let all = numbers()?;
    let at = |share: f64| (all[2] + share * all[4], all[3] + all[5] / 2.0);
    page.drag(at(0.25), at(0.5))?;
    let zoomed = numbers()?;
    assert!(
        (zoomed[0] - 0.25 * all[1]).abs() < 0.03 && (zoomed[1] - 0.5 * all[1]).abs() < 0.03,
        "{zoomed:?}"
    );
    page.double_click(at(0.4))?;
    assert_eq!(numbers()?[..2], all[..2]);
    // The cursor's read-out.
    let legend = page.get("nowait.plots().find(({element}) => element.closest('#time-line-plots')).u.root.querySelector('.u-value').textContent")?;
    assert!(legend.as_str().is_some_and(|text| text.ends_with(" s")), "{legend}");
    assert_eq!(page.complaints()?, [""; 0]);
    Ok(())
}

#[test]
fn a_partial_result_says_so_at_the_top_and_text_is_only_text() -> Result<()> {
    let mut sample = Sample::load()?;
    let hostile = "</script><script>window.pwned = 1</script><img src=x onerror='window.pwned = 1'>\u{2028}\"'&amp;<!--";
    sample.0["complete"] = false.into();
    sample.0["config"]["scenario"]["name"] = hostile.into();
    sample.0["host"]["kernel"] = hostile.into();
    sample.0["warnings"] = json!([hostile]);
    sample.0["failures"] = json!([{"round": 1, "apf": "user", "vcpus": 2, "message": hostile}]);
    sample.0["runs"][1]["command"] = json!({"status": 1, "output": hostile});
    let Some((page, _dir)) = open(&sample, View::DESK)? else { return Ok(()) };
    let banner = page.texts("main > .banner.bad")?;
    assert!(banner[0].starts_with("Partial result. 36 runs of 36 complete"), "{banner:?}");
    assert!(
        page.get("document.querySelector('main').firstElementChild.classList.contains('bad')")?
            == true
    );
    let text =
        |selector: &str| page.get(&format!("document.querySelector({selector:?}).textContent"));
    assert_eq!(text("h1")?, hostile);
    assert_eq!(text("#missing li")?, format!("Mode user, 2 vCPUs, round 1: {hostile}"));
    assert_eq!(text("title")?, format!("nowait stall: {hostile}"));
    assert_eq!(
        page.get("[typeof window.pwned, document.images.length, document.scripts.length]")?,
        json!(["undefined", 0, 3])
    );
    page.picture("partial")?;
    assert_eq!(page.complaints()?, [""; 0]);
    Ok(())
}

#[test]
fn without_a_complete_run_there_is_a_page() -> Result<()> {
    let mut sample = Sample::load()?;
    sample.0["complete"] = false.into();
    for part in ["runs", "summary", "gates"] {
        sample.0[part] = json!([]);
    }
    let Some((page, _dir)) = open(&sample, View::PHONE)? else { return Ok(()) };
    assert!(page.texts("#finding")?.concat().contains("No run is complete"));
    assert_eq!(page.complaints()?, [""; 0]);
    Ok(())
}

#[test]
fn who_sees_no_picture_finds_the_same() -> Result<()> {
    let Some((page, _dir)) = open(&Sample::load()?, View::DESK)? else { return Ok(()) };
    let nameless = page.get(
        "[...document.querySelectorAll('[role=img], [role=region], select')].filter((e) => \
         !(e.getAttribute('aria-label') || (e.labels && e.labels.length))).length",
    )?;
    assert_eq!(nameless, 0);
    assert_eq!(page.get("[...document.querySelectorAll('table:not(.u-legend)')].filter((t) => !t.caption).length")?, 0);
    let levels =
        page.get("[...document.querySelectorAll('h1,h2,h3,h4')].map((h) => Number(h.tagName[1]))")?;
    let levels: Vec<u64> = serde_json::from_value(levels)?;
    assert_eq!(levels.iter().filter(|level| **level == 1).count(), 1);
    assert!(levels.windows(2).all(|pair| pair[1] <= pair[0] + 1), "{levels:?}");
    // Each mode is told from the others by its dashes.
    let dashes = page.get("nowait.plots()[0].u.series.slice(1).map((s) => String(s.dash))")?;
    let mut dashes: Vec<String> = serde_json::from_value(dashes)?;
    dashes.sort_unstable();
    dashes.dedup();
    assert_eq!(dashes.len(), 5);
    assert_eq!(page.complaints()?, [""; 0]);
    Ok(())
}

#[test]
fn it_prints_with_all_values() -> Result<()> {
    let Some((page, _dir)) = open(&Sample::load()?, View { scheme: "dark", ..View::DESK })? else {
        return Ok(());
    };
    page.get(
        "addEventListener('beforeprint', () => { window.closed_details = \
         document.querySelectorAll('details:not([open])').length; })",
    )?;
    let pdf = page.print("print")?;
    assert!(pdf.starts_with(b"%PDF") && pdf.len() > 20_000);
    assert_eq!(page.get("window.closed_details")?, 0);
    assert_eq!(page.get("document.documentElement.hasAttribute('data-print')")?, false);
    assert_eq!(page.complaints()?, [""; 0]);
    Ok(())
}

#[test]
fn the_page_may_not_ask_anybody() -> Result<()> {
    let Some((page, _dir)) = open(&Sample::load()?, View::DESK)? else { return Ok(()) };
    page.get("window.said = []; addEventListener('securitypolicyviolation', (e) => said.push(e.violatedDirective)); \
        fetch('http://192.0.2.1/').then(() => said.push('fetched'), () => said.push('refused')); \
        const i = new Image(); i.src = 'http://192.0.2.1/x.png';")?;
    page.wait_for("said.length >= 3")?;
    let mut said: Vec<String> = serde_json::from_value(page.get("said")?)?;
    said.sort_unstable();
    assert_eq!(said, ["connect-src", "img-src", "refused"]);
    Ok(())
}

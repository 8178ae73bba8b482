//! The page as a whole: every part is there, and nobody but us writes markup or scripts.

use std::ops::Range;

use nowait_wire::agent::{Cause, CauseStalls, HostStalls, Kind, SLICES, TierCounts, VcpuStalls};
use proptest::prelude::*;

use super::super::document::tests::{BOOT, host, planned, result, workload};
use super::super::document::{Failure, Run};
use super::super::overrun;
use super::super::plan::Boot;
use super::*;
use crate::kvm::cpuid::Apf;

/// A result with two modes, two rounds and all that a page may show.
fn document() -> Document {
    let (plan, mut document) = planned(&["--scenario", "quick"]);
    let mut stalls = overrun::empty().unwrap();
    stalls.record_n(700, 4).unwrap();
    let us_hdr = overrun::encode(&stalls).unwrap();
    for (round, apf) in [(1, Apf::Off), (1, Apf::Host), (2, Apf::Off), (2, Apf::Host)] {
        for kind in [Kind::Idle, Kind::User, Kind::Copy] {
            let host = HostStalls {
                visible: apf == Apf::Off,
                marked: true,
                elapsed_us: 10_500,
                causes: vec![CauseStalls {
                    cause: Cause::Waited,
                    total_us: 2800,
                    us_hdr: us_hdr.clone(),
                }],
                vcpus: vec![VcpuStalls { slices_us: vec![9; SLICES], ..VcpuStalls::default() }; 2],
                tiers: TierCounts { fetched: 4, ..TierCounts::default() },
            };
            let host = if apf == Apf::Off { host } else { self::host() };
            let boot = Boot { round, apf, ..BOOT };
            document.runs.push(Run::new(boot, result(&workload(kind), 2), host).unwrap());
        }
    }
    document.judge(&plan);
    document
}

fn page(document: &Document) -> String {
    String::from_utf8(render(document).unwrap()).unwrap()
}

/// Where the page has its data.
fn data(page: &str) -> Range<usize> {
    let begin = "<script type=\"application/json\" id=\"data\">";
    let start = page.find(begin).unwrap() + begin.len();
    start..start + page[start..].find("</script>").unwrap()
}

#[test]
fn it_has_every_part_and_names_no_address() {
    let mut document = document();
    let gate: super::super::Gate = "host.overrun.max > 1us".parse().unwrap();
    document.gates.push(gate.judge(&document.summary));
    document.failures.push(Failure::new(BOOT, "the guest kernel panicked".into()));
    let page = page(&document);
    for part in [
        "<!doctype html>",
        "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:",
        "<strong>Partial result.</strong>",
        "With 1 thread in user mode, on 2 vCPUs, the heartbeat is late by about",
        "✗ failed",
        "the guest kernel panicked",
        "Permission is hereby granted",
        "id=\"scenario-table\"",
        "waited for I/O",
        "Stalls stay inside KVM",
        "<strong>1 of 1 gate failed.</strong>",
    ] {
        assert!(page.contains(part), "no '{part}'");
    }
    for never in ["http:", "https:", "{{", "@import", "src=", "url("] {
        assert!(!page.contains(never), "'{never}' is in it");
    }
    assert_eq!(page.matches("<script").count(), 3);
    assert_eq!(page.matches("</script>").count(), 3);
    let value: serde_json::Value = serde_json::from_str(&page[data(&page)]).unwrap();
    assert_eq!(value["groups"].as_array().unwrap().len(), 3);
    assert_eq!(value["time_lines"].as_array().unwrap().len(), 6);
    assert_eq!(value["headline"], 1);
}

#[test]
fn without_runs_it_is_still_a_page() {
    let (_, document) = planned(&[]);
    let page = page(&document);
    assert!(page.contains("No run is complete") && page.contains("Partial result"));
}

#[test]
fn a_result_of_the_quick_preset_stays_small() {
    let (plan, mut document) = planned(&["--scenario", "quick"]);
    let templates: Vec<Run> = self::document().runs;
    // 32 processors, which nobody has in that preset, and 40 runs.
    let big = |run: &Run| {
        let mut run = run.clone();
        run.heartbeats = (0..32).map(|_| run.heartbeats[1].clone()).collect();
        run.heartbeats.iter_mut().for_each(|heartbeat| heartbeat.slices_us = vec![123_456; SLICES]);
        run.stall.vcpus =
            vec![VcpuStalls { slices_us: vec![12_345; SLICES], ..Default::default() }; 32];
        run
    };
    document.runs = templates.iter().map(big).cycle().take(40).collect();
    document.judge(&plan);
    let bytes = page(&document).len();
    assert!(bytes < 1_500_000, "{bytes} bytes");
    // As many runs as there may be.
    document.runs = templates.iter().map(big).cycle().take(1200).collect();
    for (index, run) in document.runs.iter_mut().enumerate() {
        run.round = index as u32 / 12 + 1;
    }
    document.judge(&plan);
    let bytes = page(&document).len();
    assert!(bytes < 2_000_000, "{bytes} bytes");
}

#[test]
fn places_are_filled_once() {
    let part = |name: &str| Ok(format!("<{name}>{{{{b}}}}"));
    assert_eq!(fill("x{{a}}y", part).unwrap(), "x<a>{{b}}y");
    assert!(fill("x{{a", part).is_err());
    let page = page(&document());
    assert!(!page.contains("the page has no part"));
    assert!(fill("{{nothing}}", |name| Err(name.to_owned())).is_err());
}

/// The document with this text wherever a guest, a user or a file can put one.
fn with(text: &str) -> Document {
    let mut document = document();
    document.config.scenario.name = text.to_owned();
    document.config.scenario.about = text.to_owned();
    document.config.scenario.store = text.to_owned();
    document.config.command = text.to_owned();
    document.config.kernel = text.to_owned();
    document.config.memory = text.to_owned();
    document.config.resident_limit = Some(text.to_owned());
    document.host.kernel = text.to_owned();
    document.warnings.push(text.to_owned());
    document.failures.push(Failure::new(BOOT, text.to_owned()));
    document.runs[0].problem = Some(text.to_owned());
    let output = text.to_owned();
    document.runs[0].command = Some(super::super::CommandEnd { status: 1, output });
    document.gates.push(super::super::GateResult {
        gate: text.to_owned(),
        passed: false,
        failures: vec![text.to_owned()],
        compared: 1,
    });
    document
}

/// How many tags of each kind a page has: `<` with what follows.
fn tags(page: &str) -> Vec<&str> {
    let mut tags: Vec<&str> = page
        .match_indices('<')
        .map(|(at, _)| {
            let rest = &page[at..];
            let end = rest[1..].find(|c: char| !c.is_ascii_alphanumeric() && c != '/' && c != '!');
            &rest[..end.map_or(rest.len(), |end| end + 1)]
        })
        .collect();
    tags.sort_unstable();
    tags
}

#[test]
fn what_a_guest_says_is_text() {
    let harmless = page(&with("harmless"));
    for text in [
        "</script><script>alert(1)</script>",
        "</title><img src=x onerror=alert(1)>",
        "\" onmouseover=\"alert(1)",
        "' onmouseover='alert(1)",
        "<!--",
        "]]>",
        "{{script}}",
        "\u{2028}\u{2029}\u{0}\u{202e}",
        "&lt;b&gt;",
    ] {
        let page = page(&with(text));
        assert_eq!(tags(&page), tags(&harmless), "{text}");
        assert!(!page.contains("<img") && !page.contains("onmouseover=\"alert"), "{text}");
        assert!(serde_json::from_str::<serde_json::Value>(&page[data(&page)]).is_ok(), "{text}");
    }
    let page = page(&with("a & <b>"));
    assert!(page.contains("a &amp; &lt;b&gt;") && !page.contains("a & <b>"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn any_text_makes_no_tag(text in "[<>&\"'/!{}a-c\u{2028}\u{0}-]{0,40}|\\PC{0,40}") {
        let (page, harmless) = (page(&with(&format!("a{text}"))), page(&with("x")));
        prop_assert_eq!(tags(&page), tags(&harmless));
    }
}

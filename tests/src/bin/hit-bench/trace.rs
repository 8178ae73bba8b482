//! The pages that a guest touches: its agent's Zipf workload with a quarter of RAM in memory, written down by
//! the agent itself, so that accesses to pages in memory are in it, too.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use nowait_tests::guest::Guest;
use nowait_wire::agent::{Access, Kind, Pressure, Report, Request, TOUCHES_FILE, Workload};

/// Pages of the buffer (32M of a guest of 96M).
const PAGES: u32 = 8192;
/// Touches that are written down at most, and at least.
const TOUCHES: u32 = 1 << 17;
const LEAST_TOUCHES: usize = 1 << 15;
/// A report comes out byte by byte, through an emulated UART.
const LIMIT: Duration = Duration::from_secs(400);
const DURATION_MS: u32 = 30_000;
/// The file comes out in pieces that fit in a report.
const PIECE_BYTES: usize = 7168;

/// Records a trace, and writes its page numbers to a file, one a line.
pub(crate) fn record(path: &Path) -> Result<()> {
    let pressure = Pressure::Limit { access: Access::Zipf, seed: 7 };
    let workload = Workload {
        kind: Kind::User,
        threads: 4,
        duration_ms: DURATION_MS,
        pages: PAGES,
        heartbeat_us: 10_000,
        pressure,
        ..Workload::IDLE
    };
    let mut guest = Guest::linux()
        .limit(LIMIT)
        .args(["--memory", "96M", "--resident-limit", "24M", "--console", "none"])
        .request(Request::Record { workload, touches: TOUCHES });
    let pieces = (TOUCHES as usize * 2).div_ceil(PIECE_BYTES);
    for piece in 0..pieces {
        guest = guest.exec(&format!(
            "dd if={TOUCHES_FILE} bs={PIECE_BYTES} skip={piece} count=1 2>/dev/null | base64"
        ));
    }
    let end = guest.run();
    end.expect_code(0);
    let results = end.results();
    ensure!(results.len() == 1 && results[0].data_errors == 0, "{results:?}");
    let mut bytes = Vec::new();
    for report in &end.reports {
        if let Report::Exec { output, .. } = report {
            let text: String = output.split_whitespace().collect();
            bytes.extend(BASE64_STANDARD.decode(text).context("a piece of the trace")?);
        }
    }
    let touches: Vec<u16> =
        bytes.as_chunks().0.iter().map(|two| u16::from_le_bytes(*two)).collect();
    let touched = usize::try_from(results[0].pages_touched)?.min(TOUCHES as usize);
    ensure!(touches.len() == touched, "{} of {touched} touches came out", touches.len());
    ensure!(touched >= LEAST_TOUCHES, "only {touched} touches");
    let faults = end.number("/pager/fetched_pages") + end.number("/pager/hits_stored");
    eprintln!("hit-bench: {touched} touches, {faults} pages came back meanwhile");
    let lines: String = touches.iter().map(|page| format!("{page}\n")).collect();
    std::fs::write(path, lines).with_context(|| format!("writing {}", path.display()))
}

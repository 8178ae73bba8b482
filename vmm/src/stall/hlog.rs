//! All overruns as an HdrHistogram interval log: what HistogramLogProcessor and its relatives read. One
//! interval for each run, tagged with what it was.

use std::time::{Duration, SystemTime};

use hdrhistogram::serialization::V2DeflateSerializer;
use hdrhistogram::serialization::interval_log::{IntervalLogWriterBuilder, Tag};

use super::document::{Document, Run};
use super::overrun;
use super::summary::workload_name;

/// Values are logged in milliseconds, as the format has it: from microseconds.
const MAX_VALUE_DIVISOR: f64 = 1000.0;

/// The report.
pub(super) fn render(document: &Document) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::new();
    let mut serializer = V2DeflateSerializer::new();
    let mut writer = IntervalLogWriterBuilder::new()
        .add_comment("nowait stall: wake-up overruns in microseconds, an interval for each run")
        .add_comment(&format!("scenario: {}", document.config.scenario.name))
        .with_start_time(SystemTime::UNIX_EPOCH)
        .with_max_value_divisor(MAX_VALUE_DIVISOR)
        .begin_log_with(&mut bytes, &mut serializer)
        .map_err(|error| error.to_string())?;
    let mut start = Duration::ZERO;
    for run in &document.runs {
        let histogram = overrun::decode(&run.overrun_us_hdr).map_err(|error| error.to_string())?;
        let lasted = Duration::from_micros(run.elapsed_us);
        let tag = tag(run);
        let tag = Tag::new(&tag).ok_or_else(|| format!("'{tag}' is no tag"))?;
        writer
            .write_histogram(&histogram, start, lasted, Some(tag))
            .map_err(|error| format!("{error:?}"))?;
        start += lasted;
    }
    drop(writer);
    Ok(bytes)
}

/// What a run was, in a word.
fn tag(run: &Run) -> String {
    let workload = workload_name(run.workload);
    format!("{}-{workload}-{}t-{}cpu-r{}", run.apf, run.threads, run.vcpus, run.round)
}

#[cfg(test)]
mod tests {
    use super::super::document::tests::{BOOT, host, planned, result, workload};
    use super::*;
    use hdrhistogram::Histogram;
    use hdrhistogram::serialization::Deserializer;
    use hdrhistogram::serialization::interval_log::{IntervalLogIterator, LogEntry};
    use nowait_wire::agent::Kind;

    #[test]
    fn the_log_is_read_back_as_it_was() {
        let (_, mut document) = planned(&[]);
        for kind in [Kind::Idle, Kind::User] {
            document.runs.push(Run::new(BOOT, result(&workload(kind), 2), host()).unwrap());
        }
        let log = render(&document).unwrap();
        let entries: Vec<_> = IntervalLogIterator::new(&log).map(Result::unwrap).collect();
        let mut tags = Vec::new();
        for entry in &entries {
            let LogEntry::Interval(interval) = entry else { continue };
            tags.push(interval.tag().unwrap().as_str().to_owned());
            let bytes = base64::Engine::decode(
                &base64::engine::general_purpose::STANDARD,
                interval.encoded_histogram(),
            )
            .unwrap();
            let histogram: Histogram<u64> =
                Deserializer::new().deserialize(&mut bytes.as_slice()).unwrap();
            assert_eq!((histogram.len(), histogram.max()), (20, 1000));
            // In milliseconds.
            assert!((interval.max() - 1.0).abs() < 1e-9);
        }
        assert_eq!(tags, ["host-idle-0t-2cpu-r1", "host-user-1t-2cpu-r1"]);
    }
}

//! The life of every fault, in the trace event format that Perfetto and Chrome read ("Trace Event Format",
//! Google, 2016): a track for each vCPU with its stalls and notifications, and for each page that needed
//! time the parts of its way.
//!
//! ```text
//!   vCPU 0   |--told--|          |ACK       |-----waited-----|
//!   page 7f3 |--queue--|----store----|-install-|
//! ```
//!
//! Steps are kept in memory, the last [`MAX_STEPS`] of them, and written at the end of the run.

use std::collections::{HashMap, VecDeque};
use std::io::Write;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use guest_memory::Step;
use nowait_wire::agent::Cause;
use serde::Serialize;

/// The most steps that are kept; each takes 48 bytes.
pub const MAX_STEPS: usize = 1 << 20;

/// What is told a guest, and what it says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notification {
    /// Page-not-present is injected.
    NotPresent,
    /// A page came that the vCPU knows of; the interrupt follows unless an earlier one has no ACK yet.
    Ready,
    /// The guest wrote ACK.
    Ack,
}

/// Writes steps down.
#[derive(Debug)]
pub struct Tracer {
    base: Instant,
    steps: Mutex<Steps>,
}

#[derive(Debug)]
struct Steps {
    kept: VecDeque<Recorded>,
    most: usize,
    dropped: u64,
}

#[derive(Clone, Copy, Debug)]
struct Recorded {
    at: Instant,
    what: What,
}

#[derive(Clone, Copy, Debug)]
enum What {
    Stall { vcpu: u16, cause: Cause, gfn: u64, took_ns: u64 },
    Notification { vcpu: u16, what: Notification, token: u64 },
    Page { gfn: u64, step: Step },
}

/// One event of the format. Times are in microseconds.
#[derive(Serialize)]
struct Event<'a> {
    name: &'a str,
    cat: &'a str,
    ph: &'a str,
    ts: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    dur: Option<f64>,
    pid: u32,
    tid: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    args: Args<'a>,
}

#[derive(Default, Serialize)]
struct Args<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    gfn: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    dropped_steps: Option<u64>,
}

/// How far a page that needs time has come.
struct Way {
    began: Instant,
    /// The part that it is in, and since when.
    part: &'static str,
    since: Instant,
    number: u64,
}

impl Tracer {
    /// One that keeps so many steps.
    #[must_use]
    pub fn new(most: usize) -> Self {
        let steps = Steps { kept: VecDeque::new(), most, dropped: 0 };
        Self { base: Instant::now(), steps: Mutex::new(steps) }
    }

    /// A vCPU was stalled.
    pub fn stall(&self, vcpu: usize, cause: Cause, gfn: u64, began: Instant, ended: Instant) {
        let took_ns = u64::try_from((ended - began).as_nanos()).unwrap_or(u64::MAX);
        let what = What::Stall { vcpu: vcpu as u16, cause, gfn, took_ns };
        self.keep(Recorded { at: began, what });
    }

    /// A guest was told something, or said something.
    pub fn notification(&self, vcpu: u32, what: Notification, token: u64) {
        let what = What::Notification { vcpu: vcpu as u16, what, token };
        self.keep(Recorded { at: Instant::now(), what });
    }

    /// A fault took a step.
    pub fn step(&self, gfn: u64, step: Step) {
        self.keep(Recorded { at: Instant::now(), what: What::Page { gfn, step } });
    }

    fn keep(&self, step: Recorded) {
        let mut steps = self.lock();
        if steps.kept.len() >= steps.most {
            steps.kept.pop_front();
            steps.dropped += 1;
        }
        steps.kept.push_back(step);
    }

    fn lock(&self) -> MutexGuard<'_, Steps> {
        self.steps.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The trace as JSON.
    ///
    /// # Errors
    /// None that can be: numbers and strings always encode.
    pub fn render(&self) -> Result<Vec<u8>, serde_json::Error> {
        let steps = self.lock();
        let mut out =
            Writer { bytes: b"{\"displayTimeUnit\":\"ns\",\"traceEvents\":[".to_vec(), any: false };
        let args =
            Args { name: Some("nowait"), dropped_steps: Some(steps.dropped), ..Args::default() };
        out.event(&meta("process_name", 0, args))?;
        let mut vcpus: Vec<u16> = steps.kept.iter().filter_map(|step| step.what.vcpu()).collect();
        vcpus.sort_unstable();
        vcpus.dedup();
        for vcpu in vcpus {
            let name = format!("vCPU {vcpu}");
            let args = Args { name: Some(&name), ..Args::default() };
            out.event(&meta("thread_name", tid(vcpu), args))?;
        }
        let mut ways: HashMap<u64, Way> = HashMap::new();
        let mut number = 0;
        for step in &steps.kept {
            match step.what {
                What::Page { gfn, step: kind } => {
                    self.page(&mut out, &mut ways, &mut number, step.at, gfn, kind)?;
                }
                What::Stall { vcpu, cause, gfn, took_ns } => out.event(&Event {
                    dur: Some(took_ns as f64 / 1000.0),
                    args: Args { gfn: Some(hex(gfn)), ..Args::default() },
                    ..self.event(cause.name(), "stall", "X", step.at, tid(vcpu))
                })?,
                What::Notification { vcpu, what, token } => {
                    let name = match what {
                        Notification::NotPresent => "page-not-present",
                        Notification::Ready => "page came",
                        Notification::Ack => "ACK",
                    };
                    let token = (what != Notification::Ack).then(|| hex(token));
                    out.event(&Event {
                        args: Args { token, ..Args::default() },
                        ..self.event(name, "notification", "i", step.at, tid(vcpu))
                    })?;
                }
            }
        }
        out.bytes.extend_from_slice(b"\n]}\n");
        Ok(out.bytes)
    }

    /// The parts of a page's way, each when it is over.
    fn page(
        &self,
        out: &mut Writer,
        ways: &mut HashMap<u64, Way>,
        number: &mut u64,
        at: Instant,
        gfn: u64,
        step: Step,
    ) -> Result<(), serde_json::Error> {
        let begin = |part| match part {
            Step::Message => Some("message"),
            Step::Queued => Some("queue"),
            Step::Started => Some("store"),
            Step::Read => Some("install"),
            Step::Mapped => None,
        };
        let way = ways.remove(&gfn);
        let Some(next) = begin(step) else {
            // Without a way the page was at hand.
            let Some(way) = way else { return Ok(()) };
            self.part(out, &way, gfn, at)?;
            let name = format!("page {}", hex(gfn));
            for (ph, at) in [("b", way.began), ("e", at)] {
                let id = Some(format!("{:x}", way.number));
                out.event(&Event { id, ..self.event(&name, "page", ph, at, 0) })?;
            }
            return Ok(());
        };
        let way = match way {
            Some(way) => {
                self.part(out, &way, gfn, at)?;
                Way { part: next, since: at, ..way }
            }
            None => {
                *number += 1;
                Way { began: at, part: next, since: at, number: *number }
            }
        };
        ways.insert(gfn, way);
        Ok(())
    }

    fn part(
        &self,
        out: &mut Writer,
        way: &Way,
        gfn: u64,
        ended: Instant,
    ) -> Result<(), serde_json::Error> {
        for (ph, at) in [("b", way.since), ("e", ended)] {
            out.event(&Event {
                id: Some(format!("{:x}", way.number)),
                args: Args { gfn: Some(hex(gfn)), ..Args::default() },
                ..self.event(way.part, "page", ph, at, 0)
            })?;
        }
        Ok(())
    }

    fn event<'a>(
        &self,
        name: &'a str,
        cat: &'a str,
        ph: &'a str,
        at: Instant,
        tid: u32,
    ) -> Event<'a> {
        let ts = at.saturating_duration_since(self.base).as_nanos() as f64 / 1000.0;
        Event { name, cat, ph, ts, dur: None, pid: PID, tid, id: None, args: Args::default() }
    }
}

const PID: u32 = 1;

/// 0 is nobody's.
fn tid(vcpu: u16) -> u32 {
    u32::from(vcpu) + 1
}

fn hex(number: u64) -> String {
    format!("{number:#x}")
}

fn meta<'a>(name: &'a str, tid: u32, args: Args<'a>) -> Event<'a> {
    Event { name, cat: "__metadata", ph: "M", ts: 0.0, dur: None, pid: PID, tid, id: None, args }
}

impl What {
    fn vcpu(self) -> Option<u16> {
        match self {
            Self::Stall { vcpu, .. } | Self::Notification { vcpu, .. } => Some(vcpu),
            Self::Page { .. } => None,
        }
    }
}

/// Events, separated by commas.
struct Writer {
    bytes: Vec<u8>,
    any: bool,
}

impl Writer {
    fn event(&mut self, event: &Event<'_>) -> Result<(), serde_json::Error> {
        let separator: &[u8] = if std::mem::replace(&mut self.any, true) { b",\n" } else { b"\n" };
        // Writing to a vector does not fail.
        let _ = self.bytes.write_all(separator);
        serde_json::to_writer(&mut self.bytes, event)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;
    use std::time::Duration;

    fn events(tracer: &Tracer) -> Vec<Value> {
        let text = tracer.render().unwrap();
        let trace: Value = serde_json::from_slice(&text).unwrap();
        trace["traceEvents"].as_array().unwrap().clone()
    }

    #[test]
    fn the_life_of_a_fault_is_a_stall_and_the_parts_of_its_pages_way() {
        let tracer = Tracer::new(100);
        let began = Instant::now();
        tracer.step(0x7f3, Step::Queued);
        tracer.notification(1, Notification::NotPresent, 0x105);
        tracer.stall(1, Cause::Told, 0x7f3, began, began + Duration::from_micros(40));
        tracer.step(0x7f3, Step::Started);
        tracer.step(0x7f3, Step::Read);
        tracer.step(0x7f3, Step::Mapped);
        tracer.notification(1, Notification::Ready, 0x105);
        tracer.notification(1, Notification::Ack, 0);
        // A hit has no way.
        tracer.step(0x7f4, Step::Mapped);
        let events = events(&tracer);
        let named = |name: &str| -> Vec<&Value> {
            events.iter().filter(|event| event["name"] == name).collect()
        };
        let [told] = named("told")[..] else { panic!("{events:?}") };
        assert_eq!(
            (&told["ph"], &told["dur"], &told["tid"]),
            (&"X".into(), &40.0.into(), &2.into())
        );
        assert_eq!(told["args"]["gfn"], "0x7f3");
        for part in ["queue", "store", "install", "page 0x7f3"] {
            let [begin, end] = named(part)[..] else { panic!("{part}: {events:?}") };
            assert_eq!((&begin["ph"], &end["ph"]), (&"b".into(), &"e".into()));
            assert_eq!((&begin["id"], &begin["cat"]), (&end["id"], &end["cat"]));
            assert!(begin["ts"].as_f64() <= end["ts"].as_f64());
        }
        assert_eq!(named("page-not-present")[0]["args"]["token"], "0x105");
        assert_eq!((named("page came").len(), named("ACK").len()), (1, 1));
        assert_eq!(named("thread_name")[0]["args"]["name"], "vCPU 1");
        assert!(named("page 0x7f4").is_empty());
    }

    #[test]
    fn memory_is_bounded_and_what_was_dropped_is_told() {
        let tracer = Tracer::new(3);
        for gfn in 0..10 {
            tracer.step(gfn, Step::Message);
        }
        assert_eq!(tracer.lock().kept.len(), 3);
        assert_eq!(events(&tracer)[0]["args"]["dropped_steps"], 7);
        const { assert!(size_of::<Recorded>() <= 48) };
    }
}

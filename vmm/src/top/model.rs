//! What the screen shows and what keys do to it. No terminal, no socket and no clock here.

use guest_memory::{MIN_RESIDENT_LIMIT_BYTES, PAGE_BYTES};

use super::client::Request;
use super::history::History;
use super::pages::Pages;
use super::snapshot::Snapshot;

/// For so many snapshots a change that was asked for is what the next one starts from, whether it has
/// taken effect or not: a second.
const AIM_SNAPSHOTS: u8 = 4;
/// The largest threshold that the server takes, in microseconds.
const MAX_THRESHOLD_US: u64 = 3_600_000_000;

/// What is known of a run, and what its user is at.
#[derive(Clone, Debug, Default)]
pub(super) struct Model {
    /// The path of the socket.
    pub(super) socket: String,
    pub(super) history: History,
    pub(super) pages: Option<Pages>,
    /// What became of the last action.
    pub(super) status: Option<Status>,
    /// Why there is nothing new.
    pub(super) trouble: Option<String>,
    /// To be answered with y before all of RAM is evicted.
    pub(super) asks_to_evict: bool,
    pub(super) shows_help: bool,
    limit: Option<Aim>,
    threshold: Option<Aim>,
}

/// What became of an action.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Status {
    pub(super) text: String,
    pub(super) is_error: bool,
}

/// What was asked for, in bytes or microseconds.
#[derive(Clone, Copy, Debug)]
struct Aim {
    value: u64,
    snapshots_left: u8,
}

/// A key, as far as it matters here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Press {
    Char(char),
    Escape,
    /// Ctrl-C.
    Interrupt,
    /// Ctrl-L.
    Redraw,
}

/// What a key asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use]
pub(super) enum Step {
    /// Nothing but what the model has noted.
    Stay,
    /// The end.
    Quit,
    /// The end, as by a signal.
    Interrupted,
    /// The whole screen anew.
    Redraw,
    /// The server is to do this.
    Act(Action),
}

/// Something that the server is asked to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Action {
    /// In a word.
    pub(super) name: &'static str,
    pub(super) request: Request,
}

impl Model {
    /// Of a run whose first snapshot is this.
    pub(super) fn new(socket: String, first: Snapshot) -> Self {
        let mut model = Self { socket, ..Self::default() };
        model.take(first);
        model
    }

    /// A new snapshot.
    pub(super) fn take(&mut self, snapshot: Snapshot) {
        self.trouble = None;
        self.history.push(snapshot);
        for aim in [&mut self.limit, &mut self.threshold] {
            *aim = aim.and_then(|aim| {
                let snapshots_left = aim.snapshots_left.checked_sub(1)?;
                Some(Aim { snapshots_left, ..aim })
            });
        }
    }

    /// An action was done, or not.
    pub(super) fn acted(&mut self, name: &str, result: Result<String, String>) {
        let is_error = result.is_err();
        if is_error {
            (self.limit, self.threshold) = (None, None);
        }
        let line = result.unwrap_or_else(|error| error);
        let text = format!("{name}: {}", line.lines().next().unwrap_or(""));
        self.status = Some(Status { text, is_error });
    }

    /// A key was pressed.
    pub(super) fn press(&mut self, key: Press) -> Step {
        match key {
            Press::Interrupt => return Step::Interrupted,
            Press::Redraw => return Step::Redraw,
            Press::Escape => {
                (self.shows_help, self.asks_to_evict) = (false, false);
                return Step::Stay;
            }
            Press::Char(_) => {}
        }
        let Press::Char(key) = key else { return Step::Stay };
        if std::mem::take(&mut self.asks_to_evict) {
            return match key {
                'y' | 'Y' => act("evict", Request::plain("POST /evict")),
                _ => self.say("nothing was evicted"),
            };
        }
        // Any key but that of the help takes it away; what it means is done.
        let helped = std::mem::take(&mut self.shows_help);
        match key {
            'q' | 'Q' => Step::Quit,
            '?' | 'h' => {
                self.shows_help = !helped;
                Step::Stay
            }
            'p' => act("pause", Request::plain("POST /pause")),
            'r' => act("resume", Request::plain("POST /resume")),
            'e' => {
                self.asks_to_evict = true;
                Step::Stay
            }
            '+' | '=' | 'l' => self.raise_limit(),
            '-' | '_' | 'L' => self.lower_limit(),
            't' => self.scale_threshold(|us| us.saturating_mul(2)),
            'T' => self.scale_threshold(|us| us / 2),
            'a' => self.set_threshold("auto".to_owned()),
            _ => Step::Stay,
        }
    }

    fn raise_limit(&mut self) -> Step {
        let Some((limit, total)) = self.limit_now().zip(self.total()) else {
            return self.say("there is no resident limit to raise: - sets one");
        };
        if limit >= total {
            return self.say("the resident limit is all of guest RAM");
        }
        let more = (limit / 10).next_multiple_of(PAGE_BYTES).max(PAGE_BYTES);
        self.set_limit(limit.saturating_add(more).min(total))
    }

    fn lower_limit(&mut self) -> Step {
        // Without one, what is in memory is where it begins.
        let memory = self.history.last().map(|snapshot| &snapshot.memory);
        let used = memory.map_or(0, |memory| (memory.resident + memory.store) as u64);
        let limit = self.limit_now().unwrap_or(used);
        if limit <= MIN_RESIDENT_LIMIT_BYTES {
            return self.say("the resident limit is as low as it can be, 4 MiB");
        }
        let less = (limit / 10).next_multiple_of(PAGE_BYTES);
        self.set_limit(limit.saturating_sub(less).max(MIN_RESIDENT_LIMIT_BYTES))
    }

    fn set_limit(&mut self, bytes: u64) -> Step {
        let bytes = bytes / PAGE_BYTES * PAGE_BYTES;
        self.limit = Some(Aim { value: bytes, snapshots_left: AIM_SNAPSHOTS });
        act("limit", Request { line: "PUT /limit".to_owned(), body: bytes.to_string() })
    }

    fn scale_threshold(&mut self, scale: impl FnOnce(u64) -> u64) -> Step {
        let async_pf = self.history.last().and_then(|snapshot| snapshot.async_pf.as_ref());
        let shown = async_pf.map(|async_pf| (async_pf.threshold * 1e6).round() as u64);
        // Where there is none, the server says why.
        let now = self.threshold.map(|aim| aim.value).or(shown).unwrap_or(0);
        let us = scale(now.max(1)).min(MAX_THRESHOLD_US);
        self.threshold = Some(Aim { value: us, snapshots_left: AIM_SNAPSHOTS });
        self.set_threshold(format!("{us}us"))
    }

    fn set_threshold(&mut self, body: String) -> Step {
        act("threshold", Request { line: "PUT /threshold".to_owned(), body })
    }

    fn limit_now(&self) -> Option<u64> {
        let shown = || self.history.last()?.memory.limit.map(|bytes| bytes as u64);
        self.limit.map(|aim| aim.value).or_else(shown)
    }

    fn total(&self) -> Option<u64> {
        self.history.last().map(|snapshot| snapshot.memory.total as u64)
    }

    fn say(&mut self, text: &str) -> Step {
        self.status = Some(Status { text: text.to_owned(), is_error: false });
        Step::Stay
    }
}

fn act(name: &'static str, request: Request) -> Step {
    Step::Act(Action { name, request })
}

#[cfg(test)]
mod tests {
    use super::super::snapshot::{AsyncPf, Memory};
    use super::*;
    use proptest::prelude::*;

    const MIB: u64 = 1 << 20;

    fn model(limit: Option<u64>, threshold_us: Option<u64>) -> Model {
        Model::new("control".to_owned(), snapshot(limit, threshold_us))
    }

    fn snapshot(limit: Option<u64>, threshold_us: Option<u64>) -> Snapshot {
        let memory = Memory {
            total: (64 * MIB) as f64,
            resident: (20 * MIB) as f64,
            limit: limit.map(|bytes| bytes as f64),
            ..Memory::default()
        };
        let async_pf =
            threshold_us.map(|us| AsyncPf { threshold: us as f64 / 1e6, ..AsyncPf::default() });
        Snapshot { memory, async_pf, ..Snapshot::default() }
    }

    /// Line and body of what a key asks for.
    fn asked(model: &mut Model, key: char) -> Option<(String, String)> {
        match model.press(Press::Char(key)) {
            Step::Act(Action { request, .. }) => Some((request.line, request.body)),
            _ => None,
        }
    }

    fn put(path: &str, value: impl ToString) -> Option<(String, String)> {
        Some((format!("PUT {path}"), value.to_string()))
    }

    #[test]
    fn the_limit_goes_up_and_down_by_a_tenth_between_its_bounds() {
        let mut m = model(Some(40 * MIB), None);
        assert_eq!(asked(&mut m, '+'), put("/limit", 44 * MIB));
        // From where it was asked to go, though it is not there yet.
        assert_eq!(
            asked(&mut m, 'l'),
            put("/limit", (48.4 * MIB as f64 / 4096.0).ceil() as u64 * 4096)
        );
        let mut m = model(Some(40 * MIB), None);
        assert_eq!(asked(&mut m, '-'), put("/limit", 36 * MIB));
        assert_eq!(asked(&mut model(Some(60 * MIB), None), '+'), put("/limit", 64 * MIB));
        assert_eq!(asked(&mut model(Some(64 * MIB), None), '+'), None);
        assert_eq!(asked(&mut model(Some(4 * MIB + 4096), None), 'L'), put("/limit", 4 * MIB));
        let mut low = model(Some(4 * MIB), None);
        assert_eq!(asked(&mut low, '-'), None);
        assert!(low.status.unwrap().text.contains("4 MiB"));
        assert_eq!(asked(&mut model(None, None), '+'), None);
        assert_eq!(asked(&mut model(None, None), '-'), put("/limit", 18 * MIB));
    }

    #[test]
    fn what_did_not_happen_is_not_aimed_from() {
        let mut m = model(Some(40 * MIB), None);
        assert_eq!(asked(&mut m, '+'), put("/limit", 44 * MIB));
        m.acted("limit", Err("the order before is being carried out".into()));
        assert!(m.status.as_ref().unwrap().is_error);
        assert_eq!(asked(&mut m, '+'), put("/limit", 44 * MIB));
        for _ in 0..=AIM_SNAPSHOTS {
            m.take(snapshot(Some(40 * MIB), None));
        }
        assert_eq!(asked(&mut m, '+'), put("/limit", 44 * MIB));
    }

    #[test]
    fn the_threshold_doubles_halves_and_is_automatic() {
        let mut m = model(None, Some(100));
        assert_eq!(asked(&mut m, 't'), put("/threshold", "200us"));
        assert_eq!(asked(&mut m, 't'), put("/threshold", "400us"));
        assert_eq!(asked(&mut m, 'T'), put("/threshold", "200us"));
        assert_eq!(asked(&mut m, 'a'), put("/threshold", "auto"));
        assert_eq!(asked(&mut model(None, Some(0)), 't'), put("/threshold", "2us"));
        assert_eq!(asked(&mut model(None, Some(1)), 'T'), put("/threshold", "0us"));
        assert_eq!(asked(&mut model(None, Some(u64::MAX)), 't'), put("/threshold", "3600000000us"));
        // The server knows why there is none.
        assert!(asked(&mut model(None, None), 't').is_some());
    }

    #[test]
    fn everything_is_evicted_only_when_that_is_confirmed() {
        let mut m = model(None, None);
        assert_eq!(asked(&mut m, 'e'), None);
        assert!(m.asks_to_evict);
        assert_eq!(asked(&mut m, 'n'), None);
        assert!(!m.asks_to_evict);
        let _ = (m.press(Press::Char('e')), m.press(Press::Escape));
        assert_eq!(asked(&mut m, 'y'), None);
        let _ = m.press(Press::Char('e'));
        // Not even quit.
        assert_eq!(m.press(Press::Char('q')), Step::Stay);
        let _ = m.press(Press::Char('e'));
        assert_eq!(asked(&mut m, 'y'), Some(("POST /evict".into(), String::new())));
    }

    #[test]
    fn help_comes_and_goes_and_the_end_is_always_near() {
        let mut m = model(None, None);
        let _ = m.press(Press::Char('?'));
        assert!(m.shows_help);
        let _ = m.press(Press::Char('?'));
        assert!(!m.shows_help);
        let _ = m.press(Press::Char('h'));
        assert_eq!(asked(&mut m, 'p'), Some(("POST /pause".into(), String::new())));
        assert!(!m.shows_help);
        let _ = m.press(Press::Char('e'));
        assert_eq!(m.press(Press::Interrupt), Step::Interrupted);
        assert_eq!(model(None, None).press(Press::Char('q')), Step::Quit);
    }

    proptest! {
        #[test]
        fn whatever_is_pressed_limits_stay_in_bounds(limit in prop::option::of(0..u64::MAX), total in 0.0..1e18_f64, keys in "[+\\-lLtTaperyn?]{0,40}") {
            let mut m = model(limit, Some(7));
            let mut odd = snapshot(limit, Some(7));
            odd.memory.total = total;
            m.take(odd);
            for key in keys.chars() {
                if let Some((line, body)) = asked(&mut m, key)
                    && line == "PUT /limit"
                {
                    let bytes: u64 = body.parse().unwrap();
                    prop_assert!(bytes.is_multiple_of(PAGE_BYTES));
                }
            }
        }
    }
}

//! Whole screens, as text. `NOWAIT_BLESS=1` writes them anew.

use std::fmt::Write as _;
use std::path::Path;

use proptest::prelude::*;
use ratatui::Terminal;
use ratatui::backend::TestBackend;

use super::super::model::{Model, Press};
use super::super::pages::{Pages, State};
use super::super::snapshot::{AsyncPf, Memory, Snapshot, Stalls, Tier};
use super::*;

const MIB: f64 = 1024.0 * 1024.0;

fn screen(model: &Model, columns: u16, rows: u16) -> String {
    let mut terminal = Terminal::new(TestBackend::new(columns, rows)).unwrap();
    terminal.draw(|frame| draw(frame, model)).unwrap();
    let buffer = terminal.backend().buffer();
    let mut text = String::new();
    for y in 0..rows {
        let line: String = (0..columns).map(|x| buffer[(x, y)].symbol()).collect();
        writeln!(text, "{}", line.trim_end()).unwrap();
    }
    text
}

/// Compares with the file, or writes it.
fn expect(name: &str, model: &Model, columns: u16, rows: u16) {
    let text = screen(model, columns, rows);
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/top/view/screens").join(name);
    if std::env::var_os("NOWAIT_BLESS").is_some() {
        std::fs::write(&path, &text).unwrap();
    }
    let expected = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(text == expected, "{name} is\n{text}\nand not\n{expected}");
}

/// A run of some seconds at a tenth of the speed of its clock.
fn snapshot(time: f64, vcpus: usize) -> Snapshot {
    let stalls = (0..vcpus).map(|vcpu| {
        let mut stalls = Stalls { now: 0.0, ..Stalls::default() };
        // The first one waits more the longer it lasts.
        let waited = if vcpu == 0 { time * time / 150.0 } else { time / 50.0 };
        (stalls.counts[4], stalls.seconds[4]) = (20.0 * time, waited);
        (stalls.counts[2], stalls.seconds[2]) = (100.0 * time, time / 200.0);
        stalls.now = if vcpu == 1 { 0.123 } else { 0.0 };
        stalls
    });
    Snapshot {
        version: "0.1.0".into(),
        apf: "user".into(),
        fault_source: "marker".into(),
        uptime: 3600.0 + time,
        vcpus: vcpus as f64,
        memory: Memory {
            total: 64.0 * MIB,
            resident: 20.5 * MIB,
            store: 2.5 * MIB,
            limit: Some(24.0 * MIB),
            ..Memory::default()
        },
        faults: [100.0, 1000.0 * time, 512.0 * time, 40.0 * time, 8.0 * time],
        outstanding: 7.0,
        ages: [1.0, 2.0, 3.0, 0.0, 1.0, 0.0],
        oldest: 1.5,
        stalls: stalls.collect(),
        async_pf: Some(AsyncPf {
            threshold: 0.000_016,
            outstanding: 2.0,
            outcomes: [30.0 * time, 4.0 * time, 5.0, 600.0 * time],
        }),
        tiers: ["same", "lz4", "delay", "memory"]
            .into_iter()
            .zip(1..)
            .map(|(name, level)| Tier {
                name: name.into(),
                pages: 1234.0 * f64::from(level),
                stored: MIB * f64::from(level),
                reads: 40.0 * time,
                hits: 512.0 * time,
                read: [0.0201, 0.024, 0.1],
                write: [0.000_3, 0.002, 0.01],
                ..Tier::default()
            })
            .collect(),
        fetches: vec![(0.01, 10.0), (0.03, 10.0 + 39.0 * time), (1e18, 10.0 + 40.0 * time)],
        ..Snapshot::default()
    }
}

fn model(vcpus: usize) -> Model {
    model_of(vcpus, 80, 24)
}

/// Of a run that has been asked for as many cells as such a screen has.
fn model_of(vcpus: usize, columns: u16, rows: u16) -> Model {
    let mut model = Model::new("/run/vm/control".into(), snapshot(0.0, vcpus));
    for tick in 1..=240 {
        model.take(snapshot(f64::from(tick) / 4.0, vcpus));
    }
    let states = [State::Mapped, State::Idle, State::AtHand, State::Stored, State::Absent];
    let cell = |cell: usize| {
        let last = match cell % 37 {
            0 => State::UnderWay,
            1 => State::Pinned,
            _ => states[cell / 20 % 5],
        };
        (states[cell / 20 % 5], last)
    };
    model.pages =
        Some(Pages::of(&(0..cells(&model, columns, rows) as usize).map(cell).collect::<Vec<_>>()));
    model
}

#[test]
fn the_whole_screen() {
    expect("80x24.txt", &model(2), 80, 24);
    expect("120x40.txt", &model_of(4, 120, 40), 120, 40);
    expect("40x10.txt", &model(2), 40, 10);
}

#[test]
fn states_of_the_run_and_of_its_user() {
    let mut paused = model(2);
    let mut last = snapshot(60.25, 2);
    last.paused = vec!["store".into(), "user".into()];
    last.memory.limit = None;
    last.async_pf = None;
    last.stalls.clear();
    last.apf = "kernel".into();
    paused.take(last);
    paused.acted("threshold", Err("--apf kernel has no threshold".into()));
    paused.pages = None;
    expect("kernel.txt", &paused, 80, 24);
    let mut help = model(2);
    let _ = help.press(Press::Char('?'));
    expect("help.txt", &help, 80, 24);
    let mut asks = model(2);
    let _ = asks.press(Press::Char('e'));
    assert!(screen(&asks, 80, 24).contains("move all of guest RAM to the store? y/n"));
    asks.trouble = Some("'control' does not answer within 2s".into());
    let _ = asks.press(Press::Escape);
    assert!(screen(&asks, 80, 24).contains("does not answer within 2s"));
}

#[test]
fn many_vcpus_leave_room_for_the_rest() {
    let text = screen(&model(32), 80, 24);
    assert!(text.contains("more vCPUs"), "{text}");
    for section in ["Stalls", "Faults", "Outstanding", "Memory", "Store", "Async faults"] {
        assert!(text.contains(section), "{section} is not in\n{text}");
    }
    let tall = screen(&model(32), 200, 80);
    assert!(!tall.contains("more vCPUs") && tall.contains("Stalled"), "{tall}");
}

#[test]
fn rows_are_shared_out_and_never_more_than_there_are() {
    for vcpus in [1, 2, 4, 32] {
        for height in (24..60).step_by(3) {
            let rows = share(&model(vcpus), height);
            let sum = rows.vcpus + rows.tiers + rows.strip + rows.chart;
            assert!(sum + FIXED_ROWS <= height, "{rows:?} of {height}");
            assert!(rows.vcpus >= 1 && rows.tiers >= 1 && rows.strip >= 1);
            // Nothing is cut off below: faults and async faults both have theirs.
            let text = screen(&model(vcpus), 80, height as u16);
            assert_eq!(text.matches("in total").count(), 2, "{text}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
    #[test]
    fn any_numbers_on_any_screen_are_drawn(
        columns in 0..200_u16,
        rows in 0..100_u16,
        numbers in prop::collection::vec(prop_oneof![0.0..10.0_f64, 0.0..1e18_f64, Just(0.0), Just(1e18)], 24),
        vcpus in 0..70_usize,
        name in "\\PC{0,60}",
        help: bool,
    ) {
        let mut model = model(2);
        let mut odd = snapshot(numbers[0], vcpus);
        odd.memory = Memory { total: numbers[1], resident: numbers[2], store: numbers[3], limit: Some(numbers[4]), exceeded: help };
        odd.faults = std::array::from_fn(|at| numbers[5 + at]);
        odd.ages = std::array::from_fn(|at| numbers[10 + at]);
        odd.oldest = numbers[16];
        odd.uptime = numbers[17];
        odd.tiers[0].name.clone_from(&name);
        odd.tiers[0].read = [numbers[18], numbers[19], numbers[20]];
        if let Some(stalls) = odd.stalls.first_mut() {
            stalls.now = numbers[21];
            stalls.seconds[0] = numbers[22];
        }
        odd.apf = name;
        model.shows_help = help;
        model.take(odd.clone());
        odd.uptime += numbers[23];
        model.take(odd);
        let _ = screen(&model, columns, rows);
        prop_assert!((1..=1024).contains(&cells(&model, columns, rows)));
    }
}

//! The terminal: taken at the start, given back on every way out, and the loop between.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use ratatui::DefaultTerminal;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};

use super::model::{Model, Press, Step};
use super::poller::{News, Poller};
use super::view;
use crate::exit;

/// How long keys are waited for before news and signals are looked at.
const TICK: Duration = Duration::from_millis(50);
/// Keys that are taken before the screen is drawn again.
const KEYS_AT_ONCE: usize = 64;

/// How it ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// A key asked for it.
    Quit,
    /// Ctrl-C, or a signal.
    Interrupted,
    /// The run is gone.
    Gone,
}

/// Signals that end it: noted, so that the terminal is given back; the second one ends it at once.
#[derive(Debug)]
pub(super) struct Signals {
    last: Arc<AtomicUsize>,
}

impl Signals {
    /// Installs the handlers.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub(super) fn install() -> io::Result<Self> {
        let (last, seen) = (Arc::<AtomicUsize>::default(), Arc::<AtomicBool>::default());
        let code = i32::from(exit::STOPPED);
        for signal in [SIGINT, SIGQUIT, SIGTERM] {
            signal_hook::flag::register_conditional_shutdown(signal, code, Arc::clone(&seen))?;
            signal_hook::flag::register(signal, Arc::clone(&seen))?;
            signal_hook::flag::register_usize(signal, Arc::clone(&last), signal as usize)?;
        }
        // There is no terminal any more that could be given back.
        let gone = Arc::new(AtomicBool::new(true));
        signal_hook::flag::register_conditional_shutdown(SIGHUP, code, gone)?;
        Ok(Self { last })
    }

    fn came(&self) -> bool {
        self.last.load(Ordering::SeqCst) != 0
    }
}

/// The terminal in raw mode and on its other screen, until this is dropped.
struct Screen(DefaultTerminal);

impl Screen {
    fn take() -> io::Result<Self> {
        // It also has a panic give the terminal back.
        ratatui::try_init().map(Self)
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // Nothing more can be done when the terminal is gone.
        let _ = ratatui::try_restore();
    }
}

/// Shows the model until the end.
///
/// # Errors
/// When the terminal fails; it is given back all the same, as far as it goes.
pub(super) fn run(model: &mut Model, poller: &Poller, signals: &Signals) -> io::Result<End> {
    let mut screen = Screen::take()?;
    loop {
        while let Ok(news) = poller.news.try_recv() {
            match news {
                News::Metrics(snapshot) => model.take(*snapshot),
                News::Pages(pages) => model.pages = Some(pages),
                News::Acted(name, result) => model.acted(name, result),
                News::Trouble(why) => model.trouble = Some(why),
                News::Gone => return Ok(End::Gone),
            }
        }
        if signals.came() {
            return Ok(End::Interrupted);
        }
        let size = screen.0.size()?;
        poller.want_cells(view::cells(model, size.width, size.height));
        screen.0.draw(|frame| view::draw(frame, model))?;
        let mut wait = TICK;
        for _ in 0..KEYS_AT_ONCE {
            if !event::poll(wait)? {
                break;
            }
            wait = Duration::ZERO;
            let Some(press) = press(&event::read()?) else { continue };
            match model.press(press) {
                Step::Stay => {}
                Step::Quit => return Ok(End::Quit),
                Step::Interrupted => return Ok(End::Interrupted),
                Step::Redraw => screen.0.clear()?,
                Step::Act(action) => {
                    let name = action.name;
                    if !poller.act(action) {
                        model.acted(name, Err("the run is slow to answer: try again".to_owned()));
                    }
                }
            }
        }
    }
}

/// A key that matters here.
fn press(event: &Event) -> Option<Press> {
    let Event::Key(KeyEvent { code, modifiers, kind, .. }) = event else { return None };
    if *kind == KeyEventKind::Release {
        return None;
    }
    let control = modifiers.contains(KeyModifiers::CONTROL);
    match code {
        KeyCode::Char('c') if control => Some(Press::Interrupt),
        KeyCode::Char('l') if control => Some(Press::Redraw),
        KeyCode::Char(key) if !control && !modifiers.contains(KeyModifiers::ALT) => {
            Some(Press::Char(*key))
        }
        KeyCode::Esc => Some(Press::Escape),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_with_control_are_not_their_letters() {
        let key = |code, modifiers| press(&Event::Key(KeyEvent::new(code, modifiers)));
        let (none, control) = (KeyModifiers::NONE, KeyModifiers::CONTROL);
        assert_eq!(key(KeyCode::Char('c'), none), Some(Press::Char('c')));
        assert_eq!(key(KeyCode::Char('L'), KeyModifiers::SHIFT), Some(Press::Char('L')));
        assert_eq!(key(KeyCode::Char('c'), control), Some(Press::Interrupt));
        assert_eq!(key(KeyCode::Char('l'), control), Some(Press::Redraw));
        assert_eq!(key(KeyCode::Char('p'), control), None);
        assert_eq!(key(KeyCode::Esc, none), Some(Press::Escape));
        assert_eq!(press(&Event::Resize(1, 1)), None);
    }
}

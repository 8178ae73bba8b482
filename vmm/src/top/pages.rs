//! `GET /pages` as a strip of cells: which state is shown for each share of guest RAM.

use serde::Deserialize;

/// More cells than the server gives.
const MAX_CELLS: usize = 1024;

/// What a page can be, in the order in which totals are shown: the field of the answer, the name, and the
/// sign in the strip.
pub(super) const STATES: [(State, &str, char); 8] = [
    (State::Mapped, "mapped", '█'),
    (State::Idle, "idle", '▓'),
    (State::AtHand, "at hand", '▒'),
    (State::Stored, "stored", '░'),
    (State::Absent, "absent", '·'),
    (State::UnderWay, "under way", '*'),
    (State::Pinned, "pinned", 'P'),
    (State::Lost, "lost", '!'),
];

/// What a page can be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    Mapped,
    Idle,
    AtHand,
    Stored,
    Absent,
    UnderWay,
    Pinned,
    Lost,
}

/// The answer.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub(super) struct Pages {
    /// Not every page was looked at.
    pub(super) sampled: bool,
    pub(super) cells: Vec<Cell>,
}

/// One share of guest RAM; counts of the pages that were looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize)]
pub(super) struct Cell {
    pages: u32,
    looked_at: u32,
    mapped: u32,
    pinned: u32,
    idle: u32,
    at_hand: u32,
    stored: u32,
    absent: u32,
    under_way: u32,
    lost: u32,
}

impl Pages {
    /// Reads the answer.
    ///
    /// # Errors
    /// Why it is none, in one line.
    pub(super) fn parse(json: &str) -> Result<Self, String> {
        let mut pages: Self = serde_json::from_str(json).map_err(|error| error.to_string())?;
        pages.cells.truncate(MAX_CELLS);
        Ok(pages)
    }

    /// How many pages of RAM are in a state; of a sample an estimate.
    pub(super) fn total(&self, state: State) -> f64 {
        let share = |cell: &Cell| match cell.looked_at {
            0 => 0.0,
            looked => f64::from(cell.count(state)) * f64::from(cell.pages) / f64::from(looked),
        };
        self.cells.iter().map(share).sum()
    }
}

impl Cell {
    fn count(&self, state: State) -> u32 {
        match state {
            State::Mapped => self.mapped,
            State::Idle => self.idle,
            State::AtHand => self.at_hand,
            State::Stored => self.stored,
            State::Absent => self.absent,
            State::UnderWay => self.under_way,
            State::Pinned => self.pinned,
            State::Lost => self.lost,
        }
    }

    /// What is shown: states that few pages are in if any page is, else that of the most.
    pub(super) fn shown(&self) -> State {
        for rare in [State::Lost, State::UnderWay, State::Pinned] {
            if self.count(rare) > 0 {
                return rare;
            }
        }
        let common = [State::Absent, State::Stored, State::AtHand, State::Idle, State::Mapped];
        common.into_iter().max_by_key(|state| self.count(*state)).unwrap_or(State::Absent)
    }
}

#[cfg(test)]
impl Pages {
    /// Cells of 100 pages, each of one state, but for the last page if that is of another.
    pub(super) fn of(cells: &[(State, State)]) -> Self {
        let cell = |(state, last): &(State, State)| {
            let mut cell = Cell { pages: 100, looked_at: 100, ..Cell::default() };
            *cell.count_mut(*state) += 99;
            *cell.count_mut(*last) += 1;
            cell
        };
        Self { sampled: false, cells: cells.iter().map(cell).collect() }
    }
}

#[cfg(test)]
impl Cell {
    fn count_mut(&mut self, state: State) -> &mut u32 {
        match state {
            State::Mapped => &mut self.mapped,
            State::Idle => &mut self.idle,
            State::AtHand => &mut self.at_hand,
            State::Stored => &mut self.stored,
            State::Absent => &mut self.absent,
            State::UnderWay => &mut self.under_way,
            State::Pinned => &mut self.pinned,
            State::Lost => &mut self.lost,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cell_shows_what_is_rare_or_what_is_most() {
        let pages = Pages::of(&[
            (State::Mapped, State::Mapped),
            (State::Mapped, State::UnderWay),
            (State::Stored, State::AtHand),
            (State::Absent, State::Pinned),
        ]);
        let shown: Vec<State> = pages.cells.iter().map(Cell::shown).collect();
        assert_eq!(shown, [State::Mapped, State::UnderWay, State::Stored, State::Pinned]);
        assert_eq!(Cell::default().shown(), State::Mapped);
        assert_eq!((pages.total(State::Mapped), pages.total(State::Stored)), (199.0, 99.0));
    }

    #[test]
    fn the_answer_of_the_server_is_read_and_others_are_not() {
        let counts = guest_memory::PageCounts { idle: 2, ..guest_memory::PageCounts::default() };
        let cell = guest_memory::SurveyCell { pages: 8, looked_at: 4, counts };
        let survey = guest_memory::Survey { pages: 8, sampled: true, cells: vec![cell] };
        let pages = Pages::parse(&serde_json::to_string(&survey).unwrap()).unwrap();
        assert!(pages.sampled);
        assert_eq!(pages.total(State::Idle), 4.0);
        for bad in ["", "[]", "{}", r#"{"sampled":false,"cells":[{}]}"#] {
            assert!(Pages::parse(bad).is_err(), "{bad}");
        }
    }
}

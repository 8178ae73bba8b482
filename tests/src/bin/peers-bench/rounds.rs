//! Interleaved rounds of all peers.

use std::path::Path;

use anyhow::Result;

use crate::peer::{Outcome, Peer};

/// How many guests of one peer may be lost before the benchmark gives up.
const LOST_MAX: u32 = 2;

/// What all boots gave.
pub(crate) struct Rounds {
    /// By peer, in the order of [`Peer::ALL`].
    outcomes: Vec<Vec<Outcome>>,
    /// Guests that did not come to their end, likewise.
    lost: Vec<u32>,
}

impl Rounds {
    /// Boots a guest with each peer, `runs` times; not always the same one first.
    pub(crate) fn run(runs: u32, duration_ms: u32, store: &Path) -> Result<Self> {
        let mut outcomes: Vec<Vec<Outcome>> = Peer::ALL.iter().map(|_| Vec::new()).collect();
        let mut lost = vec![0; Peer::ALL.len()];
        for round in 0..runs {
            eprintln!("peers-bench: round {} of {runs}", round + 1);
            for turn in 0..Peer::ALL.len() {
                let index = (turn + round as usize) % Peer::ALL.len();
                let peer = Peer::ALL[index];
                outcomes[index].push(loop {
                    match peer.boot(duration_ms, store) {
                        Err(error) if lost[index] < LOST_MAX => {
                            eprintln!("peers-bench: once more: {error:#}");
                            lost[index] += 1;
                        }
                        other => break other?,
                    }
                });
                let Some(last) = outcomes[index].last() else { continue };
                let row = &last.loaded;
                eprintln!(
                    "peers-bench: {}: overrun p50 {} us, p99 {} us; {:.0} pages/s, {:.0} units/s; {:.1} MiB in memory",
                    peer.name(),
                    row.p50_us,
                    row.p99_us,
                    row.pages_per_s,
                    row.units_per_s,
                    last.resident_mib
                );
            }
        }
        Ok(Self { outcomes, lost })
    }

    fn index(peer: Peer) -> usize {
        Peer::ALL.iter().position(|each| *each == peer).expect("all peers are listed")
    }

    /// A number of each boot of this peer, one for each round.
    pub(crate) fn values(&self, peer: Peer, number: fn(&Outcome) -> f64) -> Vec<f64> {
        self.outcomes[Self::index(peer)].iter().map(number).collect()
    }

    /// Guests of this peer that did not come to their end and were booted again.
    pub(crate) fn lost(&self, peer: Peer) -> u32 {
        self.lost[Self::index(peer)]
    }
}

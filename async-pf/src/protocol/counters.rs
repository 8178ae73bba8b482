//! Counters of one vCPU's protocol.

use super::verdict::{Mode, Refusal};

/// What one vCPU's protocol did; all of them together, added up, are the guest's.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct ProtocolStats {
    /// Pages that came before anything was sent, by mode (user, kernel).
    pub avoided: [u64; Mode::COUNT],
    /// page-not-present that were sent, by mode.
    pub notified: [u64; Mode::COUNT],
    /// Artificial halts, by mode.
    pub halted: [u64; Mode::COUNT],
    /// Waits outside of the guest, by mode.
    pub waited: [u64; Mode::COUNT],
    /// Why no page-not-present was sent for halts and waits, by mode and [`Refusal`].
    pub refused: [[u64; Refusal::COUNT]; Mode::COUNT],
    /// page-ready that were sent, wake-alls included.
    pub ready_sent: u64,
    /// page-ready that the guest acknowledged.
    pub ready_acknowledged: u64,
    /// Of those sent, wake-alls.
    pub wake_alls: u64,
    /// Notified pages whose page-ready is never sent: the guest turned the protocol off, or was told to
    /// wake everything.
    pub cancelled: u64,
    /// Interrupts that no local APIC took; each was tried again.
    pub interrupts_refused: u64,
    /// INITs that were noticed.
    pub resets: u64,
    /// The most pages that were outstanding or unacknowledged at once, of one vCPU.
    pub outstanding_max: usize,
}

impl ProtocolStats {
    /// Adds another vCPU's.
    pub fn add(&mut self, other: &Self) {
        let pairs = [
            (&mut self.avoided, &other.avoided),
            (&mut self.notified, &other.notified),
            (&mut self.halted, &other.halted),
            (&mut self.waited, &other.waited),
        ];
        for (sum, part) in pairs {
            sum.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
        }
        let refused = self.refused.iter_mut().flatten().zip(other.refused.iter().flatten());
        refused.for_each(|(sum, part)| *sum += part);
        self.ready_sent += other.ready_sent;
        self.ready_acknowledged += other.ready_acknowledged;
        self.wake_alls += other.wake_alls;
        self.cancelled += other.cancelled;
        self.interrupts_refused += other.interrupts_refused;
        self.resets += other.resets;
        self.outstanding_max = self.outstanding_max.max(other.outstanding_max);
    }

    pub(super) fn decided(&mut self, field: fn(&mut Self) -> &mut [u64; Mode::COUNT], mode: Mode) {
        field(self)[mode as usize] += 1;
    }
}

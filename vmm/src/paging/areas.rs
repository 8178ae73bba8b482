//! KVM's paravirtual areas: guest pages that KVM itself writes, at any time and without a way to wait.
//!
//! A write of KVM's over a marker fails, and KVM takes no notice: the guest's clock stands still. So the
//! guest's writes to the MSRs that name such areas come to us first (an MSR filter); the page is pinned,
//! and the value handed on to KVM. A pin ends when its area moves: each vCPU has one for each kind of
//! area, however often a hostile guest moves them. Documentation/virt/kvm/x86/msr.rst.

use std::sync::Arc;

use async_pf::protocol::{MSR_ACK, MSR_EN, MSR_INT};
use guest_memory::{Gpa, Pager, PagerError, Pinned, Sleeper};

/// The first of KVM's MSRs.
pub(crate) const MSR_BASE: u32 = 0x4b56_4d00;
/// How many of them the filter covers.
pub(crate) const MSR_COUNT: u32 = 8;

const MSR_WALL_CLOCK: u32 = 0x4b56_4d00;
const MSR_SYSTEM_TIME: u32 = 0x4b56_4d01;
const MSR_STEAL_TIME: u32 = 0x4b56_4d03;
const MSR_PV_EOI: u32 = 0x4b56_4d04;

/// One bit for each MSR from [`MSR_BASE`] on: 1 is KVM's own, 0 comes to us.
pub(crate) const ALLOWED: u8 = !(1 << (MSR_WALL_CLOCK - MSR_BASE)
    | 1 << (MSR_SYSTEM_TIME - MSR_BASE)
    | 1 << (MSR_STEAL_TIME - MSR_BASE)
    | 1 << (MSR_PV_EOI - MSR_BASE));

/// The MSRs of async page faults, as bits from [`MSR_BASE`] on.
pub(crate) const PROTOCOL: u8 =
    1 << (MSR_EN - MSR_BASE) | 1 << (MSR_INT - MSR_BASE) | 1 << (MSR_ACK - MSR_BASE);

/// One kind of area.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    WallClock,
    SystemTime,
    StealTime,
    PvEoi,
}

/// Where an area lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Area {
    gpa: Gpa,
    bytes: u64,
}

impl Kind {
    fn of(msr: u32) -> Option<Self> {
        match msr {
            MSR_WALL_CLOCK => Some(Self::WallClock),
            MSR_SYSTEM_TIME => Some(Self::SystemTime),
            MSR_STEAL_TIME => Some(Self::StealTime),
            MSR_PV_EOI => Some(Self::PvEoi),
            _ => None,
        }
    }

    /// The area that this value of the MSR names; `None` when it names none.
    fn area(self, value: u64) -> Option<Area> {
        // msr.rst: bit 0 enables; the other low bits are the alignment's.
        let enabled = value & 1 != 0;
        let (bytes, align, enabled) = match self {
            // struct pvclock_wall_clock; no enable bit: the write itself has it filled in.
            Self::WallClock => (12, 4, true),
            // struct pvclock_vcpu_time_info.
            Self::SystemTime => (32, 4, enabled),
            // struct kvm_steal_time.
            Self::StealTime => (64, 64, enabled),
            Self::PvEoi => (4, 4, enabled),
        };
        enabled.then(|| Area { gpa: Gpa(value & !(align - 1)), bytes })
    }
}

/// The pins of one vCPU's areas.
#[derive(Debug, Default)]
pub(crate) struct Areas {
    system_time: Option<Pinned>,
    steal_time: Option<Pinned>,
    pv_eoi: Option<Pinned>,
}

/// A pin that KVM's use of a page needs, until KVM has been told where the page is.
#[derive(Debug)]
pub(crate) struct Held(Kind, Option<Pinned>);

impl Areas {
    /// The guest writes `value` to one of the MSRs: pins the page that it names. Areas outside RAM
    /// are KVM's to refuse.
    ///
    /// # Errors
    /// When the page does not come.
    pub(crate) fn hold(
        pager: &Pager,
        by: &Arc<Sleeper>,
        msr: u32,
        value: u64,
    ) -> Result<Option<Held>, PagerError> {
        let Some(kind) = Kind::of(msr) else { return Ok(None) };
        let Some(area) = kind.area(value) else { return Ok(Some(Held(kind, None))) };
        match pager.pin(&[(area.gpa, area.bytes)], by) {
            Ok(pinned) => Ok(Some(Held(kind, Some(pinned)))),
            Err(PagerError::OutOfRange(_)) => Ok(Some(Held(kind, None))),
            Err(error) => Err(error),
        }
    }

    /// KVM has taken the value: the pin lives as long as the area, and that of the area before ends.
    pub(crate) fn keep(&mut self, held: Held) {
        let Held(kind, pinned) = held;
        match kind {
            Kind::WallClock => drop(pinned),
            Kind::SystemTime => self.system_time = pinned,
            Kind::StealTime => self.steal_time = pinned,
            Kind::PvEoi => self.pv_eoi = pinned,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_name_areas_as_the_kernel_reads_them() {
        let area = |msr, value| Kind::of(msr).and_then(|kind| kind.area(value));
        let at = |gpa, bytes| Some(Area { gpa: Gpa(gpa), bytes });
        assert_eq!(area(MSR_SYSTEM_TIME, 0x1001), at(0x1000, 32));
        assert_eq!(area(MSR_SYSTEM_TIME, 0x1000), None);
        assert_eq!(area(MSR_STEAL_TIME, 0x1041), at(0x1040, 64));
        assert_eq!(area(MSR_PV_EOI, 0x1005), at(0x1004, 4));
        assert_eq!(area(MSR_PV_EOI, 0), None);
        assert_eq!(area(MSR_WALL_CLOCK, 0x1000), at(0x1000, 12));
        assert_eq!(area(MSR_BASE + 2, 1), None);
    }

    #[test]
    fn the_filter_has_exactly_the_areas_msrs() {
        for msr in MSR_BASE..MSR_BASE + MSR_COUNT {
            let ours = ALLOWED & 1 << (msr - MSR_BASE) == 0;
            assert_eq!(ours, Kind::of(msr).is_some(), "{msr:#x}");
        }
    }
}

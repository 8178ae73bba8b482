//! The three MSRs of the protocol, and what KVM answers to every value (Documentation/virt/kvm/x86/msr.rst;
//! arch/x86/kvm/x86.c, `kvm_pv_enable_async_pf` and its neighbours).

/// `MSR_KVM_ASYNC_PF_EN`: the area's address and what may be sent.
pub const MSR_EN: u32 = 0x4b56_4d02;
/// `MSR_KVM_ASYNC_PF_INT`: the vector of page-ready.
pub const MSR_INT: u32 = 0x4b56_4d06;
/// `MSR_KVM_ASYNC_PF_ACK`: bit 0 acknowledges a page-ready.
pub const MSR_ACK: u32 = 0x4b56_4d07;

/// The bytes of the area that EN names, which is aligned to as many.
pub const AREA_BYTES: u64 = 64;

const EN_ENABLED: u64 = 1 << 0;
const EN_SEND_ALWAYS: u64 = 1 << 1;
/// A promise to nested guests (CPUID bit 10) that we do not make.
const EN_AS_VMEXIT: u64 = 1 << 2;
const EN_AS_INTERRUPT: u64 = 1 << 3;
const EN_RESERVED: u64 = 0x30;
const INT_RESERVED: u64 = !0xff;
const ACK_ACKNOWLEDGED: u64 = 1 << 0;

/// The guest gets #GP for its WRMSR.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a value that the processor refuses (#GP)")]
pub struct GeneralProtection;

/// One of the three.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Msr {
    /// [`MSR_EN`].
    En,
    /// [`MSR_INT`].
    Int,
    /// [`MSR_ACK`].
    Ack,
}

impl Msr {
    /// By its number.
    #[must_use]
    pub fn of(number: u32) -> Option<Self> {
        match number {
            MSR_EN => Some(Self::En),
            MSR_INT => Some(Self::Int),
            MSR_ACK => Some(Self::Ack),
            _ => None,
        }
    }
}

/// A value of EN that was not refused.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct En(u64);

impl En {
    /// Checks a value that the guest writes.
    ///
    /// # Errors
    /// Reserved bits, or delivery as a VM exit.
    pub fn new(value: u64) -> Result<Self, GeneralProtection> {
        let refused = value & (EN_RESERVED | EN_AS_VMEXIT) != 0;
        if refused { Err(GeneralProtection) } else { Ok(Self(value)) }
    }

    /// The whole value.
    #[must_use]
    pub fn raw(self) -> u64 {
        self.0
    }

    /// The guest physical address of the area, if the protocol is on with this value: it takes bit 0 and
    /// delivery by interrupt, as KVM has it.
    #[must_use]
    pub fn area(self) -> Option<u64> {
        const ON: u64 = EN_ENABLED | EN_AS_INTERRUPT;
        (self.0 & ON == ON).then_some(self.0 & !(AREA_BYTES - 1))
    }

    /// May page-not-present be sent to guest kernel mode, too?
    #[must_use]
    pub fn send_always(self) -> bool {
        self.0 & EN_SEND_ALWAYS != 0
    }
}

/// Checks a value of INT: the vector.
pub(super) fn vector(value: u64) -> Result<u8, GeneralProtection> {
    if value & INT_RESERVED != 0 { Err(GeneralProtection) } else { Ok(value as u8) }
}

/// Does this value of ACK acknowledge? No value is refused.
pub(super) fn acknowledges(value: u64) -> bool {
    value & ACK_ACKNOWLEDGED != 0
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn values_are_taken_and_refused_as_kvm_does() {
        let area = |value| En::new(value).map(En::area);
        assert_eq!(area(0), Ok(None));
        // Enabled, but with the delivery that KVM dropped in 5.9: it is off.
        assert_eq!(area(0x1001), Ok(None));
        assert_eq!(area(0x1009), Ok(Some(0x1000)));
        assert_eq!(area(0x10cb), Ok(Some(0x10c0)));
        assert_eq!(area(0x1008), Ok(None));
        for bad in [0x100d, 0x1019, 0x1029, 0x4, 0x10, 0x20] {
            assert_eq!(area(bad), Err(GeneralProtection), "{bad:#x}");
        }
        assert!(En::new(0xb).unwrap().send_always());
        assert!(!En::new(0x9).unwrap().send_always());
        assert_eq!(vector(0xf3), Ok(0xf3));
        assert_eq!(vector(0x100), Err(GeneralProtection));
        assert!(acknowledges(1) && acknowledges(3) && !acknowledges(2) && !acknowledges(0));
    }

    #[test]
    fn only_the_three_are_ours() {
        let ours = (0x4b56_4d00..0x4b56_4d08).filter(|number| Msr::of(*number).is_some());
        assert_eq!(ours.collect::<Vec<_>>(), [MSR_EN, MSR_INT, MSR_ACK]);
    }
}

//! Power-off, reset, panic and debug exit: ports whose writes end the run.

use super::ports;
use crate::exit::ExitReason;

/// The ACPI system control interrupt; never raised, for nothing happens that the guest must hear of.
pub const SCI_IRQ: u16 = 9;
/// SLP_TYP of the soft-off state, as `\_S5` in the DSDT says.
pub const S5_SLEEP_TYPE: u8 = 5;
/// What is written to the ACPI reset register.
pub const RESET_VALUE: u8 = 0x06;

/// PM1 control: the guest is in ACPI mode.
const SCI_ENABLED: u16 = 1 << 0;
const SLEEP_TYPE_SHIFT: u16 = 10;
const SLEEP_TYPE_MASK: u16 = 0b111;
const SLEEP_ENABLE: u16 = 1 << 13;
/// Port 0xcf9: reset the processor.
const RESET_CPU: u8 = 1 << 2;
const I8042_PULSE_RESET: u8 = 0xfe;
/// pvpanic: the guest has panicked (QEMU, docs/specs/pvpanic.rst).
const PVPANIC_PANICKED: u8 = 1 << 0;

/// The ports that end a run.
#[derive(Debug, Default)]
pub struct Power {
    debug_exit: bool,
    pm1_enable: u16,
}

impl Power {
    /// With or without the debug-exit port.
    #[must_use]
    pub fn new(debug_exit: bool) -> Self {
        Self { debug_exit, pm1_enable: 0 }
    }

    /// One `OUT`; `Some` when it ends the run.
    pub fn write(&mut self, port: u16, data: &[u8]) -> Option<ExitReason> {
        let byte = *data.first()?;
        let word = u16::from_le_bytes([byte, data.get(1).copied().unwrap_or(0)]);
        match port {
            ports::PM1_CONTROL => sleep(word),
            ports::RESET => (byte & RESET_CPU != 0).then_some(ExitReason::Reset),
            ports::I8042_COMMAND => (byte == I8042_PULSE_RESET).then_some(ExitReason::Reset),
            ports::PVPANIC => (byte & PVPANIC_PANICKED != 0).then_some(ExitReason::Panic),
            ports::DEBUG_EXIT if self.debug_exit => Some(ExitReason::DebugExit { value: byte }),
            _ if port == ports::PM1_EVENT + 2 => {
                self.pm1_enable = word;
                None
            }
            _ => None,
        }
    }

    /// One `IN`.
    #[must_use]
    pub fn read(&self, port: u16) -> u16 {
        match port {
            ports::PM1_CONTROL => SCI_ENABLED,
            ports::PVPANIC => u16::from(PVPANIC_PANICKED),
            _ if port == ports::PM1_EVENT + 2 => self.pm1_enable,
            // PM1 status: nothing has happened. The keyboard controller: buffers empty, ready.
            _ => 0,
        }
    }

    /// Whether this port is one of ours.
    #[must_use]
    pub fn claims(&self, port: u16) -> bool {
        matches!(port, ports::I8042_COMMAND | ports::PVPANIC | ports::RESET)
            || (port == ports::DEBUG_EXIT && self.debug_exit)
            || (ports::PM1_EVENT..ports::PM1_CONTROL + u16::from(ports::PM1_CONTROL_BYTES))
                .contains(&port)
    }
}

fn sleep(control: u16) -> Option<ExitReason> {
    let sleep_type = (control >> SLEEP_TYPE_SHIFT) & SLEEP_TYPE_MASK;
    (control & SLEEP_ENABLE != 0 && sleep_type == u16::from(S5_SLEEP_TYPE))
        .then_some(ExitReason::PowerOff)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_soft_off_with_sleep_enable_powers_off() {
        let mut power = Power::new(false);
        let s5 = (u16::from(S5_SLEEP_TYPE) << 10) | SLEEP_ENABLE;
        assert_eq!(power.write(ports::PM1_CONTROL, &s5.to_le_bytes()), Some(ExitReason::PowerOff));
        assert_eq!(power.write(ports::PM1_CONTROL, &(s5 & !SLEEP_ENABLE).to_le_bytes()), None);
        assert_eq!(power.write(ports::PM1_CONTROL, &SLEEP_ENABLE.to_le_bytes()), None);
        assert_eq!(power.write(ports::PM1_CONTROL, &[]), None);
    }

    #[test]
    fn both_reset_ports_reset() {
        let mut power = Power::new(false);
        assert_eq!(power.write(ports::RESET, &[RESET_VALUE]), Some(ExitReason::Reset));
        assert_eq!(power.write(ports::RESET, &[0x02]), None);
        assert_eq!(power.write(ports::I8042_COMMAND, &[0xfe]), Some(ExitReason::Reset));
        assert_eq!(power.write(ports::I8042_COMMAND, &[0xaa]), None);
    }

    #[test]
    fn debug_exit_is_there_only_when_asked_for() {
        let (mut with, mut without) = (Power::new(true), Power::new(false));
        assert_eq!(with.write(ports::DEBUG_EXIT, &[3]), Some(ExitReason::DebugExit { value: 3 }));
        assert_eq!(without.write(ports::DEBUG_EXIT, &[3]), None);
        assert!(with.claims(ports::DEBUG_EXIT) && !without.claims(ports::DEBUG_EXIT));
    }

    #[test]
    fn enable_bits_are_kept_and_status_is_quiet() {
        let mut power = Power::new(false);
        assert_eq!(power.write(ports::PM1_EVENT + 2, &0x120u16.to_le_bytes()), None);
        assert_eq!(power.read(ports::PM1_EVENT + 2), 0x120);
        assert_eq!(power.read(ports::PM1_EVENT), 0);
        assert_eq!(power.read(ports::PM1_CONTROL), SCI_ENABLED);
    }
}

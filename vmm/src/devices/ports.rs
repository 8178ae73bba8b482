//! The I/O ports and interrupt lines of the machine.
//!
//! ```text
//!   0x0064           keyboard controller: only "pulse the reset line" (0xfe)
//!   0x00f4           debug exit, with --debug-exit
//!   0x02f8..=0x02ff  COM2, IRQ 3: the agent channel
//!   0x03f8..=0x03ff  COM1, IRQ 4: the console
//!   0x0505           pvpanic
//!   0x0600..=0x0605  ACPI PM1 event and control blocks
//!   0x0cf9           reset
//!   0x6e70..=0x6e73  paging requests (nowait_wire::paging)
//!   0x6e74..=0x6e77  marks of a measured run (nowait_wire::paging::MARK_PORT)
//! ```

/// The keyboard controller's command port.
pub const I8042_COMMAND: u16 = 0x64;
/// The debug-exit port (QEMU's isa-debug-exit as test kernels use it).
pub const DEBUG_EXIT: u16 = 0xf4;
/// First port of the second UART.
pub const COM2: u16 = 0x2f8;
/// Its interrupt line.
pub const COM2_IRQ: u8 = 3;
/// First port of the first UART.
pub const COM1: u16 = 0x3f8;
/// Its interrupt line.
pub const COM1_IRQ: u8 = 4;
/// Ports of one UART.
pub const UART_BYTES: u8 = 8;
/// The pvpanic port.
pub const PVPANIC: u16 = 0x505;
/// The ACPI PM1 event block: status and enable, 16 bits each.
pub const PM1_EVENT: u16 = 0x600;
/// Its length in bytes.
pub const PM1_EVENT_BYTES: u8 = 4;
/// The ACPI PM1 control block.
pub const PM1_CONTROL: u16 = 0x604;
/// Its length in bytes.
pub const PM1_CONTROL_BYTES: u8 = 2;
/// The reset control port.
pub const RESET: u16 = 0xcf9;
/// The paging request port, 32 bits.
pub const PAGING: u16 = nowait_wire::paging::PORT;
/// The port of marks, 32 bits.
pub const MARK: u16 = nowait_wire::paging::MARK_PORT;

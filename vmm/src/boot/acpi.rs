//! The ACPI tables that describe the machine: processors, two UARTs, pvpanic, power-off and reset
//! (ACPI 6.5, chapters 4, 5 and 19).
//!
//! ```text
//!   RSDP -> XSDT -> FADT -> DSDT (UARTs, pvpanic, \_S5)
//!                        -> FACS
//!                -> MADT (local APICs, I/O APIC)
//! ```

use acpi_tables::aml::{self, Path};
use acpi_tables::facs::FACS;
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, aml::EISAName};

use super::layout::{IO_APIC, LOCAL_APIC};
use crate::devices::{ports, power};

const OEM_ID: [u8; 6] = *b"NOWAIT";
const OEM_TABLE_ID: [u8; 8] = *b"NOWAITVM";
const OEM_REVISION: u32 = 1;
/// FACS must lie on a 64-byte boundary; the others do as well.
const ALIGN_BYTES: usize = 64;
/// IAPC_BOOT_ARCH (ACPI 6.5, 5.2.9.3): legacy devices present (the UARTs), no VGA, no CMOS clock.
const BOOT_ARCH: u16 = 1 << 0 | 1 << 2 | 1 << 5;
/// The I/O APIC's id, which its register shows after a reset.
const IO_APIC_ID: u8 = 0;

/// Builds all tables, to be written at `base`; the RSDP comes first.
#[must_use]
pub fn build(base: u64, cpus: u32) -> Vec<u8> {
    let mut blob = Blob { base, bytes: Vec::new() };
    let rsdp_room = blob.append(&vec![0; Rsdp::len()]);
    let dsdt = blob.append(&dsdt());
    let facs = blob.append(&bytes_of(&FACS::new()));
    let fadt = blob.append(&fadt(dsdt, facs));
    let madt = blob.append(&madt(cpus));
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = blob.append(&bytes_of(&xsdt));
    let rsdp = bytes_of(&Rsdp::new(OEM_ID, xsdt));
    let at = (rsdp_room - base) as usize;
    blob.bytes[at..at + rsdp.len()].copy_from_slice(&rsdp);
    blob.bytes
}

struct Blob {
    base: u64,
    bytes: Vec<u8>,
}

impl Blob {
    /// Appends a table on a boundary and returns its guest physical address.
    fn append(&mut self, table: &[u8]) -> u64 {
        self.bytes.resize(self.bytes.len().next_multiple_of(ALIGN_BYTES), 0);
        let address = self.base + self.bytes.len() as u64;
        self.bytes.extend_from_slice(table);
        address
    }
}

fn bytes_of(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn fadt(dsdt: u64, facs: u64) -> Vec<u8> {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        // All tables lie below 1 MiB.
        .firmware_ctrl_32(facs as u32)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup);
    fadt.sci_int = power::SCI_IRQ.into();
    fadt.pm1a_evt_blk = u32::from(ports::PM1_EVENT).into();
    fadt.pm1_evt_len = ports::PM1_EVENT_BYTES;
    fadt.pm1a_cnt_blk = u32::from(ports::PM1_CONTROL).into();
    fadt.pm1_cnt_len = ports::PM1_CONTROL_BYTES;
    fadt.iapc_boot_arch = BOOT_ARCH.into();
    fadt.reset_reg =
        GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, u64::from(ports::RESET));
    fadt.reset_value = power::RESET_VALUE;
    bytes_of(&fadt.finalize())
}

fn madt(cpus: u32) -> Vec<u8> {
    let local = LocalInterruptController::Address(LOCAL_APIC);
    let mut madt = MADT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION, local);
    for id in 0..cpus {
        // At most 32 processors: `Spec` saw to that.
        madt.add_structure(ProcessorLocalApic::new(id as u8, id as u8, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(IO_APIC_ID, IO_APIC, 0));
    bytes_of(&madt)
}

fn dsdt() -> Vec<u8> {
    let uart = |name: &str, uid: u8, port: u16, irq: u8| {
        let mut bytes = Vec::new();
        aml::Device::new(
            Path::new(name),
            vec![
                &aml::Name::new(Path::new("_HID"), &EISAName::new("PNP0501")),
                &aml::Name::new(Path::new("_UID"), &uid),
                &aml::Name::new(
                    Path::new("_CRS"),
                    &aml::ResourceTemplate::new(vec![
                        &aml::IO::new(port, port, 1, ports::UART_BYTES),
                        &aml::Interrupt::new(true, true, false, false, u32::from(irq)),
                    ]),
                ),
            ],
        )
        .to_aml_bytes(&mut bytes);
        bytes
    };
    let mut body = uart("_SB_.COM1", 1, ports::COM1, ports::COM1_IRQ);
    body.extend(uart("_SB_.COM2", 2, ports::COM2, ports::COM2_IRQ));
    // pvpanic as QEMU describes it: Documentation in QEMU's docs/specs/pvpanic.rst.
    aml::Device::new(
        Path::new("_SB_.PEVT"),
        vec![
            &aml::Name::new(Path::new("_HID"), &"QEMU0001"),
            &aml::Name::new(
                Path::new("_CRS"),
                &aml::ResourceTemplate::new(vec![&aml::IO::new(
                    ports::PVPANIC,
                    ports::PVPANIC,
                    1,
                    1,
                )]),
            ),
        ],
    )
    .to_aml_bytes(&mut body);
    let sleep = power::S5_SLEEP_TYPE;
    aml::Name::new(
        Path::new("_S5_"),
        &aml::Package::new(vec![&sleep, &sleep, &aml::ZERO, &aml::ZERO]),
    )
    .to_aml_bytes(&mut body);
    let mut sdt = Sdt::new(*b"DSDT", 36, 6, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    sdt.append_slice(&body);
    bytes_of(&sdt)
}

#[cfg(test)]
mod tests {
    use super::super::layout::{ACPI, ACPI_END};
    use super::*;

    fn u32_at(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    /// Walks the tables as a guest does and returns signature and bytes of each.
    fn walk(blob: &[u8]) -> Vec<([u8; 4], Vec<u8>)> {
        let at = |address: u64| (address - ACPI) as usize;
        let table = |address: u64| {
            let start = at(address);
            let length = u32_at(blob, start + 4) as usize;
            let bytes = blob[start..start + length].to_vec();
            (<[u8; 4]>::try_from(&bytes[..4]).unwrap(), bytes)
        };
        assert_eq!(&blob[..8], b"RSD PTR ");
        let xsdt = table(u64_at(blob, 24));
        let mut tables = vec![xsdt.clone()];
        for entry in xsdt.1[36..].chunks_exact(8) {
            tables.push(table(u64_at(entry, 0)));
        }
        let fadt = tables.iter().find(|(name, _)| name == b"FACP").unwrap().1.clone();
        tables.push(table(u64_at(&fadt, 140)));
        tables
    }

    #[test]
    fn all_tables_are_reached_from_the_rsdp_and_sum_to_zero() {
        for cpus in [1, 2, 32] {
            let blob = build(ACPI, cpus);
            assert!(ACPI + blob.len() as u64 <= ACPI_END);
            let tables = walk(&blob);
            let names: Vec<_> = tables.iter().map(|(name, _)| name).collect();
            assert_eq!(names, [b"XSDT", b"FACP", b"APIC", b"DSDT"]);
            for (name, bytes) in &tables {
                let sum = bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
                assert_eq!(sum, 0, "{}", String::from_utf8_lossy(name));
            }
        }
    }

    #[test]
    fn the_madt_lists_every_processor_once() {
        let tables = walk(&build(ACPI, 32));
        let madt = &tables.iter().find(|(name, _)| name == b"APIC").unwrap().1;
        let (mut at, mut ids) = (44, Vec::new());
        while at < madt.len() {
            if madt[at] == 0 {
                ids.push(madt[at + 3]);
                assert_eq!(u32_at(madt, at + 4), 1, "enabled");
            }
            at += usize::from(madt[at + 1]);
        }
        assert_eq!(ids, (0..32).collect::<Vec<u8>>());
    }

    #[test]
    fn facs_is_found_and_aligned() {
        let blob = build(ACPI, 1);
        let fadt = walk(&blob).into_iter().find(|(name, _)| name == b"FACP").unwrap().1;
        let facs = u64::from(u32_at(&fadt, 36));
        assert_eq!(facs % 64, 0);
        assert_eq!(&blob[(facs - ACPI) as usize..][..4], b"FACS");
    }
}

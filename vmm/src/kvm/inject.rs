//! What async page faults do to a vCPU: its state at a fault, a page fault injected, an artificial halt.
//!
//! All of it is by the registers that KVM_RUN leaves in `kvm_run` and takes from there
//! (KVM_CAP_SYNC_REGS): with an ioctl for each it costs five times as much. They are stale after any
//! KVM_SET ioctl for registers or events; nothing here makes one between an exit and its answer.
//!
//! KVM leaves there what it is told to at every exit, those for a console's bytes, too. So only the general
//! registers are asked for all the time, and the rest for some exits after one that needed it.

use async_pf::protocol::{GuestState, MSR_INT};
use kvm_bindings::{
    KVM_CAP_EXCEPTION_PAYLOAD, KVM_CAP_SYNC_REGS, KVM_MP_STATE_HALTED, KVM_MP_STATE_RUNNABLE,
    KVM_SYNC_X86_EVENTS, KVM_SYNC_X86_REGS, KVM_SYNC_X86_SREGS, KVM_VCPUEVENT_VALID_PAYLOAD,
    KVM_VCPUEVENT_VALID_SHADOW, Msrs, kvm_enable_cap, kvm_mp_state, kvm_msr_entry, kvm_regs,
    kvm_sync_regs,
};
use kvm_ioctls::{SyncReg, VcpuFd, VmFd};

use super::KvmError;

/// What of the registers is needed after an exit, and before an entry.
const SYNC: i32 = (KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS | KVM_SYNC_X86_EVENTS) as i32;
/// For so many exits after one that needed it the whole state is left in `kvm_run`.
const WATCHED_EXITS: u32 = 64;

const RFLAGS_IF: u64 = 1 << 9;
const CR0_PG: u64 = 1 << 31;
/// #PF.
const PAGE_FAULT: u8 = 14;
/// What KVM's own copy of the vector is set to, which nobody uses: INIT makes it 0.
const SENTINEL: u64 = 0xff;

/// Is there an exchange of the general registers by `kvm_run`?
///
/// # Errors
/// When there is none.
pub(super) fn prepare_registers(vm: &VmFd) -> Result<(), KvmError> {
    let registers = KVM_SYNC_X86_REGS as i32;
    if vm.check_extension_raw(KVM_CAP_SYNC_REGS.into()) & registers == 0 {
        return Err(KvmError::MissingForUser("KVM_CAP_SYNC_REGS"));
    }
    Ok(())
}

/// Has KVM take a page fault's address with its injection.
///
/// # Errors
/// When KVM lacks this, or the exchange of registers by `kvm_run`.
pub(super) fn prepare(vm: &VmFd) -> Result<(), KvmError> {
    if vm.check_extension_raw(KVM_CAP_SYNC_REGS.into()) & SYNC != SYNC {
        return Err(KvmError::MissingForUser("KVM_CAP_SYNC_REGS with events"));
    }
    let payload =
        kvm_enable_cap { cap: KVM_CAP_EXCEPTION_PAYLOAD, args: [1, 0, 0, 0], ..Default::default() };
    vm.enable_cap(&payload).map_err(|_| KvmError::MissingForUser("KVM_CAP_EXCEPTION_PAYLOAD"))
}

/// A halt that the guest did not ask for, by the address of the instruction that met the page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Halted {
    rip: u64,
}

/// How much of the guest's state an exit leaves in `kvm_run`.
#[derive(Debug, Default)]
pub(super) struct Watch {
    /// Exits that leave all of it; then the general registers only.
    left: u32,
}

impl Watch {
    /// Has KVM_RUN leave the general registers in `kvm_run`.
    pub(super) fn begin(fd: &mut VcpuFd) {
        fd.set_sync_valid_reg(SyncReg::Register);
    }

    /// An exit is over that did not ask for more.
    pub(super) fn passed(&mut self, fd: &mut VcpuFd) {
        if self.left == 1 {
            fd.clear_sync_valid_reg(SyncReg::SystemRegister);
            fd.clear_sync_valid_reg(SyncReg::VcpuEvents);
        }
        self.left = self.left.saturating_sub(1);
    }

    /// Sees to it that `kvm_run` has all of the state that the last exit left.
    fn complete(&mut self, fd: &mut VcpuFd) -> Result<(), kvm_ioctls::Error> {
        if self.left == 0 {
            let (sregs, events) = (fd.get_sregs()?, fd.get_vcpu_events()?);
            let sync = fd.sync_regs_mut();
            (sync.sregs, sync.events) = (sregs, events);
            fd.set_sync_valid_reg(SyncReg::SystemRegister);
            fd.set_sync_valid_reg(SyncReg::VcpuEvents);
        }
        self.left = WATCHED_EXITS;
        Ok(())
    }
}

/// The general registers as the last exit left them, after [`Watch::begin`].
pub(super) fn registers(fd: &VcpuFd) -> kvm_regs {
    fd.sync_regs().regs
}

/// The guest as the last exit left it, after [`Watch::begin`].
///
/// # Errors
/// When KVM does not say.
pub(super) fn guest_state(
    fd: &mut VcpuFd,
    watch: &mut Watch,
) -> Result<GuestState, kvm_ioctls::Error> {
    watch.complete(fd)?;
    let kvm_sync_regs { regs, sregs, events } = fd.sync_regs();
    let pending = [
        events.exception.injected,
        events.exception.pending,
        events.interrupt.injected,
        events.nmi.injected,
        events.nmi.pending,
        events.smi.pending,
        events.triple_fault.pending,
    ];
    Ok(GuestState {
        // What hardware runs at is SS's, not CS's (AMD APM volume 2, 15.5.1; SDM 3C, 26.3.1.2).
        cpl: sregs.ss.dpl,
        interrupts: regs.rflags & RFLAGS_IF != 0,
        shadow: events.interrupt.shadow != 0,
        event: pending.iter().any(|each| *each != 0),
        paging: sregs.cr0 & CR0_PG != 0,
    })
}

/// The next entry is a page fault with error code 0 at this address. Nothing may be pending.
pub(super) fn page_fault(fd: &mut VcpuFd, cr2: u64) {
    let events = &mut fd.sync_regs_mut().events;
    events.exception.pending = 1;
    events.exception.injected = 0;
    events.exception.nr = PAGE_FAULT;
    events.exception.has_error_code = 1;
    events.exception.error_code = 0;
    events.exception_has_payload = 1;
    events.exception_payload = cr2;
    // An NMI or INIT may have come since the exit: without their flags KVM leaves its own.
    events.flags = KVM_VCPUEVENT_VALID_PAYLOAD | events.flags & KVM_VCPUEVENT_VALID_SHADOW;
    fd.set_sync_dirty_reg(SyncReg::VcpuEvents);
}

/// The next KVM_RUN halts until there is an interrupt.
pub(super) fn halt(fd: &VcpuFd) -> Result<Halted, kvm_ioctls::Error> {
    let rip = fd.sync_regs().regs.rip;
    fd.set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_HALTED })?;
    Ok(Halted { rip })
}

/// Ends the artificial halt, if it has not ended by itself: then the vCPU may halt by its own HLT, and
/// stays so.
pub(super) fn end_halt(fd: &VcpuFd, halted: Halted) -> Result<(), kvm_ioctls::Error> {
    let state = fd.get_mp_state()?;
    if state.mp_state == KVM_MP_STATE_HALTED && fd.sync_regs().regs.rip == halted.rip {
        fd.set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE })?;
    }
    Ok(())
}

/// From here on [`had_init`] tells. KVM's own protocol is off, and its copy of the vector unused; it is
/// cleared with the rest of it when the vCPU gets INIT, of which user space hears nothing.
///
/// The bits of TR that an exit leaves anyway (AVL, which INIT clears too) are no way to spare the ioctl: they can be
/// set by KVM_SET_SREGS only, which makes the type of TR a busy one, and where QEMU emulates SVM an OUT of a
/// task that has the right to it is a general protection fault then.
pub(super) fn arm_sentinel(fd: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    fd.set_msrs(&one(SENTINEL)?).map(drop)
}

/// Did the vCPU get INIT since [`arm_sentinel`]?
pub(super) fn had_init(fd: &VcpuFd) -> Result<bool, kvm_ioctls::Error> {
    let mut msrs = one(0)?;
    let read = fd.get_msrs(&mut msrs)?;
    Ok(read == 1 && msrs.as_slice().first().is_some_and(|entry| entry.data != SENTINEL))
}

fn one(data: u64) -> Result<Msrs, kvm_ioctls::Error> {
    let entry = kvm_msr_entry { index: MSR_INT, data, ..Default::default() };
    Msrs::from_entries(&[entry]).map_err(|_| kvm_ioctls::Error::new(libc::E2BIG))
}

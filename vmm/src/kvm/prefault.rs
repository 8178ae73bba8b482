//! Filling KVM's page tables ahead of the guest: KVM_PRE_FAULT_MEMORY (Linux 6.11 and later;
//! Documentation/virt/kvm/api.rst, 4.143).
//!
//! When the pager has mapped a run of pages, KVM still takes one exit for each page that the guest
//! touches. This thread has KVM map the whole run at once. The ioctl belongs to a vCPU, and those of
//! the guest are busy in KVM_RUN: so there is one more vCPU for it, which never runs and is in none
//! of the tables that the guest sees. All vCPUs share the page tables.
//!
//! It is a bonus: a run that finds the queue full is dropped. It has a thread of its own because the
//! host may have taken the page away again in the meantime; the ioctl then waits for the pager.
//!
//! A single page that the guest waits for ([`page`]) is mapped by the vCPU that will touch it, whose
//! thread is in user space anyway, for the guest's ACK.
#![allow(unsafe_code, reason = "an ioctl that kvm-ioctls does not have")]

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use guest_memory::{Gfn, Gpa};
use kvm_bindings::{KVM_CAP_PRE_FAULT_MEMORY, kvm_cpuid_entry2, kvm_pre_fault_memory};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use vmm_sys_util::ioctl::ioctl_with_mut_ref;

use super::{KvmError, vcpu};
use crate::sigbus::{GuestMapping, GuestThread};

/// Runs that wait for the thread.
const QUEUE: usize = 256;
/// How long a vCPU lets the thread get ahead of it.
const PATIENCE: Duration = Duration::from_millis(5);

mod number {
    use kvm_bindings::{KVMIO, kvm_pre_fault_memory};
    use vmm_sys_util::ioctl_iowr_nr;
    ioctl_iowr_nr!(KVM_PRE_FAULT_MEMORY, KVMIO, 0xd5, kvm_pre_fault_memory);
}

enum Job {
    Map { gpa: Gpa, bytes: u64 },
    Flush(SyncSender<()>),
    Stop,
}

/// The thread that fills KVM's page tables.
#[derive(Debug)]
pub struct Prefault {
    jobs: SyncSender<Job>,
    pages: Arc<AtomicU64>,
    thread: JoinHandle<()>,
}

/// Where mapped runs are told; cheap to clone.
#[derive(Clone, Debug)]
pub struct Ahead(SyncSender<Job>);

impl Ahead {
    /// These pages are mapped in the guest mapping. Never waits.
    pub fn mapped(&self, gpa: Gpa, bytes: u64) {
        // Full or gone: the guest's own faults do it.
        let _ = self.0.try_send(Job::Map { gpa, bytes });
    }

    /// For a vCPU whose fault mapped a run of pages: lets the thread do that run first. A vCPU that goes on at
    /// once would fault on page after page beside it. The thread may wait for a page itself: this does not, for
    /// longer than some milliseconds.
    pub fn settle(&self) {
        let (done, wait) = sync_channel(1);
        if self.0.try_send(Job::Flush(done)).is_ok() {
            let _ = wait.recv_timeout(PATIENCE);
        }
    }
}

impl Prefault {
    /// Starts the thread on a vCPU `id` of its own, with the CPUID of the others so that it shares their
    /// page tables; `None` where KVM cannot do it. With `markers`, guest RAM as it is mapped for the
    /// guest, a page that was marked meanwhile comes as SIGBUS, as it does to the guest's own vCPUs.
    ///
    /// # Errors
    /// When the vCPU or the thread cannot be made.
    pub fn start(
        kvm: &Kvm,
        vm: &VmFd,
        id: u32,
        cpuid: &[kvm_cpuid_entry2],
        markers: Option<Vec<GuestMapping>>,
    ) -> Result<Option<Self>, KvmError> {
        let room = kvm.get_max_vcpus() > id as usize && kvm.get_max_vcpu_id() > id as usize;
        if !room || vm.check_extension_raw(KVM_CAP_PRE_FAULT_MEMORY.into()) <= 0 {
            return Ok(None);
        }
        let vcpu = vm
            .create_vcpu(id.into())
            .map_err(KvmError::during("KVM_CREATE_VCPU for KVM_PRE_FAULT_MEMORY"))?;
        vcpu::prepare(&vcpu, id, cpuid)?;
        let (jobs, inbox) = sync_channel(QUEUE);
        let pages = Arc::new(AtomicU64::new(0));
        let thread = thread::Builder::new().name("prefault".into()).spawn({
            let pages = Arc::clone(&pages);
            move || work(&vcpu, &inbox, &pages, markers.as_deref())
        });
        let thread = thread.map_err(|error| {
            let source = kvm_ioctls::Error::new(error.raw_os_error().unwrap_or(libc::EAGAIN));
            KvmError::during("a thread for KVM_PRE_FAULT_MEMORY")(source)
        })?;
        Ok(Some(Self { jobs, pages, thread }))
    }

    /// Where to tell it of mapped runs.
    #[must_use]
    pub fn ahead(&self) -> Ahead {
        Ahead(self.jobs.clone())
    }

    /// Waits until all runs told so far are in KVM's page tables.
    pub fn flush(&self) {
        let (done, wait) = sync_channel(1);
        if self.jobs.send(Job::Flush(done)).is_ok() {
            // An error means that the thread has ended; then nothing is left to wait for.
            let _ = wait.recv();
        }
    }

    /// Pages that KVM was asked to map so far, and did.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.pages.load(Ordering::Relaxed)
    }

    /// Ends the thread. The pager must be shut down, so that the thread does not wait for a page.
    pub fn finish(self) {
        // An error means that the thread has ended already.
        let _ = self.jobs.send(Job::Stop);
        // A panic has been reported on standard error.
        let _ = self.thread.join();
    }
}

fn work(vcpu: &VcpuFd, inbox: &Receiver<Job>, pages: &AtomicU64, markers: Option<&[GuestMapping]>) {
    let thread = markers.map(GuestThread::register).transpose();
    // Without a handler a marker would end the process.
    let mut works = thread.is_ok();
    let thread = thread.ok().flatten();
    for job in inbox {
        match job {
            // After an error (a KVM that says it can and cannot) the guest's own faults do it.
            Job::Map { gpa, bytes } if works => {
                works = map(vcpu, gpa, bytes, pages, thread.as_ref()).is_ok();
            }
            Job::Map { .. } => {}
            Job::Flush(done) => drop(done.try_send(())),
            Job::Stop => return,
        }
    }
}

/// KVM_PRE_FAULT_MEMORY: maps the range, and moves it on over what is done.
fn pre_fault(vcpu: &VcpuFd, range: &mut kvm_pre_fault_memory) -> io::Result<()> {
    // SAFETY: KVM reads and writes the one struct; it changes its own page tables only.
    let done = unsafe { ioctl_with_mut_ref(vcpu, number::KVM_PRE_FAULT_MEMORY(), range) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Has KVM map one page whose fault `vcpu` would take next, on its own thread. Not a matter of this call is
/// whether it is mapped then: it may be on its way out again, or the thread be wanted.
///
/// # Errors
/// KVM cannot do it at all.
pub(super) fn page(vcpu: &VcpuFd, gfn: Gfn) -> io::Result<()> {
    let Some(Gpa(gpa)) = gfn.gpa() else { return Ok(()) };
    let size = guest_memory::PAGE_BYTES;
    let mut range = kvm_pre_fault_memory { gpa, size, ..Default::default() };
    match pre_fault(vcpu, &mut range).map_err(|error| error.raw_os_error()) {
        Ok(()) => Ok(()),
        // Of this moment.
        Err(Some(libc::EINTR | libc::EAGAIN | libc::EFAULT | libc::EHWPOISON | libc::ENOMEM)) => {
            Ok(())
        }
        Err(errno) => Err(io::Error::from_raw_os_error(errno.unwrap_or(libc::EIO))),
    }
}

fn map(
    vcpu: &VcpuFd,
    gpa: Gpa,
    bytes: u64,
    pages: &AtomicU64,
    thread: Option<&GuestThread>,
) -> io::Result<()> {
    let ioctl = |range: &mut kvm_pre_fault_memory| match thread {
        Some(thread) => thread.in_kvm_run(|| pre_fault(vcpu, range)),
        None => pre_fault(vcpu, range),
    };
    let mut range = kvm_pre_fault_memory { gpa: gpa.0, size: bytes, ..Default::default() };
    while range.size > 0 {
        let before = range.size;
        let done = ioctl(&mut range);
        // A marker: KVM sends SIGBUS, and the ioctl is interrupted by it.
        let marked = thread.is_some_and(|thread| thread.take_fault().is_some());
        match done.map_err(|error| error.raw_os_error()) {
            // Gone again, or on its way out: the next page may be there.
            Err(Some(libc::EINTR)) if marked => skip(&mut range),
            Err(Some(libc::EFAULT | libc::EHWPOISON)) => skip(&mut range),
            Err(Some(libc::EINTR | libc::EAGAIN)) => {}
            Err(errno) => return Err(io::Error::from_raw_os_error(errno.unwrap_or(libc::EIO))),
            Ok(()) => {
                let done = (before - range.size) / guest_memory::PAGE_BYTES;
                pages.fetch_add(done, Ordering::Relaxed);
            }
        }
    }
    Ok(())
}

/// One page on.
fn skip(range: &mut kvm_pre_fault_memory) {
    let step = range.size.min(guest_memory::PAGE_BYTES);
    range.gpa += step;
    range.size -= step;
}

//! The deadly cases run in a forked child that does nothing but the access or the signal.

use std::fs::File;
use std::os::fd::FromRawFd;

use vm_memory::{FileOffset, MmapRegion};

use super::*;

const PAGE_BYTES: u64 = 4096;
/// Addresses that no test maps: only compared, never touched.
const GUEST: GuestMapping = GuestMapping { hva: 0x7000_0000_0000, len: 4 * PAGE_BYTES };

/// Queues a SIGBUS to this very thread, as KVM does: delivered before the call returns.
fn queue_sigbus(code: c_int, hva: u64) {
    // SAFETY: siginfo is plain data of 128 bytes; si_addr lies at offset 16 on x86_64, inside it.
    // A thread may queue any siginfo to itself.
    let result = unsafe {
        let mut info: siginfo_t = std::mem::zeroed();
        info.si_signo = libc::SIGBUS;
        info.si_code = code;
        (&raw mut info).cast::<u64>().add(2).write(hva);
        libc::syscall(
            libc::SYS_rt_tgsigqueueinfo,
            libc::getpid(),
            libc::syscall(libc::SYS_gettid),
            libc::SIGBUS,
            &info,
        )
    };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
}

/// The signal that ends a forked child that does `act`, or `None` if it lives on.
fn signal_that_ends(act: impl FnOnce()) -> Option<c_int> {
    // SAFETY: the child calls only async-signal-safe functions: setrlimit, `act` (an access or
    // system calls, see the tests) and _exit. The parent waits for the child that it made.
    let status = unsafe {
        let child = libc::fork();
        assert!(child >= 0, "{}", io::Error::last_os_error());
        if child == 0 {
            let no_core = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
            libc::setrlimit(libc::RLIMIT_CORE, &no_core);
            act();
            libc::_exit(0);
        }
        let mut status = 0;
        assert_eq!(libc::waitpid(child, &mut status, 0), child);
        status
    };
    libc::WIFSIGNALED(status).then(|| libc::WTERMSIG(status))
}

#[test]
fn a_fault_in_a_guest_mapping_inside_kvm_run_is_recorded_once() {
    let thread = GuestThread::register(&[GUEST]).unwrap();
    let hva = GUEST.hva + 2 * PAGE_BYTES;
    assert_eq!(thread.in_kvm_run(|| 7), 7);
    assert_eq!(thread.take_fault(), None);
    thread.in_kvm_run(|| queue_sigbus(libc::BUS_MCEERR_AR, hva));
    assert_eq!(thread.take_fault(), Some(hva));
    assert_eq!(thread.take_fault(), None);
}

#[test]
fn each_thread_has_its_own_mappings_and_fault() {
    let _here = GuestThread::register(&[GUEST]).unwrap();
    let other = GuestMapping { hva: GUEST.hva + 0x1000_0000, ..GUEST };
    let seen = std::thread::spawn(move || {
        let thread = GuestThread::register(&[GUEST, other]).unwrap();
        thread.in_kvm_run(|| queue_sigbus(libc::BUS_MCEERR_AR, other.hva));
        thread.take_fault()
    });
    assert_eq!(seen.join().unwrap(), Some(other.hva));
    assert_eq!(_here.take_fault(), None);
}

#[test]
fn a_blocked_sigbus_is_unblocked_by_registering() {
    // SAFETY: an initialised set, and the mask of this thread only.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigaddset(&mut set, libc::SIGBUS);
        libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
    }
    let thread = GuestThread::register(&[GUEST]).unwrap();
    thread.in_kvm_run(|| queue_sigbus(libc::BUS_MCEERR_AR, GUEST.hva));
    assert_eq!(thread.take_fault(), Some(GUEST.hva));
}

#[test]
fn anything_else_ends_the_process_by_sigbus() {
    let thread = GuestThread::register(&[GUEST]).unwrap();
    let end = GUEST.hva + GUEST.len;
    let deadly: [(&str, &dyn Fn()); 4] = [
        ("outside KVM_RUN", &|| {
            queue_sigbus(libc::BUS_MCEERR_AR, GUEST.hva);
        }),
        ("behind the mapping", &|| {
            thread.in_kvm_run(|| queue_sigbus(libc::BUS_MCEERR_AR, end));
        }),
        ("before the mapping", &|| {
            thread.in_kvm_run(|| queue_sigbus(libc::BUS_MCEERR_AR, GUEST.hva - 1));
        }),
        ("sent by a process", &|| {
            thread.in_kvm_run(|| queue_sigbus(libc::SI_QUEUE, GUEST.hva));
        }),
    ];
    for (case, act) in deadly {
        assert_eq!(signal_that_ends(act), Some(libc::SIGBUS), "{case}");
    }
    assert_eq!(signal_that_ends(|| ()), None, "a child that does nothing");
}

#[test]
fn a_memory_error_that_nobody_has_run_into_ends_nothing() {
    let thread = GuestThread::register(&[GUEST]).unwrap();
    for hva in [GUEST.hva, GUEST.hva + GUEST.len] {
        queue_sigbus(libc::BUS_MCEERR_AO, hva);
        thread.in_kvm_run(|| queue_sigbus(libc::BUS_MCEERR_AO, hva));
    }
    assert_eq!(thread.take_fault(), None);
    thread.in_kvm_run(|| queue_sigbus(libc::BUS_MCEERR_AR, GUEST.hva));
    assert_eq!(thread.take_fault(), Some(GUEST.hva), "the handler is still there");
}

#[test]
fn a_real_access_behind_the_end_of_a_file_ends_the_process_by_sigbus() {
    let thread = GuestThread::register(&[GUEST]).unwrap();
    // SAFETY: a fresh descriptor that nobody else owns.
    let file = unsafe { File::from_raw_fd(libc::memfd_create(c"sigbus-test".as_ptr(), 0)) };
    file.set_len(PAGE_BYTES).unwrap();
    let region: MmapRegion =
        MmapRegion::from_file(FileOffset::new(file.try_clone().unwrap(), 0), 4096).unwrap();
    file.set_len(0).unwrap();
    let page = region.as_ptr();
    // SAFETY: the address is mapped, so the access is a read that the kernel answers with SIGBUS.
    let read = || unsafe {
        page.read_volatile();
    };
    assert_eq!(signal_that_ends(read), Some(libc::SIGBUS));
    assert_eq!(signal_that_ends(|| thread.in_kvm_run(read)), Some(libc::SIGBUS), "in KVM_RUN");
}

#[test]
fn bad_registrations_are_refused_by_name() {
    let too_many = vec![GUEST; MAX_GUEST_MAPPINGS + 1];
    let refused = GuestThread::register(&too_many).unwrap_err().to_string();
    assert!(refused.contains("9 guest mappings"), "{refused}");
    for (hva, len) in [(0, 4096), (4096, 0), (u64::MAX, 4096)] {
        let refused = GuestThread::register(&[GuestMapping { hva, len }]).unwrap_err();
        assert!(matches!(refused, SigbusError::BadMapping { .. }), "{refused}");
    }
    assert!(matches!(GuestThread::register(&[]), Err(SigbusError::NoMapping)));
    let first = GuestThread::register(&[GUEST]).unwrap();
    assert!(matches!(GuestThread::register(&[GUEST]), Err(SigbusError::AlreadyRegistered)));
    drop(first);
    GuestThread::register(&[GUEST]).expect("free again after the first was dropped");
}

/// As [`GuestThread::collects`] leaves the thread's own mask; a vCPU's needs KVM.
fn blocked() -> GuestThread {
    let thread = GuestThread::register(&[GUEST]).unwrap();
    mask::change(libc::SIG_BLOCK).unwrap();
    thread
}

#[test]
fn a_fault_that_waits_is_recorded_when_it_is_collected() {
    let thread = blocked();
    thread.collect();
    assert_eq!(thread.take_fault(), None);
    thread.in_kvm_run(|| queue_sigbus(libc::BUS_MCEERR_AR, GUEST.hva));
    assert_eq!(thread.take_fault(), None, "nobody looked");
    thread.collect();
    assert!(thread.has_fault());
    assert_eq!(thread.take_fault(), Some(GUEST.hva));
    thread.collect();
    assert_eq!(thread.take_fault(), None);
    queue_sigbus(libc::BUS_MCEERR_AO, GUEST.hva + GUEST.len);
    thread.collect();
    assert_eq!(thread.take_fault(), None);
    assert!(mask::take().is_none(), "it was not collected");
}

#[test]
fn anything_else_that_is_collected_ends_the_process_by_sigbus() {
    let thread = blocked();
    for (code, hva) in [(libc::BUS_MCEERR_AR, GUEST.hva - 1), (libc::SI_QUEUE, GUEST.hva)] {
        let act = || {
            queue_sigbus(code, hva);
            thread.collect();
        };
        assert_eq!(signal_that_ends(act), Some(libc::SIGBUS), "{code} {hva:#x}");
    }
}

#[test]
fn faults_of_another_ioctl_are_dropped_and_the_next_one_waits_again() {
    let thread = blocked();
    // One that nobody has collected yet, too: the guest meets its page again.
    queue_sigbus(libc::BUS_MCEERR_AR, GUEST.hva);
    let ioctl = || queue_sigbus(libc::BUS_MCEERR_AR, GUEST.hva + PAGE_BYTES);
    thread.in_other_ioctl(ioctl).unwrap();
    assert_eq!(thread.take_fault(), None);
    thread.collect();
    assert_eq!(thread.take_fault(), None);
    queue_sigbus(libc::BUS_MCEERR_AR, GUEST.hva);
    assert_eq!(thread.take_fault(), None);
    thread.collect();
    assert_eq!(thread.take_fault(), Some(GUEST.hva));
    let other = || {
        let _ = thread.in_other_ioctl(|| queue_sigbus(libc::SI_QUEUE, GUEST.hva));
    };
    assert_eq!(signal_that_ends(other), Some(libc::SIGBUS));
}

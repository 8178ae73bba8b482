//! Faults on markers, as a vCPU thread has them: the access fails at once, the thread asks the pager, sleeps
//! until it is told, and tries again. A system call on guest RAM stands for `KVM_RUN`: it gives EFAULT
//! on a marker, and sleeps in the kernel where there is none.
// Unsafe: system calls with addresses of guest RAM, and fork.
#![allow(unsafe_code)]

mod common;

use std::cell::Cell;
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::{Machine, Rng, eventually, page, plain, ram};
use guest_memory::stores::testing::{self, Switch, switchable};
use guest_memory::{
    Fault, Gfn, Hit, PAGE_BYTES, PAGE_SIZE, PageEnd, PagerConfig, PagerError, Sleeper, Waiter,
    Wake, Woken,
};

const LONG: Duration = Duration::from_secs(20);

fn marked(store: &str) -> PagerConfig {
    PagerConfig { markers: true, store: store.parse().unwrap(), ..plain() }
}

/// A thread that accesses guest RAM by system calls.
struct Vcpu<'a> {
    machine: &'a Machine,
    reader: PipeReader,
    writer: PipeWriter,
    sleeper: Arc<Sleeper>,
    /// How often it met a marker.
    markers: Cell<u64>,
}

impl<'a> Vcpu<'a> {
    fn new(machine: &'a Machine) -> Self {
        let (reader, writer) = io::pipe().unwrap();
        Self { machine, reader, writer, sleeper: Arc::default(), markers: Cell::new(0) }
    }

    /// One try to read a word; `None`: there is a marker.
    fn try_read(&self, gpa: u64) -> Option<u64> {
        let from = self.machine.hva(gpa) as *const libc::c_void;
        // SAFETY: 8 bytes from here are guest RAM; the kernel copies them, or says that it cannot.
        let copied = unsafe { libc::write(self.writer.as_raw_fd(), from, 8) };
        if !self.done(copied) {
            return None;
        }
        let mut word = [0; 8];
        (&self.reader).read_exact(&mut word).unwrap();
        Some(u64::from_le_bytes(word))
    }

    /// One try to write the word that is in the pipe.
    fn try_write_from_pipe(&self, gpa: u64) -> bool {
        let to = self.machine.hva(gpa) as *mut libc::c_void;
        // SAFETY: 8 bytes from here are guest RAM; the kernel copies them, or says that it cannot.
        let copied = unsafe { libc::read(self.reader.as_raw_fd(), to, 8) };
        self.done(copied)
    }

    fn done(&self, copied: isize) -> bool {
        if copied == 8 {
            return true;
        }
        assert_eq!(io::Error::last_os_error().raw_os_error(), Some(libc::EFAULT), "{copied}");
        self.markers.set(self.markers.get() + 1);
        false
    }

    fn fault(&self, gpa: u64) -> Fault {
        let gfn = self.machine.pager.gfn_at(self.machine.hva(gpa)).unwrap();
        self.machine.pager.fault(gfn, 1, &self.sleeper.begin()).unwrap()
    }

    /// Asks the pager, and sleeps if need be.
    fn fault_and_sleep(&self, gpa: u64) {
        match self.fault(gpa) {
            Fault::Hit(_) | Fault::Present => {}
            Fault::Waits { .. } => {
                assert_eq!(self.sleeper.wait(Some(LONG)), Woken::Page(PageEnd::Ready));
            }
            Fault::Lost => panic!("{gpa:#x} is lost"),
        }
    }

    fn read(&self, gpa: u64) -> u64 {
        loop {
            if let Some(word) = self.try_read(gpa) {
                return word;
            }
            self.fault_and_sleep(gpa);
        }
    }

    fn write(&self, gpa: u64, word: u64) {
        (&self.writer).write_all(&word.to_le_bytes()).unwrap();
        while !self.try_write_from_pipe(gpa) {
            self.fault_and_sleep(gpa);
        }
    }
}

/// 16 pages, of which each begins with its number plus one; and a store that can be turned off.
fn switched() -> Option<(Machine, Switch)> {
    let (store, switch) = switchable(testing::open("raw+memory").unwrap());
    let machine = Machine::with_store(ram(16 * PAGE_BYTES), marked("memory"), store)?;
    let vcpu = Vcpu::new(&machine);
    (0..16).for_each(|number| vcpu.write(page(number), number + 1));
    Some((machine, switch))
}

#[test]
fn an_idle_page_has_a_marker_and_is_a_hit() {
    let Some((machine, switch)) = switched() else { return };
    let vcpu = Vcpu::new(&machine);
    // What the store refuses has left the guest mapping, and stays in memory.
    switch.down();
    machine.pager.evict(&[Gfn(3)]).unwrap_err();
    let before = machine.stats();
    assert_eq!(vcpu.try_read(page(3)), None);
    assert_eq!(vcpu.fault(page(3)), Fault::Hit(Hit::Resident));
    assert_eq!(vcpu.try_read(page(3)), Some(4));
    assert_eq!(vcpu.fault(page(3)), Fault::Present, "a marker that is met late");
    let after = machine.stats();
    assert_eq!(after.hits_idle, before.hits_idle + 1);
    assert_eq!(
        after.messages_missing + after.messages_minor,
        before.messages_missing + before.messages_minor
    );
}

#[test]
fn a_stored_page_has_a_marker_until_it_has_come() {
    let Some(machine) = Machine::start(ram(16 * PAGE_BYTES), marked("raw+delay=100ms")) else {
        return;
    };
    let vcpu = Vcpu::new(&machine);
    vcpu.write(page(3), 4);
    assert_eq!(machine.pager.evict(&[Gfn(3)]).unwrap(), 1);
    assert_eq!(vcpu.try_read(page(3)), None);
    let Fault::Waits { expected } = vcpu.fault(page(3)) else { panic!("it is no hit") };
    assert!(expected >= Duration::from_millis(90), "{expected:?}");
    assert_eq!(vcpu.try_read(page(3)), None, "neither zeros nor a wait");
    assert_eq!(vcpu.sleeper.wait(Some(LONG)), Woken::Page(PageEnd::Ready));
    assert_eq!(vcpu.try_read(page(3)), Some(4));
    assert_eq!(machine.stats().messages_missing, 1, "the first touch of the block only");
}

#[test]
fn a_block_gets_its_markers_when_it_is_first_touched() {
    let Some(machine) = Machine::start(ram(page(1024)), marked("memory")) else { return };
    let vcpu = Vcpu::new(&machine);
    for block in [0, 512] {
        let before = machine.stats();
        vcpu.write(page(block), block + 1);
        assert_eq!(vcpu.markers.get(), 0, "a message, no marker");
        eventually("the block is marked", || machine.stats().markers >= before.markers + 511);
        assert_eq!(vcpu.try_read(page(block + 511)), None);
        vcpu.markers.set(0);
        let after = machine.stats();
        assert_eq!(after.messages_missing, before.messages_missing + 1);
        assert_eq!(after.pages_touched, before.pages_touched + 1);
    }
    // An untouched page of a marked block: zeros, at once.
    assert_eq!(vcpu.fault(page(700)), Fault::Hit(Hit::Zero));
    assert_eq!(vcpu.try_read(page(700)), Some(0));
    assert_eq!((vcpu.read(page(0)), vcpu.read(page(512))), (1, 513));
}

#[test]
fn a_page_whose_entry_the_host_took_comes_by_message() {
    let Some((machine, switch)) = switched() else { return };
    let vcpu = Vcpu::new(&machine);
    // Mapped: no marker there, a minor fault.
    let before = machine.stats().messages_minor;
    machine.reclaim_mapping(page(1));
    assert_eq!(vcpu.try_read(page(1)), Some(2));
    // Idle, and its marker gone with the page table.
    switch.down();
    machine.pager.evict(&[Gfn(2)]).unwrap_err();
    switch.up();
    machine.reclaim_mapping(page(2));
    assert_eq!(vcpu.try_read(page(2)), Some(3));
    assert_eq!(machine.stats().messages_minor, before + 2);
    // Stored, likewise: a missing fault, and no zeros.
    assert_eq!(machine.pager.evict(&[Gfn(3)]).unwrap(), 1);
    machine.reclaim_mapping(page(3));
    assert_eq!(vcpu.try_read(page(3)), Some(4));
    assert_eq!(vcpu.markers.get(), 0);
}

/// Counts how often it is told.
#[derive(Default)]
struct Told(AtomicU64);

impl Wake for Told {
    fn wake(&self, _: u64, end: PageEnd) {
        assert_eq!(end, PageEnd::Ready);
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

#[test]
fn each_waiter_is_told_exactly_once() {
    let Some(machine) = Machine::start(ram(page(4)), marked("raw+delay=1ms")) else { return };
    Vcpu::new(&machine).write(page(1), 7);
    let (told, waits) = (Arc::new(Told::default()), AtomicU64::new(0));
    for _ in 0..100 {
        machine.pager.evict(&[Gfn(1)]).unwrap();
        thread::scope(|scope| {
            for lane in 0..8 {
                let wake = Arc::clone(&told) as Arc<dyn Wake>;
                let (machine, waits) = (&machine, &waits);
                scope.spawn(move || {
                    let waiter = Waiter { wake, token: lane };
                    let fault = machine.pager.fault(Gfn(1), lane as u16, &waiter).unwrap();
                    waits.fetch_add(
                        u64::from(matches!(fault, Fault::Waits { .. })),
                        Ordering::Relaxed,
                    );
                });
            }
        });
        let all = || told.0.load(Ordering::Relaxed) == waits.load(Ordering::Relaxed);
        eventually("all are told", all);
    }
    thread::sleep(Duration::from_millis(20));
    assert_eq!(told.0.load(Ordering::Relaxed), waits.load(Ordering::Relaxed));
    assert!(waits.load(Ordering::Relaxed) >= 100);
}

#[test]
fn eight_threads_at_one_page_share_one_fetch() {
    const ROUNDS: u64 = 20;
    let Some(machine) = Machine::start(ram(page(4)), marked("raw+delay=3ms")) else { return };
    Vcpu::new(&machine).write(page(1), 7);
    for round in 1..=ROUNDS {
        assert_eq!(machine.pager.evict(&[Gfn(1)]).unwrap(), 1);
        thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    let vcpu = Vcpu::new(&machine);
                    assert_eq!(vcpu.read(page(1)), 7);
                });
            }
        });
        assert_eq!(machine.stats().fetched_pages, round);
    }
}

#[test]
fn late_messages_of_many_threads_do_no_harm() {
    // Each page is the first of its block: eight messages at once, and markers in the middle of it.
    const BLOCKS: u64 = 64;
    let Some(machine) = Machine::start(ram(page(512 * BLOCKS)), marked("memory")) else { return };
    for block in 0..BLOCKS {
        thread::scope(|scope| {
            for thread in 0..8 {
                let machine = &machine;
                scope.spawn(move || {
                    let vcpu = Vcpu::new(machine);
                    let at = page(512 * block + thread / 2) + 8 * thread;
                    vcpu.write(at, at + 1);
                    assert_eq!(vcpu.read(at), at + 1);
                });
            }
        });
    }
    let stats = machine.stats();
    assert_eq!(stats.pages_touched, 4 * BLOCKS);
    assert_eq!(stats.resident_bytes, 4 * BLOCKS * PAGE_BYTES);
}

#[test]
fn random_accesses_read_what_was_written() {
    let Some(machine) = Machine::start(ram(page(64)), marked("lz4=256K+delay=200us")) else {
        return;
    };
    let mut rng = Rng::from_environment();
    thread::scope(|scope| {
        let vcpus: Vec<_> = (0..4)
            .map(|lane| {
                let (machine, mut rng) = (&machine, rng.split());
                scope.spawn(move || {
                    let (vcpu, mut written) = (Vcpu::new(machine), [0; 64]);
                    for _ in 0..4000 {
                        let number = rng.below(64);
                        let (at, word) = (page(number) + 8 * lane, &mut written[number as usize]);
                        if rng.below(2) == 0 {
                            *word = rng.next();
                            vcpu.write(at, *word);
                        } else {
                            assert_eq!(vcpu.read(at), *word);
                        }
                    }
                })
            })
            .collect();
        while !vcpus.iter().all(thread::ScopedJoinHandle::is_finished) {
            let gfns: Vec<_> = (0..rng.below(20)).map(|_| Gfn(rng.below(64))).collect();
            machine.pager.evict(&gfns).unwrap();
            machine.reclaim_mapping(page(rng.below(64)));
        }
    });
    let stats = machine.stats();
    println!("{stats:?}");
    assert!(machine.pager.failure().is_none() && stats.marker_errors == 0);
}

#[test]
fn a_sleeper_is_interrupted_while_the_store_hangs() {
    let Some(machine) = Machine::start(ram(page(4)), marked("raw+delay=60s")) else { return };
    let vcpu = Vcpu::new(&machine);
    vcpu.write(page(1), 7);
    assert_eq!(machine.pager.evict(&[Gfn(1)]).unwrap(), 1);
    assert!(matches!(vcpu.fault(page(1)), Fault::Waits { .. }));
    thread::scope(|scope| {
        let sleeper = Arc::clone(&vcpu.sleeper);
        scope.spawn(move || {
            thread::sleep(Duration::from_millis(30));
            sleeper.interrupt();
        });
        let start = Instant::now();
        assert_eq!(vcpu.sleeper.wait(None), Woken::Interrupted);
        assert!(start.elapsed() < Duration::from_secs(5));
    });
    // It may ask again, as often as it likes; the fetch is the same.
    for _ in 0..3 {
        assert!(matches!(vcpu.fault(page(1)), Fault::Waits { .. }));
    }
    // A device's access is not left half done for an interrupt; the end of all ends it.
    let by = Arc::new(Sleeper::default());
    by.interrupt();
    by.close();
    let error = machine.pager.read_page(Gfn(1), &mut [0; PAGE_SIZE], &by).unwrap_err();
    assert!(matches!(error, PagerError::Interrupted(Gfn(1))), "{error}");
    let start = Instant::now();
    machine.pager.shutdown();
    machine.crew.close();
    assert_eq!(vcpu.sleeper.wait(Some(LONG)), Woken::Page(PageEnd::Ready));
    assert!(start.elapsed() < Duration::from_secs(5));
}

/// What a process that may look into this one reads at an address.
fn peek(address: u64) -> io::Result<u64> {
    let mut word = [0_u8; 8];
    let local = libc::iovec { iov_base: word.as_mut_ptr().cast(), iov_len: 8 };
    let remote = libc::iovec { iov_base: address as *mut libc::c_void, iov_len: 8 };
    // SAFETY: the local buffer is this frame's; the remote one is only read, by the kernel.
    let read = unsafe {
        libc::process_vm_readv(libc::getpid(), &raw const local, 1, &raw const remote, 1, 0)
    };
    if read == 8 { Ok(u64::from_le_bytes(word)) } else { Err(io::Error::last_os_error()) }
}

#[test]
fn a_debugger_reads_the_bytes_or_an_error_and_never_zeros() {
    let Some((machine, _)) = switched() else { return };
    let at = machine.hva(page(5));
    assert_eq!(peek(at).unwrap(), 6);
    assert_eq!(machine.pager.evict(&[Gfn(5)]).unwrap(), 1);
    assert_eq!(peek(at).unwrap_err().raw_os_error(), Some(libc::EFAULT));
    let mut word = [0; 8];
    let memory = std::fs::File::open("/proc/self/mem").unwrap();
    std::os::unix::fs::FileExt::read_exact_at(&memory, &mut word, at).unwrap_err();
    // Where the host took the marker away it waits for the page.
    machine.reclaim_mapping(page(5));
    assert_eq!(peek(at).unwrap(), 6);
}

/// The mappings of guest RAM in the text of /proc/self/maps or smaps, with the lines that follow each.
fn of_guest_ram(text: &str) -> Vec<&str> {
    let is_head = |line: &str| line.split(' ').next().is_some_and(|range| range.contains('-'));
    let mut starts: Vec<_> = text
        .lines()
        .filter(|line| is_head(line))
        .map(|line| line.as_ptr() as usize - text.as_ptr() as usize)
        .collect();
    starts.push(text.len());
    starts
        .windows(2)
        .map(|pair| &text[pair[0]..pair[1]])
        .filter(|part| part.contains("nowait-ram"))
        .collect()
}

#[test]
fn neither_mapping_goes_into_core_dumps_or_child_processes() {
    let Some((machine, _)) = switched() else { return };
    let text = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let mappings = of_guest_ram(&text);
    let here = format!("{:x}-", machine.hva(0));
    assert!(mappings.len() >= 2 && mappings.iter().any(|mapping| mapping.starts_with(&here)));
    for mapping in mappings {
        let flags = mapping.lines().find_map(|line| line.strip_prefix("VmFlags:")).unwrap();
        let has = |flag| flags.split(' ').any(|one| one == flag);
        assert!(has("dd") && has("dc"), "{mapping}");
        // Huge pages would bring in more than was asked for; the flag is there where the kernel has any.
        assert!(has("nh") || !std::path::Path::new("/sys/kernel/mm/transparent_hugepage").exists());
    }
    let at = machine.hva(page(1));
    assert_eq!(peek(at).unwrap(), 2);
    // SAFETY: the child makes system calls only, and ends without running anything of ours.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let gone = peek(at).is_err_and(|error| error.raw_os_error() == Some(libc::EFAULT));
        // SAFETY: ends the child.
        unsafe { libc::_exit(if gone { 0 } else { 1 }) };
    }
    let mut status = -1;
    // SAFETY: waits for the child that was just made.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    assert_eq!(status, 0, "the child has guest RAM");
}

//! The control socket over a real pager, with threads that stand for vCPUs: for tests of what talks to it,
//! where no guest can run.

use std::path::Path;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use guest_memory::{
    Fault, Gfn, GuestRam, Hit, PAGE_BYTES, PAGE_SIZE, Pager, PagerConfig, RamLayout, Sleeper,
    Workers,
};
use nowait_wire::agent::Cause;
use vm_memory::{Bytes, GuestAddress};

use super::{Control, ControlSocket, Facts, House};
use crate::kvm::cpuid::Apf;
use crate::paging::{Crew, FaultSource};
use crate::stalls::{Stall, Stalls};
use crate::threads::BareGate;

/// Guest RAM, in bytes.
pub const MEMORY_BYTES: u64 = 64 << 20;
/// The resident limit at first, in bytes.
pub const LIMIT_BYTES: u64 = 24 << 20;
/// Pages that are not zero at the start.
const LOADED_PAGES: u64 = MEMORY_BYTES / PAGE_BYTES * 3 / 4;
/// Between two faults of a thread.
const PAUSE: Duration = Duration::from_micros(300);

/// A pager at work, and its control socket.
pub struct Bed {
    control: Option<Control>,
    pager: Arc<Pager>,
    crew: Arc<Crew>,
    gate: BareGate,
    sleepers: Vec<Arc<Sleeper>>,
    threads: Vec<JoinHandle<()>>,
}

impl Bed {
    /// Serves at `socket`: so many threads touch pages of RAM, three quarters of which are loaded, and
    /// what leaves goes to `store`.
    ///
    /// # Errors
    /// Why this host cannot: it has no userfaultfd for us, for example.
    pub fn start(socket: &Path, vcpus: u32, store: &str) -> Result<Self, String> {
        let why = |error: &dyn std::fmt::Display| error.to_string();
        let socket = ControlSocket::bind(socket).map_err(|error| why(&error))?;
        let layout = RamLayout::new(MEMORY_BYTES).map_err(|error| why(&error))?;
        let mut ram = GuestRam::new(&layout).map_err(|error| why(&error))?;
        let mut random = Random(1);
        for page in 0..LOADED_PAGES {
            let bytes = random.page();
            let at = GuestAddress(page * PAGE_BYTES);
            ram.loader().write_slice(&bytes, at).map_err(|error| why(&error))?;
        }
        let config = PagerConfig {
            store: store.parse().map_err(|error| why(&error))?,
            resident_limit_bytes: Some(LIMIT_BYTES),
            ..PagerConfig::default()
        };
        let crew = Crew::new().map_err(|error| why(&error))?;
        let workers: Arc<dyn Workers> = Arc::<Crew>::clone(&crew);
        let pager = Arc::new(ram.start(&config, workers).map_err(|error| why(&error))?);
        let sleepers: Vec<_> = (0..vcpus).map(|_| Arc::<Sleeper>::default()).collect();
        let (gate, pauser) = BareGate::new(&sleepers).map_err(|error| why(&error))?;
        let stalls = Arc::new(Stalls::new(vcpus, true, None));
        let facts = Facts {
            apf: Apf::Off,
            fault_source: FaultSource::Marker,
            cpus: vcpus,
            started: Instant::now(),
        };
        let threads = sleepers.iter().zip(0..).map(|(sleeper, vcpu)| {
            let thread = Thread {
                pager: Arc::clone(&pager),
                gate: gate.clone(),
                sleeper: Arc::clone(sleeper),
                stall: stalls.of(vcpu),
                lane: vcpu as u16 + 1,
                random: Random(u64::from(vcpu) + 7),
            };
            thread::spawn(move || thread.run())
        });
        let threads = threads.collect();
        let house = House::new(&pager, &crew, &pauser, &Arc::from([]), &stalls, facts);
        let control = Control::start(socket, house).map_err(|error| why(&error))?;
        Ok(Self { control: Some(control), pager, crew, gate, sleepers, threads })
    }

    /// The pager.
    #[must_use]
    pub fn pager(&self) -> &Pager {
        &self.pager
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        drop(self.control.take());
        self.gate.stop();
        self.sleepers.iter().for_each(|sleeper| sleeper.close());
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
        self.pager.shutdown();
        self.crew.close();
    }
}

/// What stands for a vCPU.
struct Thread {
    pager: Arc<Pager>,
    gate: BareGate,
    sleeper: Arc<Sleeper>,
    stall: Stall,
    lane: u16,
    random: Random,
}

impl Thread {
    fn run(mut self) {
        while self.gate.pass() {
            let page = self.random.below(MEMORY_BYTES / PAGE_BYTES);
            self.stall.begin();
            let waiter = self.sleeper.begin();
            let cause = match self.pager.fault(Gfn(page), self.lane, &waiter) {
                Ok(Fault::Hit(Hit::Zero)) => Some(Cause::Zero),
                Ok(Fault::Hit(Hit::Resident)) => Some(Cause::Resident),
                Ok(Fault::Hit(Hit::AtHand)) => Some(Cause::AtHand),
                Ok(Fault::Waits { .. }) => {
                    let _ = self.sleeper.wait(None);
                    self.pager.leave(Gfn(page), &waiter);
                    Some(Cause::Waited)
                }
                Ok(Fault::Present) => None,
                Ok(Fault::Lost) | Err(_) => return,
            };
            self.stall.end(cause.map(|cause| (cause, 0)));
            thread::sleep(PAUSE);
        }
    }
}

/// Knuth's linear congruential generator.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 24
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    /// Noise, or something that compresses.
    fn page(&mut self) -> [u8; PAGE_SIZE] {
        let noise = self.below(3) > 0;
        std::array::from_fn(|byte| if noise { self.next() as u8 } else { (byte / 64) as u8 })
    }
}

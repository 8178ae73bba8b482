//! The async page fault protocol of one vCPU, joined to its guest's memory, KVM and the pager.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use async_pf::protocol::{
    AREA_BYTES, Area, AsyncPf, Begun, Completed, Decision, En, GeneralProtection, GuestState,
    Interrupt, MAX_VCPU, Machine, Msr, Page, ProtocolStats, Taken, Token,
};
use guest_memory::{Gfn, Gpa, PageEnd, Pager, PagerError, Pinned, Sleeper, Waiter, Wake};
use kvm_bindings::kvm_msi;
use kvm_ioctls::VmFd;
use vm_memory::{Bytes, GuestAddress};

use super::threshold::InUse;
use crate::kvm::kick::Kicker;
use crate::trace::{Notification, Tracer};

// A vCPU's number fits a token.
const _: () = assert!(crate::spec::MAX_CPUS <= MAX_VCPU as i64);

/// The guest's area, pinned.
struct PinnedArea {
    pinned: Pinned,
    base: GuestAddress,
}

const FLAGS: u64 = 0;
const TOKEN: u64 = 4;

impl PinnedArea {
    fn load(&self, at: u64) -> u32 {
        // The area lies in the pinned page: it is aligned to its size.
        self.pinned.load(GuestAddress(self.base.0 + at), Ordering::Acquire).unwrap_or(u32::MAX)
    }

    fn store(&self, at: u64, value: u32) {
        let _ = self.pinned.store(value, GuestAddress(self.base.0 + at), Ordering::Release);
    }
}

impl Area for PinnedArea {
    fn flags(&self) -> u32 {
        self.load(FLAGS)
    }

    fn set_flags(&mut self, flags: u32) {
        self.store(FLAGS, flags);
    }

    fn token(&self) -> u32 {
        self.load(TOKEN)
    }

    fn set_token(&mut self, token: u32) {
        self.store(TOKEN, token);
    }
}

/// Interrupts for one local APIC.
struct Msi {
    vm: Arc<VmFd>,
    apic: u32,
}

/// Where MSIs go (SDM 3A, 11.11.1): fixed delivery, physical destination.
const MSI_BASE: u32 = 0xfee0_0000;
const MSI_DESTINATION_SHIFT: u32 = 12;

impl Interrupt for Msi {
    fn raise(&mut self, vector: u8) -> Taken {
        let msi = kvm_msi {
            address_lo: MSI_BASE | self.apic << MSI_DESTINATION_SHIFT,
            data: vector.into(),
            ..Default::default()
        };
        // 0: no APIC that is enabled. An error leaves page-ready due, and is tried again likewise.
        match self.vm.signal_msi(msi) {
            Ok(taken) if taken > 0 => Taken::Yes,
            Ok(_) | Err(_) => Taken::No,
        }
    }
}

/// When to tell the guest of a page that is on its way.
#[derive(Clone)]
pub(crate) struct Policy {
    /// For the interrupts.
    pub(crate) vm: Arc<VmFd>,
    /// A page that is expected sooner is waited for.
    pub(crate) threshold: Arc<InUse>,
    /// Who hears of notifications.
    pub(crate) tracer: Option<Arc<Tracer>>,
}

/// What the parts of telling a guest cost this process.
#[derive(Debug, Default)]
struct Clocks {
    decision: Clock,
    injection: Clock,
    ready: Clock,
    ack: Clock,
    ahead: Clock,
}

/// The time that something took, added up.
#[derive(Debug, Default)]
struct Clock {
    count: AtomicU64,
    total_ns: AtomicU64,
}

impl Clock {
    fn time<T>(&self, what: impl FnOnce() -> T) -> T {
        let began = Instant::now();
        let value = what();
        let took = u64::try_from(began.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.count.fetch_add(1, Ordering::Relaxed);
        self.total_ns.fetch_add(took, Ordering::Relaxed);
        value
    }

    fn add_to(&self, cost: &mut Cost) {
        cost.count += self.count.load(Ordering::Relaxed);
        cost.total_ns += self.total_ns.load(Ordering::Relaxed);
    }
}

/// The protocol of one vCPU. Completions come by [`Wake`].
pub(crate) struct Notifier {
    protocol: AsyncPf<PinnedArea, Msi>,
    threshold: Arc<InUse>,
    clocks: Clocks,
    kicker: Kicker,
    sleeper: Arc<Sleeper>,
    vcpu: u32,
    tracer: Option<Arc<Tracer>>,
}

/// How a fault on a page that is not at hand goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub(crate) enum Next {
    /// Enter the guest.
    Enter,
    /// Inject a page fault with this address.
    Notify(u64),
    /// Halt the vCPU artificially.
    Halt,
    /// Wait on the sleeper, then enter.
    Wait,
}

impl Notifier {
    /// Of a vCPU after reset.
    pub(crate) fn new(vcpu: u32, policy: &Policy, kicker: Kicker, sleeper: Arc<Sleeper>) -> Self {
        // Checked above.
        let machine = Machine::new(u8::try_from(vcpu).unwrap_or(MAX_VCPU));
        let msi = Msi { vm: Arc::clone(&policy.vm), apic: vcpu };
        let protocol = AsyncPf::new(machine, None, msi);
        let (threshold, tracer) = (Arc::clone(&policy.threshold), policy.tracer.clone());
        Self { protocol, threshold, clocks: Clocks::default(), kicker, sleeper, vcpu, tracer }
    }

    /// The vCPU meets a page: is it outstanding already?
    pub(crate) fn begin(&self, gfn: Gfn) -> Begun {
        self.protocol.begin(Page(gfn.0))
    }

    /// Who is told when the page comes that has this token.
    pub(crate) fn waiter(self: &Arc<Self>, token: Token) -> Waiter {
        Waiter { wake: Arc::<Self>::clone(self), token: token.raw().into() }
    }

    /// The page was at hand.
    pub(crate) fn cancel(&self, token: Token) {
        self.protocol.cancel(token);
    }

    /// The page is on its way, expected in so long.
    pub(crate) fn on_its_way(&self, token: Token, expected: Duration, guest: GuestState) -> Next {
        let threshold = self.threshold.get();
        if expected < threshold {
            // It costs less than to tell the guest; and if it takes longer, no more than twice as much.
            if self.protocol.wait_first(token) == Decision::Wait {
                let _ = self.sleeper.wait(Some(threshold));
            }
            self.protocol.awake();
        }
        let decision = self.clocks.decision.time(|| self.protocol.decide(token, guest));
        if let Decision::Notify { .. } = decision {
            self.trace(Notification::NotPresent, token.raw().into());
        }
        next(decision)
    }

    /// The page has no new token, see [`Begun`].
    pub(crate) fn again(&self, begun: Begun, gfn: Gfn, guest: GuestState) -> Next {
        next(self.protocol.decide_again(begun, Page(gfn.0), guest))
    }

    /// Injects a page fault, by `inject`.
    pub(crate) fn time_injection(&self, inject: impl FnOnce()) {
        self.clocks.injection.time(inject);
    }

    /// Does the next [`Notifier::awake`] try again what could not be sent?
    pub(crate) fn sends_next(&self) -> bool {
        self.protocol.sends_next()
    }

    /// The vCPU's thread is back from the guest, or from its sleep.
    pub(crate) fn awake(&self) {
        self.protocol.awake();
    }

    /// Is the protocol on?
    pub(crate) fn is_on(&self) -> bool {
        En::new(self.protocol.registers().0).is_ok_and(|en| en.area().is_some())
    }

    /// The vCPU got INIT.
    pub(crate) fn reset(&self) {
        self.protocol.reset();
    }

    /// The guest writes ACK. Returns the page that it will touch next, if one is known.
    pub(crate) fn acknowledge(&self, value: u64) -> Option<Gfn> {
        self.trace(Notification::Ack, 0);
        let page = self.clocks.ack.time(|| self.protocol.write_ack(value));
        page.map(|Page(gfn)| Gfn(gfn))
    }

    /// Calls what is to have KVM map a page ahead of the guest.
    pub(crate) fn time_ahead<T>(&self, call: impl FnOnce() -> T) -> T {
        self.clocks.ahead.time(call)
    }

    /// The guest writes INT.
    ///
    /// # Errors
    /// For the guest.
    pub(crate) fn set_int(&self, value: u64) -> Result<(), GeneralProtection> {
        self.protocol.set_int(value)
    }

    /// The guest writes EN.
    ///
    /// # Errors
    /// The outer one when the area's page does not come; the inner one for the guest.
    pub(crate) fn set_en(
        &self,
        value: u64,
        pager: &Pager,
    ) -> Result<Result<(), GeneralProtection>, PagerError> {
        let en = match En::new(value) {
            Ok(en) => en,
            Err(refused) => return Ok(Err(refused)),
        };
        let area = match en.area() {
            None => None,
            Some(gpa) => match pager.pin(&[(Gpa(gpa), AREA_BYTES)], &self.sleeper) {
                Ok(pinned) => Some(PinnedArea { pinned, base: GuestAddress(gpa) }),
                Err(PagerError::OutOfRange(_)) => return Ok(Err(GeneralProtection)),
                Err(error) => return Err(error),
            },
        };
        self.protocol.set_en(en, area);
        Ok(Ok(()))
    }

    /// What the guest reads from one of them.
    pub(crate) fn read(&self, msr: Msr) -> u64 {
        let (en, int) = self.protocol.registers();
        match msr {
            Msr::En => en,
            Msr::Int => int,
            Msr::Ack => 0,
        }
    }

    fn trace(&self, what: Notification, token: u64) {
        if let Some(tracer) = &self.tracer {
            tracer.notification(self.vcpu, what, token);
        }
    }

    /// What it did.
    pub(crate) fn stats(&self) -> ProtocolStats {
        self.protocol.stats()
    }

    /// The threshold of all vCPUs.
    pub(crate) fn threshold(&self) -> &Arc<InUse> {
        &self.threshold
    }

    /// How many pages are outstanding or unacknowledged.
    pub(crate) fn outstanding(&self) -> usize {
        self.protocol.outstanding()
    }
}

impl Wake for Notifier {
    fn wake(&self, token: u64, _end: PageEnd) {
        // Tokens have 32 bits; one that is lost is met again, and ends the run.
        let Ok(token) = u32::try_from(token) else { return };
        self.trace(Notification::Ready, token.into());
        match self.clocks.ready.time(|| self.protocol.complete(Token::from_raw(token))) {
            Completed::Nothing => {}
            Completed::EndHalt => self.kicker.kick(),
            Completed::EndWait => self.sleeper.interrupt(),
        }
    }
}

/// What the parts of telling a guest cost.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct Costs {
    /// The verdict on a page that is on its way, under the protocol's lock.
    pub decision: Cost,
    /// The injection of page-not-present, until the guest is entered.
    pub injection: Cost,
    /// A page that has come: its bookkeeping and, if its turn has come, token and interrupt.
    pub ready: Cost,
    /// ACK, with the next page-ready if there is one.
    pub ack: Cost,
    /// Having KVM map a page that has come, before the guest meets it.
    pub ahead: Cost,
}

/// How often something was done, and how long it took in all.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct Cost {
    /// How often.
    pub count: u64,
    /// In all, in nanoseconds.
    pub total_ns: u64,
}

/// What all vCPUs' protocols did.
#[derive(Clone, Debug, serde::Serialize)]
pub struct AsyncPfStats {
    /// A page that is expected sooner than this is waited for, in microseconds.
    pub threshold_us: u64,
    /// What one exit to this process takes and back, in nanoseconds; 0 if it was not measured.
    pub exit_ns: u64,
    /// What telling the guest costs this process, by part.
    pub costs: Costs,
    /// Pages that are outstanding or unacknowledged.
    pub outstanding: usize,
    /// Added up.
    #[serde(flatten)]
    pub protocol: ProtocolStats,
}

impl AsyncPfStats {
    /// Of a guest's vCPUs; `None` when it has no protocol of ours.
    pub(crate) fn of(notifiers: &[Arc<Notifier>]) -> Option<Self> {
        let threshold = notifiers.first()?.threshold();
        let whole = |count: u128| u64::try_from(count).unwrap_or(u64::MAX);
        let mut sum = Self {
            threshold_us: whole(threshold.get().as_micros()),
            exit_ns: whole(threshold.exit().unwrap_or_default().as_nanos()),
            costs: Costs::default(),
            outstanding: 0,
            protocol: ProtocolStats::default(),
        };
        for notifier in notifiers {
            sum.outstanding += notifier.outstanding();
            sum.protocol.add(&notifier.stats());
            let (clocks, costs) = (&notifier.clocks, &mut sum.costs);
            clocks.decision.add_to(&mut costs.decision);
            clocks.injection.add_to(&mut costs.injection);
            clocks.ready.add_to(&mut costs.ready);
            clocks.ack.add_to(&mut costs.ack);
            clocks.ahead.add_to(&mut costs.ahead);
        }
        Some(sum)
    }
}

fn next(decision: Decision) -> Next {
    match decision {
        Decision::Arrived => Next::Enter,
        Decision::Notify { cr2 } => Next::Notify(cr2),
        Decision::Halt => Next::Halt,
        Decision::Wait => Next::Wait,
    }
}

//! What is asked and answered when a vCPU meets a page that is on its way.

/// What the guest was doing at the fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestState {
    /// Its privilege level, 0 to 3 (on SVM and VMX alike the DPL of SS).
    pub cpl: u8,
    /// RFLAGS.IF.
    pub interrupts: bool,
    /// In the shadow of STI or MOV SS.
    pub shadow: bool,
    /// An exception, NMI or interrupt is pending or being injected.
    pub event: bool,
    /// CR0.PG: without paging there are no page faults.
    pub paging: bool,
}

impl GuestState {
    /// Which counters it belongs to.
    #[must_use]
    pub fn mode(self) -> Mode {
        if self.cpl == 0 { Mode::Kernel } else { Mode::User }
    }

    /// Would an interrupt be taken at once?
    #[must_use]
    pub fn interruptible(self) -> bool {
        self.interrupts && !self.shadow && !self.event
    }
}

/// Which part of the guest met the page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Privilege levels 1 to 3.
    User,
    /// Privilege level 0.
    Kernel,
}

impl Mode {
    /// How many there are.
    pub const COUNT: usize = 2;
    /// All, in the order of the counters.
    pub const ALL: [(Self, &'static str); Self::COUNT] =
        [(Self::User, "user"), (Self::Kernel, "kernel")];
}

/// Why page-not-present may not be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The guest has not turned the protocol on for this vCPU, or not said which vector.
    Off,
    /// Guest kernel mode, and the guest did not ask for "send always".
    KernelMode,
    /// RFLAGS.IF is clear, or an interrupt shadow.
    Uninterruptible,
    /// Another event comes first.
    Event,
    /// No paging.
    NoPaging,
    /// The guest has not yet read the flags of the page-not-present before.
    FlagsBusy,
    /// This page is outstanding for this vCPU already.
    Repeated,
    /// [`super::MAX_OUTSTANDING`] pages are.
    TooMany,
}

impl Refusal {
    /// How many there are.
    pub const COUNT: usize = 8;
    /// All, in the order of the counters.
    pub const ALL: [(Self, &'static str); Self::COUNT] = [
        (Self::Off, "off"),
        (Self::KernelMode, "kernel_mode"),
        (Self::Uninterruptible, "uninterruptible"),
        (Self::Event, "event"),
        (Self::NoPaging, "no_paging"),
        (Self::FlagsBusy, "flags_busy"),
        (Self::Repeated, "repeated"),
        (Self::TooMany, "too_many"),
    ];
}

/// How the vCPU gets over the page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Decision {
    /// The page has come: enter the guest.
    Arrived,
    /// The flags word says so already: inject #PF with error code 0 and this in CR2.
    Notify {
        /// CR2.
        cr2: u64,
    },
    /// Halt the vCPU artificially: interrupts still run.
    Halt,
    /// Wait outside of the guest.
    Wait,
}

/// What a fault is to this vCPU, before anything is known of the page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Begun {
    /// Ask for the page under this name.
    New(super::Token),
    /// It is outstanding already: ask nobody.
    Outstanding,
    /// Too many are: the page has no name.
    TooMany,
}

/// What is to be done when a page has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Completed {
    /// Nothing, or page-ready is sent.
    Nothing,
    /// The vCPU was halted artificially for this page, and not seen since: have it leave KVM_RUN.
    EndHalt,
    /// The vCPU's thread waits for this page: wake it.
    EndWait,
}

/// A page-ready that is to be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ready {
    /// For the token word: a token's, or [`super::WAKE_ALL`].
    pub token: u32,
    /// The interrupt.
    pub vector: u8,
}

//! userfaultfd with nothing around it: what a page fault costs at least, and what it costs in a handler as
//! other VMMs have it.
// Unsafe: ZEROPAGE and COPY write to memory.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use guest_memory::{PAGE_BYTES, PAGE_SIZE, PageBytes};
use userfaultfd::{Event, EventBuffer, FeatureFlags, RegisterMode, Uffd, UffdBuilder};

use crate::memory::{Mapping, Pages, memory_file};

/// From `linux/userfaultfd.h`.
const MINOR_SHMEM: FeatureFlags = FeatureFlags::from_bits_retain(1 << 10);
/// Messages read at once, as the pager does.
const MESSAGES: usize = 64;
/// How long the bare loop spins for a message, as the pager does.
const SPIN: Duration = Duration::from_micros(50);
/// How often a sleeping handler looks whether it is to end.
const LOOK_MS: libc::c_int = 20;

/// What a handler does for a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// The page is new: zeros.
    Zero,
    /// The page is in the memory file, and not mapped: maps it.
    Map,
    /// The page's bytes are elsewhere in memory: writes them to the memory file, and maps it.
    Fill,
    /// The same for anonymous memory: COPY.
    Copy,
}

/// How a handler waits for messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Waiting {
    /// Spins for a while before it sleeps, and reads many messages at once.
    Spins,
    /// Sleeps in poll(2), and reads one message.
    Sleeps,
}

/// A mapping under userfaultfd, and how its faults are answered.
pub(crate) struct Bare {
    // Dropped first: whoever still waits is woken.
    uffd: Uffd,
    mapping: Mapping,
    file: Option<File>,
    answer: Answer,
    source: PageBytes,
    stop: AtomicBool,
}

impl Bare {
    /// A mapping of so many pages, none of them mapped.
    pub(crate) fn new(pages: u32, answer: Answer) -> Result<Self> {
        let source = [0x5a; PAGE_SIZE];
        let (mapping, file) = if answer == Answer::Copy {
            (Mapping::anonymous(pages).context("anonymous memory")?, None)
        } else {
            let file = memory_file(pages).context("a memory file")?;
            (Mapping::shared(&file, pages).context("the memory file's mapping")?, Some(file))
        };
        if answer == Answer::Map {
            // As idle pages are: they had been mapped.
            (0..pages).for_each(|page| mapping.pages().fill(page, &source));
            mapping.unmap().context("unmapping")?;
        }
        let uffd = UffdBuilder::new()
            .close_on_exec(true)
            .non_blocking(true)
            .user_mode_only(false)
            .require_features(FeatureFlags::MISSING_SHMEM | MINOR_SHMEM)
            .create()
            .context("userfaultfd")?;
        let mode = match answer {
            Answer::Copy => RegisterMode::MISSING,
            _ => RegisterMode::MISSING | RegisterMode::MINOR,
        };
        uffd.register_with_mode(mapping.at(0), mapping.len(), mode).context("registering")?;
        Ok(Self { uffd, mapping, file, answer, source, stop: AtomicBool::new(false) })
    }

    /// The pages.
    pub(crate) fn pages(&self) -> Pages<'_> {
        self.mapping.pages()
    }

    /// Ends [`Bare::serve`].
    pub(crate) fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// Answers faults until [`Bare::stop`]; `delay` says how long the page's bytes take to come.
    pub(crate) fn serve(&self, waiting: Waiting, delay: impl Fn(u32) -> Duration) -> Result<()> {
        let messages = if waiting == Waiting::Spins { MESSAGES } else { 1 };
        let spin = if waiting == Waiting::Spins { SPIN } else { Duration::ZERO };
        let mut buffer = EventBuffer::new(messages);
        while !self.stop.load(Ordering::Relaxed) {
            if waiting == Waiting::Sleeps {
                self.sleep()?;
            }
            let began = Instant::now();
            while !self.answer_batch(&mut buffer, &delay)? {
                if began.elapsed() >= spin {
                    self.sleep()?;
                    break;
                }
                std::hint::spin_loop();
            }
        }
        Ok(())
    }

    /// False if there was no message.
    fn answer_batch(
        &self,
        buffer: &mut EventBuffer,
        delay: impl Fn(u32) -> Duration,
    ) -> Result<bool> {
        let mut any = false;
        for event in self.uffd.read_events(buffer)? {
            let Event::Pagefault { addr, .. } = event? else { bail!("an event that is no fault") };
            let page = self.mapping.page_at(addr);
            let delay = delay(page);
            if !delay.is_zero() {
                std::thread::sleep(delay);
            }
            self.answer(page)?;
            any = true;
        }
        Ok(any)
    }

    fn answer(&self, page: u32) -> Result<()> {
        let at = self.mapping.at(page);
        match (self.answer, &self.file) {
            // SAFETY: the page lies in our mapping, of whose bytes there are atomic references only.
            (Answer::Zero, _) => unsafe { self.uffd.zeropage(at, PAGE_SIZE, true).map(drop)? },
            (Answer::Fill, Some(file)) => {
                file.write_all_at(&self.source, u64::from(page) * PAGE_BYTES)?;
                self.uffd.r#continue(at, PAGE_SIZE, true)?;
            }
            (Answer::Copy, _) => {
                let source = self.source.as_ptr().cast();
                // SAFETY: as above; the source is a whole page.
                unsafe { self.uffd.copy(source, at, PAGE_SIZE, true)? };
            }
            (Answer::Map | Answer::Fill, _) => {
                self.uffd.r#continue(at, PAGE_SIZE, true)?;
            }
        }
        Ok(())
    }

    fn sleep(&self) -> Result<()> {
        let fd = self.uffd.as_raw_fd();
        let mut polled = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        // SAFETY: `polled` is one pollfd of this frame.
        let result = unsafe { libc::poll(&mut polled, 1, LOOK_MS) };
        if result < 0 {
            return Err(io::Error::last_os_error()).context("poll");
        }
        Ok(())
    }
}

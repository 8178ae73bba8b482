//! How large a pool may get, and how its workers are shared out.

use std::time::Duration;

use super::Class;

/// Workers at most, if not said otherwise. They wait, they do not compute: many more than CPUs.
pub const WORKERS_MAX: usize = 64;
/// Media, if not said otherwise.
pub const MEDIA: u8 = 4;
/// Workers kept for each medium if there are enough, and if not said otherwise.
pub const MEDIUM_WORKERS_MIN: usize = 4;
/// Fewer workers cannot be kept for a medium: one for faults, one for the rest.
const MEDIUM_WORKERS_LEAST: usize = 2;
/// Faults that may wait: every page that a guest can have outstanding, with room (64 per vCPU).
pub const FAULT_QUEUE_MAX: usize = 16_384;
/// Prefetches that may wait: older ones than these are of no use.
pub const PREFETCH_QUEUE_MAX: usize = 4096;
/// Write-backs that may wait: each holds a page that should be gone.
pub const WRITE_BACK_QUEUE_MAX: usize = 4096;
/// How long a worker stays without work.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(10);
/// A worker's stack, bytes. Batches of pages do not fit: they belong on the heap.
pub const WORKER_STACK_BYTES: usize = 128 << 10;

/// A pool's bounds.
///
/// ```text
///   workers_max             64  +-----------------------------------------------------+
///   medium_workers_max      48  | one medium, however dead          | others only     |
///   prefetch_workers_max    16  | at most   |                       |                 |
///   write_back_workers_max   8  | at most |                         |                 |
///   medium_workers_min       4  | kept |  for each medium, half of them for faults only
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolConfig {
    /// Threads are named after the pool: `name`, a dash, a number. 15 bytes of it are seen.
    pub name: String,
    /// Workers at most.
    pub workers_max: usize,
    /// Media that jobs may name: 0 up to this.
    pub media: u8,
    /// Workers that one medium may occupy at most.
    pub medium_workers_max: usize,
    /// Workers that each medium can have at any time, whatever the other media do: 2 or more. Half
    /// of them, rounded down, are for faults only.
    pub medium_workers_min: usize,
    /// Workers that one medium's prefetches may occupy at most.
    pub prefetch_workers_max: usize,
    /// Workers that one medium's write-backs may occupy at most.
    pub write_back_workers_max: usize,
    /// Jobs that may wait, by class; those of [`submit_after`](super::Pool::submit_after) count.
    pub queue_max: [usize; Class::COUNT],
    /// How long a worker stays without work.
    pub idle_timeout: Duration,
    /// A worker's stack, bytes.
    pub stack_bytes: usize,
}

impl Default for PoolConfig {
    fn default() -> Self {
        Self::sized(WORKERS_MAX, MEDIA)
    }
}

/// What cannot be meant.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// No medium.
    #[error("a worker pool for no medium: give it 1 or more")]
    NoMedium,
    /// Zero somewhere.
    #[error("{0} is 0: nothing would ever run; use 1 or more")]
    Zero(&'static str),
    /// The media's own workers are more than there are.
    #[error("{media} media with {min} worker(s) kept for each, but only {workers_max} worker(s)")]
    TooFewWorkers {
        /// Media.
        media: u8,
        /// Workers kept for each.
        min: usize,
        /// Workers in all.
        workers_max: usize,
    },
    /// A medium's least is more than its most, or too little.
    #[error(
        "{min} worker(s) are kept for a medium that may have {max}: use {MEDIUM_WORKERS_LEAST} or \
         more, and not more than it may have"
    )]
    MediumBounds {
        /// Workers kept for it.
        min: usize,
        /// Workers it may have.
        max: usize,
    },
    /// Faults could find no worker.
    #[error(
        "{prefetch} worker(s) for prefetch and {write_back} for write-back leave none of a \
         medium's {medium} for faults"
    )]
    NoneForFaults {
        /// Workers that prefetches may occupy.
        prefetch: usize,
        /// Workers that write-backs may occupy.
        write_back: usize,
        /// Workers that a medium may occupy.
        medium: usize,
    },
}

impl PoolConfig {
    /// A pool of that many workers for that many media, shared out as the default one is.
    #[must_use]
    pub fn sized(workers_max: usize, media: u8) -> Self {
        let others = usize::from(media.saturating_sub(1));
        let min = workers_max / 2 / (others + 1);
        let min = min.clamp(MEDIUM_WORKERS_LEAST, MEDIUM_WORKERS_MIN);
        // What the other media keep cannot be had; a fourth stays for them in any case.
        let medium = if others == 0 {
            workers_max
        } else {
            workers_max.saturating_sub((others * min).max(workers_max / 4)).max(min)
        };
        Self {
            name: "worker".to_owned(),
            workers_max,
            media,
            medium_workers_max: medium,
            medium_workers_min: min,
            prefetch_workers_max: (medium / 3).max(1),
            write_back_workers_max: (medium / 6).max(1),
            queue_max: [FAULT_QUEUE_MAX, PREFETCH_QUEUE_MAX, WRITE_BACK_QUEUE_MAX],
            idle_timeout: IDLE_TIMEOUT,
            stack_bytes: WORKER_STACK_BYTES,
        }
    }

    /// Refuses bounds with which some job would never run, or could keep all others from running.
    pub fn check(&self) -> Result<(), ConfigError> {
        if self.media == 0 {
            return Err(ConfigError::NoMedium);
        }
        let counts = [
            ("workers_max", self.workers_max),
            ("prefetch_workers_max", self.prefetch_workers_max),
            ("write_back_workers_max", self.write_back_workers_max),
            ("queue_max", self.queue_max.into_iter().min().unwrap_or(0)),
        ];
        if let Some((name, _)) = counts.into_iter().find(|(_, count)| *count == 0) {
            return Err(ConfigError::Zero(name));
        }
        let (media, min, max) = (self.media, self.medium_workers_min, self.medium_workers_max);
        if usize::from(media).saturating_mul(min) > self.workers_max {
            let workers_max = self.workers_max;
            return Err(ConfigError::TooFewWorkers { media, min, workers_max });
        }
        if max < min || min < MEDIUM_WORKERS_LEAST {
            return Err(ConfigError::MediumBounds { min, max });
        }
        let (prefetch, write_back) = (self.prefetch_workers_max, self.write_back_workers_max);
        if prefetch.saturating_add(write_back) >= max.min(self.workers_max) {
            return Err(ConfigError::NoneForFaults { prefetch, write_back, medium: max });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_is_what_the_picture_says() {
        let config = PoolConfig::default();
        assert_eq!(config.check(), Ok(()));
        assert_eq!((config.medium_workers_max, config.medium_workers_min), (48, 4));
        assert_eq!((config.prefetch_workers_max, config.write_back_workers_max), (16, 8));
    }

    #[test]
    fn small_pools_are_good_or_refused() {
        for media in 1..=8_u8 {
            for workers in 0..=80 {
                let config = PoolConfig::sized(workers, media);
                let enough = workers > 2 * usize::from(media);
                assert_eq!(config.check().is_ok(), enough, "{config:?}: {:?}", config.check());
            }
        }
        assert_eq!(PoolConfig::sized(8, 0).check(), Err(ConfigError::NoMedium));
    }
}

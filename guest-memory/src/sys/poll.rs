//! Waiting for several descriptors, with a timeout finer than a millisecond.
// Unsafe: ppoll(2). Store delays are given in microseconds, which poll(2) and epoll cannot wait for.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::AsRawFd;
use std::ptr;
use std::time::Duration;

/// Waits until some descriptor can be read, `timeout` is over (`None`: never), or a signal came, and
/// says which can be read. `None` in the place of a descriptor: it is not waited for.
pub(crate) fn wait_readable<const N: usize>(
    descriptors: [Option<&dyn AsRawFd>; N],
    timeout: Option<Duration>,
) -> io::Result<[bool; N]> {
    let mut polled = descriptors.map(|descriptor| libc::pollfd {
        // ppoll skips negative descriptors.
        fd: descriptor.map_or(-1, AsRawFd::as_raw_fd),
        events: libc::POLLIN,
        revents: 0,
    });
    let timeout = timeout.map(|timeout| libc::timespec {
        tv_sec: timeout.as_secs().try_into().unwrap_or(libc::time_t::MAX),
        tv_nsec: timeout.subsec_nanos().into(),
    });
    let timeout = timeout.as_ref().map_or(ptr::null(), ptr::from_ref);
    // SAFETY: both pointers are to values of this frame, N is the number of `polled`, and no signal
    // mask is given.
    let result =
        unsafe { libc::ppoll(polled.as_mut_ptr(), N as libc::nfds_t, timeout, ptr::null()) };
    if result < 0 {
        let error = io::Error::last_os_error();
        return match error.kind() {
            io::ErrorKind::Interrupted => Ok([false; N]),
            _ => Err(error),
        };
    }
    // Errors and hang-ups count as readable: the read tells what it is.
    Ok(polled.map(|polled| polled.revents != 0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    #[test]
    fn only_what_can_be_read_is_told() {
        let (reader, mut writer) = io::pipe().unwrap();
        let (silent, _kept) = io::pipe().unwrap();
        io::Write::write_all(&mut writer, b"x").unwrap();
        let fds: [Option<&dyn AsRawFd>; 3] = [Some(&silent), Some(&reader), None];
        assert_eq!(wait_readable(fds, None).unwrap(), [false, true, false]);
    }

    #[test]
    fn the_timeout_ends_the_wait() {
        let start = Instant::now();
        let timeout = Duration::from_millis(5);
        assert_eq!(wait_readable([None], Some(timeout)).unwrap(), [false]);
        assert!(start.elapsed() >= timeout);
    }
}

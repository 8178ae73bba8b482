//! Memory files: creation, holes and data.
// Unsafe: memfd_create is in no crate that we use.
#![allow(unsafe_code)]

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::FromRawFd;

use vmm_sys_util::fallocate::{FallocateMode, fallocate};
use vmm_sys_util::seek_hole::SeekHole;

/// A memory file of `len` bytes, all of it a hole, closed on exec.
pub(crate) fn create(name: &CStr, len: u64) -> io::Result<File> {
    // Linux before 6.3 does not know the seal against execution, and does without.
    let fd = match memfd(name, libc::MFD_CLOEXEC | libc::MFD_NOEXEC_SEAL) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => memfd(name, libc::MFD_CLOEXEC)?,
        other => other?,
    };
    fd.set_len(len)?;
    Ok(fd)
}

fn memfd(name: &CStr, flags: libc::c_uint) -> io::Result<File> {
    // SAFETY: the name is a C string that outlives the call; the call touches no other memory.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and nobody else has it.
    Ok(unsafe { File::from_raw_fd(fd) })
}

/// Makes a range a hole: its memory is given back, and it reads as zeros.
pub(crate) fn punch(file: &File, offset: u64, len: u64) -> io::Result<()> {
    fallocate(file, FallocateMode::PunchHole, true, offset, len).map_err(io::Error::from)
}

/// The next range at or after `offset` that is no hole, as offset and length; the end of the file
/// counts as a hole.
pub(crate) fn next_data(file: &mut File, offset: u64) -> io::Result<Option<(u64, u64)>> {
    let Some(start) = file.seek_data(offset)? else {
        return Ok(None);
    };
    let end = match file.seek_hole(start)? {
        Some(end) => end,
        None => file.metadata()?.len(),
    };
    Ok(Some((start, end - start)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn data_lies_where_it_was_written_and_not_where_it_was_punched() {
        let mut file = create(c"test", 16 << 12).unwrap();
        assert_eq!(next_data(&mut file, 0).unwrap(), None);
        file.write_all_at(&[1; 3 << 12], 4 << 12).unwrap();
        file.write_all_at(&[1], (16 << 12) - 1).unwrap();
        assert_eq!(next_data(&mut file, 0).unwrap(), Some((4 << 12, 3 << 12)));
        assert_eq!(next_data(&mut file, 7 << 12).unwrap(), Some((15 << 12, 1 << 12)));
        punch(&file, 5 << 12, 1 << 12).unwrap();
        assert_eq!(next_data(&mut file, 0).unwrap(), Some((4 << 12, 1 << 12)));
        assert_eq!(next_data(&mut file, 5 << 12).unwrap(), Some((6 << 12, 1 << 12)));
    }
}

//! Descriptors that a process was started with.
#![allow(unsafe_code)]

use std::{io, os::fd::RawFd};

/// Let no program that is started from here inherit the descriptor `first` or a later one.
///
/// # Errors
/// The system's: `EINVAL` before Linux 5.11.
pub fn close_on_exec_from(first: RawFd) -> io::Result<()> {
    let first = libc::c_uint::try_from(first).map_err(|_| io::ErrorKind::InvalidInput)?;
    let last = libc::c_uint::MAX;
    // The constant is an int in the kernel's header, as the argument is.
    let flags = libc::CLOSE_RANGE_CLOEXEC.cast_signed();
    // SAFETY: with this flag it closes nothing and touches no memory: every descriptor stays what
    // its owner takes it for, until the process becomes another program.
    match unsafe { libc::close_range(first, last, flags) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

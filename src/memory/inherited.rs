//! Descriptors that a process was started with.
#![allow(unsafe_code)]

use std::{
    io,
    os::fd::{FromRawFd as _, OwnedFd, RawFd},
};

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

/// A descriptor of our own for what this process was started with under the number `fd`.
///
/// Not by pidfd_getfd(2), which needs no unsafe code: containers forbid it.
///
/// # Errors
/// The system's: `EBADF` if there is nothing.
pub fn inherited(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: it touches no memory, and whatever has this number stays as it is.
    match unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) } {
        // SAFETY: the kernel has just made it, for us.
        copy @ 0.. => Ok(unsafe { OwnedFd::from_raw_fd(copy) }),
        _ => Err(io::Error::last_os_error()),
    }
}

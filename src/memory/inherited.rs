//! Descriptors that this process inherited.
#![allow(unsafe_code)]

use std::{
    io,
    os::fd::{FromRawFd as _, OwnedFd, RawFd},
};

/// Set close-on-exec for the descriptor `first` and all above it.
///
/// # Errors
/// An I/O error from the system: `EINVAL` before Linux 5.11.
pub fn close_on_exec_from(first: RawFd) -> io::Result<()> {
    let first = libc::c_uint::try_from(first).map_err(|_| io::ErrorKind::InvalidInput)?;
    let last = libc::c_uint::MAX;
    // The constant is an int in the kernel's header, as the argument is.
    let flags = libc::CLOSE_RANGE_CLOEXEC.cast_signed();
    // SAFETY: with this flag the call closes nothing and touches no memory: every descriptor stays
    // valid for its owner until the process calls exec.
    match unsafe { libc::close_range(first, last, flags) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Duplicate the descriptor that this process inherited under the number `fd`.
///
/// Not with pidfd_getfd(2), which needs no unsafe code: containers forbid it.
///
/// # Errors
/// An I/O error from the system: `EBADF` if there is no such descriptor.
pub fn inherited(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: the call touches no memory, and the descriptor with this number stays as it is.
    match unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) } {
        // SAFETY: the kernel has just created this descriptor for us.
        copy @ 0.. => Ok(unsafe { OwnedFd::from_raw_fd(copy) }),
        _ => Err(io::Error::last_os_error()),
    }
}

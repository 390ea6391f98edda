//! The process at the other end of a socket.
#![allow(unsafe_code)]

use std::{
    io, mem,
    os::fd::{AsFd, AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
};

/// Since Linux 6.5 (asm-generic/socket.h).
const SO_PEERPIDFD: libc::c_int = 77;

/// Return a pidfd of the process that created the other end of `socket`, or listened there: of that
/// process, not of one that has its PID by now.
///
/// # Errors
/// An I/O error from the system: `ENOPROTOOPT` before Linux 6.5; others if the process is gone.
pub fn peer_process(socket: impl AsFd) -> io::Result<OwnedFd> {
    let mut fd: RawFd = -1;
    let mut length = mem::size_of::<RawFd>() as libc::socklen_t;
    let socket = socket.as_fd().as_raw_fd();
    // SAFETY: the kernel writes an int and its length, and both variables are large enough.
    let result = unsafe {
        libc::getsockopt(
            socket,
            libc::SOL_SOCKET,
            SO_PEERPIDFD,
            (&raw mut fd).cast(),
            &raw mut length,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just created this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

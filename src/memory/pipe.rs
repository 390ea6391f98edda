//! A pipe that moves bytes from a socket into a file without copying them to user space.

use std::{
    io,
    os::fd::{BorrowedFd, OwnedFd},
};

use rustix::{
    io::retry_on_intr,
    pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice},
};

/// Requested pipe size in bytes: the limit for an unprivileged process (pipe-max-size).
const SIZE: usize = 1 << 20;

/// A pipe for [`Region::receive_from`](super::Region::receive_from); empty between calls.
#[derive(Debug)]
pub struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
    /// Capacity in bytes.
    size: usize,
}

impl Pipe {
    /// Create a pipe.
    ///
    /// # Errors
    /// An I/O error from the system, if descriptors or pipe buffers run out.
    pub fn new() -> io::Result<Self> {
        let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
        // A smaller pipe is slower, not wrong.
        let size = fcntl_setpipe_size(&write, SIZE).unwrap_or(64 << 10);
        Ok(Self { read, write, size })
    }

    /// Move up to `length` bytes from `socket` to `offset` of `file`; 0 means end of stream.
    pub(super) fn splice(
        &mut self,
        socket: BorrowedFd<'_>,
        file: BorrowedFd<'_>,
        mut offset: u64,
        length: usize,
    ) -> io::Result<usize> {
        let flags = SpliceFlags::MOVE | SpliceFlags::MORE;
        let taken = splice(socket, None, &self.write, None, length.min(self.size), flags)?;
        let mut left = taken;
        while left > 0 {
            // Drain the pipe even if interrupted: no later call would.
            let moved =
                retry_on_intr(|| splice(&self.read, None, file, Some(&mut offset), left, flags))?;
            if moved == 0 {
                return Err(io::Error::new(io::ErrorKind::WriteZero, "file takes no bytes"));
            }
            left -= moved;
        }
        Ok(taken)
    }
}

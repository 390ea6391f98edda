//! The kernel pipe through which bytes go from a socket into a file without being copied to us.

use std::{
    io,
    os::fd::{BorrowedFd, OwnedFd},
};

use rustix::{
    io::retry_on_intr,
    pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice},
};

/// Pipe size asked for, in bytes: what an unprivileged process may have (pipe-max-size).
const SIZE: usize = 1 << 20;

/// A pipe for [`Region::receive_from`](super::Region::receive_from); empty between calls.
#[derive(Debug)]
pub struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
    /// Bytes that it holds.
    size: usize,
}

impl Pipe {
    /// Make one.
    ///
    /// # Errors
    /// The system's, when descriptors or pipe buffers run out.
    pub fn new() -> io::Result<Self> {
        let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
        // Without the larger size it is slower, not wrong.
        let size = fcntl_setpipe_size(&write, SIZE).unwrap_or(64 << 10);
        Ok(Self { read, write, size })
    }

    /// Move up to `length` bytes from `socket` to `offset` of `file`; 0 is the socket's end.
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
            // What is in the pipe must come out of it: nobody begins anew.
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

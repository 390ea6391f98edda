//! Bytes with file descriptors over a Unix stream socket.
//!
//! Descriptors belong to the first byte of the `sendmsg` that carried them. A read ends behind the
//! bytes of such a `sendmsg`, but may begin with bytes from before them: where in it they belong only
//! [`recv_apart`] tells.

use std::{
    io::{self, IoSlice, IoSliceMut},
    iter::Peekable,
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    slice::Chunks,
};

use rustix::{
    io::retry_on_intr,
    net::{
        RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
        SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
    },
    process::Pid,
};
use tokio::{io::Interest, net::UnixStream};

/// Most descriptors that one `sendmsg` may carry (Linux: SCM_MAX_FD).
pub const FDS_MAX: usize = 253;

/// Receive bytes and the descriptors that came with them; 0 bytes mean the end.
///
/// # Errors
/// The system's; `InvalidData` if descriptors were lost because more came than [`FDS_MAX`].
pub fn recv(fd: impl AsFd, buf: &mut [u8], fds: &mut Vec<OwnedFd>) -> io::Result<usize> {
    Ok(receive(fd, buf, fds)?.0)
}

/// [`recv`] on a tokio socket that names the process that sent (SO_PASSCRED is set on it).
///
/// # Errors
/// As [`recv`].
pub async fn recv_with_sender(
    socket: &UnixStream,
    buf: &mut [u8],
) -> io::Result<(usize, Option<Pid>)> {
    socket.async_io(Interest::READABLE, || receive(socket, buf, &mut Vec::new())).await
}

fn receive(
    fd: impl AsFd,
    buf: &mut [u8],
    fds: &mut Vec<OwnedFd>,
) -> io::Result<(usize, Option<Pid>)> {
    let mut space =
        [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX), ScmCredentials(1))];
    let mut sender = None;
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = retry_on_intr(|| {
        recvmsg(&fd, &mut [IoSliceMut::new(buf)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)
    })?;
    for message in ancillary.drain() {
        match message {
            RecvAncillaryMessage::ScmRights(rights) => fds.extend(rights),
            RecvAncillaryMessage::ScmCredentials(credentials) => sender = Some(credentials.pid),
            _ => {}
        }
    }
    if received.flags.contains(ReturnFlags::CTRUNC) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "file descriptors were lost"));
    }
    Ok((received.bytes, sender))
}

/// Send some of `bytes`, with `fds` attached to the first; returns how many were taken.
///
/// # Errors
/// The system's; `EPIPE` rather than a signal when the peer is gone.
pub fn send(fd: impl AsFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "too many file descriptors"));
    }
    let sent =
        retry_on_intr(|| sendmsg(&fd, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL));
    Ok(sent?)
}

/// Send all of `bytes` on a blocking socket, with `fds` attached to the first; more than fit into one
/// `sendmsg` to the next ones.
///
/// # Errors
/// As [`send`].
pub fn send_all(fd: impl AsFd, mut bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut batches = fds.chunks(FDS_MAX).peekable();
    while !bytes.is_empty() {
        let (now, batch) = next(bytes, &mut batches);
        bytes = &bytes[send(&fd, now, batch)?..];
    }
    Ok(())
}

/// What goes into the next `sendmsg`.
fn next<'a, 'fd>(
    bytes: &'a [u8],
    batches: &mut Peekable<Chunks<'a, BorrowedFd<'fd>>>,
) -> (&'a [u8], &'a [BorrowedFd<'fd>]) {
    let batch = batches.next().unwrap_or_default();
    (if batches.peek().is_some() { &bytes[..1] } else { bytes }, batch)
}

/// [`recv`] on a tokio socket.
///
/// # Errors
/// As [`recv`].
pub async fn recv_async(
    socket: &UnixStream,
    buf: &mut [u8],
    fds: &mut Vec<OwnedFd>,
) -> io::Result<usize> {
    socket.async_io(Interest::READABLE, || recv(socket, buf, fds)).await
}

/// [`recv_async`]. Descriptors that come belong to the last of the bytes.
///
/// # Errors
/// As [`recv`].
pub async fn recv_apart(
    socket: &UnixStream,
    buf: &mut [u8],
    fds: &mut Vec<OwnedFd>,
) -> io::Result<usize> {
    let receive = || {
        let mut no_room = RecvAncillaryBuffer::default();
        let slices = &mut [IoSliceMut::new(buf)];
        let seen = retry_on_intr(|| recvmsg(socket, slices, &mut no_room, RecvFlags::PEEK))?;
        // It looks beyond what fits too. As QEMU does, byte by byte that is led up to.
        let has_descriptors = seen.flags.contains(ReturnFlags::CTRUNC);
        let length = if has_descriptors { 1 } else { seen.bytes };
        recv(socket, &mut buf[..length], fds)
    };
    socket.async_io(Interest::READABLE, receive).await
}

/// [`send_all`] on a tokio socket.
///
/// # Errors
/// As [`send`].
pub async fn send_all_async(
    socket: &UnixStream,
    mut bytes: &[u8],
    fds: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let mut batches = fds.chunks(FDS_MAX).peekable();
    while !bytes.is_empty() {
        let (now, batch) = next(bytes, &mut batches);
        let sent = socket.async_io(Interest::WRITABLE, || send(socket, now, batch)).await?;
        bytes = &bytes[sent..];
    }
    Ok(())
}

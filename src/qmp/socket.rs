//! Bytes with file descriptors over a Unix stream socket.
//!
//! Descriptors belong to the first byte of the `sendmsg` that carried them. A read ends after the
//! bytes of such a `sendmsg`, but may begin with earlier bytes. Only [`recv_apart`] tells where in
//! a read the descriptors belong.

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

/// Receive bytes and the descriptors attached to them; 0 bytes mean the end.
///
/// # Errors
/// An I/O error from the system; `InvalidData` if descriptors were lost because more than
/// [`FDS_MAX`] arrived.
pub fn recv(fd: impl AsFd, buf: &mut [u8], fds: &mut Vec<OwnedFd>) -> io::Result<usize> {
    Ok(receive(fd, buf, fds)?.0)
}

/// [`recv`] on a tokio socket with SO_PASSCRED set; also returns the sender's PID.
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

/// Send some of `bytes`, with `fds` attached to the first. Returns how many were sent.
///
/// # Errors
/// An I/O error from the system; `EPIPE` rather than a signal if the peer is gone.
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

/// Send all of `bytes` on a blocking socket, with `fds` attached to the first byte. Descriptors
/// that don't fit into one `sendmsg` are attached to the next bytes.
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

/// The bytes and the descriptors of the next `sendmsg`.
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

/// [`recv_async`], but descriptors that arrive belong to the last byte.
///
/// # Errors
/// As [`recv`].
pub async fn recv_apart(
    socket: &UnixStream,
    buf: &mut [u8],
    fds: &mut Vec<OwnedFd>,
) -> io::Result<usize> {
    let receive = || {
        let mut no_ancillary = RecvAncillaryBuffer::default();
        let slices = &mut [IoSliceMut::new(buf)];
        let seen = retry_on_intr(|| recvmsg(socket, slices, &mut no_ancillary, RecvFlags::PEEK))?;
        // MSG_PEEK sees descriptors beyond what fits too. Go there byte by byte, as QEMU does.
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

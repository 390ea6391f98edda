//! QEMU's migration sockets, as a source's relay and its worker hold them.

use std::{
    net::Shutdown,
    os::{fd::OwnedFd, unix::net::UnixStream},
    sync::Arc,
    thread::JoinHandle,
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    net::{RecvFlags, recv},
};

use crate::{patience::Patience, threads};

/// How long drained channels may be idle before they are left alone.
const IDLE: Duration = Duration::from_secs(30);

/// The stream, and QEMU's multifd channels if it was told to use any. The relay holds them too, so
/// that QEMU does not notice the worker's death: the relay decides what QEMU is told.
#[derive(Debug)]
pub struct QemuSockets {
    /// The stream, with the return path in the other direction.
    pub main: Arc<UnixStream>,
    /// The channels, in no particular order.
    pub channels: Vec<Arc<UnixStream>>,
}

impl QemuSockets {
    /// Take over descriptors, the stream's first; `None` if there are none.
    pub fn new(fds: Vec<OwnedFd>) -> Option<Self> {
        let mut sockets = fds.into_iter().map(|fd| Arc::new(UnixStream::from(fd)));
        let main = sockets.next()?;
        Some(Self { main, channels: sockets.collect() })
    }

    /// Make QEMU's migration fail. Only the stream breaks: if a channel did, another channel thread
    /// that does not know yet of a pending synchronisation would exit silently, and the migration
    /// thread would wait for it forever (`multifd_send_thread`, QEMU 10.0). So the channels are
    /// drained until QEMU closes them, on the returned thread, which the process should join before
    /// it exits.
    pub fn end(&self) -> Option<JoinHandle<()>> {
        // Fails only if QEMU has closed its end.
        let _ = self.main.shutdown(Shutdown::Both);
        if self.channels.is_empty() {
            return None;
        }
        let channels = self.channels.clone();
        threads::finish("drain", move || drain(channels))
    }
}

/// Read and drop what arrives on these channels until all are closed. If they are idle for long,
/// QEMU is stuck or gone, and waiting longer does not help.
fn drain(mut channels: Vec<Arc<UnixStream>>) {
    let mut buffer = vec![0; 64 << 10];
    let mut patience = Patience::new(IDLE);
    while !channels.is_empty() {
        let mut fds: Vec<_> =
            channels.iter().map(|channel| PollFd::new(channel, PollFlags::IN)).collect();
        let slice = Timespec::try_from(patience.slice()).ok();
        match poll(&mut fds, slice.as_ref()) {
            Ok(0) | Err(Errno::INTR) if patience.lasts() => continue,
            Ok(1..) => patience = Patience::new(IDLE),
            Ok(0) | Err(_) => return,
        }
        channels.retain(|channel| {
            let received = recv(channel, &mut buffer[..], RecvFlags::DONTWAIT);
            matches!(received, Ok((1.., _)) | Err(Errno::AGAIN | Errno::INTR))
        });
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Write as _, thread};

    use super::*;

    /// In whatever order QEMU writes and closes them.
    #[test]
    fn all_channels_are_drained_until_they_are_closed() {
        let ends: Vec<_> = (0..3).map(|_| UnixStream::pair().unwrap()).collect();
        let (ours, theirs): (Vec<_>, Vec<_>) =
            ends.into_iter().map(|(ours, theirs)| (Arc::new(ours), theirs)).unzip();
        let draining = thread::spawn(move || drain(ours));
        for mut channel in theirs.into_iter().rev() {
            channel.write_all(&[7; 1 << 20]).unwrap();
        }
        draining.join().unwrap();
    }
}

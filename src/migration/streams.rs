//! QEMU's migration sockets, as a source's relay and its worker hold them.

use std::{
    io,
    net::Shutdown,
    os::{fd::OwnedFd, unix::net::UnixStream},
    sync::Arc,
    thread::JoinHandle,
    time::Duration,
};

use crate::threads;

/// How long QEMU may write nothing to a channel that is drained, before it is left alone.
const IDLE: Duration = Duration::from_secs(30);

/// The stream, and QEMU's multifd channels if it was told to use any. QEMU does not notice the
/// worker's end by itself, because the relay has them too: it decides what QEMU is told.
#[derive(Debug)]
pub struct Streams {
    /// The stream, and the return path in the other direction.
    pub main: Arc<UnixStream>,
    /// The channels, in no order.
    pub channels: Vec<Arc<UnixStream>>,
}

impl Streams {
    /// From descriptors, the stream's first; `None` if there are none.
    pub fn new(fds: Vec<OwnedFd>) -> Option<Self> {
        let mut sockets = fds.into_iter().map(|fd| Arc::new(UnixStream::from(fd)));
        let main = sockets.next()?;
        Some(Self { main, channels: sockets.collect() })
    }

    /// Let QEMU's migration fail. Only the stream breaks: when a channel does, another that has not
    /// noticed yet that it should be synchronised ends without a word, and the migration thread waits
    /// for it for good (`multifd_send_thread`, QEMU 10.0). So what comes on the channels is taken, to
    /// nowhere, until QEMU closes them; by these threads, which the process should outlive.
    pub fn end(&self) -> Vec<JoinHandle<()>> {
        // It fails only when QEMU has closed its end.
        let _ = self.main.shutdown(Shutdown::Both);
        let drain = |channel: &Arc<UnixStream>| {
            let channel = channel.clone();
            let drain = move || {
                // QEMU is stuck, or gone; neither is helped by more patience.
                let _ = channel.set_read_timeout(Some(IDLE));
                let _ = io::copy(&mut &*channel, &mut io::sink());
            };
            // Nobody can do more for QEMU than that.
            threads::start("drain", drain, |_| {})
        };
        self.channels.iter().filter_map(drain).collect()
    }
}

//! QEMU's return path at the destination: forwarded to the source.

use std::{
    os::unix::net::UnixStream,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use rustix::{
    io::{Errno, retry_on_intr},
    net::{RecvFlags, recv},
};
use tracing::debug;

use super::input::{Input, say_failure};
use crate::{
    fabric::{Connection, FabricError},
    proto::{
        destination::Event,
        error::{MigrationError, Result},
    },
    threads,
    wire::{Message, credit::Flow},
    worker::{drive::Events, link::Link},
};

/// Forward until QEMU closes its end, or the connection is lost, which the receiver notices.
///
/// # Errors
/// When forwarding fails although both ends are there.
pub fn forward(qemu: &UnixStream, link: &Link, events: &Events<Input>) -> Result<()> {
    let mut buffer = [0; 4096];
    loop {
        let received = match retry_on_intr(|| recv(qemu, &mut buffer[..], RecvFlags::empty())) {
            // QEMU may have closed it with bytes unread.
            Ok((0, _)) | Err(Errno::CONNRESET) => {
                events.send(Event::QemuClosed);
                return Ok(());
            }
            Ok((received, _)) => received,
            Err(errno) => return Err(MigrationError::QemuSocket(errno.into())),
        };
        match link.send(&Message::QemuFile(&buffer[..received])) {
            Err(MigrationError::Fabric(FabricError::Closed)) => return Ok(()),
            sent => sent?,
        }
    }
}

/// The return path to a stock source: a second connection, which may arrive before or after the
/// source begins, or not at all. QEMU's messages are forwarded after both.
pub struct ReturnPath {
    qemu: Arc<UnixStream>,
    events: Events<Input>,
    ends: Mutex<Ends>,
}

#[derive(Default)]
struct Ends {
    main: Option<Arc<Link>>,
    link: Option<Arc<Link>>,
    begun: bool,
}

impl ReturnPath {
    /// Create a return path of this QEMU; its loss is reported to `events`.
    pub fn new(qemu: Arc<UnixStream>, events: Events<Input>) -> Arc<Self> {
        Arc::new(Self { qemu, events, ends: Mutex::default() })
    }

    fn lock(&self) -> MutexGuard<'_, Ends> {
        self.ends.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Set the source's first connection, which is closed together with the return path.
    pub fn belongs_to(&self, main: &Arc<Link>) {
        let mut ends = self.lock();
        if let Some(link) = &ends.link {
            main.accompany(link);
        }
        ends.main = Some(main.clone());
    }

    /// Take the second connection, and receive its READYs on a thread of their own.
    pub fn open(&self, connection: Box<dyn Connection>, stall: Duration) {
        let (link, mut receiver) = Link::stock(connection, Flow::LockstepAhead, stall);
        let answering = link.clone();
        let receive = move || {
            let mut buffer = Vec::new();
            while let Ok(message) = receiver.next(&answering, &mut buffer) {
                debug!(?message, "a message on the return path");
            }
            Ok(())
        };
        let say = say_failure(&self.events, Event::ReturnPathLost);
        threads::start("return path", receive, say);
        let mut ends = self.lock();
        if let Some(main) = &ends.main {
            main.accompany(&link);
        }
        if ends.begun {
            self.forward(&link);
        }
        ends.link = Some(link);
    }

    /// Start to forward: the source begins.
    pub fn begin(&self) {
        let mut ends = self.lock();
        ends.begun = true;
        if let Some(link) = &ends.link {
            self.forward(link);
        }
    }

    fn forward(&self, link: &Arc<Link>) {
        debug!("the return path is open");
        let (qemu, link) = (self.qemu.clone(), link.clone());
        let say = say_failure(&self.events, Event::ReturnPathLost);
        let events = self.events.clone();
        threads::start("return path", move || forward(&qemu, &link, &events), say);
    }
}

impl Drop for ReturnPath {
    fn drop(&mut self) {
        let ends = self.lock();
        if let Some(link) = ends.link.as_ref().filter(|_| !ends.begun) {
            link.close();
        }
    }
}

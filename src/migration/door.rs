//! Who connects to a waiting destination: sources, and the return path of a stock one.

use std::{
    os::unix::net::UnixStream,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread,
    time::Duration,
};

use tracing::{debug, info};

use super::{Result, acceptance, landing::Context, link::Link, return_path};
use crate::{
    fabric::{self, FabricError, Listener, Request},
    wire::credit::Flow,
};

/// Sources that may wait while another is served.
const WAITING: usize = 16;

/// Where a connection goes that is no source's, if one is expected.
type Expected = Mutex<Option<SyncSender<Box<dyn Request>>>>;

/// Lets in who connects.
pub struct Door {
    sources: Receiver<fabric::Result<Box<dyn Request>>>,
    /// Where a stock source's second connection goes.
    return_path: Arc<Expected>,
}

fn lock(expected: &Expected) -> MutexGuard<'_, Option<SyncSender<Box<dyn Request>>>> {
    expected.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Door {
    /// Accept on a thread of its own, until the listener is closed.
    pub fn open(mut listener: Box<dyn Listener>) -> Self {
        let (to_serve, sources) = sync_channel(WAITING);
        let return_path = Arc::new(Expected::default());
        let expected = return_path.clone();
        thread::spawn(move || {
            loop {
                let request = listener.accept();
                let failed = request.is_err();
                let sent = match (lock(&expected).as_ref(), request) {
                    (Some(return_path), Ok(request)) => return_path.try_send(request).is_ok(),
                    (_, request) => to_serve.try_send(request).is_ok(),
                };
                if failed {
                    return;
                }
                if !sent {
                    info!("a peer was turned away: too many wait already");
                }
            }
        });
        Self { sources, return_path }
    }

    /// The next source.
    pub fn next(&self) -> Result<Box<dyn Request>> {
        Ok(self.sources.recv().unwrap_or(Err(FabricError::Closed))?)
    }

    /// Whoever connects next is a source.
    pub fn expect_sources(&self) {
        *lock(&self.return_path) = None;
    }

    /// Whoever connects next is the return path of the stock source at `link`, which QEMU's end of
    /// it is forwarded to. It need not come.
    pub fn expect_return_path(&self, link: Arc<Link>, context: &Context) {
        let (to_open, requests) = sync_channel::<Box<dyn Request>>(WAITING);
        *lock(&self.return_path) = Some(to_open.clone());
        // QEMU connects as soon as it was let in, which may have been before this.
        for early in self.sources.try_iter().flatten() {
            // Too many wait already: this one is turned away.
            let _ = to_open.try_send(early);
        }
        drop(to_open);
        let (qemu, stall) = (context.qemu.clone(), context.options.stall_timeout());
        thread::spawn(move || {
            while let Ok(request) = requests.recv() {
                let peer = request.peer();
                match open(request, &link, stall) {
                    Ok(return_path) => return forward(&qemu, &return_path),
                    Err(error) => info!(%peer, %error, "no return path"),
                }
            }
        });
    }
}

fn forward(qemu: &UnixStream, link: &Link) {
    debug!("the return path is open");
    return_path::forward(qemu, link);
}

/// Accept the second connection; its READYs are taken on a thread of its own.
fn open(request: Box<dyn Request>, main: &Link, stall: Duration) -> Result<Arc<Link>> {
    let connection = acceptance::accept_again(request)?;
    let (link, mut receiver) = Link::stock(connection, Flow::LockstepAhead, stall);
    main.accompany(&link);
    let answering = link.clone();
    thread::spawn(move || {
        let mut buffer = Vec::new();
        while let Ok(message) = receiver.next(&answering, &mut buffer) {
            debug!(?message, "a message on the return path");
        }
    });
    Ok(link)
}

//! Accepts connections to a waiting destination: sources, and the return path of a stock source.
//!
//! Each source has a handshake thread of its own, so that a source that falls silent, or sends a
//! byte a second, delays no other. The first one that begins to send its stream is served; those
//! that are pending then are turned away.

use std::{
    net::{IpAddr, SocketAddr},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        mpsc::{self, Receiver, Sender, SyncSender, sync_channel},
    },
    time::Duration,
};

use tracing::{debug, info, warn};

use super::{
    context::Context,
    handshake::{self, Accepted},
    input::{Input, say_failure},
    return_path::ReturnPath,
    seat::Seat,
};
use crate::{
    control::FabricKind,
    fabric::{
        FabricError, Listener, Request,
        pending::{GRACE, Limits, Newcomer, Pending, Place},
    },
    proto::{
        destination::Event,
        error::{MigrationError, Result},
    },
    refusals::Refusals,
    threads,
    wire::PrivateData,
};

/// Limits for pending sources. On RDMA the buffers of each are 12 MiB of pinned memory; a queued
/// source has none yet.
const PENDING: Limits = Limits { each: 4, total: 16, line: 64, grace: GRACE };

/// How long a source may take from the handshake to its first bytes. Meanwhile its QEMU is asked to
/// migrate.
const FIRST_BYTES: Duration = Duration::from_secs(60);

/// A source that has the seat and sends.
pub struct Proven {
    /// The result of the handshake.
    pub accepted: Accepted,
    /// Its first message.
    pub first: Vec<u8>,
    /// The source's address.
    pub peer: SocketAddr,
    /// Its slot among the pending sources.
    pub place: Place,
    /// A stock source's return path, which may be opened later.
    pub return_path: Option<Arc<ReturnPath>>,
}

/// Accepts sources.
pub struct Acceptor {
    proven: Receiver<Result<Proven>>,
    /// Limits log lines about sources that are turned away.
    pub refused: Arc<Refusals>,
}

/// What all pending sources share.
struct AcceptorShared {
    context: Arc<Context>,
    pending: Arc<Pending>,
    seat: Arc<Seat>,
    /// Stock sources whose second connection may arrive.
    expected: Mutex<Vec<Expected>>,
    proven: Sender<Result<Proven>>,
    refused: Arc<Refusals>,
    /// Limits log lines about sources whose handshake succeeded.
    agreed: Refusals,
}

/// Where to pass the second connection of a stock source at this address.
struct Expected {
    address: IpAddr,
    /// Dropped with its source.
    return_path: Weak<ReturnPath>,
    open: SyncSender<Box<dyn Request>>,
}

impl Acceptor {
    /// Accept on a separate thread until the listener is closed.
    pub fn open(mut listener: Box<dyn Listener>, context: &Arc<Context>) -> Self {
        let (sender, proven) = mpsc::channel();
        let refused = Arc::<Refusals>::default();
        let shared = Arc::new(AcceptorShared {
            context: context.clone(),
            pending: Pending::new(PENDING),
            seat: Arc::default(),
            expected: Mutex::default(),
            proven: sender.clone(),
            refused: refused.clone(),
            agreed: Refusals::default(),
        });
        let accept = move || {
            loop {
                match listener.accept() {
                    Ok(request) => shared.visit(request),
                    Err(error) => {
                        // The receiver is gone only when a source is served.
                        let _ = shared.proven.send(Err(error.into()));
                        return Ok(());
                    }
                }
            }
        };
        let say = say_failure(&context.events, Event::Failed);
        threads::start("acceptor", accept, move |end| {
            say(end);
            // Not earlier: a thread that waits for a source would take that for the end of a peer.
            drop(sender);
        });
        Self { proven, refused }
    }

    /// Return the next source that sends.
    pub fn next(&self) -> Result<Proven> {
        self.proven.recv().unwrap_or(Err(FabricError::Closed.into()))
    }
}

impl AcceptorShared {
    fn expected(&self) -> MutexGuard<'_, Vec<Expected>> {
        self.expected.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Handle a new connection, without blocking.
    fn visit(self: &Arc<Self>, request: Box<dyn Request>) {
        let peer = request.peer();
        let stock = self.context.options.fabric == FabricKind::Verbs
            && PrivateData::decode(request.private_data()).is_ok_and(|it| it.extension.is_none());
        let request = match stock {
            true => self.offer_return_path(request),
            false => Some(request),
        };
        let Some(request) = request else { return };
        if self.seat.begun() {
            self.refused.say(|left_out| {
                info!(%peer, left_out, "turned away: another source is served");
            });
            return;
        }
        let newcomer = self.pending.enter(peer.ip(), request.handle());
        let (shared, receiving) = (self.clone(), self.clone());
        let receive = move || receiving.receive(request, newcomer, stock);
        threads::start("source", receive, move |received| {
            if let Err(error) = received.unwrap_or_else(|lost| Err(lost.into())) {
                shared.refused.say(|left_out| match shared.seat.begun() {
                    true => {
                        info!(%peer, %error, left_out, "turned away: another source is served");
                    }
                    false => warn!(%peer, %error, left_out, "turned away"),
                });
            }
        });
    }

    /// Do a source's handshake when it has a slot, and pass it on when it sends.
    fn receive(&self, request: Box<dyn Request>, newcomer: Newcomer, stock: bool) -> Result<()> {
        let peer = request.peer();
        let Some(place) = newcomer.wait() else {
            let why = "Too many of this address, or in all, are pending";
            return Err(MigrationError::Aborted(why.into()));
        };
        // Before the source is accepted: a stock QEMU connects again right after that.
        let return_path = stock.then(|| self.expect_return_path(peer.ip()));
        let mut accepted = handshake::accept(request, &self.context, &place, &self.seat)?;
        let link = accepted.link.clone();
        if let Some(return_path) = &return_path {
            return_path.belongs_to(&link);
        }
        self.agreed.say(|left_out| match stock {
            true => info!(%peer, left_out, "a stock QEMU connected"),
            false => info!(%peer, left_out, "a source connected, and the block lists agree"),
        });
        self.context.events.send(Input::Agreed(link.clone()));
        match first_message(&mut accepted) {
            Ok(first) => {
                // Fails only when another source is served.
                let _ = self.proven.send(Ok(Proven { accepted, first, peer, place, return_path }));
                Ok(())
            }
            Err(error) => {
                let why = accepted.took_leave(&error).then(|| error.to_string());
                link.end(&error, true);
                self.context.events.send(Input::Withdrawn(link, why));
                Err(error)
            }
        }
    }

    /// Pass a stock QEMU's connection to the source at the same address that expects it, the latest
    /// one first. Returns it if there is none.
    fn offer_return_path(&self, mut request: Box<dyn Request>) -> Option<Box<dyn Request>> {
        let address = request.peer().ip();
        let mut expected = self.expected();
        expected.retain(|source| source.return_path.strong_count() > 0);
        for source in expected.iter().rev().filter(|source| source.address == address) {
            match source.open.try_send(request) {
                Ok(()) => return None,
                Err(mpsc::TrySendError::Full(it) | mpsc::TrySendError::Disconnected(it)) => {
                    request = it;
                }
            }
        }
        Some(request)
    }

    /// Expect a second connection of a stock source at this address.
    fn expect_return_path(&self, address: IpAddr) -> Arc<ReturnPath> {
        let (open, requests) = sync_channel::<Box<dyn Request>>(1);
        let return_path = ReturnPath::new(self.context.qemu.clone(), self.context.events.clone());
        let (opened, stall) = (Arc::downgrade(&return_path), self.context.options.stall_timeout());
        self.expected().push(Expected { address, return_path: opened.clone(), open });
        let open = move || {
            while let Ok(request) = requests.recv() {
                let peer = request.peer();
                // Expected only as long as its source exists.
                let Some(return_path) = opened.upgrade() else { break };
                match handshake::accept_again(request) {
                    Ok(connection) => {
                        return_path.open(connection, stall);
                        break;
                    }
                    Err(error) => info!(%peer, %error, "no return path"),
                }
            }
            Ok(())
        };
        let say = say_failure(&self.context.events, Event::ReturnPathLost);
        threads::start("return path", open, say);
        return_path
    }
}

/// Wait for a source's first message, then for the seat.
fn first_message(accepted: &mut Accepted) -> Result<Vec<u8>> {
    let link = accepted.link.clone();
    let mut first = Vec::new();
    let deadline = link.deadline(FIRST_BYTES);
    link.grant()?;
    accepted.receiver.next(&link, &mut first)?;
    debug!("the source begins");
    drop(deadline);
    if accepted.claim.take() {
        accepted.claim.expect();
        return Ok(first);
    }
    Err(MigrationError::Aborted("The destination is served by another source already".into()))
}

//! Who connects to a waiting destination: sources, and the return path of a stock one.
//!
//! Each source agrees on a thread of its own, so that who falls silent, or sends a byte a second, is
//! waited for by nobody else. The first one that begins to send its stream is served, and those that
//! are pending then are turned away.

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

/// Sources that may be pending. On RDMA the buffers of each are 12 MiB of pinned memory; who stands in line
/// has none yet.
const PENDING: Limits = Limits { each: 4, total: 16, line: 64, grace: GRACE };

/// How long a source may take from the agreement to its first bytes. Its QEMU is asked to migrate
/// then.
const FIRST_BYTES: Duration = Duration::from_secs(60);

/// A source that has the seat and sends.
pub struct Proven {
    /// The agreement.
    pub accepted: Accepted,
    /// Its first message.
    pub first: Vec<u8>,
    /// Who it is.
    pub peer: SocketAddr,
    /// Its place among those that are pending.
    pub place: Place,
    /// A stock source's, which may come later.
    pub return_path: Option<Arc<ReturnPath>>,
}

/// Lets in who connects.
pub struct Acceptor {
    proven: Receiver<Result<Proven>>,
    /// Lines about those that get no further.
    pub refused: Arc<Refusals>,
}

/// What all that are pending share.
struct Hall {
    context: Arc<Context>,
    pending: Arc<Pending>,
    seat: Arc<Seat>,
    /// Stock sources whose second connection may come.
    expected: Mutex<Vec<Expected>>,
    proven: Sender<Result<Proven>>,
    refused: Arc<Refusals>,
    /// Lines about those that got this far.
    agreed: Refusals,
}

/// Where the second connection of a stock source at this address goes.
struct Expected {
    address: IpAddr,
    /// Gone with its source.
    return_path: Weak<ReturnPath>,
    open: SyncSender<Box<dyn Request>>,
}

impl Acceptor {
    /// Accept on a thread of its own, until the listener is closed.
    pub fn open(mut listener: Box<dyn Listener>, context: &Arc<Context>) -> Self {
        let (sender, proven) = mpsc::channel();
        let refused = Arc::<Refusals>::default();
        let hall = Arc::new(Hall {
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
                    Ok(request) => hall.visit(request),
                    Err(error) => {
                        // The receiver is gone only when a source is served.
                        let _ = hall.proven.send(Err(error.into()));
                        return Ok(());
                    }
                }
            }
        };
        let say = say_failure(&context.events, Event::Failed);
        threads::start("acceptor", accept, move |end| {
            say(end);
            // Not before: who waits for a source would take that for a peer's end.
            drop(sender);
        });
        Self { proven, refused }
    }

    /// The next source that sends.
    pub fn next(&self) -> Result<Proven> {
        self.proven.recv().unwrap_or(Err(FabricError::Closed.into()))
    }
}

impl Hall {
    fn expected(&self) -> MutexGuard<'_, Vec<Expected>> {
        self.expected.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Somebody connects. Nobody is waited for.
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
        let (hall, receiving) = (self.clone(), self.clone());
        let receive = move || receiving.receive(request, newcomer, stock);
        threads::start("source", receive, move |received| {
            if let Err(error) = received.unwrap_or_else(|lost| Err(lost.into())) {
                hall.refused.say(|left_out| match hall.seat.begun() {
                    true => {
                        info!(%peer, %error, left_out, "turned away: another source is served");
                    }
                    false => warn!(%peer, %error, left_out, "turned away"),
                });
            }
        });
    }

    /// Agree with a source when it has its place, and hand it on when it sends.
    fn receive(&self, request: Box<dyn Request>, newcomer: Newcomer, stock: bool) -> Result<()> {
        let peer = request.peer();
        let Some(place) = newcomer.wait() else {
            let why = "Too many of this address, or in all, are pending";
            return Err(MigrationError::Aborted(why.into()));
        };
        // Before it is let in: a stock QEMU connects again as soon as it is.
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
                // It fails only when another source is served.
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

    /// Hand a stock QEMU's connection to the source at the same address that expects it: the last
    /// one that came. Returns it if there is none.
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

    /// A stock source at this address may connect once more.
    fn expect_return_path(&self, address: IpAddr) -> Arc<ReturnPath> {
        let (open, requests) = sync_channel::<Box<dyn Request>>(1);
        let return_path = ReturnPath::new(self.context.qemu.clone(), self.context.events.clone());
        let (opened, stall) = (Arc::downgrade(&return_path), self.context.options.stall_timeout());
        self.expected().push(Expected { address, return_path: opened.clone(), open });
        let open = move || {
            while let Ok(request) = requests.recv() {
                let peer = request.peer();
                // It is expected as long as its source is there.
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

/// Wait for a source's first message, and for the seat.
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

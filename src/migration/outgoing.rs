//! The source's side: QEMU's stream in, RAM and the rest of the stream out.

use std::{
    cell::Cell,
    net::Shutdown,
    os::unix::net::UnixStream,
    path::PathBuf,
    sync::{
        Arc,
        atomic::Ordering,
        mpsc::{self, Receiver, Sender},
    },
    thread,
    time::{Duration, Instant},
};

use tracing::{info, warn};

use super::{
    Block, Result, Verdict,
    agreement::{self, Agreement},
    answers,
    commitment::Commitment,
    control::Reports,
    error::MigrationError,
    intake, lifetime,
    link::Link,
    messages::{Address, Options, Order, Report},
    orphan, return_path,
    statistics::Statistics,
    targets::Targets,
};
use crate::{
    fabric::{Fabric, FabricError},
    wire::{Message, credit::Flow},
};

/// How long to wait for the peer's own words after it closed the connection.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// What happens to an outgoing migration.
pub enum Event {
    /// From the relay.
    Order(Order),
    /// The relay is gone.
    RelayGone,
    /// Connected, and the block lists agree; or not.
    Agreed(Result<Agreement>),
    /// QEMU's stream ended and all of it was sent; or not.
    StreamTaken(Result<()>),
    /// The destination's QEMU completed.
    Acknowledged,
    /// The peer, or the connection, failed.
    PeerFailed(MigrationError),
}

/// Where an outgoing migration stands.
enum Outgoing {
    /// Connecting and comparing block lists; QEMU has not been asked to migrate.
    Connecting,
    /// QEMU's stream is being taken.
    Streaming(Arc<Link>),
    /// The end of the stream was sent; the destination's QEMU has not completed yet.
    Confirming(Arc<Link>),
    /// It is over.
    Ended(Verdict),
}

/// How QEMU is reached.
pub struct Qemu {
    /// The worker's end of its migration socket.
    pub migration: UnixStream,
    /// Its QMP socket, which is the relay's as long as there is one.
    pub qmp: Option<PathBuf>,
}

/// How the destination is reached.
struct Way {
    fabric: Arc<dyn Fabric>,
    address: Address,
    options: Options,
}

impl Way {
    /// A stock destination wants a connection of its own for the return path, if QEMU opens one,
    /// once it is ready on the first.
    fn open_return_path(
        &self,
        link: &Link,
        qemu: &Arc<UnixStream>,
        events: &Sender<Event>,
    ) -> Result<()> {
        if !link.is_stock() || !self.options.return_path {
            return Ok(());
        }
        link.await_ready()?;
        let (connection, stall) = (
            agreement::connect_again(&*self.fabric, &self.address, &self.options)?,
            self.options.stall_timeout(),
        );
        let (return_path, receiver) = Link::stock(connection, Flow::LockstepAhead, stall);
        link.accompany(&return_path);
        let (qemu, events) = (qemu.clone(), events.clone());
        thread::spawn(move || {
            answers::receive_return_path(receiver, &return_path, &qemu, &events);
        });
        Ok(())
    }
}

/// What all states need.
struct Context {
    way: Arc<Way>,
    qemu: Arc<UnixStream>,
    /// The relay is gone.
    orphaned: Cell<bool>,
    reports: Arc<Reports>,
    statistics: Arc<Statistics>,
    commitment: Arc<Commitment>,
    events: Sender<Event>,
}

/// Run one to its end.
pub fn run(
    fabric: Arc<dyn Fabric>,
    address: Address,
    blocks: Vec<Block>,
    options: Options,
    qemu: Qemu,
    reports: Arc<Reports>,
    (sender, events): (Sender<Event>, Receiver<Event>),
) {
    let statistics = Statistics::new(fabric.name());
    let way = Arc::new(Way { fabric, address, options });
    let set_up = statistics.clone();
    let context = Context {
        way: way.clone(),
        qemu: Arc::new(qemu.migration),
        orphaned: Cell::new(false),
        reports: reports.clone(),
        statistics: statistics.clone(),
        commitment: Arc::default(),
        events: sender.clone(),
    };
    thread::spawn(move || {
        let agreed = agreement::connect(&*way.fabric, &way.address, blocks, &way.options, &set_up);
        // The receiver is gone only when the migration has ended otherwise.
        let _ = sender.send(Event::Agreed(agreed));
    });
    let verdict =
        lifetime(Outgoing::Connecting, &events, &reports, &statistics, |state, event| match state
            .handle(event, &context, &events)
        {
            Outgoing::Ended(verdict) => Err(verdict),
            state => Ok(state),
        });
    verdict.tell(&reports, &statistics, |guest_never_ran| {
        if guest_never_ran {
            // QEMU takes the end of its socket for a failure: the guest runs on. It fails only
            // when QEMU has closed its end.
            let _ = context.qemu.shutdown(Shutdown::Both);
            if context.orphaned.get()
                && let Some(qmp) = &qemu.qmp
                && let Err(error) = orphan::release_guest(qmp)
            {
                warn!(%error, "QEMU could not be asked whether its guest waits");
            }
        } else {
            return_path::settle(&context.qemu);
        }
    });
}

impl Outgoing {
    fn handle(self, event: Event, context: &Context, events: &Receiver<Event>) -> Self {
        match (self, event) {
            (Self::Connecting, Event::Agreed(Ok(agreement))) => Self::start(agreement, context),
            (Self::Connecting, Event::Agreed(Err(error))) => {
                Self::Ended(Verdict::failed(error, true, None))
            }
            (Self::Streaming(link), Event::StreamTaken(Ok(()))) => {
                let total = context.statistics.stream_bytes.load(Ordering::Relaxed);
                if link.is_stock() {
                    return Self::Confirming(link);
                }
                match link.send(&Message::StreamEnd { bytes: total }) {
                    Ok(()) => Self::Confirming(link),
                    Err(error) => Self::fail(Some(link), error, context, events),
                }
            }
            (Self::Streaming(link), Event::StreamTaken(Err(error))) => {
                Self::fail(Some(link), error, context, events)
            }
            (Self::Confirming(link), Event::Acknowledged) => {
                link.close();
                Self::Ended(Verdict::Done)
            }
            (Self::Streaming(link), Event::Acknowledged) => {
                let error = MigrationError::Peer("it confirmed an unfinished migration".into());
                Self::fail(Some(link), error, context, events)
            }
            // All that a stock destination says when it has loaded the guest.
            (
                Self::Confirming(link),
                Event::PeerFailed(MigrationError::Fabric(FabricError::Closed)),
            ) if link.is_stock() => {
                link.close();
                Self::Ended(Verdict::Done)
            }
            (state, Event::PeerFailed(error)) => Self::fail(state.link(), error, context, events),
            (state, Event::Order(Order::Abort { reason })) => {
                let error = MigrationError::Aborted(reason);
                Self::fail(state.link(), error, context, events)
            }
            // The guest may be running at the destination: the verdict is waited for, so that
            // QEMU gets to know how it ends.
            (state, Event::RelayGone) if context.commitment.is_past_ram() => state,
            (state, Event::RelayGone) => {
                context.orphaned.set(true);
                let error = MigrationError::Aborted(
                    "The source's helper is gone; start it again there, and migrate again".into(),
                );
                Self::fail(state.link(), error, context, events)
            }
            (state, Event::Order(order)) => {
                warn!(?order, "an order that means nothing to a source");
                state
            }
            // Late words of threads whose migration has moved on.
            (state, Event::Agreed(_) | Event::StreamTaken(_) | Event::Acknowledged) => state,
        }
    }

    fn link(self) -> Option<Arc<Link>> {
        match self {
            Self::Streaming(link) | Self::Confirming(link) => Some(link),
            Self::Connecting | Self::Ended(_) => None,
        }
    }

    /// The block lists agree: take QEMU's stream.
    fn start(agreement: Agreement, context: &Context) -> Self {
        let Agreement { link, receiver, blocks, pin_limit } = agreement;
        context.statistics.set_up();
        let (qemu, events) = (context.qemu.clone(), context.events.clone());
        let answering = link.clone();
        // A range that is needed, and the one that will be.
        let (answers, answered) = mpsc::sync_channel(2);
        thread::spawn(move || answers::receive(receiver, &answering, &qemu, &answers, &events));
        let targets = Targets::new(blocks, answered, pin_limit, context.way.options.clone());
        let (qemu, events, way) =
            (context.qemu.clone(), context.events.clone(), context.way.clone());
        let (taking, statistics) = (link.clone(), context.statistics.clone());
        let (commitment, reports) = (context.commitment.clone(), context.reports.clone());
        let pass_ram = move || {
            let passed = commitment.pass_ram();
            if passed {
                reports.send(&Report::PastRam);
            }
            passed
        };
        thread::spawn(move || {
            let taken = way
                .open_return_path(&taking, &qemu, &events)
                .and_then(|()| intake::take(&qemu, &taking, targets, &statistics, pass_ram));
            // As above: nobody waits for it any more.
            let _ = events.send(Event::StreamTaken(taken));
        });
        info!("block lists agree");
        context.reports.send(&Report::Agreed);
        Self::Streaming(link)
    }

    /// End as failed.
    fn fail(
        link: Option<Arc<Link>>,
        error: MigrationError,
        context: &Context,
        events: &Receiver<Event>,
    ) -> Self {
        let error = last_words(&error, events).unwrap_or(error);
        let never_ran = context.commitment.withdraw();
        Self::Ended(Verdict::failed(error, never_ran, link))
    }
}

/// When the connection was closed, the peer may have said why before, or another thread of ours
/// know it.
fn last_words(error: &MigrationError, events: &Receiver<Event>) -> Option<MigrationError> {
    if !matches!(error, MigrationError::Fabric(FabricError::Closed)) {
        return None;
    }
    let deadline = Instant::now() + LAST_WORDS;
    loop {
        match events.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(Event::PeerFailed(error) | Event::StreamTaken(Err(error)))
                if !matches!(error, MigrationError::Fabric(FabricError::Closed)) =>
            {
                return Some(error);
            }
            Ok(_) => {}
            Err(_) => return None,
        }
    }
}

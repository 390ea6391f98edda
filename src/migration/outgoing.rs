//! The source's side: QEMU's stream in, RAM and the rest of the stream out.

use std::{
    cell::{Cell, OnceCell, RefCell},
    sync::{
        Arc,
        atomic::Ordering,
        mpsc::{self, Receiver, Sender},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use tracing::{debug, info, warn};

use super::{
    Block, Result, Verdict,
    agreement::{self, Agreement},
    answers,
    channels::Channels,
    commitment::Commitment,
    control::Reports,
    error::MigrationError,
    intake, lifetime,
    link::Link,
    messages::{Address, Agreed, Command, Options, Order, QmpSocket, Report},
    orphan::Orphan,
    pacing::Pacer,
    return_path::{self, ToQemu},
    statistics::Statistics,
    streams::Streams,
    targets::Targets,
    writer::Writer,
};
use crate::{
    fabric::{Fabric, FabricError},
    memory::Region,
    wire::{Message, credit::Flow},
};

/// How long to wait for the peer's own words after it closed the connection.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// What happens to an outgoing migration.
pub enum Event {
    /// From the relay.
    Order(Order),
    /// The relay is gone, or can't reach QEMU: why.
    RelayGone(String),
    /// Connected, and the block lists agree; or not.
    Agreed(Result<Agreement>),
    /// From the relay: QEMU's sockets; `None` if there were none.
    Take(Option<Streams>),
    /// What the guest did before the switchover, as QEMU tells the destination.
    GuestBefore(String),
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
    /// The block lists agree; QEMU is being asked to migrate.
    Agreed(Box<Agreement>),
    /// QEMU's stream is being taken.
    Streaming(Arc<Link>),
    /// The end of the stream was sent; the destination's QEMU has not completed yet.
    Confirming(Arc<Link>),
    /// It is over.
    Ended(Verdict),
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
        qemu: &Arc<ToQemu>,
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
    /// QEMU's sockets, once it was asked to migrate.
    qemu: OnceCell<Arc<Streams>>,
    /// What sets QEMU back to what it was before.
    give_back: RefCell<Vec<Command>>,
    /// QEMU's QMP socket, for when the relay is gone.
    qmp: Option<QmpSocket>,
    /// The relay is gone.
    is_alone: Cell<bool>,
    /// What is in its place.
    orphan: Cell<Option<Orphan>>,
    /// The guest runs, but for the switchover.
    guest_runs: Cell<bool>,
    /// It ran until the switchover, as QEMU knows it.
    guest_ran: Cell<Option<bool>>,
    /// The relay has done all that there is to do.
    over: Cell<bool>,
    reports: Arc<Reports>,
    statistics: Arc<Statistics>,
    commitment: Arc<Commitment>,
    pacer: Arc<Pacer>,
    /// The memory that QEMU reads, all of it, where it does not announce it.
    read: Vec<Arc<Region>>,
    events: Sender<Event>,
}

/// Run one to its end. `qmp` is QEMU's QMP socket, which is the relay's as long as there is one.
pub fn run(
    fabric: Arc<dyn Fabric>,
    address: Address,
    blocks: Vec<Block>,
    options: Options,
    qmp: Option<QmpSocket>,
    reports: Arc<Reports>,
    (sender, events): (Sender<Event>, Receiver<Event>),
) {
    let statistics = Statistics::new(fabric.name());
    let way = Arc::new(Way { fabric, address, options });
    let set_up = statistics.clone();
    let read = blocks.iter().filter(|block| block.read_whole);
    let read = read.filter_map(|block| block.region.clone()).collect();
    let context = Context {
        way: way.clone(),
        qemu: OnceCell::new(),
        give_back: RefCell::default(),
        qmp,
        is_alone: Cell::new(false),
        orphan: Cell::default(),
        guest_runs: Cell::new(true),
        guest_ran: Cell::new(None),
        over: Cell::new(false),
        reports: reports.clone(),
        statistics: statistics.clone(),
        commitment: Arc::default(),
        pacer: Arc::default(),
        read,
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
    let (mut never_ran, mut threads) = (false, Vec::new());
    verdict.tell(&reports, &statistics, |guest_never_ran| {
        never_ran = guest_never_ran;
        threads = context.let_go(guest_never_ran);
        threads.extend(context.stand_in(guest_never_ran));
    });
    // What the relay has not done when it dies is left to do here.
    let has_begun = context.qemu.get().is_some();
    if has_begun
        && !context.is_alone.get()
        && !context.over.get()
        && !context.relay_finishes(&events)
    {
        context.become_orphan();
        if never_ran {
            threads.extend(context.let_go(true));
        }
    }
    threads.extend(context.stand_in(never_ran));
    for thread in threads {
        // A panic of it was said.
        let _ = thread.join();
    }
}

impl Context {
    fn become_orphan(&self) {
        // A relay that can't reach QEMU says so, and then it goes.
        if !self.is_alone.replace(true) {
            self.orphan.set(Some(Orphan::new(self.qmp.as_ref())));
        }
    }

    /// Tell QEMU of the end; by threads that the process should outlive.
    fn let_go(&self, guest_never_ran: bool) -> Vec<JoinHandle<()>> {
        let Some(qemu) = self.qemu.get() else { return Vec::new() };
        if !guest_never_ran {
            return_path::settle(&qemu.main);
            return Vec::new();
        }
        // QEMU takes the end of its stream for a failure: the guest runs on. One with channels the relay
        // cancels before.
        if qemu.channels.is_empty() || self.is_alone.get() { qemu.end() } else { Vec::new() }
    }

    /// Do what the relay would, if it is gone; on a thread, because neither QEMU nor the peer should
    /// wait for the other.
    fn stand_in(&self, never_ran: bool) -> Option<JoinHandle<()>> {
        let (orphan, give_back) = (self.orphan.take()?, self.give_back.take());
        if self.qemu.get().is_none() && give_back.is_empty() {
            return None;
        }
        let guest_runs = self.guest_ran.get().unwrap_or(self.guest_runs.get());
        Some(thread::spawn(move || orphan.finish(&give_back, never_ran, guest_runs)))
    }
}

impl Context {
    /// What the relay says for the case that it dies.
    fn note(&self, order: Order) {
        match order {
            Order::Guest { runs } => self.guest_runs.set(runs),
            Order::GiveBack { commands } => drop(self.give_back.replace(commands)),
            Order::Over => self.over.set(true),
            _ => {}
        }
    }

    fn guest_was(&self, status: String) {
        self.guest_ran.set(Some(status == "running"));
        self.reports.send(&Report::GuestBefore { status });
    }

    /// Wait until the relay has done its part; false if it is gone before.
    fn relay_finishes(&self, events: &Receiver<Event>) -> bool {
        debug!("waiting for the relay to end QEMU's migration");
        loop {
            match events.recv() {
                Ok(Event::Order(order)) => self.note(order),
                Ok(Event::GuestBefore(status)) => self.guest_was(status),
                Ok(Event::RelayGone(_)) | Err(_) => return false,
                Ok(_) => {}
            }
            if self.over.get() {
                return true;
            }
        }
    }
}

impl Outgoing {
    fn handle(self, event: Event, context: &Context, events: &Receiver<Event>) -> Self {
        match (self, event) {
            (Self::Connecting, Event::Agreed(Ok(agreement))) => {
                context.statistics.set_up();
                info!("block lists agree");
                let options = &context.way.options;
                context.reports.send(&Report::Agreed(Agreed {
                    channels: agreement.channels(options),
                    announceable: agreement.announceable(options),
                    return_path: agreement.return_path(options),
                }));
                Self::Agreed(Box::new(agreement))
            }
            (Self::Agreed(agreement), Event::Take(Some(streams))) => {
                Self::start(*agreement, streams, context)
            }
            (state, Event::Take(_)) => {
                let error = MigrationError::Aborted("The relay's order is out of turn".into());
                Self::fail(state.link(), error, context, events)
            }
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
            (state, Event::RelayGone(_)) if !context.commitment.withdraw() => {
                context.become_orphan();
                state
            }
            (state, Event::RelayGone(reason)) => {
                context.become_orphan();
                Self::fail(state.link(), MigrationError::Aborted(reason), context, events)
            }
            (state, Event::Order(order @ (Order::Guest { .. } | Order::GiveBack { .. }))) => {
                context.note(order);
                state
            }
            (state, Event::GuestBefore(status)) => {
                context.guest_was(status);
                state
            }
            (state, Event::Order(Order::Pace { rate })) => {
                context.pacer.set(rate);
                state
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
            Self::Agreed(agreement) => Some(agreement.link),
            Self::Connecting | Self::Ended(_) => None,
        }
    }

    /// Take QEMU's stream.
    fn start(agreement: Agreement, streams: Streams, context: &Context) -> Self {
        let Agreement { link, receiver, blocks, pin_limit, .. } = agreement;
        let (answering, events) = (link.clone(), context.events.clone());
        let qemu = context.qemu.get_or_init(|| Arc::new(streams)).clone();
        let to_qemu = Arc::new(ToQemu::new(qemu.main.clone()));
        let return_path = to_qemu.clone();
        // A range that is needed, and the one that will be.
        let (answers, answered) = mpsc::sync_channel(2);
        thread::spawn(move || {
            answers::receive(receiver, &answering, &return_path, &answers, &events);
        });
        let (events, way) = (context.events.clone(), context.way.clone());
        let statistics = context.statistics.clone();
        let targets = Targets::new(blocks, answered, pin_limit, way.options.clone());
        let (pacer, counted) = (context.pacer.clone(), statistics.clone());
        let writer = Arc::new(Writer::new(link.clone(), targets, pacer, counted));
        let (commitment, reports) = (context.commitment.clone(), context.reports.clone());
        let pass_ram = move || {
            let passed = commitment.pass_ram();
            if passed {
                reports.send(&Report::PastRam);
            }
            passed
        };
        let channels = (!qemu.channels.is_empty()).then(|| {
            // Who has channels reads memory by itself.
            fill_holes(context, &writer);
            Channels::start(&qemu.channels, writer.clone(), &events)
        });
        thread::spawn(move || {
            let taken = way.open_return_path(writer.link(), &to_qemu, &events).and_then(|()| {
                let (main, to_qemu) = (&qemu.main, &to_qemu);
                intake::take(main, to_qemu, channels, &writer, &statistics, &events, pass_ram)
            });
            // As above: nobody waits for it any more.
            let _ = events.send(Event::StreamTaken(taken));
        });
        Self::Streaming(link)
    }

    /// End as failed.
    fn fail(
        link: Option<Arc<Link>>,
        error: MigrationError,
        context: &Context,
        events: &Receiver<Event>,
    ) -> Self {
        // At once: what comes in the meantime must not make the guest run there.
        let never_ran = context.commitment.withdraw();
        let error = last_words(&error, context, events).unwrap_or(error);
        Self::Ended(Verdict::failed(error, never_ran, link))
    }
}

/// Make large pages of the holes that QEMU reads, as long as something of it is written.
fn fill_holes(context: &Context, writer: &Arc<Writer>) {
    let (read, commitment) = (context.read.clone(), context.commitment.clone());
    let writer = Arc::downgrade(writer);
    let wants = move || writer.strong_count() > 0 && !commitment.is_withdrawn();
    let fill = move || read.iter().for_each(|region| region.fill_holes(&wants));
    // Without it, QEMU's reading takes longer.
    let _ = thread::Builder::new().name("holes".into()).spawn(fill);
}

/// When the connection has ended, the peer may have said why before, or another thread of ours know
/// it.
fn last_words(
    error: &MigrationError,
    context: &Context,
    events: &Receiver<Event>,
) -> Option<MigrationError> {
    let closed =
        |error: &MigrationError| matches!(error, MigrationError::Fabric(FabricError::Closed));
    match error {
        MigrationError::Fabric(error) if !error.leaves_connection() => {}
        _ => return None,
    }
    let deadline = Instant::now() + LAST_WORDS;
    // What a thread of ours says may be the consequence of what the peer says next.
    let mut known = None;
    loop {
        match events.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(Event::PeerFailed(other @ MigrationError::PeerFailed { .. })) => return Some(other),
            // A thread that was stopped because of this, and knows no more.
            Ok(Event::StreamTaken(Err(MigrationError::Aborted(_)))) => {}
            Ok(Event::PeerFailed(other) | Event::StreamTaken(Err(other)))
                if closed(error) && !closed(&other) =>
            {
                known.get_or_insert(other);
            }
            Ok(Event::RelayGone(_)) => context.become_orphan(),
            Ok(Event::Order(order)) => context.note(order),
            Ok(Event::GuestBefore(status)) => context.guest_was(status),
            Ok(_) => {}
            Err(_) => return known,
        }
    }
}

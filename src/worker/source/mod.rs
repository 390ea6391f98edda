//! The source's side: QEMU's stream in, RAM and the rest of the stream out.

mod context;
mod ending;
mod handshake;
mod multifd;
mod multifd_sync;
mod ram_writer;
mod rate_limit;
mod remote_blocks;
mod reply_reader;
mod stream_reader;
mod takeover;
#[cfg(test)]
mod tests;

use std::{
    cell::{Cell, OnceCell, RefCell},
    sync::{
        Arc,
        atomic::Ordering,
        mpsc::{self, Receiver, Sender},
    },
};

use tracing::{debug, info, warn};

use self::{
    context::{Context, Way, say_lost},
    ending::Ending,
    handshake::Agreement,
    multifd::MultifdChannels,
    ram_writer::RamWriter,
    remote_blocks::RemoteBlocks,
};
use super::{
    Block, Outcome, Result, error::MigrationError, link::Link, qemu_sockets::QemuSockets,
    relay_socket::Reports, return_path::ToQemu, run_state_machine, statistics::Statistics,
};
use crate::{
    address::Address,
    control::{Agreed, Options, Order, QmpSocket, Report},
    fabric::{Fabric, FabricError},
    patience::Patience,
    threads::{self, Lost},
    wire::Message,
};

/// What happens to an outgoing migration.
pub enum Event {
    /// From the relay.
    Order(Order),
    /// The relay is gone, or can't reach QEMU: why.
    RelayGone(String),
    /// Connected, and the block lists agree; or not.
    Agreed(Result<Agreement>),
    /// From the relay: QEMU's sockets; `None` if there were none.
    Take(Option<QemuSockets>),
    /// What the guest did before the switchover, as QEMU tells the destination.
    GuestBefore(String),
    /// QEMU's stream was read to its end, as far as that can be.
    StreamRead,
    /// QEMU's stream ended and all of it was sent; or not. The peer may still say what it makes of that.
    StreamTaken(Result<()>),
    /// The destination's QEMU completed.
    Acknowledged,
    /// The peer failed, or the connection, or the thread that listens to it: it will say no more.
    PeerFailed(MigrationError),
    /// Memory ahead of QEMU is large pages, as far as it can be; or nobody makes any.
    HolesFilled(std::result::Result<(), Lost>),
    /// A state has lasted as long as it may.
    Late,
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
    /// It has failed, unless somebody knows better.
    Ending(Ending),
    /// It is over.
    Ended(Outcome),
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
        takeover: Cell::default(),
        guest_runs: Cell::new(true),
        guest_ran: Cell::new(None),
        stream_read: Cell::new(false),
        over: Cell::new(false),
        cancelled: Cell::new(false),
        reports: reports.clone(),
        statistics: statistics.clone(),
        switchover: Arc::default(),
        rate_limit: Arc::default(),
        read,
        events: sender.clone(),
    };
    let connect =
        move || handshake::connect(&*way.fabric, &way.address, blocks, &way.options, &set_up);
    threads::start("connect", connect, move |agreed| {
        // The receiver is gone only when the migration has ended otherwise.
        let _ = sender.send(Event::Agreed(agreed.unwrap_or_else(|lost| Err(lost.into()))));
    });
    let step = |state: Outgoing, event| match state.handle(event, &context) {
        Outgoing::Ended(verdict) => Err(verdict),
        state => Ok(state),
    };
    let (start, patience, late) = (Outgoing::Connecting, Outgoing::patience, || Event::Late);
    let verdict = run_state_machine(start, &events, &reports, &statistics, patience, late, step);
    if context.is_alone.get() {
        // Nobody else will say it.
        match &verdict {
            Outcome::Done => info!("migration completed"),
            Outcome::Failed { error, guest_never_ran, .. } => {
                warn!(reason = %error, guest_never_ran, "migration failed");
            }
        }
    }
    let words = verdict.tell(&reports, &statistics);
    let never_ran = words.as_ref().is_some_and(|words| words.guest_never_ran);
    let mut threads = context.let_go(words);
    threads.extend(context.stand_in(never_ran, &events));
    // What the relay has not done when it dies is left to do here.
    if context.concerns_relay() {
        reports.flush();
        if !context.relay_finishes(&events) && never_ran {
            threads.extend(context.end_qemu());
        }
        threads.extend(context.stand_in(never_ran, &events));
    }
    for thread in threads {
        // A panic of it was said.
        let _ = thread.join();
    }
}

impl Outgoing {
    /// What a state that lasts only so long has left of it.
    fn patience(&mut self) -> Option<&mut Patience> {
        match self {
            Self::Ending(ending) => ending.patience.as_mut(),
            _ => None,
        }
    }

    fn handle(self, event: Event, context: &Context) -> Self {
        context.note(&event);
        let is_past_ram = context.switchover.is_past_ram();
        match (self, event) {
            (Self::Ending(ending), event) => ending.handle(event, is_past_ram),
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
            (Self::Connecting, Event::Agreed(Err(error))) => {
                Self::Ended(Outcome::failed(error, true, None))
            }
            (Self::Agreed(agreement), Event::Take(Some(streams))) => {
                Self::start(*agreement, streams, context)
            }
            (state, Event::Take(_)) => {
                let error = MigrationError::Aborted("The relay's order is out of turn".into());
                state.fail(error, context)
            }
            (Self::Streaming(link), Event::StreamTaken(Ok(()))) => Self::Confirming(link),
            (state @ Self::Streaming(_), Event::StreamTaken(Err(error))) => {
                state.fail(error, context)
            }
            // What QEMU still has to say the destination's QEMU needs no more.
            (Self::Streaming(link) | Self::Confirming(link), Event::Acknowledged)
                if is_past_ram =>
            {
                Self::done(&link)
            }
            (state @ Self::Streaming(_), Event::Acknowledged) => {
                let error = MigrationError::Peer("it confirmed an unfinished migration".into());
                state.fail(error, context)
            }
            // All that a stock destination says when it has loaded the guest.
            (
                Self::Confirming(link),
                Event::PeerFailed(MigrationError::Fabric(FabricError::Closed)),
            ) if link.is_stock() => Self::done(&link),
            (state, Event::PeerFailed(error)) => {
                let never_ran = context.switchover.withdraw();
                Self::Ending(Ending::unheard(error, never_ran, state.link()))
            }
            // The guest may come to run at the destination: what was begun goes on, so that QEMU gets to
            // know how it ends.
            (state, Event::RelayGone(reason) | Event::Order(Order::Abort { reason }))
                if !context.switchover.withdraw() =>
            {
                info!(reason, "the destination's verdict is awaited");
                state
            }
            (state, Event::RelayGone(reason) | Event::Order(Order::Abort { reason })) => {
                state.fail(MigrationError::Aborted(reason), context)
            }
            (state, Event::Order(Order::Cancel { reason })) => {
                match state.fail(MigrationError::Aborted(reason), context) {
                    Self::Ending(ending) => Self::Ending(ending.hurry()),
                    state => state,
                }
            }
            (state, Event::Order(Order::Pace { rate })) => {
                context.rate_limit.set(rate);
                state
            }
            // They are noted.
            (
                state,
                Event::Order(Order::Guest { .. } | Order::GiveBack { .. } | Order::Over)
                | Event::GuestBefore(_)
                | Event::StreamRead
                | Event::HolesFilled(_),
            ) => state,
            (state, Event::Order(order)) => {
                debug!(?order, "an order that means nothing to a source");
                state
            }
            // Late words of threads whose migration has moved on: a channel that QEMU breaks off when its
            // stream has ended, for one.
            (
                state,
                Event::Agreed(_) | Event::StreamTaken(_) | Event::Acknowledged | Event::Late,
            ) => state,
        }
    }

    /// The destination has the guest.
    fn done(link: &Link) -> Self {
        link.close();
        Self::Ended(Outcome::Done)
    }

    fn link(self) -> Option<Arc<Link>> {
        match self {
            Self::Streaming(link) | Self::Confirming(link) => Some(link),
            Self::Agreed(agreement) => Some(agreement.link),
            Self::Connecting | Self::Ending(_) | Self::Ended(_) => None,
        }
    }

    /// Take QEMU's stream.
    fn start(agreement: Agreement, streams: QemuSockets, context: &Context) -> Self {
        let Agreement { link, receiver, blocks, pin_limit, .. } = agreement;
        let (answering, events) = (link.clone(), context.events.clone());
        let qemu = context.qemu.get_or_init(|| Arc::new(streams)).clone();
        let to_qemu = Arc::new(ToQemu::new(qemu.main.clone()));
        let return_path = to_qemu.clone();
        // A range that is needed, and the one that will be.
        let (answers, answered) = mpsc::sync_channel(2);
        let lost = events.clone();
        let receive =
            move || reply_reader::receive(receiver, &answering, &return_path, &answers, &events);
        threads::start("reply reader", receive, move |end| say_lost(end, &lost));
        let (events, way) = (context.events.clone(), context.way.clone());
        let statistics = context.statistics.clone();
        let remote_blocks = RemoteBlocks::new(blocks, answered, pin_limit, way.options.clone());
        let (rate_limit, counted) = (context.rate_limit.clone(), statistics.clone());
        let writer = Arc::new(RamWriter::new(link.clone(), remote_blocks, rate_limit, counted));
        let try_commit = context.try_commit(&link);
        let channels = (!qemu.channels.is_empty()).then(|| {
            // Who has channels reads memory by itself.
            fill_holes(context, &writer);
            MultifdChannels::start(&qemu.channels, writer.clone(), &events)
        });
        let lost = events.clone();
        let take = move || {
            let main = &qemu.main;
            let (taken, rest) = match way.open_return_path(writer.link(), &to_qemu, &events) {
                Ok(()) => stream_reader::take(
                    main,
                    &to_qemu,
                    channels,
                    &writer,
                    &statistics,
                    &events,
                    try_commit,
                ),
                Err(error) => (Err(error), None),
            };
            let end = taken.is_ok().then(|| writer.link());
            // As above: nobody waits for it any more. It comes before whatever the destination says to
            // the end of the stream.
            let _ = events.send(Event::StreamTaken(taken));
            let end = end.filter(|link| !link.is_stock());
            let bytes = statistics.stream_bytes.load(Ordering::Relaxed);
            if let Some(Err(error)) = end.map(|link| link.send(&Message::StreamEnd { bytes })) {
                let _ = events.send(Event::PeerFailed(error));
            }
            // Nobody waits for the writer any more.
            drop(writer);
            if let Some(status) = rest.and_then(|rest| rest.guest_before(main)) {
                let _ = events.send(Event::GuestBefore(status));
            }
            let _ = events.send(Event::StreamRead);
        };
        threads::start("stream reader", take, move |end| {
            if let Err(error) = end {
                // As above.
                let _ = lost.send(Event::StreamTaken(Err(error.into())));
            }
        });
        Self::Streaming(link)
    }

    /// Fail for a reason of this side's.
    fn fail(self, error: MigrationError, context: &Context) -> Self {
        // At once: what comes in the meantime must not make the guest run there.
        let never_ran = context.switchover.withdraw();
        Self::Ending(Ending::of_ours(error, never_ran, self.link()))
    }
}

/// Make large pages of the holes that QEMU reads, as long as something of it is written.
fn fill_holes(context: &Context, writer: &Arc<RamWriter>) {
    let (read, switchover) = (context.read.clone(), context.switchover.clone());
    let writer = Arc::downgrade(writer);
    let wants = move || writer.strong_count() > 0 && !switchover.is_withdrawn();
    let fill = move || read.iter().for_each(|region| region.fill_holes(&wants));
    let events = context.events.clone();
    threads::start("prefault", fill, move |end| {
        // The receiver is gone only when the migration has ended otherwise.
        let _ = events.send(Event::HolesFilled(end));
    });
}

//! The source's side: QEMU's stream in, RAM and the rest of the stream out.

use std::{
    cell::{Cell, OnceCell, RefCell},
    sync::{
        Arc,
        atomic::Ordering,
        mpsc::{self, Receiver, Sender},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use tracing::{debug, info, warn};

use super::{
    Block, LastWords, Result, Verdict,
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
    threads::{self, Lost},
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
    /// The peer failed, or the connection, or a thread that listens to it.
    PeerFailed(MigrationError),
    /// Memory ahead of QEMU is large pages, as far as it can be; or nobody makes any.
    HolesFilled(std::result::Result<(), Lost>),
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
        let lost = events.clone();
        let receive = move || answers::receive_return_path(receiver, &return_path, &qemu, &events);
        threads::start("return path", receive, move |end| say_lost(end, &lost));
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
    let connect =
        move || agreement::connect(&*way.fabric, &way.address, blocks, &way.options, &set_up);
    threads::start("connect", connect, move |agreed| {
        // The receiver is gone only when the migration has ended otherwise.
        let _ = sender.send(Event::Agreed(agreed.unwrap_or_else(|lost| Err(lost.into()))));
    });
    let step = |state: Outgoing, event| match state.handle(event, &context, &events) {
        Outgoing::Ended(verdict) => Err(verdict),
        state => Ok(state),
    };
    // No state has a time of its own: fabric and relay see to it that a peer that is gone is noticed.
    let no_alarm = |_: &Outgoing| None;
    let verdict = lifetime(Outgoing::Connecting, &events, &reports, &statistics, no_alarm, step);
    let words = verdict.tell(&reports, &statistics);
    let never_ran = words.as_ref().is_some_and(|words| words.guest_never_ran);
    let mut threads = context.let_go(words);
    threads.extend(context.stand_in(never_ran));
    // What the relay has not done when it dies is left to do here.
    if context.qemu.get().is_some() {
        reports.flush();
        if !context.relay_finishes(&events) && never_ran {
            threads.extend(context.end_qemu());
        }
        threads.extend(context.stand_in(never_ran));
    }
    for thread in threads {
        // A panic of it was said.
        let _ = thread.join();
    }
}

/// A thread that listens to the peer is lost.
fn say_lost(end: std::result::Result<(), Lost>, events: &Sender<Event>) {
    if let Err(lost) = end {
        // The receiver is gone only when the migration has ended otherwise.
        let _ = events.send(Event::PeerFailed(lost.into()));
    }
}

impl Context {
    fn become_orphan(&self) {
        // A relay that can't reach QEMU says so, and then it goes.
        if !self.is_alone.replace(true) {
            self.orphan.set(Some(Orphan::new(self.qmp.as_ref())));
        }
    }

    /// What no state may miss.
    fn note(&self, event: &Event) {
        match event {
            Event::Order(Order::Guest { runs }) => self.guest_runs.set(*runs),
            Event::Order(Order::GiveBack { commands }) => {
                self.give_back.replace(commands.clone());
            }
            Event::GuestBefore(status) => {
                self.guest_ran.set(Some(status == "running"));
                self.reports.send(&Report::GuestBefore { status: status.clone() });
            }
            Event::Order(Order::Over) => self.over.set(true),
            Event::HolesFilled(Err(lost)) => warn!(%lost, "QEMU's reading takes longer"),
            _ => {}
        }
    }

    /// Let the peer and QEMU go, by threads that the process should outlive: neither should wait for the
    /// other.
    fn let_go(&self, words: Option<LastWords>) -> Vec<JoinHandle<()>> {
        let mut threads = Vec::new();
        match words {
            Some(words) if words.guest_never_ran => {
                // With channels the relay cancels before.
                let qemu = self.qemu.get();
                if qemu.is_some_and(|qemu| qemu.channels.is_empty() || self.is_alone.get()) {
                    threads.extend(self.end_qemu());
                }
                threads.extend(words.say(|| {}));
            }
            // The peer first: behind that nothing of the stream goes on, whoever reads it.
            Some(words) => threads.extend(words.say(self.settle())),
            None => threads.extend(threads::start("settle", self.settle(), |_| {})),
        }
        threads
    }

    /// QEMU takes the end of its stream for a failure: the guest runs on.
    fn end_qemu(&self) -> Vec<JoinHandle<()>> {
        self.qemu.get().map_or(Vec::new(), |qemu| qemu.end())
    }

    /// The guest may run at the destination: QEMU must not take the end for a failure. Where all went
    /// well, the last message of its return path may still have been on its way.
    fn settle(&self) -> impl FnOnce() + Send + 'static {
        let qemu = self.qemu.get().cloned();
        move || {
            if let Some(qemu) = qemu {
                return_path::settle(&qemu.main);
            }
        }
    }

    /// Wait until the relay has done its part; false if it is gone before.
    fn relay_finishes(&self, events: &Receiver<Event>) -> bool {
        if self.is_alone.get() || self.over.get() {
            // Who is alone has done all that there is to do.
            return true;
        }
        debug!("waiting for the relay to end QEMU's migration");
        loop {
            match events.recv() {
                Ok(Event::RelayGone(_)) | Err(_) => break,
                Ok(event) => self.note(&event),
            }
            if self.over.get() {
                return true;
            }
        }
        self.become_orphan();
        false
    }

    /// Before the first byte behind RAM leaves: the relay must know. False: the migration has failed.
    fn pass_ram(&self, link: &Arc<Link>) -> impl FnOnce() -> bool + Send + 'static {
        let (commitment, reports) = (self.commitment.clone(), self.reports.clone());
        let link = link.clone();
        move || {
            let passed = commitment.pass_ram();
            if passed {
                link.be_patient();
                reports.deliver(&Report::PastRam);
            }
            passed
        }
    }

    /// Do what the relay would, if it is gone; on a thread, because neither QEMU nor the peer should
    /// wait for the other.
    fn stand_in(&self, never_ran: bool) -> Option<JoinHandle<()>> {
        let (orphan, give_back) = (self.orphan.take()?, self.give_back.take());
        if self.qemu.get().is_none() && give_back.is_empty() {
            return None;
        }
        let guest_runs = self.guest_ran.get().unwrap_or(self.guest_runs.get());
        let finish = move || orphan.finish(&give_back, never_ran, guest_runs);
        // What it could not do was said, or is by its panic.
        threads::start("orphan", finish, |_| {})
    }
}

impl Outgoing {
    fn handle(self, event: Event, context: &Context, events: &Receiver<Event>) -> Self {
        context.note(&event);
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
                state.fail(error, context, events)
            }
            (Self::Connecting, Event::Agreed(Err(error))) => {
                Self::Ended(Verdict::failed(error, true, None))
            }
            (Self::Streaming(link), Event::StreamTaken(Ok(()))) => Self::Confirming(link),
            (Self::Streaming(link), Event::StreamTaken(Err(error))) => {
                Self::Streaming(link).fail(error, context, events)
            }
            (Self::Confirming(link), Event::Acknowledged) => {
                link.close();
                Self::Ended(Verdict::Done)
            }
            // What QEMU still has to say the destination's QEMU needs no more.
            (Self::Streaming(link), Event::Acknowledged) if context.commitment.is_past_ram() => {
                link.close();
                Self::Ended(Verdict::Done)
            }
            (Self::Streaming(link), Event::Acknowledged) => {
                let error = MigrationError::Peer("it confirmed an unfinished migration".into());
                Self::Streaming(link).fail(error, context, events)
            }
            // All that a stock destination says when it has loaded the guest.
            (
                Self::Confirming(link),
                Event::PeerFailed(MigrationError::Fabric(FabricError::Closed)),
            ) if link.is_stock() => {
                link.close();
                Self::Ended(Verdict::Done)
            }
            (state, Event::PeerFailed(error)) => state.fail(error, context, events),
            (state, Event::Order(Order::Abort { reason })) => {
                state.fail(MigrationError::Aborted(reason), context, events)
            }
            // The guest may be running at the destination: the verdict is waited for, so that
            // QEMU gets to know how it ends.
            (state, Event::RelayGone(_)) if !context.commitment.withdraw() => {
                context.become_orphan();
                state
            }
            (state, Event::RelayGone(reason)) => {
                context.become_orphan();
                state.fail(MigrationError::Aborted(reason), context, events)
            }
            // They are noted.
            (
                state,
                Event::Order(Order::Guest { .. } | Order::GiveBack { .. } | Order::Over)
                | Event::GuestBefore(_)
                | Event::HolesFilled(_),
            ) => state,
            (state, Event::Order(Order::Pace { rate })) => {
                context.pacer.set(rate);
                state
            }
            (state, Event::Order(order)) => {
                warn!(?order, "an order that means nothing to a source");
                state
            }
            // Late words of threads whose migration has moved on: a channel that QEMU breaks off when its
            // stream has ended, for one.
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
        let lost = events.clone();
        let receive =
            move || answers::receive(receiver, &answering, &return_path, &answers, &events);
        threads::start("answers", receive, move |end| say_lost(end, &lost));
        let (events, way) = (context.events.clone(), context.way.clone());
        let statistics = context.statistics.clone();
        let targets = Targets::new(blocks, answered, pin_limit, way.options.clone());
        let (pacer, counted) = (context.pacer.clone(), statistics.clone());
        let writer = Arc::new(Writer::new(link.clone(), targets, pacer, counted));
        let pass_ram = context.pass_ram(&link);
        let channels = (!qemu.channels.is_empty()).then(|| {
            // Who has channels reads memory by itself.
            fill_holes(context, &writer);
            Channels::start(&qemu.channels, writer.clone(), &events)
        });
        let lost = events.clone();
        let take = move || {
            let taken = way.open_return_path(writer.link(), &to_qemu, &events).and_then(|()| {
                let (main, to_qemu) = (&qemu.main, &to_qemu);
                intake::take(main, to_qemu, channels, &writer, &statistics, &events, pass_ram)
            });
            let end = taken.is_ok().then(|| writer.link());
            // As above: nobody waits for it any more. It comes before whatever the destination says to
            // the end of the stream.
            let _ = events.send(Event::StreamTaken(taken));
            let end = end.filter(|link| !link.is_stock());
            let bytes = statistics.stream_bytes.load(Ordering::Relaxed);
            if let Some(Err(error)) = end.map(|link| link.send(&Message::StreamEnd { bytes })) {
                let _ = events.send(Event::PeerFailed(error));
            }
        };
        threads::start("intake", take, move |end| say_lost(end, &lost));
        Self::Streaming(link)
    }

    /// End as failed, unless the destination is just saying that it has the guest.
    fn fail(self, error: MigrationError, context: &Context, events: &Receiver<Event>) -> Self {
        // At once: what comes in the meantime must not make the guest run there.
        let never_ran = context.commitment.withdraw();
        let link = self.link();
        match last_words(error, context, events) {
            Some(error) => Self::Ended(Verdict::failed(error, never_ran, link)),
            None => {
                link.inspect(|link| link.close());
                Self::Ended(Verdict::Done)
            }
        }
    }
}

/// Make large pages of the holes that QEMU reads, as long as something of it is written.
fn fill_holes(context: &Context, writer: &Arc<Writer>) {
    let (read, commitment) = (context.read.clone(), context.commitment.clone());
    let writer = Arc::downgrade(writer);
    let wants = move || writer.strong_count() > 0 && !commitment.is_withdrawn();
    let fill = move || read.iter().for_each(|region| region.fill_holes(&wants));
    let events = context.events.clone();
    threads::start("holes", fill, move |end| {
        // The receiver is gone only when the migration has ended otherwise.
        let _ = events.send(Event::HolesFilled(end));
    });
}

/// What is said of a migration that ends of `error`; nothing if the destination has the guest, and says so
/// in what has come already.
///
/// When the connection has ended, the peer may have said why before, or another thread of ours know it.
fn last_words(
    error: MigrationError,
    context: &Context,
    events: &Receiver<Event>,
) -> Option<MigrationError> {
    let closed =
        |error: &MigrationError| matches!(error, MigrationError::Fabric(FabricError::Closed));
    let is_cut = matches!(&error, MigrationError::Fabric(error) if !error.leaves_connection());
    let deadline = Instant::now() + if is_cut { LAST_WORDS } else { Duration::ZERO };
    // What a thread of ours says may be the consequence of what the peer says next.
    let mut known = None;
    while let Ok(event) = events.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
        context.note(&event);
        match event {
            Event::Acknowledged if context.commitment.is_past_ram() => return None,
            Event::PeerFailed(other @ MigrationError::PeerFailed { .. }) if is_cut => {
                return Some(other);
            }
            // A thread that was stopped because of this, and knows no more.
            Event::StreamTaken(Err(MigrationError::Aborted(_))) => {}
            Event::PeerFailed(other) | Event::StreamTaken(Err(other))
                if closed(&error) && !closed(&other) =>
            {
                known.get_or_insert(other);
            }
            Event::RelayGone(_) => context.become_orphan(),
            _ => {}
        }
    }
    Some(known.unwrap_or(error))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::{
        fabric::tcp::Tcp,
        migration::{idle_link, messages::FabricKind},
    };

    fn context(past_ram: bool) -> (Context, Receiver<Event>) {
        let (events, received) = mpsc::channel();
        let options = Options {
            pin_all: false,
            return_path: false,
            stall_timeout: 60,
            peer_timeout: 60,
            connections: 1,
            channels: 0,
            pin_limit: None,
            cpus: Vec::new(),
            fabric: FabricKind::Tcp,
        };
        let fabric = Arc::new(Tcp { stall_timeout: Duration::from_secs(60), connections: 1 });
        let address = Address { host: "127.0.0.1".into(), port: 1 };
        let context = Context {
            way: Arc::new(Way { fabric, address, options }),
            qemu: OnceCell::new(),
            give_back: RefCell::default(),
            qmp: None,
            is_alone: Cell::new(false),
            orphan: Cell::default(),
            guest_runs: Cell::new(true),
            guest_ran: Cell::new(None),
            over: Cell::new(false),
            reports: Arc::new(Reports::new(UnixStream::pair().unwrap().0)),
            statistics: Statistics::new("tcp"),
            commitment: Arc::default(),
            pacer: Arc::default(),
            read: Vec::new(),
            events,
        };
        assert!(!past_ram || context.commitment.pass_ram());
        (context, received)
    }

    fn cut() -> MigrationError {
        FabricError::Closed.into()
    }

    fn all_events() -> Vec<(&'static str, Event)> {
        let abort = Order::Abort { reason: "told".into() };
        let told = MigrationError::PeerFailed { text: "no".into(), guest_never_ran: false };
        let lost = Lost::NotStarted { thread: "answers" };
        vec![
            ("Abort", Event::Order(abort)),
            ("Guest", Event::Order(Order::Guest { runs: false })),
            ("Pace", Event::Order(Order::Pace { rate: None })),
            ("Over", Event::Order(Order::Over)),
            ("RelayGone", Event::RelayGone("gone".into())),
            ("GiveBack", Event::Order(Order::GiveBack { commands: Vec::new() })),
            ("GuestBefore", Event::GuestBefore("running".into())),
            ("Take", Event::Take(None)),
            ("StreamTaken: ok", Event::StreamTaken(Ok(()))),
            ("StreamTaken: cut", Event::StreamTaken(Err(cut()))),
            ("PeerFailed: told", Event::PeerFailed(told)),
            ("PeerFailed: lost", Event::PeerFailed(lost.into())),
            ("PeerFailed: cut", Event::PeerFailed(cut())),
            ("HolesFilled", Event::HolesFilled(Ok(()))),
        ]
    }

    fn states(link: &Arc<Link>) -> [Outgoing; 2] {
        [Outgoing::Streaming(link.clone()), Outgoing::Confirming(link.clone())]
    }

    /// All pairs, to a destination that takes nothing: none waits for it, but for its last words.
    #[test]
    fn no_state_waits_and_none_lies() {
        let (link, _receiver) = idle_link::link();
        for past_ram in [false, true] {
            for state in 0..2 {
                for event in 0..all_events().len() {
                    let (context, events) = context(past_ram);
                    let (name, event) = all_events().swap_remove(event);
                    let [streaming, confirming] = states(&link);
                    let state = if state == 0 { streaming } else { confirming };
                    let begun = Instant::now();
                    let next = state.handle(event, &context, &events);
                    assert!(begun.elapsed() < LAST_WORDS * 2, "{name}");
                    if let Outgoing::Ended(Verdict::Failed { guest_never_ran, .. }) = next {
                        assert_eq!(guest_never_ran, !past_ram, "{name}");
                    }
                }
            }
        }
        link.close();
    }

    /// The destination's word counts, whatever came just before it.
    #[test]
    fn an_acknowledgement_is_never_lost() {
        for state in 0..2 {
            for event in 0..all_events().len() {
                let (link, _receiver) = idle_link::link();
                let (context, events) = context(true);
                let (name, event) = all_events().swap_remove(event);
                if name == "PeerFailed: told" {
                    // It has said otherwise.
                    continue;
                }
                context.events.send(Event::Acknowledged).unwrap();
                let [streaming, confirming] = states(&link);
                let state = if state == 0 { streaming } else { confirming };
                let mut next = state.handle(event, &context, &events);
                if let Ok(event) = events.try_recv() {
                    next = next.handle(event, &context, &events);
                }
                assert!(matches!(next, Outgoing::Ended(Verdict::Done)), "{name}");
            }
        }
    }

    /// But not before the guest can be there.
    #[test]
    fn nobody_confirms_what_was_not_sent() {
        let (link, _receiver) = idle_link::link();
        let (context, events) = context(false);
        let next = Outgoing::Streaming(link).handle(Event::Acknowledged, &context, &events);
        let Outgoing::Ended(Verdict::Failed { guest_never_ran: true, .. }) = next else { panic!() };
    }

    /// What a client has stopped after the failure nobody starts.
    #[test]
    fn orders_count_behind_the_verdict() {
        let (context, events) = context(false);
        context.events.send(Event::Order(Order::Guest { runs: false })).unwrap();
        context.events.send(Event::RelayGone("gone".into())).unwrap();
        assert!(!context.relay_finishes(&events));
        assert!(!context.guest_runs.get() && context.is_alone.get());
        let (context, events) = self::context(false);
        context.events.send(Event::Order(Order::Over)).unwrap();
        assert!(context.relay_finishes(&events));
    }
}

//! The destination's side: a source is let in, RAM lands, QEMU gets the rest.

use std::{
    cell::Cell,
    net::Shutdown,
    os::unix::net::UnixStream,
    sync::{
        Arc,
        mpsc::{Receiver, Sender},
    },
    time::{Duration, Instant},
};

use tracing::warn;

use super::{
    Block, Result, Verdict,
    commitment::Commitment,
    control::Reports,
    error::MigrationError,
    landing, lifetime,
    link::Link,
    messages::{Address, Agreed, Options, Order, Report},
    statistics::Statistics,
};
use crate::{
    fabric::{Fabric, Handle},
    threads::{self, Lost},
    wire::Message,
};

/// How long to wait for what the relay knows of a QEMU that takes no more of the stream.
const RELAY_VERDICT: Duration = Duration::from_secs(5);

/// How long a stock source may take to close when the guest is loaded. A helper is waited for as long as for
/// anything else that is due.
const FAREWELL: Duration = Duration::from_secs(5);

/// What happens to an incoming migration.
pub enum Event {
    /// From the relay.
    Order(Order),
    /// The relay is gone, or can't be heard any more.
    RelayGone(Option<Lost>),
    /// A source connected, and the block lists agree.
    Agreed(Arc<Link>),
    /// It went again before it sent anything.
    Withdrawn(Arc<Link>),
    /// It begins to send, and is the one that is served.
    Begun(Arc<Link>),
    /// The source has sent all of the stream, and RAM has landed.
    StreamEnded,
    /// QEMU takes no more of the stream, but has all that is to come of RAM.
    QemuLeft(MigrationError),
    /// The source ended the connection after its stream, or the migration failed.
    Served(Result<()>),
    /// The connection is closed.
    Closed,
    /// Something else failed.
    Failed(MigrationError),
    /// QEMU's return path leads nowhere any more.
    ReturnPathLost(MigrationError),
    /// The final acknowledgement is on its way, or can't be.
    Told(Result<()>),
    /// A state has lasted as long as it may.
    Late,
}

/// Where an incoming migration stands.
enum Incoming {
    /// Waiting for a source to begin; with these the block lists agree.
    Listening(Vec<Arc<Link>>),
    /// A source sends.
    Receiving(Arc<Link>),
    /// QEMU loads what is left of the stream.
    Loading(Arc<Link>),
    /// Something failed: whether the guest runs is QEMU's verdict, which the relay will hear.
    Judging {
        link: Arc<Link>,
        error: MigrationError,
        /// When it may be given up, because QEMU has not got all of RAM.
        until: Option<Instant>,
    },
    /// The relay is gone when QEMU may have all of RAM: it gets all of the stream, and nobody knows its
    /// verdict.
    Orphaned(Arc<Link>, MigrationError),
    /// QEMU has the guest, and the source still sends what QEMU needs no more. It does not listen before.
    Completed(Arc<Link>),
    /// The source is being told, until then.
    Telling(Arc<Link>, Instant),
    /// It is over.
    Ended(Verdict),
}

/// What all states need.
struct Context {
    qemu: Arc<UnixStream>,
    reports: Arc<Reports>,
    commitment: Arc<Commitment>,
    listening: Handle,
    stall_timeout: Duration,
    /// The source sends nothing more.
    sent: Cell<bool>,
    /// It has closed.
    closed: Cell<bool>,
    /// Its QEMU hears nothing of this one any more.
    mute: Cell<bool>,
    events: Sender<Event>,
}

/// Run one to its end.
pub fn run(
    fabric: &dyn Fabric,
    address: &Address,
    blocks: Vec<Block>,
    options: Options,
    qemu: UnixStream,
    reports: Arc<Reports>,
    (sender, events): (Sender<Event>, Receiver<Event>),
) {
    let statistics = Statistics::new(fabric.name());
    let listener = match fabric.listen(address) {
        Ok(listener) => listener,
        Err(error) => {
            Verdict::failed(error.into(), true, None).tell(&reports, &statistics);
            return;
        }
    };
    reports.send(&Report::Listening { address: listener.address().clone() });
    let qemu = Arc::new(qemu);
    let context = Context {
        qemu: qemu.clone(),
        reports: reports.clone(),
        commitment: Arc::default(),
        listening: listener.handle(),
        stall_timeout: options.stall_timeout(),
        sent: Cell::new(false),
        closed: Cell::new(false),
        mute: Cell::new(false),
        events: sender.clone(),
    };
    let serving = Arc::new(landing::Context {
        qemu,
        blocks,
        options,
        statistics: statistics.clone(),
        commitment: context.commitment.clone(),
        events: sender.clone(),
    });
    let serve = move || landing::serve(listener, &serving);
    threads::start("landing", serve, move |served| {
        if let Err(error) = served.unwrap_or_else(|lost| Err(lost.into())) {
            // The receiver is gone only when the migration has ended otherwise.
            let _ = sender.send(Event::Served(Err(error)));
        }
    });
    let step = |state: Incoming, event| match state.handle(event, &context) {
        Incoming::Ended(verdict) => Err(verdict),
        state => Ok(state),
    };
    let start = Incoming::Listening(Vec::new());
    let verdict = lifetime(start, &events, &reports, &statistics, Incoming::alarm, step);
    let Some(words) = verdict.tell(&reports, &statistics) else { return };
    // It fails only when QEMU has closed its end.
    let _ = context.qemu.shutdown(Shutdown::Both);
    if let Some(saying) = words.say(|| {}) {
        // A panic of it was said.
        let _ = saying.join();
    }
}

impl Incoming {
    /// How long a state may last, and what it is told then.
    fn alarm(&self) -> Option<(Instant, Event)> {
        match self {
            Self::Judging { until: Some(until), .. } | Self::Telling(_, until) => {
                Some((*until, Event::Late))
            }
            _ => None,
        }
    }

    fn handle(self, event: Event, context: &Context) -> Self {
        context.note(&event);
        match (self, event) {
            // Whatever else comes: the guest is here.
            (Self::Telling(link, until), event) => Self::tell_on(link, until, event, context),
            (Self::Completed(link), _) => Self::confirm(link, context),
            (
                Self::Receiving(link) | Self::Loading(link) | Self::Judging { link, .. },
                Event::Order(Order::QemuCompleted),
            ) => Self::confirm(link, context),
            (state @ Self::Judging { .. }, event) => state.judge(event, context),
            (
                Self::Orphaned(link, error),
                Event::StreamEnded | Event::QemuLeft(_) | Event::Served(_) | Event::Order(_),
            ) => Self::Loading(link).fail(error, false, context),
            (state @ Self::Orphaned(..), _) => state,
            (state, Event::Order(order)) => state.obey(order, context),
            (state, event) => state.proceed(event, context),
        }
    }

    /// What happens as long as all goes well, and how that ends.
    fn proceed(self, event: Event, context: &Context) -> Self {
        match (self, event) {
            (Self::Listening(mut agreed), Event::Agreed(link)) => {
                context.reports.send(&Report::Agreed(Agreed::default()));
                agreed.push(link);
                Self::Listening(agreed)
            }
            (Self::Listening(mut agreed), Event::Withdrawn(link)) => {
                agreed.retain(|known| !Arc::ptr_eq(known, &link));
                Self::Listening(agreed)
            }
            (Self::Listening(_), Event::Begun(link)) => Self::Receiving(link),
            (Self::Receiving(link), Event::StreamEnded) => {
                context.reports.send(&Report::StreamEnded);
                Self::Loading(link)
            }
            (Self::Receiving(link), Event::QemuLeft(error)) => {
                // The relay asks QEMU why.
                context.reports.send(&Report::StreamEnded);
                Self::Judging { link, error, until: None }
            }
            (Self::Receiving(link), Event::Served(Err(error @ MigrationError::Qemu(_)))) => {
                context.reports.send(&Report::StreamEnded);
                Self::Judging { link, error, until: Some(Instant::now() + RELAY_VERDICT) }
            }
            (Self::Receiving(link), Event::ReturnPathLost(error))
                if context.commitment.is_past_ram() =>
            {
                // QEMU may get the guest without it. The source's QEMU ends its stream only when it hears
                // something there.
                context.reports.send(&Report::StreamEnded);
                Self::Judging { link, error, until: None }
            }
            (state, Event::Failed(error)) if context.commitment.is_past_ram() => {
                warn!(%error, "QEMU's verdict is awaited");
                state
            }
            (state @ Self::Loading(_), Event::ReturnPathLost(error)) => {
                warn!(%error, "QEMU's verdict is awaited");
                state
            }
            (
                state,
                Event::Served(Err(error)) | Event::Failed(error) | Event::ReturnPathLost(error),
            ) => state.fail_here(error, context),
            (state, Event::RelayGone(lost)) => state.orphan(lost, context),
            // The source closed before QEMU completed: only QEMU's end decides now.
            (state, Event::Served(Ok(())) | Event::Closed) => state,
            // These belong to other states.
            (
                state,
                Event::Order(_)
                | Event::Agreed(_)
                | Event::Withdrawn(_)
                | Event::Begun(_)
                | Event::StreamEnded
                | Event::QemuLeft(_)
                | Event::Told(_)
                | Event::Late,
            ) => state,
        }
    }

    /// An order of the relay's, unless it says that QEMU has completed.
    fn obey(self, order: Order, context: &Context) -> Self {
        match order {
            Order::QemuFailed { reason, guest_never_ran } => {
                self.fail(MigrationError::Aborted(reason), guest_never_ran, context)
            }
            // The relay goes on asking QEMU for its verdict as long as it can.
            Order::Abort { .. } if context.commitment.is_past_ram() => self,
            Order::Abort { reason } => self.fail_here(MigrationError::Aborted(reason), context),
            order => {
                warn!(?order, "an order that means nothing to a destination");
                self
            }
        }
    }

    /// Waiting for QEMU's verdict, when something has failed.
    fn judge(self, event: Event, context: &Context) -> Self {
        let Self::Judging { link, error, until } = self else { return self };
        match event {
            Event::Order(Order::QemuFailed { reason, guest_never_ran }) => {
                // What the relay knows of QEMU is better than that it stopped to read.
                let error = match error {
                    MigrationError::Qemu(_) => MigrationError::Aborted(reason),
                    error => error,
                };
                Self::Loading(link).fail(error, guest_never_ran, context)
            }
            Event::RelayGone(_) | Event::Late => {
                Self::Loading(link).fail(error, context.commitment.withdraw(), context)
            }
            _ => Self::Judging { link, error, until },
        }
    }

    /// The relay is gone.
    fn orphan(self, lost: Option<Lost>, context: &Context) -> Self {
        let gone =
            "The destination's helper is gone; start it beside a new QEMU there, and migrate again";
        let reason = lost.map_or_else(|| gone.to_owned(), |lost| lost.to_string());
        let error = MigrationError::Aborted(reason);
        match self {
            Self::Receiving(link) if !context.commitment.withdraw() => Self::Orphaned(link, error),
            Self::Loading(_) => self.fail(error, false, context),
            state => state.fail_here(error, context),
        }
    }

    /// QEMU has the guest. The source must know, once it listens.
    fn confirm(link: Arc<Link>, context: &Context) -> Self {
        if !context.sent.get() && !context.mute.get() {
            return Self::Completed(link);
        }
        if link.is_stock() {
            // It closes at its stream's end, or when its return path says so.
            let closed = context.closed.get();
            let until = Instant::now() + FAREWELL;
            return if closed { Self::done(&link) } else { Self::Telling(link, until) };
        }
        if context.closed.get() {
            warn!("the source is gone, and does not know that the guest is here");
            return Self::done(&link);
        }
        let (telling, events) = (link.clone(), context.events.clone());
        let tell = move || telling.send(&Message::FinalAck);
        threads::start("final ack", tell, move |told| {
            // The receiver is gone only when the migration has ended otherwise.
            let _ = events.send(Event::Told(told.unwrap_or_else(|lost| Err(lost.into()))));
        });
        Self::Telling(link, Instant::now() + context.stall_timeout)
    }

    /// Wait until the source has closed: its acknowledgement has arrived then.
    fn tell_on(link: Arc<Link>, until: Instant, event: Event, context: &Context) -> Self {
        match event {
            Event::Told(Err(error)) => {
                warn!(%error, "the source could not be told of the completion");
                Self::done(&link)
            }
            Event::Late if !link.is_stock() => {
                warn!("the source did not say that it knows of the completion");
                Self::done(&link)
            }
            Event::Late => Self::done(&link),
            _ if context.closed.get() => Self::done(&link),
            _ => Self::Telling(link, until),
        }
    }

    fn done(link: &Link) -> Self {
        link.close();
        Self::Ended(Verdict::Done)
    }

    /// Of sources that have agreed.
    fn links(self) -> Vec<Arc<Link>> {
        match self {
            Self::Receiving(link) | Self::Loading(link) | Self::Orphaned(link, _) => vec![link],
            Self::Judging { link, .. } | Self::Completed(link) | Self::Telling(link, _) => {
                vec![link]
            }
            Self::Listening(agreed) => agreed,
            Self::Ended(_) => Vec::new(),
        }
    }

    /// End as failed for a reason of the worker's own, or let QEMU decide.
    fn fail_here(self, error: MigrationError, context: &Context) -> Self {
        match self {
            Self::Receiving(link) | Self::Loading(link) if !context.commitment.withdraw() => {
                // A QEMU that lacks a part of the stream fails now. It may have closed its end.
                let _ = context.qemu.shutdown(Shutdown::Write);
                context.reports.send(&Report::StreamEnded);
                Self::Judging { link, error, until: None }
            }
            state => state.fail(error, context.commitment.withdraw(), context),
        }
    }

    /// End as failed.
    fn fail(self, error: MigrationError, never_ran: bool, context: &Context) -> Self {
        context.listening.close();
        Self::Ended(Verdict::failed(error, never_ran, self.links()))
    }
}

impl Context {
    /// What no state may miss.
    fn note(&self, event: &Event) {
        let sent = matches!(event, Event::StreamEnded | Event::Served(_) | Event::Closed);
        let closed = matches!(event, Event::Served(Ok(())) | Event::Closed);
        self.sent.set(self.sent.get() || sent);
        self.closed.set(self.closed.get() || closed);
        self.mute.set(self.mute.get() || matches!(event, Event::ReturnPathLost(_)));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;
    use crate::migration::idle_link;

    fn context(past_ram: bool) -> (Context, Receiver<Event>) {
        let ((qemu, _), (socket, _)) = (UnixStream::pair().unwrap(), UnixStream::pair().unwrap());
        let (events, received) = mpsc::channel();
        let context = Context {
            qemu: Arc::new(qemu),
            reports: Arc::new(Reports::new(socket)),
            commitment: Arc::default(),
            listening: Handle::new(|| {}),
            stall_timeout: Duration::from_secs(60),
            sent: Cell::new(false),
            closed: Cell::new(false),
            mute: Cell::new(false),
            events,
        };
        assert!(!past_ram || context.commitment.pass_ram());
        (context, received)
    }

    fn peer() -> MigrationError {
        MigrationError::Peer("it is odd".into())
    }

    fn qemu() -> MigrationError {
        MigrationError::Qemu("stopped to read".into())
    }

    /// Every state that has a source.
    fn states(link: &Arc<Link>) -> Vec<(&'static str, Incoming)> {
        let judging = |until| Incoming::Judging { link: link.clone(), error: peer(), until };
        vec![
            ("receiving", Incoming::Receiving(link.clone())),
            ("loading", Incoming::Loading(link.clone())),
            ("judging", judging(None)),
            ("judging for some time", judging(Some(Instant::now()))),
            ("orphaned", Incoming::Orphaned(link.clone(), peer())),
        ]
    }

    /// Those behind QEMU's `completed`.
    fn completed(link: &Arc<Link>) -> Vec<(&'static str, Incoming)> {
        vec![
            ("completed", Incoming::Completed(link.clone())),
            ("telling", Incoming::Telling(link.clone(), Instant::now())),
        ]
    }

    /// Every event that may come when a source has begun.
    fn all_events() -> Vec<(&'static str, Event)> {
        let failed = Order::QemuFailed { reason: "it failed".into(), guest_never_ran: false };
        let lost = Lost::NotStarted { thread: "orders" };
        vec![
            ("QemuCompleted", Event::Order(Order::QemuCompleted)),
            ("QemuFailed", Event::Order(failed)),
            ("Abort", Event::Order(Order::Abort { reason: "told".into() })),
            ("RelayGone", Event::RelayGone(None)),
            ("orders lost", Event::RelayGone(Some(lost))),
            ("StreamEnded", Event::StreamEnded),
            ("QemuLeft", Event::QemuLeft(qemu())),
            ("Served: ok", Event::Served(Ok(()))),
            ("Served: peer", Event::Served(Err(peer()))),
            ("Served: QEMU", Event::Served(Err(qemu()))),
            ("Closed", Event::Closed),
            ("Failed", Event::Failed(peer())),
            ("ReturnPathLost", Event::ReturnPathLost(peer())),
            ("Told: ok", Event::Told(Ok(()))),
            ("Told: peer", Event::Told(Err(peer()))),
            ("Late", Event::Late),
        ]
    }

    /// All pairs, to a source that takes nothing: none waits for it, and none says that the guest never
    /// ran when QEMU may have it.
    #[test]
    fn no_state_waits_and_none_lies() {
        for past_ram in [false, true] {
            let (link, _receiver) = idle_link::link();
            let count = states(&link).len();
            for state in 0..count {
                for event in 0..all_events().len() {
                    let (context, _events) = context(past_ram);
                    let (state_name, state) = states(&link).swap_remove(state);
                    let (event_name, event) = all_events().swap_remove(event);
                    let begun = Instant::now();
                    let next = state.handle(event, &context);
                    let pair = format!("{state_name}, {event_name}, past RAM: {past_ram}");
                    assert!(begun.elapsed() < Duration::from_secs(1), "{pair}");
                    if let Incoming::Ended(Verdict::Failed { guest_never_ran, .. }) = next {
                        assert!(!(guest_never_ran && past_ram), "{pair}");
                    }
                }
            }
            link.close();
        }
    }

    /// Wherever it comes, and whatever comes then, the guest is here.
    #[test]
    fn what_qemu_has_completed_stays_so() {
        let (link, _receiver) = idle_link::link();
        for (name, state) in states(&link).into_iter().filter(|(name, _)| *name != "orphaned") {
            let (context, _events) = context(true);
            let next = state.handle(Event::Order(Order::QemuCompleted), &context);
            assert!(matches!(next, Incoming::Completed(_)), "{name}");
        }
        for state in 0..2 {
            for event in 0..all_events().len() {
                let (context, _events) = context(true);
                let (state_name, state) = completed(&link).swap_remove(state);
                let (event_name, event) = all_events().swap_remove(event);
                let next = state.handle(event, &context);
                let failed = matches!(next, Incoming::Ended(Verdict::Failed { .. }));
                assert!(!failed, "{state_name}, {event_name}");
            }
        }
    }

    /// QEMU needs no more of the stream and completes; the source hears that when it has sent all.
    #[test]
    fn the_source_is_told_when_it_listens() {
        let (link, _receiver) = idle_link::link();
        let (context, _events) = context(true);
        let state = Incoming::Receiving(link.clone());
        let state = state.handle(Event::QemuLeft(qemu()), &context);
        let state = state.handle(Event::Order(Order::QemuCompleted), &context);
        assert!(matches!(state, Incoming::Completed(_)));
        let state = state.handle(Event::StreamEnded, &context);
        assert!(matches!(state, Incoming::Telling(..)));
        let state = state.handle(Event::Told(Ok(())), &context);
        assert!(matches!(state, Incoming::Telling(..)));
        let state = state.handle(Event::Served(Ok(())), &context);
        assert!(matches!(state, Incoming::Ended(Verdict::Done)));
    }

    /// Without its return path the source's QEMU never ends its stream.
    #[test]
    fn the_source_is_told_at_once_when_the_return_path_is_lost() {
        let (link, _receiver) = idle_link::link();
        let (context, _events) = context(true);
        let state = Incoming::Receiving(link.clone());
        let state = state.handle(Event::ReturnPathLost(peer()), &context);
        let state = state.handle(Event::Order(Order::QemuCompleted), &context);
        assert!(matches!(state, Incoming::Telling(..)));
        link.close();
    }
}

//! The destination's side: a source is let in, RAM lands, QEMU gets the rest.

mod acceptor;
mod handshake;
pub(super) mod inquiry;
pub(super) mod receiver;
mod seat;
#[cfg(test)]
mod tests;

use std::{
    cell::Cell,
    net::Shutdown,
    os::unix::net::UnixStream,
    sync::{
        Arc,
        mpsc::{Receiver, Sender},
    },
    time::Duration,
};

use tracing::{debug, warn};

use self::inquiry::Inquiry;
use super::{
    Outcome, Result, error::MigrationError, link::Link, patience_of, relay_socket::Reports,
    run_state_machine, statistics::Statistics,
};
use crate::{
    address::Address,
    control::{Agreed, Options, Order, Report},
    fabric::{Fabric, Handle},
    patience::Patience,
    proto::switchover::Switchover,
    threads::{self, Lost},
    wire::Message,
};

/// How long to wait for what the relay knows of a QEMU that takes no more of the stream.
const RELAY_VERDICT: Duration = Duration::from_secs(5);

/// How long a stock source may take to close when the guest is loaded.
const FAREWELL: Duration = Duration::from_secs(5);

/// What happens to an incoming migration.
pub enum Event {
    /// From the relay.
    Order(Order),
    /// The relay is gone, or can't be heard any more.
    RelayGone(Option<Lost>),
    /// A source connected, and the block lists agree.
    Agreed(Arc<Link>),
    /// It went again before it sent anything; because its migration is over, if it said so, and why.
    Withdrawn(Arc<Link>, Option<String>),
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
        /// How long, where QEMU has not got all of RAM.
        patience: Option<Patience>,
    },
    /// The relay is gone when QEMU may have all of RAM: it gets all of the stream, and nobody knows its
    /// verdict.
    Orphaned(Arc<Link>, MigrationError),
    /// QEMU has the guest, and the source still sends what QEMU needs no more. It does not listen before.
    Completed(Arc<Link>),
    /// The source is being told. A helper closes when it knows, however long that takes; a stock one may
    /// never do so.
    Telling(Arc<Link>, Option<Patience>),
    /// It is over.
    Ended(Outcome),
}

/// What all states need.
struct Context {
    qemu: Arc<UnixStream>,
    reports: Arc<Reports>,
    switchover: Arc<Switchover>,
    listening: Handle,
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
    inquiry: Arc<Inquiry>,
    options: Options,
    qemu: UnixStream,
    reports: Arc<Reports>,
    (sender, events): (Sender<Event>, Receiver<Event>),
) {
    let statistics = Statistics::new(fabric.name());
    let listener = match fabric.listen(address) {
        Ok(listener) => listener,
        Err(error) => {
            Outcome::failed(error.into(), true, None).tell(&reports, &statistics);
            return;
        }
    };
    reports.send(&Report::Listening { address: listener.address().clone() });
    let qemu = Arc::new(qemu);
    let context = Context {
        qemu: qemu.clone(),
        reports: reports.clone(),
        switchover: Arc::default(),
        listening: listener.handle(),
        sent: Cell::new(false),
        closed: Cell::new(false),
        mute: Cell::new(false),
        events: sender.clone(),
    };
    let serving = Arc::new(receiver::Context {
        qemu,
        inquiry,
        options,
        statistics: statistics.clone(),
        switchover: context.switchover.clone(),
        events: sender.clone(),
    });
    let serve = move || receiver::serve(listener, &serving);
    threads::start("receiver", serve, move |served| {
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
    let (patience, late) = (Incoming::patience, || Event::Late);
    let verdict = run_state_machine(start, &events, &reports, &statistics, patience, late, step);
    let Some(words) = verdict.tell(&reports, &statistics) else { return };
    // It fails only when QEMU has closed its end.
    let _ = context.qemu.shutdown(Shutdown::Both);
    if let Some(saying) = words.say(|| {}) {
        // A panic of it was said.
        let _ = saying.join();
    }
}

impl Incoming {
    /// What a state that lasts only so long has left of it.
    fn patience(&mut self) -> Option<&mut Patience> {
        match self {
            Self::Judging { patience, .. } | Self::Telling(_, patience) => patience.as_mut(),
            _ => None,
        }
    }

    fn handle(self, event: Event, context: &Context) -> Self {
        context.note(&event);
        match (self, event) {
            // Whatever else comes: the guest is here.
            (Self::Telling(link, patience), event) => Self::tell_on(link, patience, event, context),
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
            (Self::Listening(mut agreed), Event::Withdrawn(link, why)) => {
                agreed.retain(|known| !Arc::ptr_eq(known, &link));
                match why {
                    // As QEMU does: nobody knows whether another one will come.
                    Some(why) if agreed.is_empty() => {
                        Self::Listening(agreed).fail_here(MigrationError::Aborted(why), context)
                    }
                    _ => Self::Listening(agreed),
                }
            }
            (Self::Listening(_), Event::Begun(link)) => Self::Receiving(link),
            (Self::Receiving(link), Event::StreamEnded) => {
                context.reports.send(&Report::StreamEnded);
                Self::Loading(link)
            }
            (Self::Receiving(link), Event::QemuLeft(error)) => {
                // The relay asks QEMU why.
                context.reports.send(&Report::StreamEnded);
                Self::Judging { link, error, patience: None }
            }
            (Self::Receiving(link), Event::Served(Err(error @ MigrationError::Qemu(_)))) => {
                context.reports.send(&Report::StreamEnded);
                Self::Judging { link, error, patience: patience_of(RELAY_VERDICT) }
            }
            (Self::Receiving(link), Event::ReturnPathLost(error))
                if context.switchover.is_past_ram() =>
            {
                // QEMU may get the guest without it. The source's QEMU ends its stream only when it hears
                // something there.
                context.reports.send(&Report::StreamEnded);
                Self::Judging { link, error, patience: None }
            }
            (state, Event::Failed(error)) if context.switchover.is_past_ram() => {
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
                | Event::Withdrawn(..)
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
            Order::Abort { .. } if context.switchover.is_past_ram() => self,
            Order::Abort { reason } => self.fail_here(MigrationError::Aborted(reason), context),
            order => {
                debug!(?order, "an order that means nothing to a destination");
                self
            }
        }
    }

    /// Waiting for QEMU's verdict, when something has failed.
    fn judge(self, event: Event, context: &Context) -> Self {
        let Self::Judging { link, error, patience } = self else { return self };
        match event {
            Event::Order(Order::QemuFailed { reason, guest_never_ran }) => {
                // What the relay knows of QEMU is better than that it stopped to read.
                let error = match error {
                    MigrationError::Qemu(_) => MigrationError::Aborted(reason),
                    error => of_ours(error),
                };
                Self::Loading(link).fail(error, guest_never_ran, context)
            }
            Event::RelayGone(_) | Event::Late => {
                let never_ran = context.switchover.withdraw();
                Self::Loading(link).fail(of_ours(error), never_ran, context)
            }
            _ => Self::Judging { link, error, patience },
        }
    }

    /// The relay is gone.
    fn orphan(self, lost: Option<Lost>, context: &Context) -> Self {
        let gone =
            "The destination's helper is gone; start it beside a new QEMU there, and migrate again";
        let reason = lost.map_or_else(|| gone.to_owned(), |lost| lost.to_string());
        let error = MigrationError::Aborted(reason);
        match self {
            Self::Receiving(link) if !context.switchover.withdraw() => Self::Orphaned(link, error),
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
            let patience = patience_of(FAREWELL);
            return if closed { Self::done(&link) } else { Self::Telling(link, patience) };
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
        Self::Telling(link, None)
    }

    /// Wait until the source has closed: its acknowledgement has arrived then.
    fn tell_on(
        link: Arc<Link>,
        patience: Option<Patience>,
        event: Event,
        context: &Context,
    ) -> Self {
        match event {
            Event::Told(Err(error)) => {
                warn!(%error, "the source could not be told of the completion");
                Self::done(&link)
            }
            Event::Late => Self::done(&link),
            _ if context.closed.get() => Self::done(&link),
            _ => Self::Telling(link, patience),
        }
    }

    fn done(link: &Link) -> Self {
        link.close();
        Self::Ended(Outcome::Done)
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
            Self::Receiving(link) | Self::Loading(link) if !context.switchover.withdraw() => {
                // A QEMU that lacks a part of the stream fails now. It may have closed its end.
                let _ = context.qemu.shutdown(Shutdown::Write);
                context.reports.send(&Report::StreamEnded);
                Self::Judging { link, error, patience: None }
            }
            state => state.fail(error, context.switchover.withdraw(), context),
        }
    }

    /// End as failed.
    fn fail(self, error: MigrationError, never_ran: bool, context: &Context) -> Self {
        context.listening.close();
        Self::Ended(Outcome::failed(error, never_ran, self.links()))
    }
}

/// A failure of which the source hears, whatever it was, and if it was its own: it waits for QEMU's
/// verdict.
fn of_ours(error: MigrationError) -> MigrationError {
    MigrationError::Aborted(error.to_string())
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

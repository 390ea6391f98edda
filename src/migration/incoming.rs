//! The destination's side: a source is let in, RAM lands, QEMU gets the rest.

use std::{
    cell::Cell,
    net::Shutdown,
    os::unix::net::UnixStream,
    sync::{
        Arc,
        mpsc::{Receiver, Sender},
    },
    thread,
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
    wire::Message,
};

/// How long to wait for what the relay knows of a QEMU that takes no more of the stream.
const RELAY_VERDICT: Duration = Duration::from_secs(5);

/// How long the source may take to close after the final acknowledgement.
const FAREWELL: Duration = Duration::from_secs(5);

/// What happens to an incoming migration.
pub enum Event {
    /// From the relay.
    Order(Order),
    /// The relay is gone.
    RelayGone,
    /// A source connected, and the block lists agree.
    Agreed(Arc<Link>),
    /// It went again before it sent anything.
    Withdrawn(Arc<Link>),
    /// It begins to send, and is the one that is served.
    Begun(Arc<Link>),
    /// QEMU has all of the stream, and RAM has landed.
    StreamEnded,
    /// The source ended the connection after that, or the migration failed.
    Served(Result<()>),
}

/// Where an incoming migration stands.
enum Incoming {
    /// Waiting for a source to begin; with these the block lists agree.
    Listening(Vec<Arc<Link>>),
    /// A source sends.
    Receiving(Arc<Link>),
    /// QEMU loads what is left of the stream.
    Loading(Arc<Link>),
    /// Something failed after QEMU got bytes behind RAM: whether its guest runs is QEMU's verdict.
    Judging(Arc<Link>, MigrationError),
    /// The relay is gone in that phase: QEMU gets all of the stream, and nobody knows its verdict.
    Orphaned(Arc<Link>, MigrationError),
    /// It is over.
    Ended(Verdict),
}

/// What all states need.
struct Context {
    qemu: Arc<UnixStream>,
    reports: Arc<Reports>,
    commitment: Arc<Commitment>,
    listening: Handle,
    /// The source has closed.
    served: Cell<bool>,
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
            return Verdict::failed(error.into(), true, None).tell(&reports, &statistics, drop);
        }
    };
    reports.send(&Report::Listening { address: listener.address().clone() });
    let qemu = Arc::new(qemu);
    let context = Context {
        qemu: qemu.clone(),
        reports: reports.clone(),
        commitment: Arc::default(),
        listening: listener.handle(),
        served: Cell::new(false),
    };
    let serving = Arc::new(landing::Context {
        qemu,
        blocks,
        options,
        statistics: statistics.clone(),
        commitment: context.commitment.clone(),
        events: sender,
    });
    thread::spawn(move || landing::serve(listener, &serving));
    let verdict = lifetime(
        Incoming::Listening(Vec::new()),
        &events,
        &reports,
        &statistics,
        |state, event| match state.handle(event, &context, &events) {
            Incoming::Ended(verdict) => Err(verdict),
            state => Ok(state),
        },
    );
    verdict.tell(&reports, &statistics, |_| {
        // It fails only when QEMU has closed its end.
        let _ = context.qemu.shutdown(Shutdown::Both);
    });
}

impl Incoming {
    fn handle(self, event: Event, context: &Context, events: &Receiver<Event>) -> Self {
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
            (Self::Loading(link) | Self::Judging(link, _), Event::Order(Order::QemuCompleted)) => {
                // A source that is gone can't be told, and its guest is here now.
                let told = if link.is_stock() { Ok(()) } else { link.send(&Message::FinalAck) };
                if let Err(error) = told {
                    warn!(%error, "the source could not be told of the completion");
                }
                if !context.served.get() {
                    await_farewell(events);
                }
                link.close();
                Self::Ended(Verdict::Done)
            }
            (
                Self::Judging(link, error),
                Event::Order(Order::QemuFailed { guest_never_ran, .. }),
            ) => Self::Loading(link).fail(error, guest_never_ran, context),
            (Self::Judging(link, error), Event::RelayGone) => {
                Self::Loading(link).fail(error, false, context)
            }
            (
                Self::Orphaned(link, error),
                Event::StreamEnded | Event::Served(_) | Event::Order(_),
            ) => Self::Loading(link).fail(error, false, context),
            (state @ (Self::Judging(..) | Self::Orphaned(..)), _) => state,
            (state, Event::Order(Order::QemuFailed { reason, guest_never_ran })) => {
                let error = MigrationError::Aborted(reason);
                state.fail(error, guest_never_ran, context)
            }
            // The relay goes on asking QEMU for its verdict as long as it can.
            (state, Event::Order(Order::Abort { .. })) if context.commitment.is_past_ram() => state,
            (state, Event::Order(Order::Abort { reason })) => {
                state.fail_here(MigrationError::Aborted(reason), context)
            }
            (state, Event::RelayGone) => {
                let reason = "The destination's helper is gone; start it beside a new QEMU there, and migrate again".to_owned();
                let error = MigrationError::Aborted(reason);
                match state {
                    Self::Receiving(link) if !context.commitment.withdraw() => {
                        Self::Orphaned(link, error)
                    }
                    Self::Loading(_) => state.fail(error, false, context),
                    state => state.fail_here(error, context),
                }
            }
            (state, Event::Served(Err(MigrationError::Qemu(text)))) => {
                // The relay knows what became of QEMU.
                context.reports.send(&Report::StreamEnded);
                let (error, never_ran) = relay_verdict(events, text, context);
                state.fail(error, never_ran, context)
            }
            (state, Event::Served(Err(error))) => state.fail_here(error, context),
            // The source closed before QEMU completed: only QEMU's end decides now.
            (state, Event::Served(Ok(()))) => {
                context.served.set(true);
                state
            }
            (state, Event::Order(order)) => {
                warn!(?order, "an order that means nothing in this state");
                state
            }
            (
                state,
                Event::Agreed(_) | Event::Withdrawn(_) | Event::Begun(_) | Event::StreamEnded,
            ) => state,
        }
    }

    /// End as failed for a reason of the worker's own, or let QEMU decide.
    fn fail_here(self, error: MigrationError, context: &Context) -> Self {
        match self {
            Self::Receiving(link) | Self::Loading(link) if !context.commitment.withdraw() => {
                // A QEMU that lacks a part of the stream fails now. It may have closed its end.
                let _ = context.qemu.shutdown(Shutdown::Write);
                context.reports.send(&Report::StreamEnded);
                Self::Judging(link, error)
            }
            state => state.fail(error, context.commitment.withdraw(), context),
        }
    }

    /// End as failed.
    fn fail(self, error: MigrationError, never_ran: bool, context: &Context) -> Self {
        context.listening.close();
        let links = match self {
            Self::Receiving(link) | Self::Loading(link) => vec![link],
            Self::Judging(link, _) | Self::Orphaned(link, _) => vec![link],
            Self::Listening(agreed) => agreed,
            Self::Ended(_) => Vec::new(),
        };
        Self::Ended(Verdict::failed(error, never_ran, links))
    }
}

/// Wait until the source has closed: its acknowledgement has arrived then.
fn await_farewell(events: &Receiver<Event>) {
    let deadline = Instant::now() + FAREWELL;
    while let Ok(event) = events.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
        if matches!(event, Event::Served(_) | Event::RelayGone) {
            return;
        }
    }
}

/// What the relay says of a QEMU that takes no more of the stream.
fn relay_verdict(
    events: &Receiver<Event>,
    text: String,
    context: &Context,
) -> (MigrationError, bool) {
    let deadline = Instant::now() + RELAY_VERDICT;
    while let Ok(event) = events.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
        if let Event::Order(Order::QemuFailed { reason, guest_never_ran }) = event {
            return (MigrationError::Aborted(reason), guest_never_ran);
        }
    }
    (MigrationError::Qemu(text), context.commitment.withdraw())
}

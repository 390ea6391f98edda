//! The source: from the connection to the destination's verdict, and what is left to do after it.
//!
//! The destination's QEMU decides where the guest runs as soon as it may have all of RAM. Until
//! then a failure ends the migration here, and the guest keeps running. After that the destination
//! reports how it ended, and a failure of this side waits for its verdict (`ending`). Then there
//! may be work left in QEMU, for the relay or for the worker in its place (`closing`).

mod closing;
mod ending;
#[cfg(test)]
mod tests;

use std::time::{Duration, Instant};

use tracing::{debug, info};

use super::{
    Machine,
    error::{MigrationError, Result},
    switchover::Switchover,
};
use crate::{
    control::{Agreed, Command, Order, Report},
    fabric::FabricError,
    patience::Patience,
};

/// An event at the source of a migration.
#[derive(Debug)]
pub enum Event {
    /// An order from the relay.
    Order(Order),
    /// The relay is gone, or can't reach QEMU; with the reason.
    RelayGone(String),
    /// Connected, and the block lists agree.
    Connected(Peer, Agreed),
    /// Not connected.
    NotConnected(MigrationError),
    /// QEMU's migration sockets, from the relay; `None` if there were none.
    Sockets(Option<Sockets>),
    /// The stream reader asks whether the bytes after RAM may leave. It waits for
    /// [`Action::PassRam`] or [`Action::HoldRam`].
    RamEnded,
    /// What the guest did before the switchover, as QEMU tells the destination.
    GuestBefore(String),
    /// QEMU's stream was read to its end, as far as possible.
    StreamRead,
    /// QEMU's stream ended and all of it was sent; or why not. The peer may still reply to that.
    StreamTaken(Result<()>),
    /// The destination's QEMU completed.
    Acknowledged,
    /// The peer, the connection or the thread that listens to it failed: the peer is not heard any
    /// more.
    PeerFailed(MigrationError),
    /// [`Machine::poll_timeout`] has passed.
    Timeout,
}

/// What to do.
#[derive(Debug)]
pub enum Action {
    /// Send the relay a report.
    Report(Report),
    /// Tell the relay that the destination has the guest.
    ReportDone,
    /// Tell the relay that the migration has failed.
    ReportFailed {
        /// Why.
        reason: String,
        /// Whether the guest certainly never ran at the destination.
        guest_never_ran: bool,
        /// Whether the QEMU on this side ended it.
        by_qemu: bool,
    },
    /// Take QEMU's stream from the sockets that the relay has handed over.
    StartStream,
    /// Limit RAM to this many bytes per second; `None`: unlimited.
    SetRateLimit(Option<u64>),
    /// Answer the stream reader: the bytes after RAM leave.
    PassRam,
    /// Answer the stream reader: they do not.
    HoldRam,
    /// Tell the peer of a failure. The connection stays, for the peer's verdict.
    TellPeer(String),
    /// Tell the peer, if the connection stands, and close it. Then, with `settle`, end QEMU's
    /// migration as [`Action::SettleQemu`] does: no thread passes on any of the stream by then.
    EndConnection {
        /// Why.
        error: MigrationError,
        /// What the peer is told about the guest.
        guest_never_ran: bool,
        /// Whether to end QEMU's migration after it.
        settle: bool,
    },
    /// Close the connection.
    CloseConnection,
    /// Let QEMU take the end of its stream for a failure: its guest keeps running.
    EndQemu,
    /// Let QEMU end its migration without resuming its guest, which may run at the destination.
    SettleQemu,
    /// Queue at QEMU's own QMP socket: the relay can do nothing more.
    ReachQemu,
    /// Do in the relay's place what is left to do in QEMU.
    TakeOver {
        /// Commands that restore QEMU's settings.
        restore: Vec<Command>,
        /// Whether the guest never ran at the destination.
        guest_never_ran: bool,
        /// Whether to resume the guest if QEMU takes its migration for complete.
        guest_runs: bool,
    },
}

/// The destination, once it is connected.
#[derive(Debug, Clone, Copy)]
pub struct Peer {
    /// Whether it is a stock QEMU, which reports little.
    pub is_stock: bool,
    /// How long a pending transfer may make no progress.
    pub stall_timeout: Duration,
}

/// QEMU's migration sockets.
#[derive(Debug, Clone, Copy)]
pub struct Sockets {
    /// Whether QEMU uses multifd channels.
    pub channels: bool,
}

/// The state machine of a source.
#[derive(Debug)]
pub struct Source {
    state: State,
    known: Known,
}

/// Where the migration stands.
#[derive(Debug)]
enum State {
    /// Connecting and comparing block lists; QEMU has not been asked to migrate.
    Connecting,
    /// The block lists agree; QEMU is being asked to migrate.
    Agreed(Peer),
    /// QEMU's stream is being read.
    Streaming(Peer),
    /// The end of the stream was sent; the destination's QEMU has not completed yet.
    Confirming(Peer),
    /// Failed, unless the destination or another thread knows better.
    Ending(Ending),
    /// The migration is over; the relay does what is left to do.
    AwaitingRelay {
        /// Whether the guest certainly never ran at the destination.
        guest_never_ran: bool,
    },
    /// The relay is gone; whether to resume the guest is in what QEMU has written.
    AwaitingGuest(Patience),
    /// Nothing is left to do.
    Closed,
}

/// A failure that is not final yet.
#[derive(Debug)]
struct Ending {
    error: MigrationError,
    /// Why the connection was closed, as another thread knows. May be the consequence of what the
    /// peer reports next.
    known: Option<MigrationError>,
    /// Whether nothing that makes the guest run at the destination has left, or will.
    guest_never_ran: bool,
    peer: Option<Peer>,
    /// How long to wait for a message; `None`: as long as the connection stands.
    patience: Option<Patience>,
}

/// What matters in every state.
#[derive(Debug)]
struct Known {
    /// Whether the guest may run at the destination.
    switchover: Switchover,
    /// QEMU's sockets, once QEMU was asked to migrate.
    sockets: Option<Sockets>,
    /// Commands that restore QEMU's settings.
    restore: Vec<Command>,
    /// Whether the relay is gone.
    is_alone: bool,
    /// Whether the relay has done all its work.
    is_finished: bool,
    /// Whether a client has cancelled: the relay cancels QEMU's migration as soon as it may.
    is_cancelled: bool,
    /// Whether the guest runs, apart from the switchover.
    guest_runs: bool,
    /// Whether it ran until the switchover, according to QEMU.
    guest_ran: Option<bool>,
    /// Whether QEMU has no more to say about that.
    is_read: bool,
}

impl Default for Source {
    fn default() -> Self {
        let known = Known {
            switchover: Switchover::default(),
            sockets: None,
            restore: Vec::new(),
            is_alone: false,
            is_finished: false,
            is_cancelled: false,
            guest_runs: true,
            guest_ran: None,
            is_read: false,
        };
        Self { state: State::Connecting, known }
    }
}

impl Machine for Source {
    type Event = Event;
    type Action = Action;

    const TIMEOUT: Event = Event::Timeout;

    fn handle(mut self, event: Event, now: Instant, actions: &mut Vec<Action>) -> Self {
        self.known.note(&event, actions);
        let state = self.state.handle(event, &mut self.known, now, actions);
        Self { state, ..self }
    }

    fn poll_timeout(&self) -> Option<Instant> {
        match &self.state {
            State::Ending(ending) => ending.patience.as_ref().map(Patience::next),
            State::AwaitingGuest(patience) => Some(patience.next()),
            _ => None,
        }
    }

    fn has_ended(&self) -> bool {
        use State::{AwaitingGuest, AwaitingRelay, Closed};
        matches!(self.state, AwaitingRelay { .. } | AwaitingGuest(_) | Closed)
    }

    fn is_closed(&self) -> bool {
        matches!(self.state, State::Closed)
    }
}

impl Known {
    /// Note what no state may miss.
    fn note(&mut self, event: &Event, actions: &mut Vec<Action>) {
        match event {
            Event::Order(Order::SetGuestRunning { runs }) => self.guest_runs = *runs,
            Event::Order(Order::SetRestore { commands }) => self.restore.clone_from(commands),
            Event::Order(Order::Finish) => self.is_finished = true,
            Event::Order(Order::Cancel { .. }) => self.is_cancelled = true,
            Event::Order(Order::SetRateLimit { rate }) => actions.push(Action::SetRateLimit(*rate)),
            Event::GuestBefore(status) => {
                self.guest_ran = Some(status == "running");
                actions.push(Action::Report(Report::GuestBefore { status: status.clone() }));
            }
            Event::StreamRead => self.is_read = true,
            // A relay that can't reach QEMU reports that before it exits.
            Event::RelayGone(_) if !self.is_alone => {
                self.is_alone = true;
                actions.push(Action::ReachQemu);
            }
            _ => {}
        }
    }
}

impl State {
    fn handle(
        self,
        event: Event,
        known: &mut Known,
        now: Instant,
        actions: &mut Vec<Action>,
    ) -> Self {
        match (self, event) {
            (
                state @ (Self::AwaitingRelay { .. } | Self::AwaitingGuest(_) | Self::Closed),
                event,
            ) => state.close(event, known, now, actions),
            (Self::Streaming(peer), Event::RamEnded) => {
                let passes = known.switchover.try_commit();
                actions.push(if passes { Action::PassRam } else { Action::HoldRam });
                Self::Streaming(peer)
            }
            (state, Event::RamEnded) => {
                actions.push(Action::HoldRam);
                state
            }
            (Self::Ending(ending), event) => ending.handle(event, known, now, actions),
            (state, Event::Order(order)) => state.obey(order, known, now, actions),
            (state, Event::RelayGone(reason)) => state.abort(reason, known, now, actions),
            (state, event) => state.proceed(event, known, now, actions),
        }
    }

    /// Handle the events of a migration that has not failed, and its failures.
    fn proceed(
        self,
        event: Event,
        known: &mut Known,
        now: Instant,
        actions: &mut Vec<Action>,
    ) -> Self {
        let is_past_ram = known.switchover.is_past_ram();
        match (self, event) {
            (Self::Connecting, Event::Connected(peer, agreed)) => {
                info!("block lists agree");
                actions.push(Action::Report(Report::Agreed(agreed)));
                Self::Agreed(peer)
            }
            (Self::Connecting, Event::NotConnected(error)) => {
                Self::failed(error, true, false, known, now, actions)
            }
            (Self::Agreed(peer), Event::Sockets(Some(sockets))) => {
                known.sockets = Some(sockets);
                actions.push(Action::StartStream);
                Self::Streaming(peer)
            }
            (state, Event::Sockets(_)) => {
                let error = MigrationError::Aborted("The relay's order is out of turn".into());
                state.fail(error, known, now, actions)
            }
            (Self::Streaming(peer), Event::StreamTaken(Ok(()))) => Self::Confirming(peer),
            (state @ Self::Streaming(_), Event::StreamTaken(Err(error))) => {
                state.fail(error, known, now, actions)
            }
            // The destination's QEMU does not need what QEMU still sends.
            (Self::Streaming(_) | Self::Confirming(_), Event::Acknowledged) if is_past_ram => {
                Self::done(known, now, actions)
            }
            (state @ Self::Streaming(_), Event::Acknowledged) => {
                let error = MigrationError::Peer("it confirmed an unfinished migration".into());
                state.fail(error, known, now, actions)
            }
            // A stock destination's only sign that it has loaded the guest.
            (
                Self::Confirming(peer),
                Event::PeerFailed(MigrationError::Fabric(FabricError::Closed)),
            ) if peer.is_stock => Self::done(known, now, actions),
            (state, Event::PeerFailed(error)) => {
                let never_ran = known.switchover.withdraw();
                Self::Ending(Ending::unheard(error, never_ran, state.peer(), now))
            }
            // Late events of threads, such as a channel that QEMU closes when its stream has ended.
            // Others were noted.
            (state, _) => state,
        }
    }

    /// Handle an order of the relay.
    fn obey(
        self,
        order: Order,
        known: &mut Known,
        now: Instant,
        actions: &mut Vec<Action>,
    ) -> Self {
        match order {
            Order::Abort { reason } => self.abort(reason, known, now, actions),
            Order::Cancel { reason } => {
                match self.fail(MigrationError::Aborted(reason), known, now, actions) {
                    Self::Ending(ending) => Self::Ending(ending.hurry(now)),
                    state => state,
                }
            }
            // Noted already.
            Order::SetGuestRunning { .. }
            | Order::SetRestore { .. }
            | Order::SetRateLimit { .. }
            | Order::Finish => self,
            order => {
                debug!(?order, "unexpected order");
                self
            }
        }
    }

    /// Abort: the helper is told to exit, or its relay is gone. Where the guest may run at the
    /// destination, the migration continues, so that QEMU learns how it ends.
    fn abort(
        self,
        reason: String,
        known: &mut Known,
        now: Instant,
        actions: &mut Vec<Action>,
    ) -> Self {
        if known.switchover.withdraw() {
            return self.fail(MigrationError::Aborted(reason), known, now, actions);
        }
        info!(reason, "the destination's verdict is awaited");
        self
    }

    /// Fail for a reason of this side.
    fn fail(
        self,
        error: MigrationError,
        known: &mut Known,
        now: Instant,
        actions: &mut Vec<Action>,
    ) -> Self {
        // At once: what arrives meanwhile must not make the guest run there.
        let never_ran = known.switchover.withdraw();
        Self::Ending(Ending::of_ours(error, never_ran, self.peer(), now, actions))
    }

    fn peer(&self) -> Option<Peer> {
        match self {
            Self::Agreed(peer) | Self::Streaming(peer) | Self::Confirming(peer) => Some(*peer),
            _ => None,
        }
    }
}

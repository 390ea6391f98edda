//! The source: from the connection to the destination's word, and what is left to do after it.
//!
//! The destination's QEMU decides where the guest runs as soon as it may have all of RAM. Until then a
//! failure ends the migration here, and the guest runs on; after that it is the destination that says
//! how it ended, and a failure of this side's waits for its word (`ending`). When that is known there
//! may be something left to do at QEMU, by the relay, or by the worker in its place (`closing`).

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

/// What happens to the source of a migration.
#[derive(Debug)]
pub enum Event {
    /// From the relay.
    Order(Order),
    /// The relay is gone, or can't reach QEMU: why.
    RelayGone(String),
    /// Connected, and the block lists agree.
    Connected(Peer, Agreed),
    /// Not connected.
    NotConnected(MigrationError),
    /// The relay has handed over QEMU's migration sockets; `None`: without any.
    Sockets(Option<Sockets>),
    /// The stream reader asks whether what follows RAM may leave. It waits for
    /// [`Action::PassRam`] or [`Action::HoldRam`].
    RamEnded,
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
    /// [`Machine::poll_timeout`] has passed.
    Timeout,
}

/// What is to be done.
#[derive(Debug)]
pub enum Action {
    /// Tell the relay.
    Report(Report),
    /// Tell the relay that the destination has the guest.
    ReportDone,
    /// Tell the relay that the migration has failed.
    ReportFailed {
        /// Why.
        reason: String,
        /// It is certain that the guest never ran at the destination.
        guest_never_ran: bool,
        /// It was the QEMU on this side that ended it.
        by_qemu: bool,
    },
    /// Take QEMU's stream from the sockets that the relay has handed over.
    StartStream,
    /// Keep RAM within this many bytes per second; `None`: any number.
    SetRateLimit(Option<u64>),
    /// Answer the stream reader: what follows RAM leaves.
    PassRam,
    /// Answer the stream reader: it must not.
    HoldRam,
    /// Tell the peer of a failure. The connection stays, and the peer's word is awaited.
    TellPeer(String),
    /// Tell the peer, if the connection stands, and end it. Then, after `settle`, end QEMU's migration as
    /// [`Action::SettleQemu`] does: nothing of the stream goes on by then, whoever reads it.
    EndConnection {
        /// Why.
        error: MigrationError,
        /// What the peer is told of the guest.
        guest_never_ran: bool,
        /// End QEMU's migration after it.
        settle: bool,
    },
    /// End the connection.
    CloseConnection,
    /// Let QEMU take the end of its stream for a failure: its guest runs on.
    EndQemu,
    /// Let QEMU end its migration without its guest running again: it may run at the destination.
    SettleQemu,
    /// The relay can do nothing more: get in line at QEMU's own QMP socket.
    ReachQemu,
    /// Do in the relay's place what is left to do at QEMU.
    TakeOver {
        /// What sets QEMU back to what it was before.
        restore: Vec<Command>,
        /// The guest never ran at the destination.
        guest_never_ran: bool,
        /// The guest is to run again if QEMU takes its migration for complete.
        guest_runs: bool,
    },
}

/// The destination, once it is connected.
#[derive(Debug, Clone, Copy)]
pub struct Peer {
    /// It is a stock QEMU, which says little.
    pub is_stock: bool,
    /// How long a transfer that is due may make no progress.
    pub stall_timeout: Duration,
}

/// QEMU's migration sockets.
#[derive(Debug, Clone, Copy)]
pub struct Sockets {
    /// QEMU uses multifd channels.
    pub channels: bool,
}

/// The source of one migration.
#[derive(Debug)]
pub struct Source {
    state: State,
    known: Known,
}

/// Where it stands.
#[derive(Debug)]
enum State {
    /// Connecting and comparing block lists; QEMU has not been asked to migrate.
    Connecting,
    /// The block lists agree; QEMU is being asked to migrate.
    Agreed(Peer),
    /// QEMU's stream is being taken.
    Streaming(Peer),
    /// The end of the stream was sent; the destination's QEMU has not completed yet.
    Confirming(Peer),
    /// It has failed, unless somebody knows better.
    Ending(Ending),
    /// It is over: the relay does what is left to do.
    AwaitingRelay {
        /// The guest certainly never ran at the destination.
        guest_never_ran: bool,
    },
    /// The relay is gone, and whether the guest is to run again is in what QEMU has written.
    AwaitingGuest(Patience),
    /// Nothing is left to do.
    Closed,
}

/// Failed, and not over yet.
#[derive(Debug)]
struct Ending {
    error: MigrationError,
    /// Of a connection that was closed: why, as another thread of ours knows. It may be the consequence of
    /// what the peer says next.
    known: Option<MigrationError>,
    /// Nothing that makes the guest run at the destination has left, or will.
    guest_never_ran: bool,
    peer: Option<Peer>,
    /// How long somebody may still say something; `None`: as long as the connection stands.
    patience: Option<Patience>,
}

/// What counts in every state.
#[derive(Debug)]
struct Known {
    /// May the guest come to run at the destination?
    switchover: Switchover,
    /// QEMU's sockets, once it was asked to migrate.
    sockets: Option<Sockets>,
    /// What sets QEMU back to what it was before.
    restore: Vec<Command>,
    /// The relay is gone.
    is_alone: bool,
    /// The relay has done all that there is to do.
    is_finished: bool,
    /// A client has cancelled: the relay cancels QEMU's migration as soon as it knows that it may.
    is_cancelled: bool,
    /// The guest runs, but for the switchover.
    guest_runs: bool,
    /// It ran until the switchover, as QEMU knows it.
    guest_ran: Option<bool>,
    /// QEMU says no more of it.
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
    /// What no state may miss.
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
            // A relay that can't reach QEMU says so, and then it goes.
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

    /// What happens as long as all goes well, and how that ends.
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
            // What QEMU still has to say the destination's QEMU needs no more.
            (Self::Streaming(_) | Self::Confirming(_), Event::Acknowledged) if is_past_ram => {
                Self::done(known, now, actions)
            }
            (state @ Self::Streaming(_), Event::Acknowledged) => {
                let error = MigrationError::Peer("it confirmed an unfinished migration".into());
                state.fail(error, known, now, actions)
            }
            // All that a stock destination says when it has loaded the guest.
            (
                Self::Confirming(peer),
                Event::PeerFailed(MigrationError::Fabric(FabricError::Closed)),
            ) if peer.is_stock => Self::done(known, now, actions),
            (state, Event::PeerFailed(error)) => {
                let never_ran = known.switchover.withdraw();
                Self::Ending(Ending::unheard(error, never_ran, state.peer(), now))
            }
            // Late words of threads whose migration has moved on: a channel that QEMU breaks off when its
            // stream has ended, for one. Others were noted.
            (state, _) => state,
        }
    }

    /// An order of the relay's.
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
            // They were noted.
            Order::SetGuestRunning { .. }
            | Order::SetRestore { .. }
            | Order::SetRateLimit { .. }
            | Order::Finish => self,
            order => {
                debug!(?order, "an order that means nothing to a source");
                self
            }
        }
    }

    /// The helper is told to end, or is gone. Where the guest may come to run at the destination, what was
    /// begun goes on, so that QEMU gets to know how it ends.
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

    /// Fail for a reason of this side's.
    fn fail(
        self,
        error: MigrationError,
        known: &mut Known,
        now: Instant,
        actions: &mut Vec<Action>,
    ) -> Self {
        // At once: what comes in the meantime must not make the guest run there.
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

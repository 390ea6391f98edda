//! The destination: sources that connect and leave, the one whose stream QEMU gets, and QEMU's
//! verdict.
//!
//! As soon as QEMU may have all of RAM, QEMU decides whether the guest runs here, and the relay
//! learns it. Any other failure waits for that verdict, and the source is told.

#[cfg(test)]
mod tests;

use std::time::{Duration, Instant};

use tracing::{debug, warn};

use super::{
    Machine,
    error::{MigrationError, Result},
    patience,
    switchover::Switchover,
};
use crate::{
    control::{Agreed, Order, Report},
    patience::Patience,
};

/// How long to wait for what the relay knows about a QEMU that reads no more of the stream.
const RELAY_VERDICT: Duration = Duration::from_secs(5);

/// How long a stock source may take to close when the guest is loaded.
const FAREWELL: Duration = Duration::from_secs(5);

/// A source that has connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    /// Tells sources apart.
    pub number: u64,
    /// Whether it is a stock QEMU, which reports little.
    pub is_stock: bool,
}

/// An event at the destination of a migration.
#[derive(Debug)]
pub enum Event {
    /// An order from the relay.
    Order(Order),
    /// The relay is gone, or can't be heard any more; with the reason in the latter case.
    RelayGone(Option<String>),
    /// A source connected, and the block lists agree.
    Agreed(Peer),
    /// A source left before it sent anything; with the reason, if it reported the end of its
    /// migration.
    Withdrawn(Peer, Option<String>),
    /// A source begins to send, and is the one that is served.
    Begun(Peer),
    /// The receiver asks whether QEMU may get the bytes after RAM. It waits for [`Action::PassRam`]
    /// or [`Action::HoldRam`].
    RamEnded,
    /// The source has sent all of the stream, and RAM has landed.
    StreamEnded,
    /// QEMU reads no more of the stream, but has all of RAM.
    QemuLeft(MigrationError),
    /// The source ended the connection after its stream, or the migration failed.
    Served(Result<()>),
    /// The connection is closed.
    Closed,
    /// Something else failed.
    Failed(MigrationError),
    /// The return path from QEMU is lost.
    ReturnPathLost(MigrationError),
    /// QEMU has closed its end: it is done, or gone.
    QemuClosed,
    /// The final acknowledgement was sent, or can't be.
    Told(Result<()>),
    /// [`Machine::poll_timeout`] has passed.
    Timeout,
}

/// What to do.
#[derive(Debug)]
pub enum Action {
    /// Send the relay a report.
    Report(Report),
    /// Tell the relay that QEMU has the guest, and that the source was told as far as possible.
    ReportDone,
    /// Tell the relay that the migration has failed.
    ReportFailed {
        /// Why.
        reason: String,
        /// Whether the guest certainly never ran here.
        guest_never_ran: bool,
        /// Whether the QEMU on this side ended it.
        by_qemu: bool,
    },
    /// Answer the receiver: QEMU gets the bytes after RAM.
    PassRam,
    /// Answer the receiver: QEMU does not get them.
    HoldRam,
    /// Accept no more sources.
    CloseListener,
    /// End QEMU's stream: a QEMU that lacks a part of it fails now.
    EndStream,
    /// Close QEMU's stream and return path.
    CloseQemu,
    /// Tell the source that QEMU has the guest; answered by [`Event::Told`].
    SendFinalAck(Peer),
    /// Close the connection.
    CloseConnection(Peer),
    /// Tell each peer whose connection stands, and close the connections.
    EndConnections {
        /// The peers.
        peers: Vec<Peer>,
        /// Why.
        error: MigrationError,
        /// What they are told about the guest.
        guest_never_ran: bool,
    },
}

/// The state machine of a destination.
#[derive(Debug, Default)]
pub struct Destination {
    state: State,
    known: Known,
}

/// Where the migration stands.
#[derive(Debug)]
enum State {
    /// Waiting for a source to begin; these have completed the handshake.
    Listening(Vec<Peer>),
    /// A source sends.
    Receiving(Peer),
    /// QEMU loads the rest of the stream.
    Loading(Peer),
    /// Something failed. Whether the guest runs is QEMU's verdict, which the relay will learn.
    Judging {
        peer: Peer,
        error: MigrationError,
        /// How long to wait, if QEMU has not got all of RAM.
        patience: Option<Patience>,
    },
    /// The relay is gone, and QEMU may have all of RAM: QEMU gets the whole stream, and nobody
    /// learns its verdict.
    RelayLost(Peer, MigrationError),
    /// QEMU has the guest and needs no more of the stream, but the source listens only after
    /// sending it.
    Completed(Peer),
    /// The source is being told. A helper closes when it knows, however long that takes; a stock
    /// source may never close.
    Telling(Peer, Option<Patience>),
    /// The migration is over.
    Closed,
}

impl Default for State {
    fn default() -> Self {
        Self::Listening(Vec::new())
    }
}

/// What matters in every state.
#[derive(Debug, Default)]
struct Known {
    /// Whether the guest may run here.
    switchover: Switchover,
    /// Whether the source sends nothing more.
    is_sent: bool,
    /// Whether the source has closed.
    is_closed: bool,
    /// Whether the return path to the source's QEMU is lost.
    is_mute: bool,
    /// Whether our QEMU has closed its end: it is done, or gone.
    is_qemu_closed: bool,
}

impl Machine for Destination {
    type Event = Event;
    type Action = Action;

    const TIMEOUT: Event = Event::Timeout;

    fn handle(mut self, event: Event, now: Instant, actions: &mut Vec<Action>) -> Self {
        self.known.note(&event);
        let state = self.state.handle(event, &mut self.known, now, actions);
        Self { state, ..self }
    }

    fn poll_timeout(&self) -> Option<Instant> {
        match &self.state {
            State::Judging { patience, .. } | State::Telling(_, patience) => {
                patience.as_ref().map(Patience::next)
            }
            _ => None,
        }
    }

    fn has_ended(&self) -> bool {
        self.is_closed()
    }

    fn is_closed(&self) -> bool {
        matches!(self.state, State::Closed)
    }
}

impl Known {
    /// Note what no state may miss.
    fn note(&mut self, event: &Event) {
        self.is_sent |= matches!(event, Event::StreamEnded | Event::Served(_) | Event::Closed);
        self.is_closed |= matches!(event, Event::Served(Ok(())) | Event::Closed);
        self.is_mute |= matches!(event, Event::ReturnPathLost(_));
        self.is_qemu_closed |= matches!(event, Event::QemuClosed);
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
            (state, Event::RamEnded) => {
                let passes = matches!(state, Self::Receiving(_)) && known.switchover.try_commit();
                actions.push(if passes { Action::PassRam } else { Action::HoldRam });
                state
            }
            // Whatever else happens, the guest is here.
            (Self::Telling(peer, patience), event) => {
                Self::tell_on(peer, patience, event, known, now, actions)
            }
            (Self::Completed(peer), _) => Self::confirm(peer, known, now, actions),
            (
                Self::Receiving(peer) | Self::Loading(peer) | Self::Judging { peer, .. },
                Event::Order(Order::QemuCompleted),
            ) => Self::confirm(peer, known, now, actions),
            (Self::Judging { peer, error, patience }, event) => {
                Self::judge(peer, error, patience, event, known, now, actions)
            }
            (
                Self::RelayLost(peer, error),
                Event::StreamEnded
                | Event::QemuLeft(_)
                | Event::QemuClosed
                | Event::Served(_)
                | Event::Order(_),
            ) => Self::Loading(peer).fail(error, false, actions),
            (state @ (Self::RelayLost(..) | Self::Closed), _) => state,
            (state, Event::Order(order)) => state.obey(order, known, actions),
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
        match (self, event) {
            (Self::Listening(mut agreed), Event::Agreed(peer)) => {
                actions.push(Action::Report(Report::Agreed(Agreed::default())));
                agreed.push(peer);
                Self::Listening(agreed)
            }
            (Self::Listening(mut agreed), Event::Withdrawn(peer, why)) => {
                agreed.retain(|other| other.number != peer.number);
                match why {
                    // As QEMU does: another source may never connect.
                    Some(why) if agreed.is_empty() => Self::Listening(agreed).give_up(
                        MigrationError::Aborted(why),
                        known,
                        actions,
                    ),
                    _ => Self::Listening(agreed),
                }
            }
            (Self::Listening(_), Event::Begun(peer)) => Self::Receiving(peer),
            (Self::Receiving(peer), Event::StreamEnded) => {
                actions.push(Action::Report(Report::StreamEnded));
                Self::Loading(peer)
            }
            (Self::Receiving(peer), Event::QemuLeft(error)) => {
                // The relay asks QEMU why.
                actions.push(Action::Report(Report::StreamEnded));
                Self::Judging { peer, error, patience: None }
            }
            (Self::Receiving(peer), Event::Served(Err(error @ MigrationError::Qemu(_)))) => {
                actions.push(Action::Report(Report::StreamEnded));
                Self::Judging { peer, error, patience: Some(patience(RELAY_VERDICT, now)) }
            }
            (Self::Receiving(peer), Event::ReturnPathLost(error))
                if known.switchover.is_past_ram() =>
            {
                // QEMU may get the guest without it, but the source's QEMU ends its stream only
                // after a message on the return path.
                actions.push(Action::Report(Report::StreamEnded));
                Self::Judging { peer, error, patience: None }
            }
            (state, Event::Failed(error)) if known.switchover.is_past_ram() => {
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
            ) => state.give_up(error, known, actions),
            (state, Event::RelayGone(reason)) => state.relay_lost(reason, known, actions),
            // The source closed before QEMU completed: only QEMU's end decides now. Other events
            // belong to other states.
            (state, _) => state,
        }
    }

    /// Handle an order of the relay other than `QemuCompleted`.
    fn obey(self, order: Order, known: &mut Known, actions: &mut Vec<Action>) -> Self {
        match order {
            Order::QemuFailed { reason, guest_never_ran } => {
                self.fail(MigrationError::Aborted(reason), guest_never_ran, actions)
            }
            // The relay keeps asking QEMU for its verdict as long as it can.
            Order::Abort { .. } if known.switchover.is_past_ram() => self,
            Order::Abort { reason } => {
                self.give_up(MigrationError::Aborted(reason), known, actions)
            }
            order => {
                debug!(?order, "unexpected order");
                self
            }
        }
    }

    /// Wait for QEMU's verdict after a failure.
    fn judge(
        peer: Peer,
        error: MigrationError,
        mut patience: Option<Patience>,
        event: Event,
        known: &mut Known,
        now: Instant,
        actions: &mut Vec<Action>,
    ) -> Self {
        let is_over = match event {
            Event::Order(Order::QemuFailed { reason, guest_never_ran }) => {
                // What the relay knows about QEMU is better than that QEMU stopped reading.
                let error = match error {
                    MigrationError::Qemu(_) => MigrationError::Aborted(reason),
                    error => of_ours(error),
                };
                return Self::Loading(peer).fail(error, guest_never_ran, actions);
            }
            Event::RelayGone(_) => true,
            Event::Timeout => patience.as_mut().is_some_and(|patience| !patience.lasts_at(now)),
            _ => false,
        };
        if !is_over {
            return Self::Judging { peer, error, patience };
        }
        let never_ran = known.switchover.withdraw();
        Self::Loading(peer).fail(of_ours(error), never_ran, actions)
    }

    /// Handle the loss of the relay.
    fn relay_lost(
        self,
        reason: Option<String>,
        known: &mut Known,
        actions: &mut Vec<Action>,
    ) -> Self {
        let gone =
            "The destination's helper is gone; start it beside a new QEMU there, and migrate again";
        let error = MigrationError::Aborted(reason.unwrap_or_else(|| gone.to_owned()));
        match self {
            // QEMU may still need the rest of the stream.
            Self::Receiving(peer) if !known.switchover.withdraw() && !known.is_qemu_closed => {
                Self::RelayLost(peer, error)
            }
            Self::Receiving(_) if known.switchover.is_past_ram() => {
                self.fail(error, false, actions)
            }
            Self::Loading(_) => self.fail(error, false, actions),
            state => state.give_up(error, known, actions),
        }
    }

    /// Tell the source that QEMU has the guest, once the source listens.
    fn confirm(peer: Peer, known: &Known, now: Instant, actions: &mut Vec<Action>) -> Self {
        if !known.is_sent && !known.is_mute {
            return Self::Completed(peer);
        }
        if known.is_closed {
            if !peer.is_stock {
                warn!("the source is gone, and does not know that the guest is here");
            }
            return Self::done(peer, actions);
        }
        if peer.is_stock {
            // A stock source closes at its stream's end, or when told on its return path.
            return Self::Telling(peer, Some(patience(FAREWELL, now)));
        }
        actions.push(Action::SendFinalAck(peer));
        Self::Telling(peer, None)
    }

    /// Wait until the source has closed: then the acknowledgement has arrived.
    fn tell_on(
        peer: Peer,
        mut patience: Option<Patience>,
        event: Event,
        known: &Known,
        now: Instant,
        actions: &mut Vec<Action>,
    ) -> Self {
        let is_over = match event {
            Event::Told(Err(error)) => {
                warn!(%error, "the source could not be told of the completion");
                true
            }
            Event::Timeout => patience.as_mut().is_some_and(|patience| !patience.lasts_at(now)),
            _ => known.is_closed,
        };
        if is_over { Self::done(peer, actions) } else { Self::Telling(peer, patience) }
    }

    fn done(peer: Peer, actions: &mut Vec<Action>) -> Self {
        actions.push(Action::CloseConnection(peer));
        actions.push(Action::ReportDone);
        Self::Closed
    }

    /// Return the sources that have completed the handshake.
    fn peers(self) -> Vec<Peer> {
        match self {
            Self::Receiving(peer) | Self::Loading(peer) | Self::RelayLost(peer, _) => vec![peer],
            Self::Judging { peer, .. } | Self::Completed(peer) | Self::Telling(peer, _) => {
                vec![peer]
            }
            Self::Listening(agreed) => agreed,
            Self::Closed => Vec::new(),
        }
    }

    /// Fail for a reason of the worker's own, or let QEMU decide.
    fn give_up(self, error: MigrationError, known: &mut Known, actions: &mut Vec<Action>) -> Self {
        let never_ran = known.switchover.withdraw();
        match self {
            Self::Receiving(peer) | Self::Loading(peer) if !never_ran => {
                actions.push(Action::EndStream);
                actions.push(Action::Report(Report::StreamEnded));
                Self::Judging { peer, error, patience: None }
            }
            state => state.fail(error, never_ran, actions),
        }
    }

    /// End as failed. A source that reports that the guest never ran here is believed: it has sent
    /// nothing after RAM.
    fn fail(self, error: MigrationError, guest_never_ran: bool, actions: &mut Vec<Action>) -> Self {
        let denied = matches!(error, MigrationError::PeerFailed { guest_never_ran: true, .. });
        let guest_never_ran = guest_never_ran || denied;
        let by_qemu = matches!(error, MigrationError::Qemu(_));
        actions.push(Action::CloseListener);
        let reason = error.to_string();
        actions.push(Action::ReportFailed { reason, guest_never_ran, by_qemu });
        actions.push(Action::CloseQemu);
        let peers = self.peers();
        actions.push(Action::EndConnections { peers, error, guest_never_ran });
        Self::Closed
    }
}

/// Convert a failure so that the source is told, even if it was the source's own: the source waits
/// for QEMU's verdict.
fn of_ours(error: MigrationError) -> MigrationError {
    MigrationError::Aborted(error.to_string())
}

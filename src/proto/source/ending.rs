//! A source that has failed, unless the destination or another thread knows better.

use std::time::{Duration, Instant};

use tracing::warn;

use super::{Action, Ending, Event, Known, Peer, State};
use crate::{
    control::Order,
    fabric::FabricError,
    proto::{error::MigrationError, patience},
};

/// How long to wait for the peer's last message after it closed the connection.
const LAST_WORDS: Duration = Duration::from_secs(1);

impl Ending {
    /// End with `error`, after which only messages that the peer has already sent are heard. If the
    /// connection has ended, they may contain the reason.
    pub fn unheard(
        error: MigrationError,
        guest_never_ran: bool,
        peer: Option<Peer>,
        now: Instant,
    ) -> Self {
        let limit = if is_cut(&error) { LAST_WORDS } else { Duration::ZERO };
        let patience = Some(patience(limit, now));
        // A peer that reports that its guest never ran is believed.
        let guest_never_ran = guest_never_ran || denies(&error);
        Self { error, known: None, guest_never_ran, peer, patience }
    }

    /// End with `error` of this side. After RAM only the destination knows where the guest runs: it
    /// is told, makes its QEMU end one way or the other, and reports which. A stock destination
    /// reports nothing.
    pub fn of_ours(
        error: MigrationError,
        guest_never_ran: bool,
        peer: Option<Peer>,
        now: Instant,
        actions: &mut Vec<Action>,
    ) -> Self {
        match &peer {
            Some(told) if !guest_never_ran && !told.is_stock && !is_cut(&error) => {
                warn!(%error, "the destination's verdict is awaited");
                actions.push(Action::TellPeer(error.to_string()));
                Self { error, known: None, guest_never_ran, peer, patience: None }
            }
            _ => Self::unheard(error, guest_never_ran, peer, now),
        }
    }

    /// Limit the wait: the client has cancelled, and must not wait for a destination forever.
    pub fn hurry(mut self, now: Instant) -> Self {
        let limit = self.peer.map_or(Duration::ZERO, |peer| peer.stall_timeout);
        self.patience = self.patience.or_else(|| Some(patience(limit, now)));
        self
    }

    /// Handle a message, or the end of the wait.
    pub(super) fn handle(
        mut self,
        event: Event,
        known: &mut Known,
        now: Instant,
        actions: &mut Vec<Action>,
    ) -> State {
        let is_past_ram = known.switchover.is_past_ram();
        match event {
            Event::Acknowledged if is_past_ram => self.done(known, now, actions),
            // The whole stream was sent before a stock destination closed, which is its only sign
            // that it has loaded the guest.
            Event::StreamTaken(Ok(()))
                if is_past_ram && is_close(&self.error) && self.is_stock() =>
            {
                self.done(known, now, actions)
            }
            Event::PeerFailed(error @ MigrationError::PeerFailed { .. }) => {
                self.told(error, known, now, actions)
            }
            // This thread was stopped by the failure, and knows no more.
            Event::StreamTaken(Err(MigrationError::Aborted(_))) => State::Ending(self),
            Event::PeerFailed(other) if !is_cut(&self.error) => {
                warn!(error = %other, "nothing more is heard of the destination");
                self.patience = Some(patience(Duration::ZERO, now));
                State::Ending(self)
            }
            Event::PeerFailed(other) | Event::StreamTaken(Err(other))
                if is_close(&self.error) && !is_close(&other) =>
            {
                self.known.get_or_insert(other);
                State::Ending(self)
            }
            Event::Order(Order::Cancel { .. }) => State::Ending(self.hurry(now)),
            Event::Timeout if self.is_over(now) => self.ended(known, now, actions),
            _ => State::Ending(self),
        }
    }

    fn is_over(&mut self, now: Instant) -> bool {
        self.patience.as_mut().is_some_and(|patience| !patience.lasts_at(now))
    }

    fn is_stock(&self) -> bool {
        self.peer.is_some_and(|peer| peer.is_stock)
    }

    /// End as done: the destination has the guest.
    fn done(self, known: &mut Known, now: Instant, actions: &mut Vec<Action>) -> State {
        warn!(error = %self.error, "the destination has the guest nevertheless");
        State::done(known, now, actions)
    }

    /// End as failed: the destination failed too. Its reason counts if only the end of the
    /// connection is known here; its report that its guest never ran always counts.
    fn told(
        mut self,
        told: MigrationError,
        known: &mut Known,
        now: Instant,
        actions: &mut Vec<Action>,
    ) -> State {
        self.guest_never_ran |= denies(&told);
        if is_cut(&self.error) {
            self.known = Some(told);
        }
        self.ended(known, now, actions)
    }

    fn ended(self, known: &mut Known, now: Instant, actions: &mut Vec<Action>) -> State {
        let error = self.known.unwrap_or(self.error);
        let (never_ran, connected) = (self.guest_never_ran, self.peer.is_some());
        State::failed(error, never_ran, connected, known, now, actions)
    }
}

/// Return whether the peer reports that its guest never ran.
fn denies(error: &MigrationError) -> bool {
    matches!(error, MigrationError::PeerFailed { guest_never_ran: true, .. })
}

/// Return whether the connection has ended.
fn is_cut(error: &MigrationError) -> bool {
    matches!(error, MigrationError::Fabric(error) if !error.leaves_connection())
}

/// Return whether the peer closed the connection.
fn is_close(error: &MigrationError) -> bool {
    matches!(error, MigrationError::Fabric(FabricError::Closed))
}

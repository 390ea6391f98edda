//! The end of a migration at the source: tells relay, peer and QEMU, and ends QEMU's own migration.

use std::time::{Duration, Instant};

use tracing::{debug, warn};

use super::{Action, Event, Known, State};
use crate::{
    control::Order,
    proto::{error::MigrationError, patience},
};

/// How long reading what QEMU has written may take, after QEMU stopped writing.
const READING: Duration = Duration::from_secs(10);

impl State {
    /// End as done: the destination has the guest.
    pub(super) fn done(known: &mut Known, now: Instant, actions: &mut Vec<Action>) -> Self {
        actions.push(Action::CloseConnection);
        // The relay must know before QEMU notices anything.
        actions.push(Action::ReportDone);
        // The last message of QEMU's return path may still be in flight.
        if known.sockets.is_some() {
            actions.push(Action::SettleQemu);
        }
        Self::leave(false, known, now, actions)
    }

    /// End as failed; a peer that is `connected` is told.
    pub(super) fn failed(
        error: MigrationError,
        guest_never_ran: bool,
        connected: bool,
        known: &mut Known,
        now: Instant,
        actions: &mut Vec<Action>,
    ) -> Self {
        let by_qemu = matches!(error, MigrationError::Qemu(_));
        let reason = error.to_string();
        // The relay must know before QEMU notices anything.
        actions.push(Action::ReportFailed { reason, guest_never_ran, by_qemu });
        // QEMU and the peer are told in any order: neither waits for the other.
        if guest_never_ran && known.ends_qemu() {
            actions.push(Action::EndQemu);
        }
        let settle = !guest_never_ran && known.sockets.is_some();
        match connected {
            true => actions.push(Action::EndConnection { error, guest_never_ran, settle }),
            false if settle => actions.push(Action::SettleQemu),
            false => {}
        }
        Self::leave(guest_never_ran, known, now, actions)
    }

    /// Do what is left to do in QEMU, when all were told.
    fn leave(
        guest_never_ran: bool,
        known: &mut Known,
        now: Instant,
        actions: &mut Vec<Action>,
    ) -> Self {
        if known.is_alone {
            return Self::take_over(guest_never_ran, known, now, actions);
        }
        if !known.concerns_relay() || known.is_finished {
            return Self::Closed;
        }
        debug!("waiting for the relay to end QEMU's migration");
        Self::AwaitingRelay { guest_never_ran }
    }

    /// Handle an event after the end of the migration.
    pub(super) fn close(
        self,
        event: Event,
        known: &mut Known,
        now: Instant,
        actions: &mut Vec<Action>,
    ) -> Self {
        match (self, event) {
            (state, Event::RamEnded) => {
                actions.push(Action::HoldRam);
                state
            }
            (Self::AwaitingRelay { .. }, Event::Order(Order::Finish)) => Self::Closed,
            // Do here what the relay had not done when it died.
            (Self::AwaitingRelay { guest_never_ran }, Event::RelayGone(_)) => {
                if guest_never_ran && known.sockets.is_some() {
                    actions.push(Action::EndQemu);
                }
                Self::take_over(guest_never_ran, known, now, actions)
            }
            (Self::AwaitingGuest(_), _) if !known.awaits_guest() => known.settled(actions),
            (Self::AwaitingGuest(mut patience), Event::Timeout) => {
                if patience.lasts_at(now) {
                    return Self::AwaitingGuest(patience);
                }
                warn!("what the guest did before the switchover is not known: it is left as it is");
                known.guest_ran = Some(false);
                known.settled(actions)
            }
            (state, _) => state,
        }
    }

    /// Do what the relay would do.
    fn take_over(
        guest_never_ran: bool,
        known: &mut Known,
        now: Instant,
        actions: &mut Vec<Action>,
    ) -> Self {
        if !known.concerns_relay() {
            return Self::Closed;
        }
        if !guest_never_ran {
            let restore = std::mem::take(&mut known.restore);
            actions.push(Action::TakeOver { restore, guest_never_ran, guest_runs: false });
            return Self::Closed;
        }
        if known.awaits_guest() {
            return Self::AwaitingGuest(patience(READING, now));
        }
        known.settled(actions)
    }
}

impl Known {
    /// Return whether the relay has work to do in QEMU when the migration has ended.
    pub(super) fn concerns_relay(&self) -> bool {
        self.sockets.is_some() || !self.restore.is_empty()
    }

    /// Return whether the worker ends QEMU's migration through its socket. The relay cancels first
    /// if QEMU has channels, or a client has cancelled.
    fn ends_qemu(&self) -> bool {
        let by_relay = self.is_cancelled || self.sockets.is_some_and(|sockets| sockets.channels);
        self.sockets.is_some() && (self.is_alone || !by_relay)
    }

    /// Return whether the guest's run state, which QEMU sends after RAM, is yet to be read. The
    /// relay's may be older, and QEMU 8.2 and later abort if told to continue a guest that was
    /// suspended meanwhile.
    fn awaits_guest(&self) -> bool {
        self.sockets.is_some() && self.guest_ran.is_none() && !self.is_read
    }

    /// Finish, knowing whether to resume the guest, which never ran at the destination.
    fn settled(&mut self, actions: &mut Vec<Action>) -> State {
        actions.push(Action::TakeOver {
            restore: std::mem::take(&mut self.restore),
            guest_never_ran: true,
            guest_runs: self.guest_ran.unwrap_or(self.guest_runs),
        });
        State::Closed
    }
}

//! The end of a migration at the source: relay, peer and QEMU are told, and QEMU's own migration ends.

use std::time::{Duration, Instant};

use tracing::{debug, warn};

use super::{Action, Event, Known, State};
use crate::{
    control::Order,
    proto::{error::MigrationError, patience},
};

/// How long reading what QEMU has written may take, when nothing more comes.
const READING: Duration = Duration::from_secs(10);

impl State {
    /// The destination has the guest.
    pub(super) fn done(known: &mut Known, now: Instant, actions: &mut Vec<Action>) -> Self {
        actions.push(Action::CloseConnection);
        // The relay has to know before QEMU notices anything.
        actions.push(Action::ReportDone);
        // The last message of QEMU's return path may still have been on its way.
        if known.sockets.is_some() {
            actions.push(Action::SettleQemu);
        }
        Self::leave(false, known, now, actions)
    }

    /// The migration has failed; a peer that is `connected` is told.
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
        // The relay has to know before QEMU notices anything.
        actions.push(Action::ReportFailed { reason, guest_never_ran, by_qemu });
        // QEMU first, or the peer first: neither waits for the other.
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

    /// All are told. What is left to do at QEMU?
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

    /// Something happens after the end of the migration.
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
            // What the relay has not done when it dies is left to do here.
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

    /// Do what the relay would.
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
    /// Is there something that the relay has to do at QEMU when the migration has ended?
    pub(super) fn concerns_relay(&self) -> bool {
        self.sockets.is_some() || !self.restore.is_empty()
    }

    /// Is it the worker that ends QEMU's migration by its socket? Where QEMU has channels the relay
    /// cancels before, and where a client has asked for it.
    fn ends_qemu(&self) -> bool {
        let by_relay = self.is_cancelled || self.sockets.is_some_and(|sockets| sockets.channels);
        self.sockets.is_some() && (self.is_alone || !by_relay)
    }

    /// QEMU says it after all of RAM, and where that was not read yet, it is now. What the relay has said
    /// may be older, and QEMU aborts if it is told to let a guest go on that was suspended meanwhile (8.2
    /// and later).
    fn awaits_guest(&self) -> bool {
        self.sockets.is_some() && self.guest_ran.is_none() && !self.is_read
    }

    /// It is known whether the guest, which never ran at the destination, is to run again here.
    fn settled(&mut self, actions: &mut Vec<Action>) -> State {
        actions.push(Action::TakeOver {
            restore: std::mem::take(&mut self.restore),
            guest_never_ran: true,
            guest_runs: self.guest_ran.unwrap_or(self.guest_runs),
        });
        State::Closed
    }
}

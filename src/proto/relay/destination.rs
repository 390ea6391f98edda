//! The relay of a destination: gets QEMU's verdict, and tells the worker.

use std::time::{Duration, Instant};

use super::MigrationStatus;
use crate::{
    control::{Order, Report},
    patience::Patience,
    proto::{Machine, patience},
};

/// How often QEMU is asked while its verdict is awaited, and otherwise.
const POLL: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(1));

/// How long the worker may take to end when QEMU is gone.
const VERDICT: Duration = Duration::from_secs(10);

/// What can happen.
#[derive(Debug)]
pub enum Event {
    /// A report of the worker.
    Report(Report),
    /// The worker is gone or unusable; with the reason.
    WorkerGone(String),
    /// The migration has to fail; with the reason.
    Abort(String),
    /// QEMU reports, in advance, that its guest runs.
    Resumed,
    /// QEMU's migration may have changed.
    MigrationChanged,
    /// The answer to [`Action::AskMigration`]: the status, and QEMU's reason. `None`: QEMU did not
    /// answer in time.
    Migration(Option<(MigrationStatus, Option<String>)>),
    /// The session with QEMU is gone.
    QemuGone {
        /// Whether QEMU is known to have exited.
        exited: bool,
    },
    /// [`Machine::poll_timeout`] has passed.
    Timeout,
}

/// What to do.
#[derive(Debug, PartialEq)]
pub enum Action {
    /// Send the worker an order.
    Order(Order),
    /// Ask QEMU for the state of its migration.
    AskMigration,
    /// Restore QEMU's settings, and show clients how the migration ended: `Ok` when QEMU has the
    /// guest.
    End(Result<(), String>),
}

/// The relay's side of a destination.
#[derive(Debug, Clone)]
pub struct RelayDestination {
    state: State,
    /// Whether QEMU has the whole stream, and its verdict is awaited.
    stream_ended: bool,
    /// Whether the guest ran. QEMU sends RESUME before its vCPUs run.
    resumed: bool,
    /// Whether the verdict was passed on.
    judged: bool,
}

#[derive(Debug, Clone)]
enum State {
    /// Worker and QEMU are watched.
    Following(Patience),
    /// QEMU is gone, but the worker may know a better reason.
    QemuGone(String, Patience),
    Closed,
}

impl RelayDestination {
    /// Create it when QEMU waits for the worker's stream.
    pub fn new(now: Instant) -> Self {
        let state = State::Following(patience(POLL.1, now));
        Self { state, stream_ended: false, resumed: false, judged: false }
    }

    fn followed(&self, now: Instant) -> State {
        let is_awaited = self.stream_ended && !self.judged;
        State::Following(patience(if is_awaited { POLL.0 } else { POLL.1 }, now))
    }

    fn end(&mut self, end: Result<(), String>, actions: &mut Vec<Action>) {
        actions.push(Action::End(end));
        self.state = State::Closed;
    }

    fn report(&mut self, report: Report, actions: &mut Vec<Action>) {
        match report {
            Report::StreamEnded => self.stream_ended = true,
            Report::Done(_) => self.end(Ok(()), actions),
            Report::Failed { reason, .. } => self.end(Err(reason), actions),
            _ => {}
        }
    }

    /// Pass on QEMU's verdict, once.
    fn judge(&mut self, status: MigrationStatus, why: Option<String>, actions: &mut Vec<Action>) {
        let order = match status {
            MigrationStatus::Completed if self.stream_ended => Order::QemuCompleted,
            MigrationStatus::Failed => {
                let why = why.unwrap_or_else(|| "look at its log".to_owned());
                Order::QemuFailed {
                    reason: format!("The destination's QEMU failed to load the guest: {why}"),
                    guest_never_ran: !self.resumed,
                }
            }
            _ => return,
        };
        if !std::mem::replace(&mut self.judged, true) {
            actions.push(Action::Order(order));
        }
    }

    /// Pass on the loss of QEMU: the source must know whether its guest may run again.
    fn qemu_gone(&mut self, exited: bool, now: Instant, actions: &mut Vec<Action>) {
        let reason = match exited {
            true => "The destination's QEMU is gone; look at its log",
            false => "The QMP session with the destination's QEMU was lost; look at its log",
        };
        let (reason, guest_never_ran) = (reason.to_owned(), exited && !self.resumed);
        actions.push(Action::Order(Order::QemuFailed { reason: reason.clone(), guest_never_ran }));
        // The worker may know better: QEMU may have ended because the migration had failed, or long
        // after it got the guest, while the source is just being told.
        self.state = State::QemuGone(reason, patience(VERDICT, now));
    }

    fn late(&mut self, now: Instant, actions: &mut Vec<Action>) {
        match &mut self.state {
            State::Following(poll) => {
                if !poll.lasts_at(now) {
                    actions.push(Action::AskMigration);
                    self.state = self.followed(now);
                }
            }
            State::QemuGone(reason, patience) => {
                if !patience.lasts_at(now) {
                    let reason = std::mem::take(reason);
                    self.end(Err(reason), actions);
                }
            }
            State::Closed => {}
        }
    }
}

impl Machine for RelayDestination {
    type Event = Event;
    type Action = Action;

    const TIMEOUT: Event = Event::Timeout;

    fn handle(mut self, event: Event, now: Instant, actions: &mut Vec<Action>) -> Self {
        let is_following = matches!(self.state, State::Following(_));
        match event {
            _ if self.is_closed() => {}
            Event::Report(report) => {
                let awaited = self.stream_ended;
                self.report(report, actions);
                if !awaited && self.stream_ended && is_following {
                    self.state = self.followed(now);
                }
            }
            Event::WorkerGone(reason) => {
                let reason = match &mut self.state {
                    State::QemuGone(known, _) => std::mem::take(known),
                    _ => reason,
                };
                self.end(Err(reason), actions);
            }
            Event::Resumed => self.resumed = true,
            Event::Abort(reason) if is_following => {
                actions.push(Action::Order(Order::Abort { reason }));
            }
            Event::MigrationChanged if is_following => actions.push(Action::AskMigration),
            Event::Migration(Some((status, why))) if is_following => {
                self.judge(status, why, actions);
            }
            Event::QemuGone { exited } if is_following => self.qemu_gone(exited, now, actions),
            Event::Timeout => self.late(now, actions),
            _ => {}
        }
        self
    }

    fn poll_timeout(&self) -> Option<Instant> {
        match &self.state {
            State::Following(patience) | State::QemuGone(_, patience) => Some(patience.next()),
            State::Closed => None,
        }
    }

    fn has_ended(&self) -> bool {
        self.is_closed()
    }

    fn is_closed(&self) -> bool {
        matches!(self.state, State::Closed)
    }
}

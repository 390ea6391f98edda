//! The relay of a destination: it hears QEMU's word, and tells the worker.

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

/// What happens.
#[derive(Debug)]
pub enum Event {
    /// The worker reports.
    Report(Report),
    /// The worker is gone, or as good as: why.
    WorkerGone(String),
    /// The migration is to fail: why.
    Abort(String),
    /// QEMU says that its guest runs, before it does.
    Resumed,
    /// QEMU's migration may have changed.
    MigrationChanged,
    /// Answer to [`Action::AskMigration`]: the status, and QEMU's reason. `None`: it did not answer in
    /// time.
    Migration(Option<(MigrationStatus, Option<String>)>),
    /// The session with QEMU is gone; and so is QEMU itself, if that is known.
    QemuGone {
        /// It has exited.
        exited: bool,
    },
    /// [`Machine::poll_timeout`] has passed.
    Timeout,
}

/// What is to be done.
#[derive(Debug, PartialEq)]
pub enum Action {
    /// Order the worker.
    Order(Order),
    /// Ask QEMU for its migration.
    AskMigration,
    /// Set QEMU back to what it was before the migration, and let clients see how that ended: `Ok` when
    /// QEMU has the guest.
    End(Result<(), String>),
}

/// The relay's side of a destination.
#[derive(Debug, Clone)]
pub struct RelayDestination {
    state: State,
    /// The stream is all QEMU's: its verdict is awaited.
    stream_ended: bool,
    /// The guest ran. QEMU says RESUME before its vCPUs run.
    resumed: bool,
    /// The verdict was passed on.
    judged: bool,
}

#[derive(Debug, Clone)]
enum State {
    /// Worker and QEMU are followed.
    Following(Patience),
    /// QEMU is gone: the worker may know better than that.
    QemuGone(String, Patience),
    Closed,
}

impl RelayDestination {
    /// QEMU waits for the worker's stream.
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

    /// QEMU's verdict is passed on, once.
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

    /// The source must know whether its guest may run again.
    fn qemu_gone(&mut self, exited: bool, now: Instant, actions: &mut Vec<Action>) {
        let reason = match exited {
            true => "The destination's QEMU is gone; look at its log",
            false => "The QMP session with the destination's QEMU was lost; look at its log",
        };
        let (reason, guest_never_ran) = (reason.to_owned(), exited && !self.resumed);
        actions.push(Action::Order(Order::QemuFailed { reason: reason.clone(), guest_never_ran }));
        // Unless the worker knows better: QEMU may have ended because the migration had failed, or when
        // it had long had the guest, and the source is just being told.
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

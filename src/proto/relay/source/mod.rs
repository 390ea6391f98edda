//! The relay of a source: from QEMU's migration into the worker to its end in QEMU.

mod failing;

use std::time::{Duration, Instant};

use super::{Guest, MigrationStatus, RunState};
use crate::{
    control::{Order, Report},
    patience::Patience,
    proto::{Machine, patience},
};

/// How long a QEMU that cancels may take before the worker is told.
const NOTICE: Duration = Duration::from_millis(500);

/// How long the worker may take to report why a migration failed that QEMU has ended, or to obey a
/// client that cancels.
const VERDICT: Duration = Duration::from_secs(3);

/// What can happen.
#[derive(Debug)]
pub enum Event {
    /// A report of the worker.
    Report(Report),
    /// The worker is gone or unusable; with the reason.
    WorkerGone(String),
    /// All reports of a killed worker were read.
    WorkerKilled,
    /// A client cancels.
    Cancel(Cancel),
    /// The migration has to fail, because the relay is told to exit or for another reason.
    Abort(String),
    /// QEMU's guest was suspended.
    Suspended,
    /// The state of QEMU's guest may have changed.
    GuestChanged,
    /// QEMU's migration may have changed.
    MigrationChanged,
    /// The answer to [`Action::AskMigration`]: the status, and QEMU's reason. `None`: QEMU did not
    /// answer in time.
    Migration(Option<(MigrationStatus, Option<String>)>),
    /// The answer to [`Action::AskGuest`]; and whether QEMU has completed its migration, where it
    /// matters.
    Guest(Option<(RunState, bool)>),
    /// The answer to [`Action::Continue`]: QEMU's error, if any.
    Continued(Result<(), String>),
    /// QEMU's settings were restored.
    Restored,
    /// QEMU, or the session with it, is gone.
    QemuGone,
    /// [`Machine::poll_timeout`] has passed.
    Timeout,
}

/// The command by which a client ends the migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Cancel {
    /// `yank`: the migration fails.
    Yank,
    /// `migrate_cancel`: clients see `cancelled`.
    Cancel,
}

/// What to do.
#[derive(Debug, PartialEq)]
pub enum Action {
    /// Send the worker an order.
    Order(Order),
    /// Kill the worker, and read the reports that it had sent.
    KillWorker,
    /// Ask QEMU for the state of its migration.
    AskMigration,
    /// Ask QEMU for the state of its guest.
    AskGuest,
    /// Cancel QEMU's migration, before anything else is done.
    CancelAtQemu,
    /// Resume the guest.
    Continue,
    /// Break QEMU's sockets: QEMU takes that for a failure.
    EndSockets,
    /// Let QEMU end its migration without resuming its guest.
    SettleSockets,
    /// Restore QEMU's settings.
    Restore,
    /// Hide from clients that QEMU's migration is cancelled because it failed.
    ShowFailing,
    /// Show clients how the migration ended.
    Show(End),
    /// Leave the worker: it has done its part, or does what is left without a relay.
    LeaveWorker {
        /// Whether QEMU can't be reached from here.
        detached: bool,
    },
}

/// How the migration ended, as clients see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// The destination has the guest.
    Completed,
    /// The migration was cancelled.
    Cancelled,
    /// The migration failed.
    Failed(String),
}

/// The relay's side of a source.
#[derive(Debug, Clone)]
pub struct RelaySource {
    state: State,
    known: Known,
}

/// Where the migration stands.
#[derive(Debug, Clone)]
enum State {
    /// The worker is watched.
    Following(Deadlines),
    /// The worker is being killed.
    Killing(String),
    /// The migration failed: QEMU's ends too, and the guest keeps running, if it may.
    Failing(Failing),
    /// QEMU's settings are being restored.
    Restoring(End),
    /// Nothing is left to do.
    Closed,
}

/// A failure after which QEMU's migration is not over yet.
#[derive(Debug, Clone)]
struct Failing {
    reason: String,
    guest_never_ran: bool,
    step: Step,
    /// How long the step may take.
    limit: Patience,
    /// When QEMU is asked again.
    poll: Option<Patience>,
}

/// What is being done about a failure.
#[derive(Debug, Clone, PartialEq)]
enum Step {
    /// QEMU has ended its stream: get its reason before anything makes it fail for another.
    HearQemu,
    /// Cancel a QEMU with channels before its sockets break: a channel that breaks while QEMU waits
    /// at pre-switchover fails the migration and leaves the guest stopped for good
    /// (`multifd_send_set_error` sets the state, and nothing wakes the waiting thread; 10.0). The
    /// same if a client has cancelled.
    BreakOff,
    /// Wait for the end of QEMU's migration.
    EndMigration {
        /// Whether it was cancelled for that.
        is_cancelled: bool,
    },
    /// Wait for the guest's status at the end of the stream, which QEMU has written completely.
    HearOfGuest,
    /// Resume the guest once QEMU is out of the switchover.
    RunAgain,
    /// `cont` was sent.
    Continue,
}

/// Time limits for a worker that is watched.
#[derive(Debug, Clone, Default)]
struct Deadlines {
    /// For a QEMU that cancels by itself.
    cancelling: Option<Patience>,
    /// For the worker, which was told that the migration is cancelled.
    cancelled: Option<Patience>,
    is_cancelled: bool,
    /// For the worker, since QEMU's migration has ended.
    verdict: Option<Patience>,
}

/// What matters in every state.
#[derive(Debug, Clone, Default)]
struct Known {
    /// Whether QEMU uses multifd channels.
    has_channels: bool,
    /// Whether the guest may have run at the destination.
    past_ram: bool,
    /// What the guest does, apart from the switchover.
    guest: Guest,
    /// What it did before, as QEMU has told the destination.
    guest_before: Option<Guest>,
    /// Whether a client has cancelled.
    cancels: bool,
    /// Whether a cancel of the relay's own is hidden from clients.
    is_failing: bool,
    /// How QEMU's own migration ended without success, and why. Later reports are about another
    /// one.
    ended: Option<(MigrationStatus, Option<String>)>,
    /// Whether there is a worker that reports.
    has_worker: bool,
}

impl RelaySource {
    /// Create it when QEMU has begun to migrate into the worker. `guest` is what its guest does.
    pub fn new(has_channels: bool, guest: Guest) -> Self {
        let known = Known { has_channels, guest, has_worker: true, ..Known::default() };
        Self { state: State::Following(Deadlines::default()), known }
    }

    /// Return whether the worker is watched and QEMU's migration has not ended.
    pub fn is_following(&self) -> bool {
        matches!(self.state, State::Following(_)) && self.is_at_qemu()
    }

    /// Return whether QEMU's reports about its migration are about this one.
    pub fn is_at_qemu(&self) -> bool {
        self.known.ended.is_none() && !self.has_ended()
    }
}

impl Machine for RelaySource {
    type Event = Event;
    type Action = Action;

    const TIMEOUT: Event = Event::Timeout;

    fn handle(mut self, event: Event, now: Instant, actions: &mut Vec<Action>) -> Self {
        let Some(event) = self.known.note(event, actions) else { return self };
        let state = self.state.handle(event, &mut self.known, now, actions);
        Self { state, ..self }
    }

    fn poll_timeout(&self) -> Option<Instant> {
        match &self.state {
            State::Following(Deadlines { cancelling, cancelled, verdict, .. }) => {
                let all = [cancelling, cancelled, verdict].into_iter().flatten();
                all.map(Patience::next).min()
            }
            State::Failing(failing) => failing.poll_timeout(),
            _ => None,
        }
    }

    fn has_ended(&self) -> bool {
        matches!(self.state, State::Restoring(_) | State::Closed)
    }

    fn is_closed(&self) -> bool {
        matches!(self.state, State::Closed)
    }
}

impl Known {
    /// Note what no state may miss; returns the event if it is left to handle.
    fn note(&mut self, event: Event, actions: &mut Vec<Action>) -> Option<Event> {
        match event {
            Event::Report(Report::PastRam) => self.past_ram = true,
            Event::Report(Report::GuestBefore { status }) => {
                self.guest_before = Some(Guest::before(&status));
                return Some(Event::Report(Report::GuestBefore { status }));
            }
            // When QEMU is asked, it may already have switched over.
            Event::Suspended => self.set_guest(Guest::Suspended, actions),
            Event::GuestChanged => actions.push(Action::AskGuest),
            Event::Cancel(cancel) => {
                self.cancels |= cancel == Cancel::Cancel;
                return Some(Event::Cancel(cancel));
            }
            event => return Some(event),
        }
        None
    }

    fn set_guest(&mut self, guest: Guest, actions: &mut Vec<Action>) {
        if std::mem::replace(&mut self.guest, guest) != guest {
            let runs = guest == Guest::Runs;
            actions.push(Action::Order(Order::SetGuestRunning { runs }));
        }
    }

    /// Return what the guest did before the switchover. QEMU knows best, but reports nothing about
    /// a running or paused guest if its machine type is older than QEMU 2.4.
    fn guest_at_switchover(&self) -> Guest {
        self.guest_before.unwrap_or(self.guest)
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
            (Self::Closed, _) => Self::Closed,
            (_, Event::QemuGone) => {
                // The worker knows better what is left to do.
                actions.push(Action::LeaveWorker { detached: true });
                Self::Closed
            }
            (Self::Restoring(end), Event::Restored) => {
                actions.push(Action::Show(end));
                actions.push(Action::LeaveWorker { detached: false });
                Self::Closed
            }
            (state @ Self::Restoring(_), _) => state,
            (Self::Following(deadlines), event) => deadlines.handle(event, known, now, actions),
            (Self::Killing(reason), event) => kill(reason, event, known, now, actions),
            (Self::Failing(failing), event) => failing.handle(event, known, now, actions),
        }
    }

    fn restore(end: End, actions: &mut Vec<Action>) -> Self {
        actions.push(Action::Restore);
        Self::Restoring(end)
    }
}

/// Handle an event while the worker is killed. Its reports count, but it can't settle QEMU any
/// more.
fn kill(
    reason: String,
    event: Event,
    known: &mut Known,
    now: Instant,
    actions: &mut Vec<Action>,
) -> State {
    match event {
        Event::Report(Report::Done(_)) => State::restore(End::Completed, actions),
        Event::Report(Report::Failed { guest_never_ran: false, .. }) => {
            known.past_ram = true;
            State::Killing(reason)
        }
        Event::Report(Report::Failed { reason, by_qemu, .. }) => {
            known.has_worker = false;
            Failing::reported(reason, true, by_qemu, known, now, actions)
        }
        Event::WorkerKilled | Event::WorkerGone(_) => {
            known.has_worker = false;
            Failing::silent(reason, known, now, actions)
        }
        _ => State::Killing(reason),
    }
}

impl Deadlines {
    fn handle(
        mut self,
        event: Event,
        known: &mut Known,
        now: Instant,
        actions: &mut Vec<Action>,
    ) -> State {
        match event {
            Event::Report(Report::Done(_)) => return State::restore(End::Completed, actions),
            Event::Report(Report::Failed { reason, guest_never_ran, by_qemu, .. }) => {
                let never_ran = guest_never_ran;
                return Failing::reported(reason, never_ran, by_qemu, known, now, actions);
            }
            Event::WorkerGone(reason) => return Self::kill(reason, actions),
            Event::Abort(reason) => actions.push(Action::Order(Order::Abort { reason })),
            // The worker is told first, and reports whether the guest may have run at the
            // destination. QEMU is told only if it has not and will not: while QEMU writes the end
            // of its stream it handles no command, and afterwards it would run its guest.
            Event::Cancel(_) => {
                let what = if known.cancels { "cancelled" } else { "yanked" };
                let at_end = if known.past_ram { " at its very end" } else { "" };
                self.cancel(format!("The migration was {what}{at_end}"), now, actions);
            }
            Event::MigrationChanged => actions.push(Action::AskMigration),
            Event::Migration(Some((status, why))) => {
                self.look_at(status, why, known, now, actions);
            }
            Event::Guest(Some((run, has_completed))) => {
                if let Some(guest) = run.guest(has_completed) {
                    known.set_guest(guest, actions);
                }
            }
            Event::Timeout => return self.late(known, now, actions),
            _ => {}
        }
        State::Following(self)
    }

    fn kill(reason: String, actions: &mut Vec<Action>) -> State {
        actions.push(Action::KillWorker);
        State::Killing(reason)
    }

    /// Note when QEMU's migration has ended without success. The worker will report why, if it can.
    fn look_at(
        &mut self,
        status: MigrationStatus,
        why: Option<String>,
        known: &mut Known,
        now: Instant,
        actions: &mut Vec<Action>,
    ) {
        if known.ended.is_some() {
            return;
        }
        match status {
            MigrationStatus::Cancelling => {
                self.cancelling.get_or_insert_with(|| patience(NOTICE, now));
            }
            MigrationStatus::Cancelled | MigrationStatus::Failed => {
                self.cancelling = None;
                self.verdict = Some(patience(VERDICT, now));
                known.ended = Some((status, why));
                if status == MigrationStatus::Cancelled {
                    // Whatever the worker reports. Clients may begin something else now.
                    actions.push(Action::Restore);
                    actions.push(Action::Show(End::Cancelled));
                }
            }
            _ => self.cancelling = None,
        }
    }

    fn late(mut self, known: &mut Known, now: Instant, actions: &mut Vec<Action>) -> State {
        let is_over = |patience: &mut Option<Patience>| {
            patience.as_mut().is_some_and(|patience| !patience.lasts_at(now))
        };
        if is_over(&mut self.verdict) {
            let why = known.ended.as_ref().and_then(|(_, why)| why.clone());
            let reason = why.unwrap_or_else(|| "QEMU ended the migration".to_owned());
            return Self::kill(reason, actions);
        }
        if is_over(&mut self.cancelled) {
            self.cancelled = None;
            if known.past_ram {
                // The worker waits for the destination's verdict.
                return State::Following(self);
            }
            let reason = "The source's worker hung and was killed; migrate again".to_owned();
            return Self::kill(reason, actions);
        }
        if is_over(&mut self.cancelling) {
            // QEMU waits for a channel, and the worker for the peer, maybe forever.
            self.cancelling = None;
            self.cancel("The migration was cancelled".to_owned(), now, actions);
        }
        State::Following(self)
    }

    fn cancel(&mut self, reason: String, now: Instant, actions: &mut Vec<Action>) {
        if !std::mem::replace(&mut self.is_cancelled, true) {
            self.cancelled = Some(patience(VERDICT, now));
            actions.push(Action::Order(Order::Cancel { reason }));
        }
    }
}

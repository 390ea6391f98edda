//! The relay of a source: from QEMU's migration into the worker to its end at QEMU.

mod failing;

use std::time::{Duration, Instant};

use super::{Guest, MigrationStatus, RunState};
use crate::{
    control::{Order, Report},
    patience::Patience,
    proto::{Machine, patience},
};

/// How long a QEMU that cancels may go on before the worker is told.
const NOTICE: Duration = Duration::from_millis(500);

/// How long the worker may take to say why a migration failed that QEMU has ended, or to obey a client
/// that cancels.
const VERDICT: Duration = Duration::from_secs(3);

/// What happens.
#[derive(Debug)]
pub enum Event {
    /// The worker reports.
    Report(Report),
    /// The worker is gone, or as good as: why.
    WorkerGone(String),
    /// All reports were heard of a worker that was killed.
    WorkerKilled,
    /// A client cancels.
    Cancel(Cancel),
    /// The migration is to fail, because the relay is told to end or for another reason.
    Abort(String),
    /// QEMU's guest was put to sleep.
    Suspended,
    /// What QEMU's guest does may have changed.
    GuestChanged,
    /// QEMU's migration may have changed.
    MigrationChanged,
    /// Answer to [`Action::AskMigration`]: the status, and QEMU's reason. `None`: it did not answer in
    /// time.
    Migration(Option<(MigrationStatus, Option<String>)>),
    /// Answer to [`Action::AskGuest`]; and whether QEMU has completed its migration, where it matters.
    Guest(Option<(RunState, bool)>),
    /// Answer to [`Action::Continue`]: an error of QEMU's.
    Continued(Result<(), String>),
    /// QEMU was set back to what it was.
    Restored,
    /// QEMU is gone, or the session with it.
    QemuGone,
    /// [`Machine::poll_timeout`] has passed.
    Timeout,
}

/// By which command a client wants the migration to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Cancel {
    /// `yank`: it fails.
    Yank,
    /// `migrate_cancel`: clients see `cancelled`.
    Cancel,
}

/// What is to be done.
#[derive(Debug, PartialEq)]
pub enum Action {
    /// Order the worker.
    Order(Order),
    /// Kill the worker, and hear what it had reported.
    KillWorker,
    /// Ask QEMU for its migration.
    AskMigration,
    /// Ask QEMU for its guest.
    AskGuest,
    /// Cancel QEMU's migration, before anything else is done.
    CancelAtQemu,
    /// Let the guest run again.
    Continue,
    /// Break QEMU's sockets: it takes that for a failure.
    EndSockets,
    /// Let QEMU end its migration without its guest running again.
    SettleSockets,
    /// Set QEMU back to what it was before the migration.
    Restore,
    /// QEMU's migration is being cancelled because it failed: clients see no cancel.
    ShowFailing,
    /// Clients see how it ended.
    Show(End),
    /// The worker has done its part, or does what is left without a relay.
    LeaveWorker {
        /// QEMU can't be reached from here.
        detached: bool,
    },
}

/// How clients see that it ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// The destination has the guest.
    Completed,
    /// It was cancelled.
    Cancelled,
    /// It failed.
    Failed(String),
}

/// The relay's side of a source.
#[derive(Debug, Clone)]
pub struct RelaySource {
    state: State,
    known: Known,
}

/// Where it stands.
#[derive(Debug, Clone)]
enum State {
    /// The worker is followed.
    Following(Deadlines),
    /// The worker is being killed.
    Killing(String),
    /// It failed: QEMU's migration ends, and the guest runs on, if that may be.
    Failing(Failing),
    /// QEMU is being set back.
    Restoring(End),
    /// Nothing is left to do.
    Closed,
}

/// Failed, and not over at QEMU.
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

/// What is being done.
#[derive(Debug, Clone, PartialEq)]
enum Step {
    /// QEMU has ended its stream: its reason comes before anything that makes it fail for another.
    HearQemu,
    /// One with channels is cancelled before its sockets break: a channel that breaks while QEMU waits at
    /// pre-switchover fails the migration and leaves the guest stopped for good
    /// (`multifd_send_set_error` sets the state, and nobody wakes the thread that waits; 10.0). So is one
    /// that a client has cancelled.
    BreakOff,
    /// QEMU's migration is to end.
    EndMigration {
        /// It was cancelled, so that it does.
        is_cancelled: bool,
    },
    /// QEMU says what the guest did at the end of its stream, all of which it has written.
    HearOfGuest,
    /// The guest is to run again: once QEMU is out of the switchover.
    RunAgain,
    /// It was told to.
    Continue,
}

/// What a worker that is followed has to do in time.
#[derive(Debug, Clone, Default)]
struct Deadlines {
    /// QEMU cancels by itself.
    cancelling: Option<Patience>,
    /// The worker was told that the migration is cancelled.
    cancelled: Option<Patience>,
    is_cancelled: bool,
    /// QEMU's migration has ended.
    verdict: Option<Patience>,
}

/// What counts in every state.
#[derive(Debug, Clone, Default)]
struct Known {
    /// QEMU uses multifd channels.
    has_channels: bool,
    /// The guest may have come to run at the destination.
    past_ram: bool,
    /// What the guest does, but for the switchover.
    guest: Guest,
    /// What QEMU has told the destination that it did before.
    guest_before: Option<Guest>,
    /// A client has cancelled.
    cancels: bool,
    /// Clients were told nothing of a cancel that is the relay's own.
    is_failing: bool,
    /// QEMU's own migration has ended without success, and why. What it says later is of another one.
    ended: Option<(MigrationStatus, Option<String>)>,
    /// There is a worker that reports.
    has_worker: bool,
}

impl RelaySource {
    /// QEMU has begun to migrate into the worker, with channels or without; its guest does this.
    pub fn new(has_channels: bool, guest: Guest) -> Self {
        let known = Known { has_channels, guest, has_worker: true, ..Known::default() };
        Self { state: State::Following(Deadlines::default()), known }
    }

    /// The worker is followed, and QEMU's migration goes on.
    pub fn is_following(&self) -> bool {
        matches!(self.state, State::Following(_)) && self.is_at_qemu()
    }

    /// What QEMU says of its migration is of this one.
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
    /// What no state may miss; returns what is left to handle.
    fn note(&mut self, event: Event, actions: &mut Vec<Action>) -> Option<Event> {
        match event {
            Event::Report(Report::PastRam) => self.past_ram = true,
            Event::Report(Report::GuestBefore { status }) => {
                self.guest_before = Some(Guest::before(&status));
                return Some(Event::Report(Report::GuestBefore { status }));
            }
            // By the time that QEMU is asked it may have switched over.
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

    /// What the guest did before the switchover. QEMU knows best, and says nothing of one that runs or is
    /// paused if its machine is that of a QEMU before 2.4.
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

/// A worker is killed. What it had said before counts, but for what it can't do any more: to settle QEMU.
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
            // The worker is told first, and says whether the guest may have come to run at the
            // destination; only if it has not, and will not, QEMU is told: while it writes the end of its
            // stream it hears nobody, and afterwards it would run its guest.
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

    /// Notice when QEMU's migration has ended without success. Its worker will say why, if it can.
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
                    // Whatever the worker says, or does not. Clients may begin something else now.
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
                // It waits for the destination's word.
                return State::Following(self);
            }
            let reason = "The source's worker hung and was killed; migrate again".to_owned();
            return Self::kill(reason, actions);
        }
        if is_over(&mut self.cancelling) {
            // It waits for a channel, and the worker for the peer, or for ever.
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

//! The migrations of one QEMU, shared by all its monitors.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use serde_json::Value;
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinHandle,
    time::timeout,
};

use super::{
    IN_PROGRESS,
    destination::Destination,
    events::{Output, Outputs, QUEUE, QemuEvent},
    saved_settings::{Loan, Turn},
    source::Source,
    status::{Phase, Side, View},
};
use crate::{
    address::Address,
    proto::relay::{Guest, source::Cancel},
    qmp::QmpError,
    relay::context::Context,
};

/// How long migrations may take to end cleanly when the relay ends.
pub const FAREWELL: Duration = Duration::from_secs(8);

/// The result of a command.
pub type Reply = Result<Value, QmpError>;

/// A migration of ours, running or over.
struct Migration {
    events: mpsc::Sender<QemuEvent>,
    view: watch::Sender<View>,
    /// A client's request to end it.
    cancel: watch::Sender<Option<Cancel>>,
    /// What clients saw before, and see again if this migration does not begin.
    before: Option<View>,
    task: JoinHandle<()>,
    /// A later migration, not ours, has taken its place.
    forgotten: bool,
}

impl Migration {
    fn runs(&self) -> bool {
        !self.task.is_finished()
    }

    /// Return whether another migration may begin.
    fn is_over(&self) -> bool {
        !self.runs() || self.view.borrow().is_over()
    }

    async fn ended(self) {
        // Keep the sender: the task takes a closed channel for the end of QEMU.
        let Self { events, task, .. } = self;
        // A panic is logged.
        let _ = task.await;
        drop(events);
    }

    /// Return what clients see.
    fn shown(&self) -> Option<View> {
        if self.forgotten {
            return None;
        }
        let view = self.view.borrow();
        if view.shows() { Some(view.clone()) } else { self.before.clone() }
    }

    fn want(&self, cancel: Cancel) {
        self.cancel.send_if_modified(|wanted| {
            let more = Some(cancel) > *wanted;
            *wanted = (*wanted).max(Some(cancel));
            more
        });
    }

    fn tell(&self, event: QemuEvent) {
        // A task that is over, or too busy, asks QEMU itself.
        let _ = self.events.try_send(event);
    }
}

/// At most one migration in each direction.
#[derive(Default)]
struct Slots {
    source: Option<Migration>,
    destination: Option<Migration>,
}

impl Slots {
    fn of(&self, side: Side) -> &Option<Migration> {
        match side {
            Side::Source => &self.source,
            Side::Destination => &self.destination,
        }
    }

    fn all(&self) -> impl Iterator<Item = &Migration> {
        [&self.source, &self.destination].into_iter().flatten()
    }

    fn all_mut(&mut self) -> impl Iterator<Item = &mut Migration> {
        [&mut self.source, &mut self.destination].into_iter().flatten()
    }
}

/// The migrations. Nothing waits while the lock is held.
#[derive(Clone)]
pub struct Migrations {
    slots: Arc<Mutex<Slots>>,
    outputs: Outputs,
    loan: Loan,
}

impl Migrations {
    /// Create it without migrations; return the output's receiver for each of `monitors` monitors.
    pub fn new(monitors: usize) -> (Self, Vec<mpsc::Receiver<Output>>) {
        let (outputs, receivers) = Outputs::new(monitors);
        (Self { slots: Arc::default(), outputs, loan: Loan::default() }, receivers)
    }

    fn slots(&self) -> MutexGuard<'_, Slots> {
        // Each change is a single assignment.
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Return what clients see: the last migration of ours.
    pub fn view(&self) -> Option<View> {
        self.slots().all().find_map(Migration::shown)
    }

    /// Return QEMU's settings, some of which a migration may have borrowed.
    pub fn loan(&self) -> &Loan {
        &self.loan
    }

    /// Return the phase of the outgoing migration.
    pub fn source(&self) -> Option<Phase> {
        let slots = self.slots();
        let source = slots.source.as_ref().filter(|source| !source.forgotten)?;
        let phase = source.view.borrow().phase.clone();
        Some(phase)
    }

    /// Cancel the outgoing migration, if one is running.
    ///
    /// Returns false if QEMU must be asked too: a migration that was only just requested may still
    /// be refused because of another one, which is then meant.
    pub fn cancel(&self) -> bool {
        let slots = self.slots();
        let Some(source) = slots.source.as_ref().filter(|source| !source.is_over()) else {
            return false;
        };
        source.view.send_modify(|view| view.cancels = true);
        source.want(Cancel::Cancel);
        source.view.borrow().shows()
    }

    /// Abort the outgoing migration, if one is running.
    pub fn yank(&self) {
        if let Some(source) = &self.slots().source {
            source.want(Cancel::Yank);
        }
    }

    /// Return whether QEMU has a status for a migration that fails.
    pub fn has_failing(&self) -> bool {
        self.slots().source.as_ref().is_some_and(|source| source.view.borrow().has_failing)
    }

    /// Return whether clients were told of the cancel.
    pub fn told_cancelling(&self) -> bool {
        self.slots().source.as_ref().is_some_and(|source| source.view.borrow().told_cancelling)
    }

    /// Tell clients of the cancel, once: before the reply, as QEMU does.
    pub async fn tell_cancelling(&self) {
        let tells = |view: &mut View| {
            let first = view.cancels && !std::mem::replace(&mut view.told_cancelling, true);
            first && view.tells
        };
        let tells = {
            let slots = self.slots();
            slots.source.as_ref().is_some_and(|source| source.view.send_if_modified(tells))
        };
        if tells {
            self.outputs.put(Output::status("cancelling")).await;
        }
    }

    /// Return whether a migration of ours has begun that QEMU does not know of yet.
    pub fn connects(&self) -> bool {
        self.source() == Some(Phase::Connecting)
    }

    /// Return whether QEMU was asked for an outgoing migration of ours that is not over.
    pub fn is_at_qemu(&self) -> bool {
        matches!(self.source(), Some(Phase::Running | Phase::Failing))
    }

    /// Return whether a migration of ours is running in this direction.
    pub fn goes_on(&self, side: Side) -> bool {
        self.slots().of(side).as_ref().is_some_and(|migration| !migration.is_over())
    }

    /// Hide migrations of ours that are over. Returns those that were shown.
    pub fn forget(&self) -> Vec<Side> {
        let shown = |migration: &mut Migration| {
            let shows = migration.is_over() && !migration.forgotten;
            migration.forgotten |= shows;
            shows.then(|| migration.view.borrow().side)
        };
        self.slots().all_mut().filter_map(shown).collect()
    }

    /// Show them again.
    pub fn remember(&self, sides: &[Side]) {
        for migration in self.slots().all_mut() {
            let side = migration.view.borrow().side;
            migration.forgotten &= !sides.contains(&side);
        }
    }

    /// Tell the migrations of an event.
    pub fn tell(&self, event: &QemuEvent) {
        self.slots().all().for_each(|migration| migration.tell(event.clone()));
    }

    /// Execute `migrate`; resolves when the client is to get its reply.
    pub fn migrate(
        &self,
        context: Context,
        address: Address,
    ) -> impl Future<Output = Reply> + Send + use<> {
        let (output, loan) = (self.outputs.clone(), self.loan.clone());
        flatten(begin(
            &mut self.slots().source,
            Side::Source,
            IN_PROGRESS,
            |Ends { events, view, cancel }, reply| {
                let (turn, guest) = (Turn::default(), Guest::Runs);
                Source { context, events, output, view, loan, turn, cancel, guest }
                    .run(address, reply)
            },
        ))
    }

    /// Execute `migrate-incoming`; resolves when the client is to get its reply.
    pub fn migrate_incoming(
        &self,
        context: Context,
        address: Address,
        exit_on_error: Option<bool>,
    ) -> impl Future<Output = Reply> + Send + use<> {
        let busy = "The incoming migration has already been started";
        let (slot, loan) = (&mut self.slots().destination, self.loan.clone());
        flatten(begin(slot, Side::Destination, busy, |Ends { events, view, .. }, reply| {
            Destination { context, events, view, loan, turn: Turn::default() }.run(
                address,
                exit_on_error,
                reply,
            )
        }))
    }

    /// End all migrations because QEMU is gone, or for `reason`.
    pub async fn end(&self, reason: Option<&str>) {
        let Slots { source, destination } = std::mem::take(&mut *self.slots());
        for migration in [source, destination].into_iter().flatten() {
            let Migration { events, task, .. } = migration;
            let events = reason.map(|reason| {
                // A task that is over does not get it.
                let _ = events.try_send(QemuEvent::Abort(reason.to_owned()));
                // Keep the sender, so that the task does not take QEMU for gone.
                events
            });
            let _ = timeout(FAREWELL, task).await;
            drop(events);
        }
    }
}

/// The task's ends of a [`Migration`]'s channels.
struct Ends {
    events: mpsc::Receiver<QemuEvent>,
    view: watch::Sender<View>,
    cancel: watch::Receiver<Option<Cancel>>,
}

/// Start a migration in its slot, or refuse it with `busy` if one is running there. The receiver
/// gets the client's reply.
fn begin<F: Future<Output = ()> + Send + 'static>(
    slot: &mut Option<Migration>,
    side: Side,
    busy: &str,
    run: impl FnOnce(Ends, oneshot::Sender<Reply>) -> F,
) -> oneshot::Receiver<Reply> {
    let (reply, result) = oneshot::channel();
    if slot.as_ref().is_some_and(|migration| !migration.is_over()) {
        // Can't fail: the receiver exists.
        let _ = reply.send(Err(QmpError::generic(busy)));
        return result;
    }
    let (events, event_receiver) = mpsc::channel(QUEUE);
    let view = watch::Sender::new(View::new(side));
    let (cancel, cancels) = watch::channel(None);
    let previous = slot.take();
    let before = previous.as_ref().and_then(Migration::shown);
    let run = run(Ends { events: event_receiver, view: view.clone(), cancel: cancels }, reply);
    let task = tokio::spawn(async move {
        // The previous worker may still be ending its connection to the peer.
        if let Some(previous) = previous {
            previous.ended().await;
        }
        run.await;
    });
    *slot = Some(Migration { events, view, cancel, before, task, forgotten: false });
    result
}

/// Return the result of a migration's start.
async fn flatten(result: oneshot::Receiver<Reply>) -> Reply {
    result.await.unwrap_or_else(|_| Err(QmpError::generic("The migration's task failed")))
}

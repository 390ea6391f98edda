//! The migrations of a QEMU, whichever of its monitors they were asked for at.

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

/// How long migrations get to end cleanly when the relay ends.
pub const FAREWELL: Duration = Duration::from_secs(8);

/// The result of a command.
pub type Reply = Result<Value, QmpError>;

/// A migration of ours, running or over.
struct Migration {
    events: mpsc::Sender<QemuEvent>,
    view: watch::Sender<View>,
    /// A client wants it to end.
    cancel: watch::Sender<Option<Cancel>>,
    /// What was shown before, and goes on to be if this one does not begin.
    before: Option<View>,
    task: JoinHandle<()>,
    /// Another one, which is not ours, came after it.
    forgotten: bool,
}

impl Migration {
    fn runs(&self) -> bool {
        !self.task.is_finished()
    }

    /// Another one may begin.
    fn is_over(&self) -> bool {
        !self.runs() || self.view.borrow().is_over()
    }

    /// Wait until its task has ended.
    async fn ended(self) {
        // It takes QEMU for gone when nobody has events for it any more.
        let Self { events, task, .. } = self;
        // A panic is in the log.
        let _ = task.await;
        drop(events);
    }

    /// What a client sees.
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
        // A task that is over, or that has more to do than it can, asks QEMU itself.
        let _ = self.events.try_send(event);
    }
}

/// One of each direction, at most.
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

/// The migrations. Nothing waits while they are locked.
#[derive(Clone)]
pub struct Migrations {
    slots: Arc<Mutex<Slots>>,
    outputs: Outputs,
    loan: Loan,
}

impl Migrations {
    /// None yet; and where each of `monitors` monitors gets their output.
    pub fn new(monitors: usize) -> (Self, Vec<mpsc::Receiver<Output>>) {
        let (outputs, receivers) = Outputs::new(monitors);
        (Self { slots: Arc::default(), outputs, loan: Loan::default() }, receivers)
    }

    fn slots(&self) -> MutexGuard<'_, Slots> {
        // Each change of them is one assignment.
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a client sees of the migration that concerns it: the last one of ours.
    pub fn view(&self) -> Option<View> {
        self.slots().all().find_map(Migration::shown)
    }

    /// Settings of QEMU's, which a migration may have borrowed.
    pub fn loan(&self) -> &Loan {
        &self.loan
    }

    /// Where the outgoing migration stands.
    pub fn source(&self) -> Option<Phase> {
        let slots = self.slots();
        let source = slots.source.as_ref().filter(|source| !source.forgotten)?;
        let phase = source.view.borrow().phase.clone();
        Some(phase)
    }

    /// Cancel the outgoing migration, if one goes on. One that has just been asked for may yet be refused
    /// because of another one, for which it is meant then: false, and QEMU is to be asked too.
    pub fn cancel(&self) -> bool {
        let slots = self.slots();
        let Some(source) = slots.source.as_ref().filter(|source| !source.is_over()) else {
            return false;
        };
        source.view.send_modify(|view| view.cancels = true);
        source.want(Cancel::Cancel);
        source.view.borrow().shows()
    }

    /// Break off the outgoing migration, if one goes on.
    pub fn yank(&self) {
        if let Some(source) = &self.slots().source {
            source.want(Cancel::Yank);
        }
    }

    /// QEMU has a status for a migration that fails.
    pub fn has_failing(&self) -> bool {
        self.slots().source.as_ref().is_some_and(|source| source.view.borrow().has_failing)
    }

    /// Clients were told that it is being cancelled.
    pub fn told_cancelling(&self) -> bool {
        self.slots().source.as_ref().is_some_and(|source| source.view.borrow().told_cancelling)
    }

    /// Say that it is being cancelled, once: as QEMU does before it answers.
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

    /// A migration of ours has begun of which QEMU knows nothing yet.
    pub fn connects(&self) -> bool {
        self.source() == Some(Phase::Connecting)
    }

    /// QEMU has been asked for an outgoing migration of ours, which is not over.
    pub fn is_at_qemu(&self) -> bool {
        matches!(self.source(), Some(Phase::Running | Phase::Failing))
    }

    /// A migration of ours goes on in this direction.
    pub fn goes_on(&self, side: Side) -> bool {
        self.slots().of(side).as_ref().is_some_and(|migration| !migration.is_over())
    }

    /// Migrations of ours that are over show no more. Returns which were shown.
    pub fn forget(&self) -> Vec<Side> {
        let shown = |migration: &mut Migration| {
            let shows = migration.is_over() && !migration.forgotten;
            migration.forgotten |= shows;
            shows.then(|| migration.view.borrow().side)
        };
        self.slots().all_mut().filter_map(shown).collect()
    }

    /// They are shown again.
    pub fn remember(&self, sides: &[Side]) {
        for migration in self.slots().all_mut() {
            let side = migration.view.borrow().side;
            migration.forgotten &= !sides.contains(&side);
        }
    }

    /// Tell them what happened.
    pub fn tell(&self, event: &QemuEvent) {
        self.slots().all().for_each(|migration| migration.tell(event.clone()));
    }

    /// `migrate`; resolves when the client is to be answered.
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

    /// `migrate-incoming`; resolves when the client is to be answered.
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

    /// End them: because QEMU is gone, or the relay is told to end.
    pub async fn end(&self, reason: Option<&str>) {
        let Slots { source, destination } = std::mem::take(&mut *self.slots());
        for migration in [source, destination].into_iter().flatten() {
            let Migration { events, task, .. } = migration;
            let events = reason.map(|reason| {
                // One that is over hears nothing.
                let _ = events.try_send(QemuEvent::Abort(reason.to_owned()));
                // It keeps its end of the events, so that it does not take QEMU for gone.
                events
            });
            let _ = timeout(FAREWELL, task).await;
            drop(events);
        }
    }
}

/// The task's ends of what a [`Migration`] is told by, and shows.
struct Ends {
    events: mpsc::Receiver<QemuEvent>,
    view: watch::Sender<View>,
    cancel: watch::Receiver<Option<Cancel>>,
}

/// Start a migration in its slot, unless one goes on there, which `busy` says. What comes is the
/// client's answer.
fn begin<F: Future<Output = ()> + Send + 'static>(
    slot: &mut Option<Migration>,
    side: Side,
    busy: &str,
    run: impl FnOnce(Ends, oneshot::Sender<Reply>) -> F,
) -> oneshot::Receiver<Reply> {
    let (reply, result) = oneshot::channel();
    if slot.as_ref().is_some_and(|migration| !migration.is_over()) {
        // The receiver is right here.
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
        // Its worker may still have to say goodbye to its peer.
        if let Some(previous) = previous {
            previous.ended().await;
        }
        run.await;
    });
    *slot = Some(Migration { events, view, cancel, before, task, forgotten: false });
    result
}

/// The result of a migration's start.
async fn flatten(result: oneshot::Receiver<Reply>) -> Reply {
    result.await.unwrap_or_else(|_| Err(QmpError::generic("The migration's task failed")))
}

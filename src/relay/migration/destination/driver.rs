//! Feeds the destination's state machine with events, and performs its actions.

use std::{collections::VecDeque, time::Instant};

use serde_json::Value;
use tokio::{task::JoinSet, time::sleep_until};

use super::Destination;
use crate::{
    control::Report,
    patience::Patience,
    proto::relay::{
        MigrationStatus,
        destination::{Action, Event, RelayDestination},
    },
    relay::migration::{
        ask,
        drive::Driver,
        events::QemuEvent,
        worker::{WORKER_DIED, Worker, heartbeat},
    },
    threads::Lost,
};

/// Follows the worker and QEMU to the end of the migration.
pub struct DestinationDriver<'a> {
    destination: &'a mut Destination,
    worker: &'a mut Worker,
    machine: RelayDestination,
    /// Events that the machine has not handled yet.
    happened: VecDeque<Event>,
    /// Pending queries to QEMU; `None` if there was no answer in time.
    answers: JoinSet<Option<Value>>,
    /// Query again after the pending answer.
    asks_again: bool,
    silence: Patience,
    hears_worker: bool,
    hears_qemu: bool,
    /// Clients see how the migration ended.
    has_ended: bool,
}

/// What the driver receives.
pub enum Input {
    Event(Event),
    Report(Option<Report>),
    Qemu(Option<QemuEvent>),
    /// QEMU's `query-migrate`.
    Answer(Option<Value>),
    /// The worker has reported nothing for a while.
    Silence,
}

impl<'a> DestinationDriver<'a> {
    /// Create a driver for a QEMU that waits for the worker's stream.
    pub fn new(destination: &'a mut Destination, worker: &'a mut Worker) -> Self {
        Self {
            destination,
            worker,
            machine: RelayDestination::new(Instant::now()),
            happened: VecDeque::new(),
            answers: JoinSet::new(),
            asks_again: false,
            silence: heartbeat(),
            hears_worker: true,
            hears_qemu: true,
            has_ended: false,
        }
    }

    /// End the migration after a panic of this task.
    pub async fn fail(&mut self, lost: &Lost) {
        self.worker.kill().await;
        if !self.has_ended {
            self.destination.end(Err(lost.to_string())).await;
        }
    }

    async fn hear(&mut self, report: Option<Report>, events: &mut Vec<Event>) {
        self.silence = heartbeat();
        let Some(report) = report else {
            self.hears_worker = false;
            return events.push(Event::WorkerGone(WORKER_DIED.into()));
        };
        match &report {
            Report::Progress(progress) | Report::Done(progress) => {
                self.destination.view.send_modify(|view| view.progress = progress.clone());
            }
            Report::SourceConnected { number } => {
                self.destination.tell_blocks(*number, self.worker).await;
            }
            Report::Agreed(_) => self.destination.look_at_settings(self.worker).await,
            _ => {}
        }
        events.push(Event::Report(report));
    }

    async fn hear_qemu(&mut self, event: Option<QemuEvent>, events: &mut Vec<Event>) {
        events.push(match event {
            Some(QemuEvent::Resumed) => Event::Resumed,
            Some(QemuEvent::Migration) => Event::MigrationChanged,
            Some(QemuEvent::Abort(reason)) => Event::Abort(reason),
            // These concern a source.
            Some(
                QemuEvent::Parameters
                | QemuEvent::Stopped
                | QemuEvent::Suspended
                | QemuEvent::Woken,
            ) => return,
            None => {
                self.hears_qemu = false;
                let exited = self.destination.context.process.exits().await;
                Event::QemuGone { exited }
            }
        });
    }

    /// Query QEMU's migration. A QEMU that is gone closes the events; one that does not answer is
    /// asked again.
    fn ask(&mut self) {
        let qemu = self.destination.context.qemu.clone();
        self.answers.spawn(ask::in_time(ask::migration(qemu)));
    }

    async fn silent(&mut self, events: &mut Vec<Event>) {
        if !self.silence.lasts() {
            self.hears_worker = false;
            self.worker.kill().await;
            let reason = "The destination's worker hung and was killed";
            events.push(Event::WorkerGone(reason.into()));
        }
    }
}

impl Driver for DestinationDriver<'_> {
    type Machine = RelayDestination;
    type Input = Input;

    fn machine(&mut self) -> &mut RelayDestination {
        &mut self.machine
    }

    async fn next(&mut self) -> Input {
        if let Some(event) = self.happened.pop_front() {
            return Input::Event(event);
        }
        let silence = self.silence.next();
        tokio::select! {
            biased;
            report = self.worker.report(), if self.hears_worker => Input::Report(report),
            event = self.destination.events.recv(), if self.hears_qemu => Input::Qemu(event),
            Some(answer) = self.answers.join_next() => Input::Answer(answer.ok().flatten()),
            () = sleep_until(silence.into()), if self.hears_worker => Input::Silence,
        }
    }

    async fn take(&mut self, input: Input, events: &mut Vec<Event>) {
        match input {
            Input::Event(event) => events.push(event),
            Input::Report(report) => self.hear(report, events).await,
            Input::Qemu(event) => self.hear_qemu(event, events).await,
            Input::Answer(state) => {
                if std::mem::take(&mut self.asks_again) {
                    self.ask();
                }
                events.push(Event::Migration(state.map(|state| {
                    let why = state["error-desc"].as_str().map(str::to_owned);
                    (MigrationStatus::of(&state), why)
                })));
            }
            Input::Silence => self.silent(events).await,
        }
    }

    async fn perform(&mut self, action: Action) {
        match action {
            Action::Order(order) => self.worker.order(&order).await,
            // A busy QEMU may take long to answer a query.
            Action::AskMigration if !self.answers.is_empty() => self.asks_again = true,
            Action::AskMigration => self.ask(),
            Action::End(end) => {
                self.has_ended = true;
                self.destination.end(end).await;
            }
        }
    }
}

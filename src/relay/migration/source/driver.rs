//! Feeds the source's state machine with events, and performs its actions.

use std::{collections::VecDeque, time::Duration};

use serde_json::Value;
use tokio::{
    task::{JoinSet, spawn_blocking},
    time::{Interval, MissedTickBehavior, interval, timeout},
};

use super::{
    Source,
    rate_limit::{RateLimit, Why},
};
use crate::{
    control::{Progress, Report},
    patience::Patience,
    proto::{
        Machine as _,
        relay::{
            Guest, MigrationStatus, RunState,
            source::{Action, Event, RelaySource},
        },
    },
    qmp::Execute as _,
    relay::{
        migration::{
            ask,
            drive::Driver,
            events::QemuEvent,
            status::Phase,
            worker::{WORKER_DIED, Worker, heartbeat},
        },
        qemu_session::Qemu,
    },
    threads::Lost,
    worker::{qemu_sockets::QemuSockets, return_path},
};

/// Follows the worker and QEMU to the end of the migration.
pub(super) struct SourceDriver<'a> {
    source: &'a mut Source,
    worker: &'a mut Worker,
    /// The sockets into which QEMU migrates; `None` if it connected to none.
    sockets: Option<QemuSockets>,
    machine: RelaySource,
    /// Events that the machine has not handled yet.
    happened: VecDeque<Event>,
    rate_limit: RateLimit,
    /// Pending queries to QEMU.
    answers: JoinSet<Answer>,
    seconds: Interval,
    /// The worker's figures one second ago.
    last: Progress,
    silence: Patience,
    hears_worker: bool,
    hears_qemu: bool,
    /// QEMU can't be reached from here: the worker does the rest.
    pub(super) is_detached: bool,
}

/// What the driver receives.
pub(super) enum Input {
    Event(Event),
    Report(Option<Report>),
    Qemu(Option<QemuEvent>),
    Cancel,
    /// `None` if the querying task panicked.
    Answer(Option<Answer>),
    Second,
}

/// QEMU's answer; `None` if there was none in time.
pub(super) enum Answer {
    /// `query-migrate`.
    Migration(Option<Value>),
    /// `query-migrate` and `max-bandwidth`: figures for clients.
    Figures(Option<(Value, u64)>),
    MaxBandwidth(Option<u64>),
    /// The guest's run state; and whether QEMU has completed, where that matters.
    Guest(Option<(RunState, bool)>),
    Continued(Result<(), String>),
}

impl<'a> SourceDriver<'a> {
    pub(super) fn new(
        source: &'a mut Source,
        worker: &'a mut Worker,
        sockets: Option<QemuSockets>,
    ) -> Self {
        let has_channels = sockets.as_ref().is_some_and(|sockets| !sockets.channels.is_empty());
        let mut happened = VecDeque::new();
        // A cancel may have arrived before QEMU was asked to migrate.
        let cancel = *source.cancel.borrow_and_update();
        happened.extend(cancel.map(Event::Cancel));
        let mut seconds = interval(Duration::from_secs(1));
        seconds.set_missed_tick_behavior(MissedTickBehavior::Delay);
        seconds.reset();
        Self {
            machine: RelaySource::new(has_channels, source.guest),
            source,
            worker,
            sockets,
            happened,
            rate_limit: if has_channels { RateLimit::At(None) } else { RateLimit::Never },
            answers: JoinSet::new(),
            seconds,
            last: Progress::default(),
            silence: heartbeat(),
            hears_worker: true,
            hears_qemu: true,
            is_detached: false,
        }
    }

    /// Begin to follow. QEMU's events were not handled while it connected.
    pub(super) fn begin(&mut self) {
        self.ask_max_bandwidth();
        self.happened.push_back(Event::GuestChanged);
    }

    /// End a migration that has not begun properly in QEMU: its guest can't have run anywhere else.
    pub(super) fn fail(&mut self, reason: String) {
        let progress = self.source.view.borrow().progress.clone();
        let failed = Report::Failed { reason, guest_never_ran: true, by_qemu: false, progress };
        self.happened.push_back(Event::Report(failed));
    }

    /// Continue after a panic of this task, as if the worker were gone: nobody else ends QEMU's
    /// migration.
    pub(super) fn go_on(&mut self, lost: &Lost) {
        let restored = self.machine.has_ended();
        let gone = || Event::WorkerGone(lost.to_string());
        self.happened.push_back(if restored { Event::Restored } else { gone() });
    }

    fn hear(&mut self, report: Option<Report>, events: &mut Vec<Event>) {
        self.silence = heartbeat();
        let Some(report) = report else {
            self.hears_worker = false;
            return events.push(Event::WorkerGone(WORKER_DIED.into()));
        };
        if let Report::Progress(progress)
        | Report::Done(progress)
        | Report::Failed { progress, .. } = &report
        {
            self.source.view.send_modify(|view| view.progress = progress.clone());
        }
        events.push(Event::Report(report));
    }

    async fn hear_qemu(&mut self, event: Option<QemuEvent>, events: &mut Vec<Event>) {
        match event {
            Some(QemuEvent::Abort(reason)) => events.push(Event::Abort(reason)),
            Some(QemuEvent::Stopped) => {
                // QEMU no longer keeps to a limit.
                self.rate_limit.lift(self.worker, Why::Stopped).await;
                events.push(Event::GuestChanged);
            }
            Some(QemuEvent::Suspended) => events.push(Event::Suspended),
            Some(QemuEvent::Woken) => events.push(Event::GuestChanged),
            Some(QemuEvent::Parameters) => self.ask_max_bandwidth(),
            Some(QemuEvent::Resumed) => {
                self.rate_limit.resume();
                events.extend([Event::GuestChanged, Event::MigrationChanged]);
            }
            Some(QemuEvent::Migration) => events.push(Event::MigrationChanged),
            None => {
                self.hears_qemu = false;
                events.push(Event::QemuGone);
            }
        }
    }

    async fn answered(&mut self, answer: Answer, events: &mut Vec<Event>) {
        match answer {
            Answer::Migration(state) => self.migration(state, events).await,
            Answer::Figures(Some((state, max_bandwidth))) => {
                self.rate_limit.answered();
                self.rate_limit.follow(self.worker, max_bandwidth).await;
                self.source.show_figures(&mut self.last, max_bandwidth);
                self.migration(Some(state), events).await;
                self.source.emit_throughput().await;
            }
            Answer::MaxBandwidth(Some(max_bandwidth)) => {
                self.rate_limit.follow(self.worker, max_bandwidth).await;
            }
            Answer::Figures(None) => self.rate_limit.lift(self.worker, Why::Silent).await,
            // QEMU is asked again.
            Answer::MaxBandwidth(None) => {}
            Answer::Guest(answer) => {
                let guest = answer.as_ref().and_then(|(run, completed)| run.guest(*completed));
                if guest == Some(Guest::Stopped) && self.rate_limit.resume() {
                    self.ask_max_bandwidth();
                }
                events.push(Event::Guest(answer));
            }
            Answer::Continued(done) => events.push(Event::Continued(done)),
        }
    }

    async fn migration(&mut self, state: Option<Value>, events: &mut Vec<Event>) {
        let Some(state) = state else { return events.push(Event::Migration(None)) };
        let status = MigrationStatus::of(&state);
        if status.comes_to_nothing() {
            // QEMU may be waiting for what the limit holds back.
            self.rate_limit.lift(self.worker, Why::Stopped).await;
        }
        let why = state["error-desc"].as_str().map(str::to_owned);
        if self.machine.is_at_qemu() {
            self.source.view.send_modify(|view| view.note(state));
        }
        events.push(Event::Migration(Some((status, why))));
    }

    fn second(&mut self, events: &mut Vec<Event>) {
        if self.hears_worker && !self.silence.lasts() {
            self.silence = heartbeat();
            let reason = "The source's worker hung and was killed; migrate again";
            events.push(Event::WorkerGone(reason.into()));
        }
        if self.machine.is_following() {
            self.ask(|qemu| async { Answer::Figures(ask::in_time(ask::figures(qemu)).await) });
            // QEMU may not have answered when the guest was stopped, because it was flushing disks.
            events.push(Event::GuestChanged);
        }
    }

    fn ask<F: Future<Output = Answer> + Send + 'static>(&mut self, ask: impl FnOnce(Qemu) -> F) {
        self.answers.spawn(ask(self.source.qemu()));
    }

    fn ask_max_bandwidth(&mut self) {
        if matches!(self.rate_limit, RateLimit::At(_)) {
            self.ask(|qemu| async {
                Answer::MaxBandwidth(ask::in_time(ask::max_bandwidth(qemu)).await)
            });
        }
    }

    /// Kill the worker. Its earlier reports count.
    async fn kill_worker(&mut self) {
        self.worker.kill().await;
        while self.hears_worker {
            let mut events = Vec::new();
            let report = self.worker.report().await;
            self.hears_worker = report.is_some();
            if report.is_some() {
                self.hear(report, &mut events);
            }
            self.happened.extend(events);
        }
        self.happened.push_back(Event::WorkerKilled);
    }
}

impl Driver for SourceDriver<'_> {
    type Machine = RelaySource;
    type Input = Input;

    fn machine(&mut self) -> &mut RelaySource {
        &mut self.machine
    }

    async fn next(&mut self) -> Input {
        if let Some(event) = self.happened.pop_front() {
            return Input::Event(event);
        }
        tokio::select! {
            biased;
            report = self.worker.report(), if self.hears_worker => Input::Report(report),
            event = self.source.events.recv(), if self.hears_qemu => Input::Qemu(event),
            Ok(()) = self.source.cancel.changed() => Input::Cancel,
            Some(answer) = self.answers.join_next() => Input::Answer(answer.ok()),
            _ = self.seconds.tick() => Input::Second,
        }
    }

    async fn take(&mut self, input: Input, events: &mut Vec<Event>) {
        match input {
            Input::Event(event) => events.push(event),
            Input::Report(report) => self.hear(report, events),
            Input::Qemu(event) => self.hear_qemu(event, events).await,
            Input::Cancel => events.extend(self.source.cancel.borrow().map(Event::Cancel)),
            Input::Answer(Some(answer)) => self.answered(answer, events).await,
            // The deadline of the step that waits for it will pass.
            Input::Answer(None) => {}
            Input::Second => self.second(events),
        }
    }

    async fn perform(&mut self, action: Action) {
        match action {
            Action::Order(order) => self.worker.order(&order).await,
            Action::KillWorker => self.kill_worker().await,
            Action::AskMigration => {
                self.ask(|qemu| async {
                    Answer::Migration(ask::in_time(ask::migration(qemu)).await)
                });
            }
            Action::AskGuest => {
                self.ask(|qemu| async { Answer::Guest(ask::in_time(ask::guest(qemu)).await) });
            }
            Action::CancelAtQemu => {
                // A QEMU that holds its lock while it writes to a socket nobody reads does not
                // answer.
                let mut qemu = self.source.qemu();
                let _ = timeout(ask::ANSWER, qemu.execute("migrate_cancel", Value::Null)).await;
            }
            Action::Continue => self.ask(|mut qemu| async move {
                let done = qemu.execute("cont", Value::Null).await;
                Answer::Continued(done.map(drop).map_err(|error| error.to_string()))
            }),
            Action::EndSockets => {
                if let Some(sockets) = &self.sockets {
                    sockets.end();
                }
            }
            Action::SettleSockets => {
                if let Some(sockets) = &self.sockets {
                    let main = sockets.main.clone();
                    spawn_blocking(move || return_path::settle(&main));
                }
            }
            Action::Restore => {
                self.source.give_back().await;
                // The restore may have failed because QEMU is gone.
                let is_lost = self.source.context.qemu.is_lost();
                self.happened.push_back(if is_lost { Event::QemuGone } else { Event::Restored });
            }
            Action::ShowFailing => {
                self.source.view.send_modify(|view| view.phase = Phase::Failing);
            }
            Action::Show(end) => self.source.show(end).await,
            Action::LeaveWorker { detached } => self.is_detached = detached,
        }
    }
}

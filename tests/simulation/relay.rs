//! The two relays: their state machines, and models of their QMP sessions.

use std::{collections::VecDeque, time::Instant};

use qemu_rdma_helper::{
    control::{Order, Report},
    proto::{
        Machine,
        relay::{
            Guest, MigrationStatus,
            destination::{self, RelayDestination},
            source::{self, End, RelaySource},
        },
    },
};

use super::{
    qemu::{DestinationQemu, Run, Said as QemuSaid, SourceQemu},
    worker::{Process, Reported, Said, state_name},
};

/// A command that QEMU has not executed yet.
#[derive(Debug)]
enum Command {
    /// QEMU's migration begins.
    Migrate,
    AskMigration,
    AskGuest,
    Cancel,
    Continue,
    /// A client's `cont`, and whether it came before the migration's end.
    Cont {
        is_gated: bool,
    },
    Stop,
    Reset,
}

/// How far a migration has come; its machine follows it from QEMU's on (`relay/migration/source/run.rs`).
#[derive(Debug, PartialEq)]
enum Begun {
    Connecting,
    Asked,
    AtQemu,
    /// It failed before.
    Never,
}

#[derive(Debug)]
pub struct SourceRelay {
    pub process: Process,
    begun: Begun,
    qemu_is_gone: bool,
    machine: RelaySource,
    inbox: VecDeque<source::Event>,
    commands: VecDeque<Command>,
    /// The end that clients were shown.
    pub shown: Option<End>,
    /// The relay holds QEMU's migration sockets, as the worker does.
    pub has_sockets: bool,
    worker_is_gone: bool,
    settles: bool,
}

impl SourceRelay {
    pub fn state_name(&self) -> String {
        state_name(&self.machine)
    }

    pub fn new(run: Run) -> Self {
        Self {
            process: Process::NEW,
            begun: Begun::Connecting,
            qemu_is_gone: false,
            machine: RelaySource::new(false, run.guest()),
            inbox: VecDeque::new(),
            commands: VecDeque::new(),
            shown: None,
            has_sockets: true,
            worker_is_gone: false,
            settles: false,
        }
    }

    pub fn timeout(&self) -> Option<Instant> {
        (self.begun == Begun::AtQemu).then(|| self.machine.poll_timeout()).flatten()
    }

    /// Handle a timeout. Return whether the worker must be killed.
    #[must_use]
    pub fn tick(&mut self, qemu: &mut SourceQemu, to: &mut VecDeque<Said>, now: Instant) -> bool {
        self.handle(source::Event::Timeout, qemu, to, now)
    }

    pub fn tell(&mut self, event: source::Event) {
        self.inbox.push_back(event);
    }

    pub fn hear_report(&mut self, from: &mut VecDeque<Reported>) {
        match from.pop_front() {
            Some(Reported::Report(report)) => self.tell(source::Event::Report(report)),
            Some(Reported::Gone) => {
                self.worker_is_gone = true;
                self.tell(source::Event::WorkerGone("The worker died".into()));
            }
            None => {}
        }
    }

    pub fn has_event(&self) -> bool {
        self.process.works() && !self.inbox.is_empty() && self.begun != Begun::Asked
    }

    /// Before QEMU was asked to migrate.
    fn connect_on(&mut self, event: source::Event, to: &mut VecDeque<Said>) {
        use source::{Cancel, Event};
        let end = match event {
            Event::Report(Report::Agreed(_)) if !self.qemu_is_gone => {
                self.begun = Begun::Asked;
                to.push_back(Said::Order(Order::StartStream));
                return self.commands.push_back(Command::Migrate);
            }
            Event::Cancel(Cancel::Cancel) => End::Cancelled,
            Event::Cancel(Cancel::Yank) => End::Failed("The migration was yanked".into()),
            Event::Report(Report::Failed { reason, .. })
            | Event::WorkerGone(reason)
            | Event::Abort(reason) => End::Failed(reason),
            Event::QemuGone | Event::Report(Report::Agreed(_)) => {
                End::Failed("QEMU is gone".into())
            }
            _ => return,
        };
        self.begun = Begun::Never;
        self.shown = Some(end);
        let reason = "The migration was cancelled".to_owned();
        to.push_back(Said::Order(Order::Abort { reason }));
        to.push_back(Said::Order(Order::Finish));
        self.has_sockets = false;
    }

    #[must_use]
    pub fn take_event(
        &mut self,
        qemu: &mut SourceQemu,
        to: &mut VecDeque<Said>,
        now: Instant,
    ) -> (bool, String) {
        let Some(event) = self.inbox.pop_front() else { return (false, String::new()) };
        let name = format!("{event:?}");
        match self.begun {
            Begun::Connecting => self.connect_on(event, to),
            Begun::Never => {}
            Begun::Asked | Begun::AtQemu => return (self.handle(event, qemu, to, now), name),
        }
        (false, name)
    }

    fn handle(
        &mut self,
        event: source::Event,
        qemu: &mut SourceQemu,
        to: &mut VecDeque<Said>,
        now: Instant,
    ) -> bool {
        use source::Action;
        let (mut actions, mut kills) = (Vec::new(), false);
        let machine = std::mem::replace(&mut self.machine, RelaySource::new(false, Guest::Runs));
        self.machine = machine.handle(event, now, &mut actions);
        for action in actions {
            match action {
                Action::Order(order) => to.push_back(Said::Order(order)),
                Action::KillWorker => {
                    kills = !self.worker_is_gone;
                    if self.worker_is_gone {
                        self.tell(source::Event::WorkerKilled);
                    }
                }
                Action::AskMigration => self.commands.push_back(Command::AskMigration),
                Action::AskGuest => self.commands.push_back(Command::AskGuest),
                Action::CancelAtQemu => self.commands.push_back(Command::Cancel),
                Action::Continue => self.commands.push_back(Command::Continue),
                Action::EndSockets => qemu.is_broken = true,
                Action::SettleSockets => {
                    qemu.return_path.push_back(true);
                    self.settles = true;
                }
                Action::Restore => self.tell(source::Event::Restored),
                Action::ShowFailing => {}
                Action::Show(end) => self.shown = Some(end),
                Action::LeaveWorker { detached } => {
                    let reason = "QEMU is gone".to_owned();
                    let order = if detached { Order::Detach { reason } } else { Order::Finish };
                    to.push_back(Said::Order(order));
                    self.has_sockets = self.settles;
                }
            }
        }
        kills
    }

    pub fn can_settle(&self, qemu: &SourceQemu) -> bool {
        let is_left = !qemu.stream.is_empty() || qemu.is_closed;
        self.process.works() && self.settles && is_left
    }

    /// Run the thread that lets QEMU end its stream.
    pub fn do_settle(&mut self, qemu: &mut SourceQemu) {
        if qemu.stream.pop_front().is_none() {
            self.settles = false;
            self.has_sockets = false;
            qemu.is_broken = true;
        }
    }

    pub fn client_stops(&mut self) {
        self.commands.push_back(Command::Stop);
    }

    pub fn client_continues(&mut self) {
        self.commands.push_back(Command::Cont { is_gated: self.shown.is_none() });
    }

    pub fn client_resets(&mut self) {
        self.commands.push_back(Command::Reset);
    }

    /// Whether QEMU can execute a command.
    pub fn can_serve(&self, qemu: &SourceQemu) -> bool {
        self.process.works() && qemu.is_alive && !self.commands.is_empty()
    }

    pub fn serve(&mut self, qemu: &mut SourceQemu) -> String {
        let Some(command) = self.commands.pop_front() else { return String::new() };
        let name = format!("{command:?}");
        let has_completed = qemu.migration == MigrationStatus::Completed;
        match command {
            Command::Migrate => {
                qemu.migrate();
                self.begun = Begun::AtQemu;
                self.machine = RelaySource::new(false, qemu.run.guest());
                self.inbox.push_front(source::Event::GuestChanged);
            }
            Command::AskMigration => {
                let answer = Some((qemu.migration, None));
                self.tell(source::Event::Migration(answer));
            }
            Command::AskGuest => {
                self.tell(source::Event::Guest(Some((qemu.run.state(), has_completed))));
            }
            Command::Cancel => {
                qemu.cancel();
            }
            Command::Continue => {
                let done = qemu.cont();
                self.tell(source::Event::Continued(done));
            }
            // `cont` of relay/monitor/commands.rs, in one step.
            Command::Cont { is_gated } => {
                let is_left = matches!(qemu.run, Run::FinishMigrate | Run::PostMigrate);
                if !(is_gated && (is_left || has_completed)) {
                    let _ = qemu.cont();
                    self.tell(source::Event::GuestChanged);
                }
            }
            Command::Stop => qemu.stop(),
            Command::Reset => qemu.reset(),
        }
        name
    }

    /// Handle an event of QEMU's.
    pub fn hear_qemu(&mut self, said: QemuSaid) {
        match said {
            QemuSaid::Stop => self.tell(source::Event::GuestChanged),
            QemuSaid::Resume => {
                self.tell(source::Event::GuestChanged);
                self.tell(source::Event::MigrationChanged);
            }
            QemuSaid::Migration => self.tell(source::Event::MigrationChanged),
        }
    }

    /// Commands get no answer then.
    pub fn loses_qemu(&mut self) {
        self.commands.clear();
        self.qemu_is_gone = true;
        if self.begun == Begun::Asked {
            self.begun = Begun::Connecting;
        }
        self.tell(source::Event::QemuGone);
    }
}

#[derive(Debug)]
pub struct DestinationRelay {
    pub process: Process,
    machine: RelayDestination,
    inbox: VecDeque<destination::Event>,
    asks: u32,
    /// The end that clients were shown.
    pub shown: Option<Result<(), String>>,
}

impl DestinationRelay {
    pub fn state_name(&self) -> String {
        state_name(&self.machine)
    }

    pub fn new(now: Instant) -> Self {
        Self {
            process: Process::NEW,
            machine: RelayDestination::new(now),
            inbox: VecDeque::new(),
            asks: 0,
            shown: None,
        }
    }

    pub fn timeout(&self) -> Option<Instant> {
        self.machine.poll_timeout()
    }

    pub fn tick(&mut self, to: &mut VecDeque<Said>, now: Instant) {
        self.handle(destination::Event::Timeout, to, now);
    }

    pub fn tell(&mut self, event: destination::Event) {
        self.inbox.push_back(event);
    }

    pub fn hear_report(&mut self, from: &mut VecDeque<Reported>) {
        match from.pop_front() {
            Some(Reported::Report(report)) => self.tell(destination::Event::Report(report)),
            Some(Reported::Gone) => {
                self.tell(destination::Event::WorkerGone("The worker died".into()));
            }
            None => {}
        }
    }

    pub fn has_event(&self) -> bool {
        self.process.works() && !self.inbox.is_empty()
    }

    pub fn take_event(&mut self, to: &mut VecDeque<Said>, now: Instant) -> String {
        let Some(event) = self.inbox.pop_front() else { return String::new() };
        let name = format!("{event:?}");
        self.handle(event, to, now);
        name
    }

    fn handle(&mut self, event: destination::Event, to: &mut VecDeque<Said>, now: Instant) {
        use destination::Action;
        let mut actions = Vec::new();
        let machine = std::mem::replace(&mut self.machine, RelayDestination::new(now));
        self.machine = machine.handle(event, now, &mut actions);
        for action in actions {
            match action {
                Action::Order(order) => to.push_back(Said::Order(order)),
                // One query at a time is enough.
                Action::AskMigration => self.asks = 1,
                Action::End(end) => {
                    self.shown = Some(end);
                    to.push_back(Said::Order(Order::Finish));
                }
            }
        }
    }

    pub fn can_serve(&self, qemu: &DestinationQemu) -> bool {
        self.process.works() && qemu.is_alive && self.asks > 0
    }

    pub fn serve(&mut self, qemu: &DestinationQemu) {
        self.asks -= 1;
        self.tell(destination::Event::Migration(Some((qemu.migration, None))));
    }

    pub fn hear_qemu(&mut self, said: QemuSaid) {
        match said {
            QemuSaid::Resume => self.tell(destination::Event::Resumed),
            QemuSaid::Migration => self.tell(destination::Event::MigrationChanged),
            QemuSaid::Stop => {}
        }
    }

    pub fn loses_qemu(&mut self) {
        self.asks = 0;
        self.tell(destination::Event::QemuGone { exited: true });
    }
}

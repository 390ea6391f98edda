//! Models of the two QEMUs, as far as precopy needs them (`migration/migration.c`,
//! `migration/savevm.c`, 7.2 to 11.1).

use std::collections::VecDeque;

use qemu_rdma_helper::proto::relay::{Guest, MigrationStatus, RunState};

/// Run state of a QEMU's guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Run {
    Running,
    Paused,
    Suspended,
    FinishMigrate,
    PostMigrate,
    Prelaunch,
    InMigrate,
}

impl Run {
    pub fn name(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Suspended => "suspended",
            Self::FinishMigrate => "finish-migrate",
            Self::PostMigrate => "postmigrate",
            Self::Prelaunch => "prelaunch",
            Self::InMigrate => "inmigrate",
        }
    }

    pub fn state(self) -> RunState {
        match self {
            Self::Running => RunState::Running,
            Self::Suspended => RunState::Suspended,
            Self::FinishMigrate => RunState::FinishMigrate,
            Self::PostMigrate => RunState::PostMigrate,
            Self::Prelaunch => RunState::Prelaunch,
            Self::Paused | Self::InMigrate => RunState::Other(self.name().to_owned()),
        }
    }

    pub fn guest(self) -> Guest {
        Guest::before(self.name())
    }
}

/// A part of QEMU's migration stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Piece {
    Ram,
    /// The end of the last RAM section.
    RamEnd,
    /// The devices, and the run state before the switchover.
    Devices(Run),
    /// QEMU has closed its end after everything was sent.
    End,
}

/// An event of QEMU's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Said {
    Stop,
    Resume,
    Migration,
}

/// How many pieces fit into a migration socket.
const SOCKET_CAPACITY: usize = 2;

/// The source's QEMU.
#[derive(Debug)]
pub struct SourceQemu {
    pub is_alive: bool,
    pub run: Run,
    /// Run state before the switchover.
    before: Run,
    pub migration: MigrationStatus,
    /// Capability `return-path`.
    pub has_return_path: bool,
    unwritten: VecDeque<Piece>,
    /// Data from QEMU in the migration socket.
    pub stream: VecDeque<Piece>,
    /// QEMU has closed its end.
    pub is_closed: bool,
    /// The other end is closed, or shut down.
    pub is_broken: bool,
    /// SHUT on the return path, and whether it is without error.
    pub return_path: VecDeque<bool>,
    pub said: VecDeque<Said>,
    /// Why a command made QEMU abort.
    pub aborted: Option<&'static str>,
}

impl SourceQemu {
    /// Create a QEMU that migrates.
    pub fn new(run: Run, has_return_path: bool) -> Self {
        Self {
            is_alive: true,
            run,
            before: run,
            migration: MigrationStatus::None,
            has_return_path,
            unwritten: VecDeque::new(),
            stream: VecDeque::new(),
            is_closed: false,
            is_broken: false,
            return_path: VecDeque::new(),
            said: VecDeque::new(),
            aborted: None,
        }
    }

    /// `migrate`.
    pub fn migrate(&mut self) {
        self.migration = MigrationStatus::UnderWay;
        self.before = self.run;
        self.unwritten = [Piece::Ram, Piece::RamEnd, Piece::Devices(self.run)].into();
    }

    fn goes_on(&self) -> bool {
        self.is_alive && self.migration == MigrationStatus::UnderWay
    }

    pub fn can_write(&self) -> bool {
        let room = self.is_broken || self.stream.len() < SOCKET_CAPACITY;
        self.goes_on() && !self.unwritten.is_empty() && room
    }

    pub fn write(&mut self) {
        if self.is_broken {
            return self.fail();
        }
        let Some(mut piece) = self.unwritten.pop_front() else { return };
        match &mut piece {
            Piece::RamEnd => {
                self.before = self.run;
                self.run = Run::FinishMigrate;
                self.said.push_back(Said::Stop);
            }
            Piece::Devices(before) => *before = self.before,
            Piece::Ram | Piece::End => {}
        }
        self.stream.push_back(piece);
        if self.unwritten.is_empty() && !self.has_return_path {
            self.complete();
        }
    }

    /// Whether QEMU can end: it has heard from its return path, or was told to cancel.
    pub fn can_end(&self) -> bool {
        let hears = !self.return_path.is_empty() || self.is_broken;
        let cancels = self.is_alive && self.migration == MigrationStatus::Cancelling;
        cancels || self.goes_on() && self.unwritten.is_empty() && hears
    }

    pub fn end(&mut self) {
        if self.migration == MigrationStatus::Cancelling {
            return self.end_as(MigrationStatus::Cancelled);
        }
        match self.return_path.pop_front() {
            Some(true) => self.complete(),
            _ => self.fail(),
        }
    }

    fn complete(&mut self) {
        self.stream.push_back(Piece::End);
        self.is_closed = true;
        self.migration = MigrationStatus::Completed;
        self.run = Run::PostMigrate;
        self.said.push_back(Said::Migration);
    }

    /// Whether QEMU can fail by itself. Over `tcp:`, too, a failure after everything was sent
    /// resumes the guest.
    pub fn can_fail(&self) -> bool {
        self.goes_on() && !self.unwritten.is_empty()
    }

    pub fn fail(&mut self) {
        self.end_as(MigrationStatus::Failed);
    }

    /// End the migration. The guest resumes its earlier state.
    fn end_as(&mut self, status: MigrationStatus) {
        self.migration = status;
        self.is_closed = true;
        if self.run == Run::FinishMigrate {
            self.run = self.before;
            self.said.push_back(Said::Resume);
        }
        self.said.push_back(Said::Migration);
    }

    /// `migrate_cancel`.
    pub fn cancel(&mut self) {
        if self.goes_on() {
            self.migration = MigrationStatus::Cancelling;
            self.said.push_back(Said::Migration);
        }
    }

    /// `cont`, from the helper or passed on from a client.
    pub fn cont(&mut self) -> Result<(), String> {
        match self.run {
            Run::FinishMigrate => return Err("Migration is not finalized yet".into()),
            Run::PostMigrate if self.before == Run::Suspended => {
                self.is_alive = false;
                self.aborted = Some("invalid runstate transition");
            }
            Run::Suspended => {}
            _ => self.run = Run::Running,
        }
        Ok(())
    }

    /// `stop`.
    pub fn stop(&mut self) {
        if self.run == Run::Running {
            self.run = Run::Paused;
            self.said.push_back(Said::Stop);
        }
    }

    /// `system_reset`.
    pub fn reset(&mut self) {
        match self.run {
            Run::PostMigrate => self.before = Run::Prelaunch,
            Run::Paused => {}
            _ => return,
        }
        self.run = Run::Prelaunch;
    }

    pub fn kill(&mut self) {
        self.is_alive = false;
        self.is_closed = true;
    }

    pub fn guest_runs(&self) -> bool {
        self.is_alive && self.run == Run::Running
    }
}

/// The destination's QEMU.
#[derive(Debug)]
pub struct DestinationQemu {
    pub is_alive: bool,
    pub run: Run,
    pub migration: MigrationStatus,
    pub stream: VecDeque<Piece>,
    /// The stream has ended.
    pub is_ended: bool,
    loaded: Option<Run>,
    has_started: bool,
    /// SHUT on the return path, and whether it is without error.
    pub return_path: VecDeque<bool>,
    pub said: VecDeque<Said>,
}

impl DestinationQemu {
    /// Create a QEMU that waits for the stream.
    pub fn new() -> Self {
        Self {
            is_alive: true,
            run: Run::InMigrate,
            migration: MigrationStatus::UnderWay,
            stream: VecDeque::new(),
            is_ended: false,
            loaded: None,
            has_started: false,
            return_path: VecDeque::new(),
            said: VecDeque::new(),
        }
    }

    /// Whether QEMU reads no more.
    pub fn has_left(&self) -> bool {
        !self.is_alive || self.migration != MigrationStatus::UnderWay
    }

    pub fn can_read(&self) -> bool {
        let reads = !self.has_left() && self.loaded.is_none();
        reads && (self.is_ended || !self.stream.is_empty())
    }

    pub fn read(&mut self) {
        match self.stream.pop_front() {
            Some(Piece::Devices(run)) => self.loaded = Some(run),
            Some(_) => {}
            None => self.fail(),
        }
    }

    pub fn can_start(&self) -> bool {
        !self.has_left() && self.loaded.is_some() && !self.has_started
    }

    pub fn start(&mut self) {
        self.has_started = true;
        self.run = self.loaded.unwrap_or(Run::Prelaunch);
        if self.run == Run::Running {
            self.said.push_back(Said::Resume);
        }
    }

    pub fn can_complete(&self) -> bool {
        !self.has_left() && self.has_started
    }

    pub fn complete(&mut self) {
        self.migration = MigrationStatus::Completed;
        self.return_path.push_back(true);
        self.said.push_back(Said::Migration);
    }

    pub fn can_fail(&self) -> bool {
        !self.has_left() && !self.has_started
    }

    pub fn fail(&mut self) {
        self.migration = MigrationStatus::Failed;
        self.return_path.push_back(false);
        self.said.push_back(Said::Migration);
    }

    pub fn guest_runs(&self) -> bool {
        self.is_alive && self.run == Run::Running
    }

    /// Whether QEMU has the guest, in any run state.
    pub fn has_guest(&self) -> bool {
        self.is_alive && self.has_started
    }
}

//! What a relay does with its worker and its QEMU, as far as a guest depends on it.
//!
//! The relay asks QEMU over QMP and may get no answer; it hears the worker's reports until that is gone.
//! What clients are shown, and what else is asked of QEMU, is not in here. The relay's tasks drive these
//! machines (`relay/migration`), and so does the simulation.

pub mod destination;
pub mod source;

use serde_json::Value;

/// Status of QEMU's own migration, by its `query-migrate` (qapi/migration.json).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MigrationStatus {
    /// There is none, or one whose status no version that was tried has.
    None,
    /// It goes on.
    UnderWay,
    /// It goes on, and is being cancelled.
    Cancelling,
    /// It was cancelled.
    Cancelled,
    /// It has failed.
    Failed,
    /// It is complete, by QEMU's account.
    Completed,
}

impl MigrationStatus {
    /// Of this `query-migrate`.
    pub fn of(state: &Value) -> Self {
        Self::named(state["status"].as_str().unwrap_or("none"))
    }

    /// By its name.
    pub fn named(status: &str) -> Self {
        match status {
            "setup"
            | "active"
            | "device"
            | "pre-switchover"
            | "failing"
            | "postcopy-device"
            | "wait-unplug"
            | "postcopy-active"
            | "postcopy-paused"
            | "postcopy-recover"
            | "postcopy-recover-setup"
            | "colo" => Self::UnderWay,
            "cancelling" => Self::Cancelling,
            "cancelled" => Self::Cancelled,
            "failed" => Self::Failed,
            "completed" => Self::Completed,
            _ => Self::None,
        }
    }

    /// It goes on.
    pub fn is_under_way(self) -> bool {
        matches!(self, Self::UnderWay | Self::Cancelling)
    }

    /// It comes, or has come, to nothing.
    pub fn comes_to_nothing(self) -> bool {
        matches!(self, Self::Cancelling | Self::Cancelled | Self::Failed)
    }
}

/// What a guest does, by `query-status` (qapi/run-state.json).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RunState {
    /// It runs.
    Running,
    /// It sleeps.
    Suspended,
    /// It is stopped for the switchover.
    FinishMigrate,
    /// Its migration is complete, by QEMU's account.
    PostMigrate,
    /// It has not run since it was started or reset.
    Prelaunch,
    /// Another one, in which it is stopped.
    Other(String),
}

impl RunState {
    /// Of this `query-status`.
    pub fn of(state: &Value) -> Option<Self> {
        Some(match state["status"].as_str()? {
            "running" => Self::Running,
            "suspended" => Self::Suspended,
            "finish-migrate" => Self::FinishMigrate,
            "postmigrate" => Self::PostMigrate,
            "prelaunch" => Self::Prelaunch,
            other => Self::Other(other.to_owned()),
        })
    }

    /// Whether the guest stands still, and not for the switchover: then it must not run when the migration
    /// fails. QEMU remembers the same (`vm_old_state`, `runstate_is_live`; 10.0). `None`: it can't be told,
    /// because QEMU switches over or, if that is known to matter, has completed.
    pub fn guest(&self, has_completed: bool) -> Option<Guest> {
        match self {
            Self::Running => Some(Guest::Runs),
            Self::Suspended => Some(Guest::Suspended),
            Self::FinishMigrate | Self::PostMigrate => None,
            // By its client, or by a reset after the switchover.
            Self::Prelaunch if has_completed => None,
            Self::Prelaunch | Self::Other(_) => Some(Guest::Stopped),
        }
    }
}

/// What a guest did before the switchover.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Guest {
    /// It ran.
    #[default]
    Runs,
    /// It slept.
    Suspended,
    /// It was stopped.
    Stopped,
}

impl Guest {
    /// As QEMU tells the destination.
    pub fn before(status: &str) -> Self {
        match status {
            "running" => Self::Runs,
            "suspended" => Self::Suspended,
            _ => Self::Stopped,
        }
    }
}

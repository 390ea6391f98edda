//! What a relay does with its worker and its QEMU, as far as it affects the guest.
//!
//! The relay asks QEMU over QMP and may get no answer; it gets reports until the worker is gone.
//! What clients are shown, and what else is asked of QEMU, is elsewhere. The relay's tasks drive
//! these machines (`relay/migration`), and so does the simulation.

pub mod destination;
pub mod source;

use serde_json::Value;

/// The status of QEMU's own migration in `query-migrate` (qapi/migration.json).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MigrationStatus {
    /// No migration, or a status that no tested version has.
    None,
    /// Under way.
    UnderWay,
    /// Being cancelled.
    Cancelling,
    /// Cancelled.
    Cancelled,
    /// Failed.
    Failed,
    /// Completed, according to QEMU.
    Completed,
}

impl MigrationStatus {
    /// Return the status in this `query-migrate`.
    pub fn of(state: &Value) -> Self {
        Self::named(state["status"].as_str().unwrap_or("none"))
    }

    /// Return the status with this name.
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

    /// Return whether it is under way.
    pub fn is_under_way(self) -> bool {
        matches!(self, Self::UnderWay | Self::Cancelling)
    }

    /// Return whether it will not complete.
    pub fn comes_to_nothing(self) -> bool {
        matches!(self, Self::Cancelling | Self::Cancelled | Self::Failed)
    }
}

/// The run state of a guest in `query-status` (qapi/run-state.json).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RunState {
    /// Running.
    Running,
    /// Suspended.
    Suspended,
    /// Stopped for the switchover.
    FinishMigrate,
    /// Migrated, according to QEMU.
    PostMigrate,
    /// Not run since it was started or reset.
    Prelaunch,
    /// Another state in which it is stopped.
    Other(String),
}

impl RunState {
    /// Return the state in this `query-status`.
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

    /// Return what the guest does, apart from the switchover: one that was stopped by the client
    /// must not be resumed after a failure. QEMU remembers the same (`vm_old_state`,
    /// `runstate_is_live`; 10.0).
    ///
    /// `None` if it is unknown because QEMU switches over or has completed. `has_completed` matters
    /// for `Prelaunch` only.
    pub fn guest(&self, has_completed: bool) -> Option<Guest> {
        match self {
            Self::Running => Some(Guest::Runs),
            Self::Suspended => Some(Guest::Suspended),
            Self::FinishMigrate | Self::PostMigrate => None,
            // Stopped by the client, or by a reset after the switchover.
            Self::Prelaunch if has_completed => None,
            Self::Prelaunch | Self::Other(_) => Some(Guest::Stopped),
        }
    }
}

/// What a guest did before the switchover.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Guest {
    /// Running.
    #[default]
    Runs,
    /// Suspended.
    Suspended,
    /// Stopped.
    Stopped,
}

impl Guest {
    /// Return the state that QEMU sends to the destination.
    pub fn before(status: &str) -> Self {
        match status {
            "running" => Self::Runs,
            "suspended" => Self::Suspended,
            _ => Self::Stopped,
        }
    }
}

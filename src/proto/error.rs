//! Errors that end a migration.

use std::io;

use crate::{fabric::FabricError, memory::RegionError, threads::Lost, wire::WireError};

/// Why a migration failed, from the worker's view.
#[derive(Debug, thiserror::Error)]
pub enum MigrationError {
    /// The transport failed.
    #[error(transparent)]
    Fabric(#[from] FabricError),
    /// A RAM block's memory can't be used.
    #[error(transparent)]
    Region(#[from] RegionError),
    /// The peer sent bytes that are not a message, or a message at the wrong time.
    #[error("The peer broke the protocol: {0}; is it a helper of this version?")]
    Peer(String),
    /// The peer keeps to the protocol, but the two can't migrate.
    #[error("{0}")]
    Incompatible(String),
    /// The peer reported why it ends the migration.
    #[error("{text}")]
    PeerFailed {
        /// The peer's message.
        text: String,
        /// Whether the guest certainly never ran there.
        guest_never_ran: bool,
    },
    /// QEMU's migration stream can't be transferred.
    #[error("{0}")]
    Stream(String),
    /// QEMU ended its stream, or stopped reading it.
    #[error("QEMU {0}")]
    Qemu(String),
    /// The socket to QEMU failed.
    #[error("The migration socket of QEMU failed: {0}")]
    QemuSocket(#[source] io::Error),
    /// A thread of the worker ended early.
    #[error(transparent)]
    Lost(#[from] Lost),
    /// The relay ended the migration, or is gone.
    #[error("{0}")]
    Aborted(String),
}

/// Result of a step of a migration.
pub type Result<T> = std::result::Result<T, MigrationError>;

impl From<WireError> for MigrationError {
    fn from(error: WireError) -> Self {
        match error {
            WireError::Incompatible(text) => Self::Incompatible(text),
            other => Self::Peer(other.to_string()),
        }
    }
}

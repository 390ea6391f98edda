//! Migrations of ours, as the relay and its clients see them: at most one in each direction.

pub mod ask;
mod destination;
mod drive;
pub mod events;
mod multifd_listener;
pub mod saved_settings;
pub mod slots;
mod source;
pub mod status;
pub mod worker;

/// QEMU's error during a migration.
pub const IN_PROGRESS: &str = "There's a migration process in progress";

//! Migrations of ours, as the relay and its clients see them: at most one of each direction.

mod destination;
mod drive;
mod multifd_listener;
pub mod saved_settings;
pub mod slots;
pub mod source;
pub mod status;
pub mod worker;

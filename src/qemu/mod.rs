//! What we know of the attached QEMU: its process, its RAM blocks, what would stop a migration.
//!
//! Asks over QMP and looks into /proc; changes nothing. Knows nothing of workers or clients.

pub mod blocker;
pub mod blockers;
pub mod command_line;
mod devices;
mod error;
mod info_ramblock;
mod proc_maps;
mod process;
pub mod ram_blocks;
mod ram_discard;
mod version;

use std::{io, os::fd::AsFd};

use serde_json::Value;

pub use error::QemuError;
pub use process::Process;
pub use version::Version;

/// Of `query-yank`: a migration has ended, but for its yank instance, the last that goes.
pub fn cleans_up(yank: &Value) -> bool {
    let mut instances = yank.as_array().into_iter().flatten();
    instances.any(|instance| instance["type"] == "migration")
}

/// The process at the other end of QEMU's QMP socket.
///
/// A socket that a manager made and QEMU inherited names the manager; see `--pid`.
///
/// # Errors
/// The system's.
pub fn peer_pid(socket: impl AsFd) -> io::Result<u32> {
    let credentials = rustix::net::sockopt::socket_peercred(socket)?;
    Ok(credentials.pid.as_raw_nonzero().get().unsigned_abs())
}

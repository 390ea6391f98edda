//! What the helper knows of the attached QEMU: its process, RAM blocks and migration blockers.
//!
//! Queries QMP and reads /proc; changes nothing. Knows nothing of workers or clients.

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

/// Whether QEMU still cleans up after a migration that has ended: in the reply of `query-yank`, the
/// migration's yank instance is the last to go.
pub fn is_cleaning_up(yank: &Value) -> bool {
    let mut instances = yank.as_array().into_iter().flatten();
    instances.any(|instance| instance["type"] == "migration")
}

/// The process at the other end of QEMU's QMP socket.
///
/// If a manager created the socket and QEMU inherited it, this is the manager; see `--pid`.
///
/// # Errors
/// An I/O error from the system.
pub fn peer_pid(socket: impl AsFd) -> io::Result<u32> {
    let credentials = rustix::net::sockopt::socket_peercred(socket)?;
    Ok(credentials.pid.as_raw_nonzero().get().unsigned_abs())
}

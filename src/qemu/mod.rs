//! What we know of the attached QEMU: its process, its RAM blocks, what would stop a migration.
//!
//! Asks over QMP and looks into /proc; changes nothing. Knows nothing of workers or clients.

pub mod argv;
pub mod blockers;
pub mod blocks;
mod devices;
mod discards;
mod maps;
mod process;
mod ramblock_text;
mod version;

use std::{io, os::fd::AsFd};

use serde_json::Value;

pub use process::Process;
pub use version::Version;

use crate::qmp::QmpError;

/// Of `query-yank`: a migration has ended, but for its yank instance, the last that goes.
pub fn cleans_up(yank: &Value) -> bool {
    let mut instances = yank.as_array().into_iter().flatten();
    instances.any(|instance| instance["type"] == "migration")
}

/// A failure to learn something of QEMU.
#[derive(Debug, thiserror::Error)]
pub enum QemuError {
    /// QEMU refused a command.
    #[error("QEMU refused '{command}': {error}")]
    Qmp {
        /// The command.
        command: &'static str,
        /// Its reply.
        error: QmpError,
    },
    /// QEMU's answer is not what it was in any version that is known.
    #[error("QEMU's answer to '{command}' is not understood: {why}; is it QEMU 7.2 or newer?")]
    Answer {
        /// The command.
        command: &'static str,
        /// What is wrong.
        why: String,
    },
    /// QEMU's process can't be looked into.
    #[error(
        "Cannot look into QEMU's process {pid} ({what}: {source}); run the helper as QEMU's user \
         or with CAP_SYS_PTRACE, and name the process with --pid if it is another"
    )]
    Process {
        /// The process.
        pid: u32,
        /// What was done.
        what: String,
        /// errno.
        source: io::Error,
    },
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

//! Errors of queries to QEMU and of reading its process.

use std::io;

use crate::qmp::QmpError;

/// A failure to get information from QEMU or its process.
#[derive(Debug, thiserror::Error)]
pub enum QemuError {
    /// QEMU refused a command.
    #[error("QEMU refused '{command}': {error}")]
    Qmp {
        /// The command.
        command: &'static str,
        /// The error reply.
        error: QmpError,
    },
    /// QEMU's reply has a form that no known version uses.
    #[error("QEMU's answer to '{command}' is not understood: {why}; is it QEMU 7.2 or newer?")]
    Answer {
        /// The command.
        command: &'static str,
        /// What is wrong.
        why: String,
    },
    /// QEMU's process can't be inspected.
    #[error(
        "Cannot inspect QEMU's process {pid} ({what}: {source}); run the helper as QEMU's user \
         or with CAP_SYS_PTRACE, and name the process with --pid if it is another"
    )]
    Process {
        /// Its PID.
        pid: u32,
        /// The operation that failed.
        what: String,
        /// The I/O error.
        source: io::Error,
    },
}

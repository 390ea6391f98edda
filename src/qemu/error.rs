//! What can go wrong where QEMU is asked or looked into.

use std::io;

use crate::qmp::QmpError;

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

//! Errors that end a relay.

use std::{io, path::PathBuf};

/// Why the relay ended.
#[derive(Debug, thiserror::Error)]
pub enum RelayError {
    /// Attaching to QEMU failed.
    #[error(
        "Cannot attach to QEMU at {path}: {source}; is it the socket of a running '-qmp unix:...,server=on,wait=off'?"
    )]
    Qemu {
        /// Its socket.
        path: PathBuf,
        /// What went wrong.
        source: io::Error,
    },
    /// The relay's own socket can't be served.
    #[error(
        "Cannot serve QMP at {path}: {source}; choose another path or stop the process that serves it"
    )]
    Serve {
        /// The socket.
        path: PathBuf,
        /// errno.
        source: io::Error,
    },
    /// The build has no `verbs` fabric.
    #[error("This build has no 'verbs' fabric; use --fabric tcp")]
    NoVerbs,
    /// The host has no RDMA device.
    #[error(
        "This host has no RDMA device; load its driver ('rdma link' shows it), or use --fabric tcp"
    )]
    NoDevice,
    /// The runtime could not be set up.
    #[error("Cannot start: {0}")]
    Start(#[source] io::Error),
}

//! Why a relay ends.

use std::{io, path::PathBuf};

/// Why the relay ended.
#[derive(Debug, thiserror::Error)]
pub enum RelayError {
    /// No session with QEMU.
    #[error(
        "Cannot attach to QEMU at {path}: {source}; is it the socket of a running '-qmp unix:...,server=on,wait=off'?"
    )]
    Qemu {
        /// Its socket.
        path: PathBuf,
        /// What went wrong.
        source: io::Error,
    },
    /// The own socket can't be served.
    #[error(
        "Cannot serve QMP at {path}: {source}; choose another path or end whoever serves there"
    )]
    Serve {
        /// The socket.
        path: PathBuf,
        /// errno.
        source: io::Error,
    },
    /// Not in this build.
    #[error("This build has no 'verbs' fabric; use --fabric tcp")]
    NoVerbs,
    /// Not on this host.
    #[error(
        "This host has no RDMA device; load its driver ('rdma link' shows it), or use --fabric tcp"
    )]
    NoDevice,
    /// The runtime could not be set up.
    #[error("Cannot start: {0}")]
    Start(#[source] io::Error),
}

//! The operations of a queue pair over TCP connections, for hosts without an RDMA device.
//!
//! Short writes are copied; longer ones leave by `sendfile` and are spliced into the destination's
//! RAM. `docs/protocol.md` defines the frames: a 24-byte header, then the payload. As with RDMA
//! itself, the peer is not authenticated and nothing is encrypted.

mod connecting;
mod connection;
mod frame;
mod listener;
mod preflight;
mod receiving;
mod sending;
mod shared;
mod socket;
#[cfg(test)]
mod tests;

use std::time::Duration;

pub use preflight::preflight;

/// The `tcp` fabric.
#[derive(Debug, Clone)]
pub struct Tcp {
    /// How long a due transfer may make no progress.
    pub stall_timeout: Duration,
    /// Connections per link, if the peer allows as many.
    pub connections: u16,
}

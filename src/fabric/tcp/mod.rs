//! The operations of a queue pair, framed over TCP connections: for hosts without an RDMA device.
//!
//! Short writes are copied, others leave by `sendfile` and are spliced into the destination's RAM.
//! Frames are `docs/protocol.md`'s: a 24-byte header, then the payload. The peer is not
//! authenticated and nothing is encrypted, as with RDMA itself.

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
    /// How long a transfer that is due may make no progress.
    pub stall_timeout: Duration,
    /// Connections of a link, if the peer has as many.
    pub connections: u16,
}

//! Time limits for the peer.

use std::time::Duration;

/// Time limits.
#[derive(Debug, Clone, Copy)]
pub struct Timeouts {
    /// Longest time without a sign of life of the peer's device.
    pub peer: Duration,
}

impl Timeouts {
    /// Silence after which the peer is probed.
    pub(super) fn keep_alive(&self) -> Duration {
        self.peer / 5
    }

    /// The rest of `peer`, for the transport's retries.
    pub(super) fn acknowledgement(&self) -> Duration {
        self.peer - self.keep_alive()
    }
}

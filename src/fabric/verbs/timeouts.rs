//! How long this end waits for the other.

use std::time::Duration;

/// How long things may take.
#[derive(Debug, Clone, Copy)]
pub struct Timeouts {
    /// Without any sign of life of the peer's device.
    pub peer: Duration,
}

impl Timeouts {
    /// Silence after which the peer is asked for a sign of life.
    pub(super) fn keep_alive(&self) -> Duration {
        self.peer / 5
    }

    /// What is left of `peer` for the transport's retries.
    pub(super) fn acknowledgement(&self) -> Duration {
        self.peer - self.keep_alive()
    }
}

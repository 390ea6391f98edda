//! What the threads of a source tell the one of its state machine.

use super::handshake::Agreement;
use crate::{
    proto::{error::Result, source::Event},
    worker::{drive::RamEnded, qemu_sockets::QemuSockets},
};

/// What they tell.
pub enum Input {
    /// It happened.
    Event(Event),
    /// Connected, and the block lists agree; or not.
    Connected(Result<Agreement>),
    /// From the relay: QEMU's sockets; `None` if there were none.
    Sockets(Option<QemuSockets>),
    /// The stream reader asks.
    RamEnded(RamEnded),
}

impl From<Event> for Input {
    fn from(event: Event) -> Self {
        Self::Event(event)
    }
}

impl From<RamEnded> for Input {
    fn from(asks: RamEnded) -> Self {
        Self::RamEnded(asks)
    }
}

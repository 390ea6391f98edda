//! Inputs from a source's threads to the thread of its state machine.

use super::handshake::Agreement;
use crate::{
    proto::{error::Result, source::Event},
    worker::{drive::RamEnded, qemu_sockets::QemuSockets},
};

/// An input.
pub enum Input {
    /// An event for the state machine.
    Event(Event),
    /// The result of the handshake.
    Connected(Result<Agreement>),
    /// QEMU's sockets, from the relay; `None` if there were none.
    Sockets(Option<QemuSockets>),
    /// The stream reader asks whether the bytes after RAM may leave.
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

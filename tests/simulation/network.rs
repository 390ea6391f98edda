//! The connection between the two workers: messages arrive in order, late, or not at all.

use std::collections::VecDeque;

use super::qemu::Piece;

#[derive(Debug, Clone)]
pub enum Message {
    Stream(Piece),
    StreamEnd,
    /// QEMU's SHUT, and whether it is without error.
    Shut(bool),
    Error {
        guest_never_ran: bool,
    },
    FinalAck,
    Closed,
}

/// One direction of the connection.
#[derive(Debug, Default)]
pub struct Wire {
    messages: VecDeque<Message>,
    is_closed: bool,
}

impl Wire {
    /// A connection that is not established yet.
    pub fn unconnected() -> Self {
        Self { is_closed: true, ..Self::default() }
    }

    pub fn connect(&mut self) {
        self.is_closed = false;
    }

    /// Send a message. Return whether the connection was open.
    pub fn send(&mut self, message: Message) -> bool {
        if self.is_closed {
            return false;
        }
        self.is_closed = matches!(message, Message::Closed);
        self.messages.push_back(message);
        true
    }

    /// End the connection. Messages in flight arrive, or are lost.
    pub fn cut(&mut self, lost: bool) {
        if lost {
            self.messages.clear();
            self.is_closed = false;
        }
        self.send(Message::Closed);
    }

    pub fn arrives(&self) -> bool {
        !self.messages.is_empty()
    }

    pub fn receive(&mut self) -> Option<Message> {
        self.messages.pop_front()
    }
}

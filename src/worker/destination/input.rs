//! What the threads of a destination tell the one of its state machine.

use std::sync::Arc;

use crate::{
    proto::{
        destination::Event,
        error::{MigrationError, Result},
    },
    threads::Lost,
    worker::{
        drive::{Events, RamEnded},
        link::Link,
    },
};

/// What they tell.
pub enum Input {
    /// It happened.
    Event(Event),
    /// A source connected, and the block lists agree.
    Agreed(Arc<Link>),
    /// It went again before it sent anything; because its migration is over, if it said so, and why.
    Withdrawn(Arc<Link>, Option<String>),
    /// It begins to send, and is the one that is served.
    Begun(Arc<Link>),
    /// The receiver asks.
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

/// What a thread that waits for the source or QEMU says at its end, if it failed or was lost.
pub fn say_failure(
    events: &Events<Input>,
    failed: fn(MigrationError) -> Event,
) -> impl FnOnce(std::result::Result<Result<()>, Lost>) + Send + 'static {
    let events = events.clone();
    move |end| {
        if let Err(error) = end.unwrap_or_else(|lost| Err(lost.into())) {
            events.send(failed(error));
        }
    }
}

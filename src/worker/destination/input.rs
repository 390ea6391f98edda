//! Inputs from a destination's threads to the thread of its state machine.

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

/// An input.
pub enum Input {
    /// An event for the state machine.
    Event(Event),
    /// A source connected, and the block lists agree.
    Agreed(Arc<Link>),
    /// A source left before it sent anything; with the reason, if it reported the end of its
    /// migration.
    Withdrawn(Arc<Link>, Option<String>),
    /// A source begins to send, and is the one that is served.
    Begun(Arc<Link>),
    /// The receiver asks whether QEMU may get the bytes after RAM.
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

/// Return a callback that reports if a thread that waits for the source or QEMU has failed or was
/// lost.
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

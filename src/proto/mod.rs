//! What a migration's two ends decide, without I/O: no thread, socket, lock or clock is in here.
//!
//! [`source`] and [`destination`] are the state machines of a worker. What happens is an event, what is
//! to be done an action, and time is what the caller says. The worker's threads drive them (`worker`),
//! and so does the simulation (`tests/simulation`).

pub mod coverage;
pub mod destination;
pub mod error;
pub mod ram_ack;
pub mod relay;
pub mod rkeys;
pub mod source;
pub mod switchover;

use std::time::{Duration, Instant};

use crate::patience::Patience;

/// How often a machine is driven at least while it waits for something with a deadline, and how often a
/// worker reports its figures, which are its sign of life. Managers ask for them twice a second.
pub const INTERVAL: Duration = Duration::from_millis(250);

/// A state machine.
pub trait Machine: Sized {
    /// What happens to it.
    type Event;
    /// What is to be done.
    type Action;

    /// The event that `poll_timeout` has passed.
    const TIMEOUT: Self::Event;

    /// `event` happened. The actions are to be done in their order.
    #[must_use]
    fn handle(self, event: Self::Event, now: Instant, actions: &mut Vec<Self::Action>) -> Self;

    /// When [`Machine::TIMEOUT`] is due, unless another event comes before; `None`: it waits for events
    /// only.
    fn poll_timeout(&self) -> Option<Instant>;

    /// The outcome of the migration is known and was reported.
    fn has_ended(&self) -> bool;

    /// Nothing more happens.
    fn is_closed(&self) -> bool;
}

/// Of a state that lasts only so long, in a process that may be stopped meanwhile.
fn patience(limit: Duration, now: Instant) -> Patience {
    Patience::from(limit, INTERVAL, now)
}

//! The decisions of a migration's two ends, without I/O: no thread, socket, lock or clock.
//!
//! [`source`] and [`destination`] are the state machines of a worker. They take events and return
//! actions; the caller supplies the time. The worker's threads drive them (`worker`), and so does
//! the simulation (`tests/simulation`).

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

/// How often a machine that waits with a deadline is driven at least, and how often a worker
/// reports its figures, which are its sign of life. Managers ask for them twice a second.
pub const INTERVAL: Duration = Duration::from_millis(250);

/// A state machine.
pub trait Machine: Sized {
    /// What can happen.
    type Event;
    /// What the caller has to do.
    type Action;

    /// The event that `poll_timeout` has passed.
    const TIMEOUT: Self::Event;

    /// Handle `event`; adds the actions to perform, in order.
    #[must_use]
    fn handle(self, event: Self::Event, now: Instant, actions: &mut Vec<Self::Action>) -> Self;

    /// Return when [`Machine::TIMEOUT`] is due, unless another event comes before; `None`: the
    /// machine waits for events only.
    fn poll_timeout(&self) -> Option<Instant>;

    /// Return whether the outcome of the migration is known and was reported.
    fn has_ended(&self) -> bool;

    /// Return whether nothing more can happen.
    fn is_closed(&self) -> bool;
}

/// Return the patience of a state with a time limit; the process may be stopped meanwhile.
fn patience(limit: Duration, now: Instant) -> Patience {
    Patience::from(limit, INTERVAL, now)
}

//! The loop of a migration's task: takes events, and performs the actions of its state machine.

use std::time::Instant;

use tokio::time::sleep_until;

use crate::proto::Machine;

/// What one side provides for its state machine.
pub trait Driver {
    /// The state machine.
    type Machine: Machine + Clone;
    /// What the driver receives.
    type Input;

    /// Return the state machine.
    fn machine(&mut self) -> &mut Self::Machine;

    /// Return the next input. Cancel safe.
    async fn next(&mut self) -> Self::Input;

    /// Handle an input; what the machine must know is added to `events`.
    async fn take(&mut self, input: Self::Input, events: &mut Vec<Event<Self>>);

    /// Perform an action.
    async fn perform(&mut self, action: Action<Self>);
}

/// Events of a driver's machine.
pub type Event<D> = <<D as Driver>::Machine as Machine>::Event;

/// Actions of a driver's machine.
pub type Action<D> = <<D as Driver>::Machine as Machine>::Action;

/// Drive a state machine until it is closed. A deadline passes only after everything that has
/// happened before it.
pub async fn drive<D: Driver>(driver: &mut D) {
    let (mut events, mut actions) = (Vec::new(), Vec::new());
    while !driver.machine().is_closed() {
        let deadline = driver.machine().poll_timeout();
        let input = tokio::select! {
            biased;
            input = driver.next() => Some(input),
            () = passes(deadline) => None,
        };
        match input {
            Some(input) => driver.take(input, &mut events).await,
            None => events.push(D::Machine::TIMEOUT),
        }
        for event in events.drain(..) {
            let machine = driver.machine();
            // If the machine panics, the previous one stays.
            *machine = machine.clone().handle(event, Instant::now(), &mut actions);
            for action in actions.drain(..) {
                driver.perform(action).await;
            }
        }
    }
}

/// Wait for the deadline; forever, if there is none.
async fn passes(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline.into()).await,
        None => std::future::pending().await,
    }
}

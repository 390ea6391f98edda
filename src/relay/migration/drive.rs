//! What the task of a migration does: takes what happens, and does what its state machine says.

use std::time::Instant;

use tokio::time::sleep_until;

use crate::proto::Machine;

/// What one side does for its state machine.
pub trait Driver {
    /// The state machine.
    type Machine: Machine + Clone;
    /// What is heard.
    type Input;

    /// Its state machine.
    fn machine(&mut self) -> &mut Self::Machine;

    /// What comes next. Nothing is lost if the future is dropped.
    async fn next(&mut self) -> Self::Input;

    /// Take it; what the machine has to know goes to `events`.
    async fn take(&mut self, input: Self::Input, events: &mut Vec<Event<Self>>);

    /// Do something.
    async fn perform(&mut self, action: Action<Self>);
}

/// What happens to a driver's machine.
pub type Event<D> = <<D as Driver>::Machine as Machine>::Event;

/// What a driver's machine wants done.
pub type Action<D> = <<D as Driver>::Machine as Machine>::Action;

/// Drive a state machine until nothing more happens to it. A deadline passes after all that has happened
/// before it.
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
            // A machine that panics leaves the one that was.
            *machine = machine.clone().handle(event, Instant::now(), &mut actions);
            for action in actions.drain(..) {
                driver.perform(action).await;
            }
        }
    }
}

/// Wait for it; for ever, if there is none.
async fn passes(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline.into()).await,
        None => std::future::pending().await,
    }
}

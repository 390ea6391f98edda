//! What the thread of a state machine does: takes what other threads tell, and does what the machine says.

use std::{
    sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, sync_channel},
    time::Instant,
};

use super::{relay_socket::Reports, statistics::Statistics};
use crate::{
    control::Report,
    proto::{INTERVAL, Machine},
};

/// Tells the thread of the state machine what happens. After the end of the migration nobody listens.
pub struct Events<I>(Sender<I>);

impl<I> Clone for Events<I> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<I> Events<I> {
    /// For threads that tell `inputs`.
    pub fn new(inputs: Sender<I>) -> Self {
        Self(inputs)
    }

    /// Tell it.
    pub fn send(&self, input: impl Into<I>) {
        // The receiver is gone only when the migration has ended.
        let _ = self.0.send(input.into());
    }
}

impl<I: From<RamEnded>> Events<I> {
    /// All of RAM was dealt with: may what follows it go on? False if the migration has failed.
    pub fn may_pass_ram(&self) -> bool {
        let (reply, answer) = sync_channel(1);
        self.send(RamEnded(reply));
        // Nobody answers after the end of the migration.
        answer.recv().unwrap_or(false)
    }
}

/// Whoever has taken all of RAM waits for the answer: may what follows it go on?
pub struct RamEnded(SyncSender<bool>);

impl RamEnded {
    /// Answer it.
    pub fn answer(self, passes: bool) {
        // Whoever asked may be gone; there is room for one answer.
        let _ = self.0.try_send(passes);
    }
}

/// What one side does for its state machine. Nothing in here waits for anybody.
pub trait Driver {
    /// The state machine.
    type Machine: Machine;
    /// What threads tell.
    type Input;

    /// Take what a thread tells; returns what happened, if the machine has to know.
    fn take(&mut self, input: Self::Input) -> Option<<Self::Machine as Machine>::Event>;

    /// Do something.
    fn perform(&mut self, action: <Self::Machine as Machine>::Action);
}

/// Drive a state machine until nothing more happens to it, reporting figures until it has ended. A
/// deadline passes after all that has happened before it, and not because this process was stopped.
pub fn drive<D: Driver>(
    mut machine: D::Machine,
    driver: &mut D,
    inputs: &Receiver<D::Input>,
    reports: &Reports,
    statistics: &Statistics,
) -> D::Machine {
    let (mut next_report, mut actions) = (Instant::now(), Vec::new());
    while !machine.is_closed() {
        let now = Instant::now();
        if next_report <= now {
            match machine.has_ended() {
                true => reports.resend(),
                false => reports.send(&Report::Progress(statistics.progress())),
            }
            next_report = now + INTERVAL;
        }
        let deadline = machine.poll_timeout();
        let until = deadline.map_or(next_report, |deadline| deadline.min(next_report));
        let event = match inputs.recv_timeout(until.saturating_duration_since(now)) {
            Ok(input) => driver.take(input),
            Err(RecvTimeoutError::Timeout) => {
                let is_due = deadline.is_some_and(|deadline| deadline <= Instant::now());
                is_due.then_some(D::Machine::TIMEOUT)
            }
            // The driver keeps a sender.
            Err(RecvTimeoutError::Disconnected) => break,
        };
        if let Some(event) = event {
            machine = machine.handle(event, Instant::now(), &mut actions);
            actions.drain(..).for_each(|action| driver.perform(action));
        }
    }
    machine
}

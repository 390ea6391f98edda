//! The thread of a state machine: takes inputs from other threads and performs the machine's
//! actions.

use std::{
    sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, sync_channel},
    time::Instant,
};

use super::{relay_socket::Reports, statistics::Statistics};
use crate::{
    control::Report,
    proto::{INTERVAL, Machine},
};

/// Sends inputs to the thread of the state machine. After the end of the migration they are
/// dropped.
pub struct Events<I>(Sender<I>);

impl<I> Clone for Events<I> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<I> Events<I> {
    /// Send to the receiver of `inputs`.
    pub fn new(inputs: Sender<I>) -> Self {
        Self(inputs)
    }

    /// Send an input.
    pub fn send(&self, input: impl Into<I>) {
        // The receiver is gone only when the migration has ended.
        let _ = self.0.send(input.into());
    }
}

impl<I: From<RamEnded>> Events<I> {
    /// Ask, when all of RAM was transferred, whether the bytes after it may go on. False if the
    /// migration has failed.
    pub fn may_pass_ram(&self) -> bool {
        let (reply, answer) = sync_channel(1);
        self.send(RamEnded(reply));
        // There is no answer after the end of the migration.
        answer.recv().unwrap_or(false)
    }
}

/// A data thread's question when it has all of RAM: may the bytes after it go on?
pub struct RamEnded(SyncSender<bool>);

impl RamEnded {
    /// Answer the question.
    pub fn answer(self, passes: bool) {
        // The asking thread may be gone. The channel has capacity for one answer.
        let _ = self.0.try_send(passes);
    }
}

/// Performs the I/O of one side's state machine. No method blocks.
pub trait Driver {
    /// The state machine.
    type Machine: Machine;
    /// What other threads send.
    type Input;

    /// Take an input; returns the event, if the machine has to know of one.
    fn take(&mut self, input: Self::Input) -> Option<<Self::Machine as Machine>::Event>;

    /// Perform an action.
    fn perform(&mut self, action: <Self::Machine as Machine>::Action);
}

/// Drive a state machine until it is closed, and report figures until it has ended.
///
/// A deadline passes after the inputs that arrived before it, and not because this process was
/// stopped.
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

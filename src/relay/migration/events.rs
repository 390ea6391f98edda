//! What migrations hear, and what they have for the clients.

use std::sync::Arc;

use tokio::sync::mpsc;

use crate::qmp::envelope;

/// Events and lines that may wait for a migration's task, or for a monitor.
pub const QUEUE: usize = 256;

/// An event of QEMU's that concerns a migration, or word of the relay itself.
#[derive(Debug, Clone)]
pub enum QemuEvent {
    /// MIGRATION: its state changed.
    Migration,
    /// RESUME: the guest runs.
    Resumed,
    /// STOP: the guest does not run.
    Stopped,
    /// SUSPEND: it sleeps.
    Suspended,
    /// WAKEUP: it does no more.
    Woken,
    /// A parameter of migrations may have changed.
    Parameters,
    /// The migration is to fail, because the relay is told to end or for another reason.
    Abort(String),
}

/// What a migration has for the client.
#[derive(Debug, Clone)]
pub enum Output {
    /// The line of an event.
    Emit(Vec<u8>),
    /// QEMU has said how the migration ended: events that were held back may pass.
    Release,
    /// The migration did not end as QEMU has it: this event takes the place of QEMU's.
    Instead(Vec<u8>),
}

impl Output {
    /// The event of a status.
    pub fn status(status: &str) -> Self {
        Self::Emit(envelope::status(status))
    }
}

/// What migrations have for the clients, to all monitors.
#[derive(Clone)]
pub struct Outputs(Arc<[mpsc::Sender<Output>]>);

impl Outputs {
    /// For so many monitors; and where each gets it.
    pub fn new(monitors: usize) -> (Self, Vec<mpsc::Receiver<Output>>) {
        let (senders, receivers): (Vec<_>, _) = (0..monitors).map(|_| mpsc::channel(QUEUE)).unzip();
        (Self(senders.into()), receivers)
    }

    /// Tell all monitors.
    pub async fn put(&self, output: Output) {
        for monitor in self.0.iter() {
            // A monitor is gone only when the relay ends.
            let _ = monitor.send(output.clone()).await;
        }
    }
}

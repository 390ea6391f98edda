//! Events for migrations, and their output for clients.

use std::sync::Arc;

use tokio::sync::mpsc;

use crate::qmp::envelope;

/// Events and lines that may be queued for a migration's task, or for a monitor.
pub const QUEUE: usize = 256;

/// An event of QEMU's that concerns a migration, or one of the relay itself.
#[derive(Debug, Clone)]
pub enum QemuEvent {
    /// MIGRATION: its state changed.
    Migration,
    /// RESUME: the guest runs.
    Resumed,
    /// STOP: the guest does not run.
    Stopped,
    /// SUSPEND: the guest is suspended.
    Suspended,
    /// WAKEUP: the guest is no longer suspended.
    Woken,
    /// A parameter of migrations may have changed.
    Parameters,
    /// The migration must fail, because the relay is told to end or for another reason.
    Abort(String),
}

/// Output of a migration for clients.
#[derive(Debug, Clone)]
pub enum Output {
    /// An event's line.
    Emit(Vec<u8>),
    /// The migration ended as QEMU reported: release the events held back.
    Release,
    /// The migration did not end as QEMU reported: send this event instead of QEMU's.
    Instead(Vec<u8>),
}

impl Output {
    /// Make the event of a status.
    pub fn status(status: &str) -> Self {
        Self::Emit(envelope::status(status))
    }
}

/// The migrations' output to all monitors.
#[derive(Clone)]
pub struct Outputs(Arc<[mpsc::Sender<Output>]>);

impl Outputs {
    /// Create it for this many monitors; return each one's receiver.
    pub fn new(monitors: usize) -> (Self, Vec<mpsc::Receiver<Output>>) {
        let (senders, receivers): (Vec<_>, _) = (0..monitors).map(|_| mpsc::channel(QUEUE)).unzip();
        (Self(senders.into()), receivers)
    }

    /// Send to all monitors.
    pub async fn put(&self, output: Output) {
        for monitor in self.0.iter() {
            // A monitor is gone only when the relay ends.
            let _ = monitor.send(output.clone()).await;
        }
    }
}

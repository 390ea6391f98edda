//! The relay's side of an outgoing migration.

mod connecting;
mod driver;
mod rate_limit;
mod reporting;
mod run;
mod stream;

use tokio::sync::{mpsc, watch};

use super::{
    events::{Output, Outputs, QemuEvent},
    saved_settings::{Loan, Turn},
    status::{Phase, View},
};
use crate::{
    proto::relay::{Guest, source::Cancel},
    qmp::QmpError,
    relay::{context::Context, qemu_session::Qemu},
};

/// fdname of the migration socket in QEMU's monitor.
const FDNAME: &str = "qemu-rdma-helper";

/// An outgoing migration.
pub struct Source {
    /// The relay's context.
    pub context: Context,
    /// QEMU's events that concern migrations.
    pub events: mpsc::Receiver<QemuEvent>,
    /// Output for clients.
    pub output: Outputs,
    /// What clients see.
    pub view: watch::Sender<View>,
    /// QEMU's settings.
    pub loan: Loan,
    /// Which of them this migration has borrowed.
    pub turn: Turn,
    /// A client's request to end it.
    pub cancel: watch::Receiver<Option<Cancel>>,
    /// What the guest does before QEMU migrates.
    pub guest: Guest,
}

impl Source {
    /// Return whether QEMU does not know of it yet.
    fn connects(&self) -> bool {
        self.view.borrow().phase == Phase::Connecting
    }

    fn qemu(&self) -> Qemu {
        self.context.qemu.clone()
    }

    async fn emit_throughput(&self) {
        let line = self.view.borrow().throughput_event();
        self.put(Output::Emit(line)).await;
    }

    async fn put(&self, output: Output) {
        self.output.put(output).await;
    }

    /// Emit QEMU's event for this status, where QEMU itself does not know of the migration.
    async fn tell_status(&self, status: &str) {
        if self.view.borrow().tells {
            self.put(Output::status(status)).await;
        }
    }
}

fn generic(error: impl std::fmt::Display) -> QmpError {
    QmpError::generic(error.to_string())
}

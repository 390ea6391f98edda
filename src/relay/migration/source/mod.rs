//! The relay's side of an outgoing migration.

mod connecting;
mod driver;
mod pace;
mod run;
mod showing;
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

/// Name of the migration socket in QEMU's monitor.
const FDNAME: &str = "qemu-rdma-helper";

/// An outgoing migration.
pub struct Source {
    /// What the relay knows.
    pub context: Context,
    /// QEMU's events, as far as they concern migrations.
    pub events: mpsc::Receiver<QemuEvent>,
    /// For the client.
    pub output: Outputs,
    /// What a client sees.
    pub view: watch::Sender<View>,
    /// Settings of QEMU's.
    pub loan: Loan,
    /// What it has borrowed of them.
    pub turn: Turn,
    /// A client wants it to end.
    pub cancel: watch::Receiver<Option<Cancel>>,
    /// What the guest does before QEMU migrates.
    pub guest: Guest,
}

impl Source {
    /// QEMU knows nothing of it yet.
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

    /// The event that QEMU has for this status, where QEMU itself knows nothing of the migration.
    async fn tell_status(&self, status: &str) {
        if self.view.borrow().tells {
            self.put(Output::status(status)).await;
        }
    }
}

fn generic(error: impl std::fmt::Display) -> QmpError {
    QmpError::generic(error.to_string())
}

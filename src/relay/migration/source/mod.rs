//! The relay's side of an outgoing migration.

mod connecting;
mod driver;
mod pace;
mod showing;
mod stream;

use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::{mpsc, oneshot, watch};

use self::{connecting::NotBegun, driver::SourceDriver};
use super::{
    drive::drive,
    saved_settings::{Loan, Turn},
    slots::Outputs,
    status::{Phase, View},
};
use crate::{
    address::Address,
    proto::relay::{Guest, MigrationStatus, source::Cancel},
    qmp::{Execute as _, QmpError},
    relay::{Context, Output, QemuEvent, qemu_session::Qemu},
    threads,
};

/// How long QEMU is waited for while the worker is followed: QEMU answers nobody while it writes the
/// end of its stream, and a worker that takes nothing then must be noticed all the same.
pub(super) const ANSWER: Duration = Duration::from_secs(1);

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

/// Has QEMU completed its migration? Its guest is in `postmigrate` then. A reset makes that `prelaunch`
/// (`main_loop_should_exit`, 7.2 to 11.1), and QEMU takes `cont` in both.
pub async fn has_completed(qemu: &mut Qemu) -> Result<bool, QmpError> {
    let state = qemu.execute("query-migrate", Value::Null).await?;
    Ok(MigrationStatus::of(&state) == MigrationStatus::Completed)
}

impl Source {
    /// Run it; `reply` is the result of the client's `migrate`, which does not wait for the destination.
    pub async fn run(mut self, address: Address, reply: oneshot::Sender<Result<Value, QmpError>>) {
        let accepted = threads::caught("accept", self.accept(address)).await;
        let (mut worker, accepted) = match accepted.map_err(generic).flatten() {
            Ok(accepted) => accepted,
            Err(error) => {
                // A client that is gone needs no reply.
                let _ = reply.send(Err(error));
                return;
            }
        };
        self.view.send_modify(|view| view.phase = Phase::Connecting);
        self.tell_status("setup").await;
        // From here on a failure is the migration's. It goes on without the client, as QEMU's would.
        let _ = reply.send(Ok(json!({})));
        let prepared = threads::caught("prepare", self.prepare(&mut worker, accepted)).await;
        let (sockets, failed) = match prepared.map_err(NotBegun::from).flatten() {
            Ok(sockets) => {
                worker.has_stream();
                (Some(sockets), None)
            }
            Err(why) => {
                // It may have ended already.
                let _ = worker.orders().send(&why.order(), &[]).await;
                match why {
                    NotBegun::Failed { reason, sockets } if !self.connects() => {
                        (sockets, Some(reason))
                    }
                    why => {
                        self.end_early(why).await;
                        return worker.finish().await;
                    }
                }
            }
        };
        let mut driver = SourceDriver::new(&mut self, &mut worker, sockets);
        match failed {
            Some(reason) => driver.fail(reason),
            None => driver.begin(),
        }
        if let Err(lost) = threads::caught("follow", drive(&mut driver)).await {
            driver.go_on(&lost);
            // A second panic is in the log; the worker does what is left.
            driver.is_detached |= threads::caught("end", drive(&mut driver)).await.is_err();
        }
        if driver.is_detached {
            worker.leave("The source's QEMU is gone; look at its log".into()).await;
        } else {
            worker.finish().await;
        }
    }

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

/// What is said when there is no worker to say it.
pub(super) const WORKER_DIED: &str =
    "The helper's worker process died; see its messages in the helper's log, and migrate again";

fn generic(error: impl std::fmt::Display) -> QmpError {
    QmpError::generic(error.to_string())
}

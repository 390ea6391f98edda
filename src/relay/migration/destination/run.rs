//! An incoming migration from `migrate-incoming` to its end.

use serde_json::Value;
use tokio::sync::oneshot;

use super::{Destination, driver::DestinationDriver};
use crate::{address::Address, qmp::QmpError, relay::migration::drive::drive, threads};

impl Destination {
    /// Run the migration; `reply` is the result of the client's `migrate-incoming`.
    pub async fn run(
        mut self,
        address: Address,
        exit_on_error: Option<bool>,
        reply: oneshot::Sender<Result<Value, QmpError>>,
    ) {
        let prepared = self.prepare(address, exit_on_error).await;
        let (result, worker) = match prepared {
            Ok((value, worker)) => (Ok(value), Some(worker)),
            // QEMU does not know of it, and clients are not shown it.
            Err(error) => {
                self.loan.give_back(self.turn, self.context.qemu.clone()).await;
                (Err(error), None)
            }
        };
        // A client that is gone needs no reply; the migration is awaited nevertheless.
        let _ = reply.send(result);
        let Some(mut worker) = worker else { return };
        let mut driver = DestinationDriver::new(&mut self, &mut worker);
        if let Err(lost) = threads::caught("follow", drive(&mut driver)).await {
            driver.fail(&lost).await;
        }
        worker.finish().await;
    }
}

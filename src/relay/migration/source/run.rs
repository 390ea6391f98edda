//! An outgoing migration from `migrate` to its end.

use serde_json::{Value, json};
use tokio::sync::oneshot;

use super::{Source, connecting::NotBegun, driver::SourceDriver, generic};
use crate::{
    address::Address,
    qmp::QmpError,
    relay::migration::{drive::drive, status::Phase},
    threads,
};

impl Source {
    /// Run the migration; `reply` is the result of the client's `migrate`, which does not wait for
    /// the destination.
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
        // From here on a failure is the migration's. It continues without the client, as in QEMU.
        let _ = reply.send(Ok(json!({})));
        let prepared = threads::caught("prepare", self.prepare(&mut worker, accepted)).await;
        let (sockets, failed) = match prepared.map_err(NotBegun::from).flatten() {
            Ok(sockets) => {
                worker.has_stream();
                (Some(sockets), None)
            }
            Err(why) => {
                // The worker may have exited already.
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
            // A second panic is logged; the worker does the rest.
            driver.is_detached |= threads::caught("end", drive(&mut driver)).await.is_err();
        }
        if driver.is_detached {
            worker.leave("The source's QEMU is gone; look at its log".into()).await;
        } else {
            worker.finish().await;
        }
    }
}

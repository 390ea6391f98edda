//! The relay's side of an incoming migration.

mod driver;
mod run;

use std::{os::fd::AsFd as _, time::Duration};

use serde_json::{Map, Value, json};
use tokio::{
    sync::{mpsc, watch},
    time::timeout,
};
use tracing::{info, warn};

use super::{
    ask::ANSWER,
    events::QemuEvent,
    saved_settings::{AsClientsSee, Borrowed, HELD_PARAMETERS, Loan, Turn},
    status::{Phase, Side, View},
    worker::{self, WORKER_DIED, Worker},
};
use crate::{
    address::Address,
    control::{Order, Report},
    patience::within,
    qemu::blockers,
    qmp::{Execute as _, QmpError},
    relay::context::{Context, listed},
};

/// Capabilities that keep these values during a migration.
///
/// QEMU crashes at the end of a stream without channels if multifd is turned on in the middle of it
/// (`multifd_recv_terminate_threads`, 10.0), and at the first page of shared memory if
/// x-ignore-shared is (`ramblock_recv_bitmap_set`, 10.0); under `run` all of its memory is shared.
const HELD: [(&str, bool); 2] = [("multifd", false), ("x-ignore-shared", false)];

/// How long the worker may take until it listens.
const LISTENING: Duration = Duration::from_secs(15);

/// fdname of the migration socket in QEMU's monitor.
const FDNAME: &str = "qemu-rdma-helper-incoming";

/// An incoming migration.
pub struct Destination {
    /// The relay's context.
    pub context: Context,
    /// QEMU's events that concern migrations.
    pub events: mpsc::Receiver<QemuEvent>,
    /// What clients see.
    pub view: watch::Sender<View>,
    /// QEMU's settings.
    pub loan: Loan,
    /// Which of them this migration has borrowed.
    pub turn: Turn,
}

impl Destination {
    /// End the migration. QEMU is set back before clients see how it ended.
    async fn end(&self, end: Result<(), String>) {
        self.loan.give_back(self.turn, self.context.qemu.clone()).await;
        let phase = match end {
            Ok(()) => {
                info!("migration completed");
                Phase::Confirmed
            }
            Err(reason) => {
                warn!(%reason, "migration failed");
                Phase::Failed(reason)
            }
        };
        self.view.send_modify(|view| view.phase = phase);
    }

    /// Start a worker that listens, and let QEMU wait for its stream.
    async fn prepare(
        &mut self,
        address: Address,
        exit_on_error: Option<bool>,
    ) -> Result<(Value, Worker), QmpError> {
        let generic = |error: &dyn std::fmt::Display| QmpError::generic(error.to_string());
        let worker = Worker::start(Side::Destination, self.context.settings.fabric.kind()).await;
        let mut worker = worker.map_err(|error| generic(&error))?;
        let mut qemu = self.context.qemu.clone();
        {
            let mut borrowed = self.loan.write().await;
            blockers::refuse(&blockers::settings(&mut qemu).await?)?;
            borrowed.settle(&mut qemu).await?;
            *borrowed = Borrowed::from(&mut qemu, &HELD, &HELD_PARAMETERS, None).await?;
            self.turn = borrowed.turn();
        }
        // The blocks are queried when a source connects. That they can be is checked now.
        self.context.blocks().await.map_err(|error| generic(&error))?;
        let options = self.context.options(&mut qemu).await?;
        let (ours, theirs) = worker::migration_socket().map_err(|error| generic(&error))?;
        let order = Order::Incoming { address, options };
        let listening = within(LISTENING, async {
            worker.begin(&order, &[ours.as_fd()]).await.map_err(|error| generic(&error))?;
            loop {
                match worker.report().await {
                    Some(Report::Listening { address }) => return Ok(address),
                    Some(Report::Progress(_)) => {}
                    Some(Report::Failed { reason, .. }) => return Err(QmpError::generic(reason)),
                    _ => return Err(QmpError::generic(WORKER_DIED)),
                }
            }
        });
        let late = || QmpError::generic("The helper's worker did not listen in time");
        let address = listening.await.ok_or_else(late)??;
        info!(%address, "listening");
        self.view.send_modify(|view| view.listens = Some(address));
        qemu.execute_with("getfd", json!({ "fdname": FDNAME }), vec![theirs]).await?;
        let mut arguments = Map::new();
        arguments.insert("uri".into(), format!("fd:{FDNAME}").into());
        if let Some(exit) = exit_on_error {
            arguments.insert("exit-on-error".into(), exit.into());
        }
        match qemu.execute("migrate-incoming", Value::Object(arguments)).await {
            Ok(value) => {
                self.view.send_modify(|view| view.phase = Phase::Running);
                Ok((value, worker))
            }
            Err(error) => {
                // QEMU keeps a descriptor that it did not use.
                let _ = qemu.execute("closefd", json!({ "fdname": FDNAME })).await;
                Err(error)
            }
        }
    }

    /// Tell the worker QEMU's RAM blocks, for a source that has connected.
    async fn tell_blocks(&self, number: u64, worker: &mut Worker) {
        let blocks = timeout(ANSWER, self.context.blocks()).await;
        let late = |_| "The destination's QEMU does not answer".to_owned();
        let blocks =
            blocks.map_err(late).and_then(|found| found.map_err(|error| error.to_string()));
        match blocks {
            Ok(blocks) => {
                let order = Order::Blocks { number, blocks: listed(&blocks) };
                let told = worker.begin(&order, &worker::block_fds(&blocks)).await;
                if let Err(error) = told {
                    // The worker waits for an answer for a limited time only.
                    warn!(%error, "the worker was not told of QEMU's memory");
                }
            }
            Err(reason) => worker.order(&Order::NoBlocks { number, reason }).await,
        }
    }

    /// Check settings when a source is accepted: they may have changed since `migrate-incoming`.
    /// With multifd, for example, QEMU would wait for channels that never connect.
    async fn look_at_settings(&self, worker: &mut Worker) {
        let borrowed = self.loan.read().await;
        let mut seen = AsClientsSee { qemu: self.context.qemu.clone(), borrowed: &borrowed };
        // A QEMU that is gone closes `events`.
        let Ok(found) = blockers::settings(&mut seen).await else { return };
        if let Err(error) = blockers::refuse(&found) {
            let reason = format!("The destination refuses: {}", error.desc);
            worker.order(&Order::Abort { reason }).await;
        }
    }
}

//! The start of an outgoing migration: refuses what QEMU would refuse at once, and connects a
//! worker to the destination before QEMU's own migration begins.

use std::time::Duration;

use serde_json::Value;
use tokio::time::Instant;
use tracing::{info, warn};

use super::{Source, generic};
use crate::{
    address::Address,
    control::{Agreed, Order, Report},
    patience::within,
    proto::relay::{MigrationStatus, source::Cancel},
    qemu::{Version, blockers, ram_blocks::RamBlock},
    qmp::{Execute as _, QmpError},
    ram::Transfer,
    relay::{
        context::listed,
        migration::{
            IN_PROGRESS,
            events::QemuEvent,
            status::{Phase, Side},
            worker::{self, WORKER_DIED, Worker},
        },
    },
    threads::Lost,
    worker::qemu_sockets::QemuSockets,
};

/// How long connecting and comparing block lists may take in all. The worker's own limits are
/// shorter, and its errors better.
const AGREEMENT: Duration = Duration::from_secs(30);

/// A migration whose start the client was told.
pub(super) struct Accepted {
    address: Address,
    /// The worker's order.
    order: Order,
    blocks: Vec<RamBlock>,
    /// How long the worker may take to connect.
    patience: Duration,
}

/// Why QEMU's migration did not begin.
pub(super) enum NotBegun {
    Cancelled,
    Failed {
        reason: String,
        /// The sockets of QEMU's migration, if that had begun.
        sockets: Option<QemuSockets>,
    },
}

impl NotBegun {
    fn failed(reason: impl Into<String>) -> Self {
        Self::Failed { reason: reason.into(), sockets: None }
    }

    /// Return the order to tell the destination, which then waits for no other source.
    pub(super) fn order(&self) -> Order {
        let reason = match self {
            Self::Cancelled => "The migration was cancelled".into(),
            Self::Failed { reason, .. } => reason.clone(),
        };
        Order::Abort { reason }
    }
}

impl From<QmpError> for NotBegun {
    fn from(error: QmpError) -> Self {
        Self::failed(error.desc)
    }
}

impl From<Lost> for NotBegun {
    fn from(lost: Lost) -> Self {
        Self::failed(lost.to_string())
    }
}

impl Source {
    /// Check what QEMU checks at once for a `migrate` (`migrate_prepare` in
    /// `migration/migration.c`), and what rules out one over `rdma:`.
    ///
    /// # Errors
    /// The reply to the client: nothing has begun.
    pub(super) async fn accept(
        &mut self,
        address: Address,
    ) -> Result<(Worker, Accepted), QmpError> {
        let worker = Worker::start(Side::Source, self.context.settings.fabric.kind());
        let worker = worker.await.map_err(generic)?;
        let mut qemu = self.qemu();
        let guest = qemu.execute("query-status", Value::Null).await?;
        let guest = guest["status"].as_str().unwrap_or_default();
        if guest == "inmigrate" {
            return Err(QmpError::generic("Guest is waiting for an incoming migration"));
        }
        let state = qemu.execute("query-migrate", Value::Null).await?;
        if MigrationStatus::of(&state).is_under_way() {
            return Err(QmpError::generic(IN_PROGRESS));
        }
        if guest == "postmigrate" {
            let why = "Can't migrate the vm that was paused due to previous migration";
            return Err(QmpError::generic(why));
        }
        let mut blocks = self.context.blocks().await.map_err(generic)?;
        let capabilities = qemu.execute("query-migrate-capabilities", Value::Null).await?;
        let options = self.context.options(&mut qemu).await?;
        let version = Version::ask(&mut qemu).await?;
        blockers::refuse(&blockers::find(&mut qemu, &blocks, options.fabric).await?)?;
        // Give the worker only the memory that it may read.
        for block in &mut blocks {
            if block.transfer(options.fabric).0 != Transfer::Direct {
                block.backing = None;
            }
        }
        let total = blocks.iter().map(|block| block.length).fold(0, u64::saturating_add);
        self.view.send_modify(|view| {
            view.pin_all = options.pin_all;
            view.tells = blockers::is_on(&capabilities, "events");
            view.has_failing = version.is_at_least(11, 1);
            view.begin(total);
        });
        let patience = AGREEMENT + options.pinning(total);
        let order = Order::Outgoing {
            address: address.clone(),
            qemu_qmp: self.context.qemu_qmp.clone(),
            blocks: listed(&blocks),
            options,
        };
        Ok((worker, Accepted { address, order, blocks, patience }))
    }

    /// Connect the worker to the destination, and start QEMU's migration into it.
    pub(super) async fn prepare(
        &mut self,
        worker: &mut Worker,
        accepted: Accepted,
    ) -> Result<QemuSockets, NotBegun> {
        let Accepted { address, order, blocks, patience } = accepted;
        let fds = worker::block_fds(&blocks);
        let agreed = async {
            worker.begin(&order, &fds).await.map_err(generic)?;
            self.await_agreement(worker).await
        };
        let agreed = within(patience, agreed).await.ok_or_else(|| {
            QmpError::generic(format!(
                "The destination {address} did not answer in time; is its helper alive?"
            ))
        });
        let Agreed { channels, announceable, return_path } = agreed??;
        // QEMU announces all shared blocks or none.
        let announces = announceable == blocks.iter().filter(|block| !block.private).count();
        self.begin_stream(worker, announces, channels, return_path).await
    }

    /// Wait until the helpers agree; return how QEMU may migrate.
    async fn await_agreement(&mut self, worker: &mut Worker) -> Result<Agreed, NotBegun> {
        let mut emitted = Instant::now();
        loop {
            let report = tokio::select! {
                biased;
                report = worker.report() => report,
                Ok(()) = self.cancel.changed() => match *self.cancel.borrow() {
                    Some(Cancel::Cancel) => return Err(NotBegun::Cancelled),
                    Some(Cancel::Yank) => return Err(NotBegun::failed("The migration was yanked")),
                    None => continue,
                },
                event = self.events.recv() => match event {
                    Some(QemuEvent::Abort(reason)) => return Err(NotBegun::failed(reason)),
                    Some(_) => continue,
                    None => return Err(QmpError::connection_lost().into()),
                },
            };
            match report {
                Some(Report::Agreed(agreed)) => return Ok(agreed),
                Some(Report::Progress(progress)) => {
                    let pins = progress.pinned > 0;
                    self.view.send_modify(|view| view.progress = progress);
                    // Pinning all of a large guest takes a while.
                    if pins && emitted.elapsed() >= Duration::from_secs(1) {
                        emitted = Instant::now();
                        self.emit_throughput().await;
                    }
                }
                Some(Report::Failed { reason, .. }) => return Err(NotBegun::failed(reason)),
                _ => return Err(NotBegun::failed(WORKER_DIED)),
            }
        }
    }

    /// End a migration before there is anything for QEMU to end.
    pub(super) async fn end_early(&self, why: NotBegun) {
        let (phase, status) = match why {
            NotBegun::Failed { reason, .. } => {
                warn!(%reason, "migration failed");
                (Phase::Failed(reason), "failed")
            }
            NotBegun::Cancelled => {
                info!("migration cancelled");
                // Cancelled by a client before the migration was accepted.
                if !self.view.borrow().told_cancelling {
                    self.tell_status("cancelling").await;
                }
                (Phase::Cancelled, "cancelled")
            }
        };
        self.give_back().await;
        self.view.send_modify(|view| view.phase = phase);
        self.emit_throughput().await;
        if status == "failed" && self.view.borrow().has_failing {
            self.tell_status("failing").await;
        }
        self.tell_status(status).await;
    }
}

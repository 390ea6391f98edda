//! The relay's side of an outgoing migration.

use std::{net::Shutdown, os::unix::net::UnixStream as StdUnixStream, time::Duration};

use serde_json::{Value, json};
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::{Instant, Interval, MissedTickBehavior, interval, sleep, sleep_until, timeout},
};
use tracing::{info, warn};

use super::{
    Context, HEARTBEAT, Output, QemuEvent,
    migrations::Outputs,
    session::Qemu,
    view::{Phase, View, rate},
    worker::{self, Worker},
};
use crate::{
    migration::{
        messages::{Address, Order, Progress, Report},
        return_path,
    },
    qemu::blockers,
    qmp::{Execute as _, QmpError, envelope},
    stream::Travel,
};

/// How long connecting and comparing block lists may take in all; the worker's own bounds are
/// shorter and its errors better.
const AGREEMENT: Duration = Duration::from_secs(30);

/// How often QEMU's state is asked for while something is expected of it.
const POLL: Duration = Duration::from_millis(20);

/// How long a QEMU whose migration lost its worker may go on before it is cancelled. While it
/// waits at pre-switchover it does not notice by itself.
const NOTICE: Duration = Duration::from_millis(500);

/// How long QEMU is waited for while the worker is followed: QEMU answers nobody while it writes the
/// end of its stream, and a worker that takes nothing then must be noticed all the same.
pub(super) const ANSWER: Duration = Duration::from_secs(1);

/// How long the worker may take to say why a migration failed that QEMU has ended.
const VERDICT: Duration = Duration::from_secs(3);

/// How long QEMU may take to end a migration that failed.
const END: Duration = Duration::from_secs(15);

/// Name of the migration socket in QEMU's monitor.
const FDNAME: &str = "qemu-rdma-helper";

/// States of QEMU's in which a migration is under way (qapi/migration.json).
const UNDER_WAY: [&str; 10] = [
    "setup",
    "active",
    "device",
    "pre-switchover",
    "cancelling",
    "wait-unplug",
    "postcopy-active",
    "postcopy-paused",
    "postcopy-recover",
    "postcopy-recover-setup",
];

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
}

/// A migration that QEMU has begun.
struct Begun {
    worker: Worker,
    /// The worker's end of QEMU's migration socket: QEMU does not notice the worker's end by
    /// itself, so that the relay decides what it is told.
    socket: StdUnixStream,
}

/// How the worker ended.
enum Outcome {
    Done,
    /// It told QEMU.
    Failed {
        reason: String,
        guest_never_ran: bool,
    },
    /// It is dead, or as good as.
    Silent {
        reason: String,
    },
    /// QEMU is gone; there is nobody to tell.
    QemuGone,
}

impl Source {
    /// Run it; `reply` is the result of the client's `migrate`.
    pub async fn run(mut self, address: Address, reply: oneshot::Sender<Result<Value, QmpError>>) {
        let prepared = self.prepare(&address).await;
        let (result, begun) = match prepared {
            Ok((value, begun)) => (Ok(value), Some(begun)),
            Err(error) => {
                self.view.send_modify(|view| view.refuse(&error.desc));
                (Err(error), None)
            }
        };
        // A client that is gone needs no reply; its migration goes on, as QEMU's would.
        let _ = reply.send(result);
        let Some(Begun { mut worker, socket }) = begun else { return };
        let outcome = self.follow(&mut worker).await;
        match outcome {
            Outcome::Done => self.confirm().await,
            Outcome::Silent { reason } => {
                worker.kill().await;
                let guest_never_ran = !self.view.borrow().past_ram;
                if guest_never_ran {
                    // It fails only when QEMU has closed its end.
                    let _ = socket.shutdown(Shutdown::Both);
                } else {
                    tokio::task::spawn_blocking(move || return_path::settle(&socket));
                }
                self.fail(reason, guest_never_ran).await;
            }
            Outcome::Failed { reason, guest_never_ran } => {
                self.fail(reason, guest_never_ran).await;
            }
            Outcome::QemuGone => {}
        }
        worker.finish().await;
    }

    fn qemu(&self) -> Qemu {
        self.context.qemu.clone()
    }

    /// Connect a worker to the destination, and start QEMU's migration into it.
    async fn prepare(&mut self, address: &Address) -> Result<(Value, Begun), QmpError> {
        let mut worker =
            Worker::start(self.context.settings.fabric.kind()).await.map_err(generic)?;
        let mut qemu = self.qemu();
        let state = qemu.execute("query-migrate", Value::Null).await?;
        if state["status"].as_str().is_some_and(|status| UNDER_WAY.contains(&status)) {
            return Err(QmpError::generic("There's a migration process in progress"));
        }
        let guest = qemu.execute("query-status", Value::Null).await?;
        if guest["status"] == "postmigrate" {
            let why = "Can't migrate the vm that was paused due to previous migration";
            return Err(QmpError::generic(why));
        }
        // From here on a failure is this migration's.
        self.view.send_modify(|view| view.phase = Phase::Connecting);
        let mut blocks = self.context.blocks().await.map_err(generic)?;
        let options = self.context.options(&mut qemu).await?;
        blockers::refuse(&blockers::find(&mut qemu, &blocks, options.fabric).await?)?;
        // The worker gets the memory that it may read, and no other.
        for block in &mut blocks {
            if block.travel(options.fabric).0 != Travel::Mapped {
                block.backing = None;
            }
        }
        let total = blocks.iter().map(|block| block.length).sum();
        self.view.send_modify(|view| {
            view.pin_all = options.pin_all;
            view.begin(total);
        });
        let (ours, theirs) = worker::migration_socket().map_err(generic)?;
        let agreement = AGREEMENT + options.pinning(total);
        let order = Order::Outgoing {
            address: address.clone(),
            qemu_qmp: self.context.qemu_qmp.clone(),
            blocks: super::listed(&blocks),
            options,
        };
        let fds = worker::order_fds(&ours, &blocks);
        let agreed = async {
            worker.begin(&order, &fds).await.map_err(generic)?;
            self.await_agreement(&mut worker).await
        };
        match timeout(agreement, agreed).await {
            Ok(result) => result?,
            Err(_) => {
                let why = format!(
                    "The destination {address} did not answer in time; is its helper alive?"
                );
                return Err(QmpError::generic(why));
            }
        }
        qemu.execute_with("getfd", json!({ "fdname": FDNAME }), vec![theirs]).await?;
        let migrate = json!({ "uri": format!("fd:{FDNAME}") });
        match qemu.execute("migrate", migrate).await {
            Ok(value) => {
                self.view.send_modify(|view| view.phase = Phase::Running);
                Ok((value, Begun { worker, socket: ours.into() }))
            }
            Err(error) => {
                // QEMU keeps what it did not use.
                let _ = qemu.execute("closefd", json!({ "fdname": FDNAME })).await;
                Err(error)
            }
        }
    }

    async fn await_agreement(&mut self, worker: &mut Worker) -> Result<(), QmpError> {
        let mut emitted = Instant::now();
        loop {
            let report = tokio::select! {
                biased;
                report = worker.report() => report,
                event = self.events.recv() => match event {
                    Some(QemuEvent::Cancel) => return Err(self.cancel_early().await),
                    Some(QemuEvent::Abort(reason)) => return Err(QmpError::generic(reason)),
                    Some(QemuEvent::Migration | QemuEvent::Resumed) => continue,
                    None => return Err(QmpError::connection_lost()),
                },
            };
            match report {
                Some(Report::Agreed) => return Ok(()),
                Some(Report::Progress(progress)) => {
                    let pins = progress.pinned > 0;
                    self.view.send_modify(|view| view.progress = progress);
                    // All of a large guest takes a while.
                    if pins && emitted.elapsed() >= Duration::from_secs(1) {
                        emitted = Instant::now();
                        self.emit_throughput().await;
                    }
                }
                Some(Report::Failed { reason, .. }) => return Err(QmpError::generic(reason)),
                _ => return Err(QmpError::generic(WORKER_DIED)),
            }
        }
    }

    /// Cancelled while it connects: QEMU knows nothing of it, and will say nothing.
    async fn cancel_early(&self) -> QmpError {
        self.view.send_modify(|view| view.phase = Phase::Cancelled);
        let capabilities = self.qemu().execute("query-migrate-capabilities", Value::Null).await;
        if capabilities.is_ok_and(|capabilities| blockers::is_on(&capabilities, "events")) {
            let cancelled = envelope::event("MIGRATION", &json!({ "status": "cancelled" }));
            self.put(Output::Emit(cancelled)).await;
        }
        QmpError::generic("The migration was cancelled before it began")
    }

    /// Follow the worker to its end.
    async fn follow(&mut self, worker: &mut Worker) -> Outcome {
        let mut seconds = every_second();
        let mut heard = Instant::now();
        let mut last = Progress::default();
        // When QEMU's own migration ended without success, and why.
        let mut ended: Option<(Instant, String)> = None;
        loop {
            let deadline = ended.as_ref().map(|(since, _)| *since + VERDICT);
            tokio::select! {
                // Reports first: they may have waited while QEMU was asked something.
                biased;
                report = worker.report() => {
                    heard = Instant::now();
                    match report {
                        Some(Report::Progress(progress)) => {
                            self.view.send_modify(|view| view.progress = progress);
                        }
                        Some(Report::Done(progress)) => {
                            self.view.send_modify(|view| view.progress = progress);
                            return Outcome::Done;
                        }
                        Some(Report::Failed { reason, guest_never_ran, progress }) => {
                            self.view.send_modify(|view| view.progress = progress);
                            return Outcome::Failed { reason, guest_never_ran };
                        }
                        Some(Report::PastRam) => {
                            self.view.send_modify(|view| view.past_ram = true);
                        }
                        Some(_) => {}
                        None => return Outcome::Silent { reason: WORKER_DIED.into() },
                    }
                }
                event = self.events.recv() => match event {
                    Some(QemuEvent::Abort(reason)) => {
                        worker.order(&Order::Abort { reason }).await;
                    }
                    Some(QemuEvent::Cancel) => {
                        let reason = "The migration was cancelled at its very end".to_owned();
                        worker.order(&Order::Abort { reason }).await;
                    }
                    Some(_) => self.look_for_end(&mut ended).await,
                    None => {
                        let reason = "The source's QEMU is gone; look at its log".to_owned();
                        worker.order(&Order::Abort { reason }).await;
                        return Outcome::QemuGone;
                    }
                },
                () = sleep_until(deadline.unwrap_or(heard)), if deadline.is_some() => {
                    let reason = ended.map(|(_, why)| why).unwrap_or_default();
                    return Outcome::Silent { reason };
                }
                _ = seconds.tick() => {
                    if heard.elapsed() > HEARTBEAT {
                        let reason = "The source's worker hung and was killed; migrate again".to_owned();
                        return Outcome::Silent { reason };
                    }
                    self.look_for_end(&mut ended).await;
                    self.second(&mut last).await;
                }
            }
        }
    }

    /// Notice when QEMU's migration has ended without success. Its worker will say why, if it can.
    async fn look_for_end(&mut self, ended: &mut Option<(Instant, String)>) {
        if ended.is_some() {
            return;
        }
        // A QEMU that is gone closes `events`; one that is busy is asked again.
        let mut qemu = self.qemu();
        let state = timeout(ANSWER, qemu.execute("query-migrate", Value::Null)).await;
        let Ok(Ok(state)) = state else { return };
        if let Some("failed" | "cancelled") = state["status"].as_str() {
            let why = state["error-desc"].as_str().unwrap_or("QEMU ended the migration");
            *ended = Some((Instant::now(), why.to_owned()));
        }
    }

    /// Once a second: what QEMU knows, and the event.
    async fn second(&mut self, last: &mut Progress) {
        let figures = timeout(ANSWER, self.ask_figures()).await;
        let Ok(Ok((ram, max_bandwidth))) = figures else { return };
        self.view.send_modify(|view| {
            let bytes = view.progress.ram_bytes.saturating_sub(last.ram_bytes);
            let milliseconds = view.progress.elapsed_ms.saturating_sub(last.elapsed_ms);
            view.mbps = rate(bytes, milliseconds);
            *last = view.progress.clone();
            if ram.is_object() {
                view.ram = ram;
            }
            view.max_bandwidth = max_bandwidth;
        });
        self.emit_throughput().await;
    }

    async fn ask_figures(&mut self) -> Result<(Value, u64), QmpError> {
        let mut qemu = self.qemu();
        let mut state = qemu.execute("query-migrate", Value::Null).await?;
        let parameters = qemu.execute("query-migrate-parameters", Value::Null).await?;
        Ok((state["ram"].take(), parameters["max-bandwidth"].as_u64().unwrap_or(0)))
    }

    async fn emit_throughput(&self) {
        let line = self.view.borrow().throughput_event();
        self.put(Output::Emit(line)).await;
    }

    async fn put(&self, output: Output) {
        self.output.put(output).await;
    }

    /// The destination's QEMU completed.
    async fn confirm(&mut self) {
        info!("migration completed");
        if let Ok((ram, max_bandwidth)) = self.ask_figures().await {
            self.view.send_modify(|view| {
                view.ram = ram;
                view.max_bandwidth = max_bandwidth;
            });
        }
        self.view.send_modify(|view| view.phase = Phase::Confirmed);
        self.emit_throughput().await;
        self.put(Output::Release).await;
    }

    /// The migration failed: let QEMU end it, and the guest run on.
    async fn fail(&mut self, reason: String, guest_never_ran: bool) {
        warn!(%reason, "migration failed");
        let status = self.end_qemus_migration(&reason, guest_never_ran).await;
        let phase = match status.as_deref() {
            Ok("cancelled") if !matches!(self.view.borrow().phase, Phase::Failed(_)) => {
                Phase::Cancelled
            }
            Ok("completed") => Phase::Failed(self.roll_back(reason, guest_never_ran).await),
            Ok(status) if UNDER_WAY.contains(&status) && !guest_never_ran => {
                Phase::Failed(stays_stopped(&reason))
            }
            _ => Phase::Failed(reason),
        };
        self.view.send_modify(|view| view.phase = phase);
        self.emit_throughput().await;
        if matches!(status.as_deref(), Ok("completed")) {
            let failed = envelope::event("MIGRATION", &json!({ "status": "failed" }));
            self.put(Output::FailInstead(failed)).await;
        } else {
            self.put(Output::Release).await;
        }
    }

    /// Wait until QEMU's migration is over; returns its last state.
    async fn end_qemus_migration(
        &mut self,
        reason: &str,
        guest_never_ran: bool,
    ) -> Result<String, QmpError> {
        let mut qemu = self.qemu();
        let begun = Instant::now();
        let mut cancelled = false;
        loop {
            let mut state = qemu.execute("query-migrate", Value::Null).await?;
            let status = state["status"].as_str().unwrap_or("none").to_owned();
            if state["ram"].is_object() {
                self.view.send_modify(|view| view.ram = state["ram"].take());
            }
            if !UNDER_WAY.contains(&status.as_str()) || begun.elapsed() > END {
                return Ok(status);
            }
            // Cancelled, QEMU would run its guest.
            let may_cancel = guest_never_ran && status != "cancelling" && !cancelled;
            if may_cancel && begun.elapsed() > NOTICE {
                cancelled = true;
                // From here on the relay shows QEMU's `cancelled` as the failure that it is.
                self.view.send_modify(|view| view.phase = Phase::Failed(reason.to_owned()));
                qemu.execute("migrate_cancel", Value::Null).await?;
            }
            sleep(POLL).await;
        }
    }

    /// QEMU has completed, and the destination has not: let the guest run again here, if it is
    /// certain that it never ran there. Returns the error text.
    async fn roll_back(&mut self, reason: String, guest_never_ran: bool) -> String {
        if !guest_never_ran {
            return stays_stopped(&reason);
        }
        match self.run_again().await {
            Ok(()) => reason,
            Err(error) => {
                format!("{reason}. The guest could not be started again here ({error}): 'cont' it")
            }
        }
    }

    async fn run_again(&mut self) -> Result<(), QmpError> {
        let mut qemu = self.qemu();
        let begun = Instant::now();
        // `completed` may come while QEMU is still in `finish-migrate`, which refuses `cont`.
        loop {
            let state = qemu.execute("query-status", Value::Null).await?;
            match state["status"].as_str() {
                Some("finish-migrate") if begun.elapsed() < END => sleep(POLL).await,
                _ => break,
            }
        }
        qemu.execute("cont", Value::Null).await.map(drop)
    }
}

/// What is said when there is no worker to say it.
pub(super) const WORKER_DIED: &str =
    "The helper's worker process died; see its messages in the helper's log, and migrate again";

fn stays_stopped(reason: &str) -> String {
    format!(
        "{reason}. The guest stays stopped here, because it may be running at the destination: \
         look there, and 'cont' here only if it is not"
    )
}

fn generic(error: impl std::fmt::Display) -> QmpError {
    QmpError::generic(error.to_string())
}

fn every_second() -> Interval {
    let mut seconds = interval(Duration::from_secs(1));
    seconds.set_missed_tick_behavior(MissedTickBehavior::Delay);
    seconds.reset();
    seconds
}

//! A migration that failed: QEMU's ends too, and the guest runs on here unless it may run there.

use std::time::Duration;

use serde_json::Value;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tracing::warn;

use super::{ANSWER, END, Ended, NOTICE, POLL, Source, UNDER_WAY};
use crate::{
    qmp::{Execute as _, QmpError, envelope},
    relay::{
        Output,
        migration::{
            status::{Guest, Phase},
            worker::Worker,
        },
    },
    worker::qemu_sockets::QemuSockets,
};

/// How long the worker may take to read the end of a stream that QEMU has written.
const READING: Duration = Duration::from_secs(3);

impl Source {
    /// Let QEMU's migration end. One with channels is cancelled first: a channel that breaks while QEMU
    /// waits at pre-switchover fails the migration and leaves the guest stopped for good
    /// (`multifd_send_set_error` sets the state, and nobody wakes the thread that waits; 10.0). So is one
    /// that a client has cancelled.
    pub(super) async fn break_off(&self, streams: &QemuSockets) {
        if !streams.channels.is_empty() || self.view.borrow().cancels {
            // One that holds its lock while it writes to nobody does not answer.
            let _ = timeout(ANSWER, self.cancel_at_qemu()).await;
        }
        streams.end();
    }

    /// QEMU has ended its stream: wait for its reason, before anything is done that makes it fail for another.
    pub(super) async fn hear_qemu(&mut self) -> Option<String> {
        let (mut qemu, begun) = (self.qemu(), Instant::now());
        while self.ended.is_none() && begun.elapsed() < NOTICE {
            let asked = timeout(ANSWER, qemu.execute("query-migrate", Value::Null));
            let state = asked.await.ok()?.ok()?;
            if state["status"] == "failed" {
                self.ended = Some(Ended::of("failed", &state));
            } else if !UNDER_WAY.contains(&state["status"].as_str().unwrap_or("none")) {
                break;
            } else {
                sleep(POLL).await;
            }
        }
        self.ended.as_ref().and_then(|ended| ended.why.clone())
    }

    /// Cancel QEMU's migration, if it goes on. Clients see that it failed, unless they cancelled it.
    async fn cancel_at_qemu(&self) -> Result<(), QmpError> {
        if self.ended.is_some() {
            return Ok(());
        }
        let mut qemu = self.qemu();
        let state = qemu.execute("query-migrate", Value::Null).await?;
        let status = state["status"].as_str().unwrap_or("none");
        if UNDER_WAY.contains(&status) && status != "cancelling" {
            self.view.send_if_modified(|view| {
                let fails = !view.cancels;
                if fails {
                    view.phase = Phase::Failing;
                }
                fails
            });
            qemu.execute("migrate_cancel", Value::Null).await?;
        }
        Ok(())
    }

    /// The migration failed: let QEMU end it, and the guest run on. A worker that is there may still read what
    /// the guest did before the switchover.
    pub(super) async fn fail(
        &mut self,
        reason: String,
        guest_never_ran: bool,
        worker: Option<&mut Worker>,
    ) {
        warn!(%reason, "migration failed");
        let status = self.end_qemus_migration(guest_never_ran).await;
        let phase = match status.as_deref() {
            Ok("cancelled") if self.view.borrow().phase != Phase::Failing => Phase::Cancelled,
            // What the worker's end has made of it.
            Ok("failed") if self.view.borrow().cancels && guest_never_ran => Phase::Cancelled,
            Ok("completed") => {
                if let Some(worker) = worker.filter(|_| guest_never_ran) {
                    self.hear_of_guest(worker).await;
                }
                self.roll_back(reason, guest_never_ran).await
            }
            Ok(status) if UNDER_WAY.contains(&status) && !guest_never_ran => {
                Phase::Failed(stays_stopped(&reason))
            }
            _ => Phase::Failed(reason),
        };
        self.give_back().await;
        let shown = if phase == Phase::Cancelled { "cancelled" } else { "failed" };
        self.view.send_modify(|view| view.phase = phase);
        self.emit_throughput().await;
        let output = match status.as_deref() {
            Ok(said @ ("completed" | "failed")) if said != shown => {
                let view = self.view.borrow().clone();
                if shown == "failed" && view.has_failing {
                    self.tell_status("failing").await;
                }
                Output::Instead(envelope::status(shown))
            }
            _ => Output::Release,
        };
        self.put(output).await;
    }

    /// Wait until QEMU's migration is over; returns its last state.
    async fn end_qemus_migration(&mut self, guest_never_ran: bool) -> Result<String, QmpError> {
        if let Some(ended) = &self.ended {
            return Ok(ended.status.clone());
        }
        let mut qemu = self.qemu();
        let begun = Instant::now();
        let mut cancelled = false;
        loop {
            let state = qemu.execute("query-migrate", Value::Null).await?;
            let status = state["status"].as_str().unwrap_or("none").to_owned();
            self.view.send_modify(|view| view.note(state));
            if !UNDER_WAY.contains(&status.as_str()) || begun.elapsed() > END {
                return Ok(status);
            }
            // Cancelled, QEMU would run its guest.
            let may_cancel = guest_never_ran && status != "cancelling" && !cancelled;
            if may_cancel && begun.elapsed() > NOTICE {
                cancelled = true;
                self.cancel_at_qemu().await?;
            }
            sleep(POLL).await;
        }
    }

    /// QEMU says what the guest did at the end of its stream, all of which it has written.
    async fn hear_of_guest(&self, worker: &mut Worker) {
        let deadline = Instant::now() + READING;
        while self.view.borrow().guest_before.is_none() {
            match timeout_at(deadline, worker.report()).await {
                Ok(Some(report)) => drop(self.hear(report)),
                // QEMU of a machine before 2.4 says nothing, and is not suspended without an event.
                Ok(None) | Err(_) => return,
            }
        }
    }

    /// QEMU has completed, and the destination has not: let the guest run again here, if it is
    /// certain that it never ran there. Returns how the migration ended.
    async fn roll_back(&mut self, reason: String, guest_never_ran: bool) -> Phase {
        if !guest_never_ran {
            return Phase::Failed(stays_stopped(&reason));
        }
        let (guest, cancels) = {
            let view = self.view.borrow();
            (view.guest_at_switchover(), view.cancels)
        };
        Phase::Failed(match guest {
            Guest::Stopped => format!(
                "{reason}. The guest stays stopped, as it was; it must run before it can migrate again"
            ),
            // QEMU 8.2 and later abort then. Earlier ones wake it up to migrate.
            Guest::Suspended => format!(
                "{reason}. The guest was suspended, and QEMU can't let it go on from here ('cont' would \
                 end QEMU): 'system_reset' and 'cont' start it anew; with capability return-path a \
                 suspended guest is not lost"
            ),
            Guest::Runs => match self.run_again().await {
                Ok(()) if cancels => return Phase::Cancelled,
                Ok(()) => reason,
                Err(error) => format!(
                    "{reason}. The guest could not be started again here ({error}): 'cont' it"
                ),
            },
        })
    }

    async fn run_again(&mut self) -> Result<(), QmpError> {
        let mut qemu = self.qemu();
        let begun = Instant::now();
        // `completed` may come while QEMU is still in `finish-migrate`, which refuses `cont`.
        loop {
            let state = qemu.execute("query-status", Value::Null).await?;
            match state["status"].as_str().unwrap_or("unknown") {
                "finish-migrate" if begun.elapsed() < END => sleep(POLL).await,
                // The latter if it was reset meanwhile.
                "postmigrate" | "prelaunch" => break,
                "running" => return Ok(()),
                // Somebody else has done something with it.
                other => return Err(QmpError::generic(format!("its state is '{other}'"))),
            }
        }
        qemu.execute("cont", Value::Null).await.map(drop)
    }
}

fn stays_stopped(reason: &str) -> String {
    format!(
        "{reason}. The guest stays stopped here, because it may be running at the destination: \
         look there, and 'cont' here only if it is not"
    )
}

//! The relay's side of an outgoing migration.

mod connecting;
mod failing;
mod pace;
mod stream;

use std::time::Duration;

use serde_json::{Value, json};
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::{Instant, Interval, MissedTickBehavior, interval, sleep_until, timeout},
};
use tracing::info;

use self::{connecting::NotBegun, pace::Pacing};
use super::{
    saved_settings::{Loan, Turn},
    slots::Outputs,
    status::{Guest, Phase, View, rate},
    worker::Worker,
};
use crate::{
    address::Address,
    control::{Order, Progress, Report},
    qmp::{Execute as _, QmpError},
    relay::{Context, Output, QemuEvent, heartbeat, qemu_session::Qemu},
    threads,
    worker::return_path,
};

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
const UNDER_WAY: [&str; 13] = [
    "setup",
    "active",
    "device",
    "pre-switchover",
    "cancelling",
    "failing",
    "postcopy-device",
    "wait-unplug",
    "postcopy-active",
    "postcopy-paused",
    "postcopy-recover",
    "postcopy-recover-setup",
    "colo",
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
    /// Settings of QEMU's.
    pub loan: Loan,
    /// What it has borrowed of them.
    pub turn: Turn,
    /// QEMU's own migration has ended without success. Whatever QEMU says after that is of another one.
    pub ended: Option<Ended>,
}

/// How QEMU's own migration ended.
pub struct Ended {
    since: Instant,
    /// `cancelled` or `failed`.
    status: String,
    /// Its `error-desc`.
    why: Option<String>,
}

impl Ended {
    /// In this state, by its `query-migrate`.
    fn of(status: &str, state: &Value) -> Self {
        let why = state["error-desc"].as_str().map(str::to_owned);
        Self { since: Instant::now(), status: status.to_owned(), why }
    }
}

/// Has QEMU a migration under way, by its `query-migrate`?
fn is_under_way(state: &Value) -> bool {
    state["status"].as_str().is_some_and(|status| UNDER_WAY.contains(&status))
}

/// Has QEMU completed its migration? Its guest is in `postmigrate` then. A reset makes that `prelaunch`
/// (`main_loop_should_exit`, 7.2 to 11.1), and QEMU takes `cont` in both.
pub async fn has_completed(qemu: &mut Qemu) -> Result<bool, QmpError> {
    let state = qemu.execute("query-migrate", Value::Null).await?;
    Ok(state["status"] == "completed")
}

/// What the relay has seen of a migration while it follows it.
struct Seen {
    pacing: Pacing,
    /// The worker's figures a second ago.
    last: Progress,
    /// Since when QEMU cancels.
    cancelling: Option<Instant>,
    /// When a client cancelled.
    cancelled: Option<Instant>,
}

impl Seen {
    fn new(pacing: Pacing) -> Self {
        Self { pacing, last: Progress::default(), cancelling: None, cancelled: None }
    }
}

/// How the worker ended.
enum Outcome {
    Done,
    /// It has said why.
    Failed {
        reason: String,
        guest_never_ran: bool,
        /// QEMU may know better.
        by_qemu: bool,
    },
    /// It is dead, or as good as.
    Silent {
        reason: String,
    },
    /// QEMU is gone, or the session with it, so that only the worker can reach it.
    QemuGone,
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
        let streams = match prepared.map_err(NotBegun::from).flatten() {
            Ok(streams) => streams,
            Err(why) => {
                // It may have ended already.
                let _ = worker.orders().send(&why.order(), &[]).await;
                self.end_early(why).await;
                return worker.finish().await;
            }
        };
        worker.has_stream();
        let has_channels = !streams.channels.is_empty();
        let followed = threads::caught("follow", self.follow(&mut worker, has_channels)).await;
        let mut outcome =
            followed.unwrap_or_else(|lost| Outcome::Silent { reason: lost.to_string() });
        if matches!(outcome, Outcome::Silent { .. }) {
            worker.kill().await;
            // What it had said before counts, but for what it can't do any more: to settle QEMU.
            while let Some(report) = worker.report().await {
                match self.hear(report) {
                    Some(Outcome::Failed { guest_never_ran: false, .. }) => {
                        self.view.send_modify(|view| view.past_ram = true);
                    }
                    Some(said) => outcome = said,
                    None => {}
                }
            }
        }
        let is_gone = matches!(outcome, Outcome::QemuGone);
        match outcome {
            Outcome::Done => self.confirm().await,
            Outcome::Silent { reason } => {
                let guest_never_ran = !self.view.borrow().past_ram;
                if guest_never_ran {
                    self.break_off(&streams).await;
                } else {
                    tokio::task::spawn_blocking(move || return_path::settle(&streams.main));
                }
                self.fail(reason, guest_never_ran, None).await;
            }
            Outcome::Failed { mut reason, guest_never_ran, by_qemu } => {
                if by_qemu && let Some(why) = self.hear_qemu().await {
                    reason = format!("{reason}: {why}");
                }
                if guest_never_ran {
                    self.break_off(&streams).await;
                }
                self.fail(reason, guest_never_ran, Some(&mut worker)).await;
            }
            Outcome::QemuGone => {}
        }
        // What was done meanwhile may have come to nothing.
        if is_gone || self.context.qemu.is_lost() {
            worker.leave("The source's QEMU is gone; look at its log".into()).await;
        } else {
            worker.finish().await;
        }
    }

    fn qemu(&self) -> Qemu {
        self.context.qemu.clone()
    }

    /// Follow the worker to its end.
    async fn follow(&mut self, worker: &mut Worker, has_channels: bool) -> Outcome {
        let mut seconds = every_second();
        let mut silence = heartbeat();
        let mut seen = Seen::new(if has_channels { Pacing::At(None) } else { Pacing::Never });
        self.pace(worker, &mut seen.pacing).await;
        // Events of this were not heard while QEMU connected.
        self.look_at_guest(worker, &mut seen.pacing).await;
        loop {
            let deadline = self.ended.as_ref().map(|ended| ended.since + VERDICT);
            tokio::select! {
                // Reports first: they may have waited while QEMU was asked something.
                biased;
                report = worker.report() => {
                    silence = heartbeat();
                    let Some(report) = report else {
                        return Outcome::Silent { reason: WORKER_DIED.into() };
                    };
                    if let Some(outcome) = self.hear(report) {
                        return outcome;
                    }
                }
                event = self.events.recv() => match event {
                    Some(QemuEvent::Abort(reason)) => {
                        worker.order(&Order::Abort { reason }).await;
                    }
                    Some(QemuEvent::Cancel) => self.cancel(worker, &mut seen).await,
                    // QEMU keeps to no limit any more.
                    Some(QemuEvent::Stopped) => {
                        seen.pacing.lift(worker).await;
                        self.look_at_guest(worker, &mut seen.pacing).await;
                        self.pace(worker, &mut seen.pacing).await;
                    }
                    // By the time that QEMU is asked it may have switched over.
                    Some(QemuEvent::Suspended) => self.set_guest(Guest::Suspended, worker).await,
                    Some(QemuEvent::Woken) => self.look_at_guest(worker, &mut seen.pacing).await,
                    Some(QemuEvent::Parameters) => self.pace(worker, &mut seen.pacing).await,
                    Some(QemuEvent::Resumed) => {
                        seen.pacing.resume();
                        self.look_at_guest(worker, &mut seen.pacing).await;
                        self.look_for_end(worker, &mut seen).await;
                    }
                    Some(QemuEvent::Migration) => self.look_for_end(worker, &mut seen).await,
                    None => return Outcome::QemuGone,
                },
                () = sleep_until(deadline.unwrap_or_else(Instant::now)), if deadline.is_some() => {
                    let why = self.ended.as_ref().and_then(|ended| ended.why.clone());
                    let reason = why.unwrap_or_else(|| "QEMU ended the migration".to_owned());
                    return Outcome::Silent { reason };
                }
                _ = seconds.tick() => {
                    let late = |since: Instant| since.elapsed() > VERDICT;
                    // Behind RAM it waits for the destination's word.
                    let holds = !self.view.borrow().past_ram
                        && (seen.cancelling.is_some_and(late) || seen.cancelled.is_some_and(late));
                    if !silence.lasts() || holds {
                        let reason = "The source's worker hung and was killed; migrate again".to_owned();
                        return Outcome::Silent { reason };
                    }
                    // One for which there was no room among the events.
                    if self.view.borrow().cancels {
                        self.cancel(worker, &mut seen).await;
                    }
                    self.second(worker, &mut seen).await;
                }
            }
        }
    }

    /// A client cancels, or yanks. The worker is told first, and says whether the guest may have come to run
    /// at the destination; only if it has not, and will not, QEMU is told: while it writes the end of its
    /// stream it hears nobody, and afterwards it would run its guest.
    async fn cancel(&mut self, worker: &mut Worker, seen: &mut Seen) {
        if seen.cancelled.is_none() {
            seen.cancelled = Some(Instant::now());
            let view = self.view.borrow().clone();
            let what = if view.cancels { "cancelled" } else { "yanked" };
            let at_end = if view.past_ram { " at its very end" } else { "" };
            let reason = format!("The migration was {what}{at_end}");
            worker.order(&Order::Cancel { reason }).await;
        }
    }

    /// Notice whether the guest stands still, and not for the switchover: then it must not run when the
    /// migration fails. QEMU remembers the same (`vm_old_state`, `runstate_is_live`; 10.0).
    async fn look_at_guest(&self, worker: &mut Worker, pacing: &mut Pacing) {
        let mut qemu = self.qemu();
        let state = timeout(ANSWER, qemu.execute("query-status", Value::Null)).await;
        // One that does not answer switches over.
        let Ok(Ok(state)) = state else { return };
        let guest = match state["status"].as_str() {
            Some("running") => Guest::Runs,
            Some("suspended") => Guest::Suspended,
            Some("finish-migrate" | "postmigrate") | None => return,
            // By its client, or by a reset behind the switchover.
            Some("prelaunch") => match timeout(ANSWER, has_completed(&mut qemu)).await {
                Ok(Ok(false)) => Guest::Stopped,
                _ => return,
            },
            Some(_) => Guest::Stopped,
        };
        self.set_guest(guest, worker).await;
        if guest == Guest::Stopped {
            pacing.resume();
        }
    }

    async fn set_guest(&self, guest: Guest, worker: &mut Worker) {
        let changed = |view: &mut View| std::mem::replace(&mut view.guest, guest) != guest;
        if self.view.send_if_modified(changed) {
            worker.order(&Order::SetGuestRunning { runs: guest == Guest::Runs }).await;
        }
    }

    /// Take a report; says how it ends, if that is what it was.
    fn hear(&self, report: Report) -> Option<Outcome> {
        let (progress, outcome) = match report {
            Report::Progress(progress) => (progress, None),
            Report::Done(progress) => (progress, Some(Outcome::Done)),
            Report::Failed { reason, guest_never_ran, by_qemu, progress } => {
                (progress, Some(Outcome::Failed { reason, guest_never_ran, by_qemu }))
            }
            Report::GuestBefore { status } => {
                self.view.send_modify(|view| view.guest_before = Some(status));
                return None;
            }
            Report::PastRam => {
                self.view.send_modify(|view| view.past_ram = true);
                return None;
            }
            _ => return None,
        };
        self.view.send_modify(|view| view.progress = progress);
        outcome
    }

    /// Notice when QEMU's migration has ended without success. Its worker will say why, if it can.
    async fn look_for_end(&mut self, worker: &mut Worker, seen: &mut Seen) {
        // A QEMU that is gone closes `events`; one that is busy is asked again.
        let mut qemu = self.qemu();
        let state = timeout(ANSWER, qemu.execute("query-migrate", Value::Null)).await;
        if let Ok(Ok(state)) = state {
            self.look_at(&state, worker, seen).await;
        }
    }

    async fn look_at(&mut self, state: &Value, worker: &mut Worker, seen: &mut Seen) {
        let status = state["status"].as_str().unwrap_or("none");
        if ["cancelling", "cancelled", "failed"].contains(&status) {
            // QEMU may wait for what is being held back.
            seen.pacing.lift(worker).await;
        }
        if self.ended.is_some() || !["cancelled", "failed"].contains(&status) {
            return;
        }
        self.ended = Some(Ended::of(status, state));
        if status == "cancelled" {
            // Whatever the worker says, or does not. Clients may begin something else now.
            self.give_back().await;
            self.view.send_modify(|view| view.phase = Phase::Cancelled);
            self.put(Output::Release).await;
        }
    }

    /// Once a second: what QEMU knows, and the event.
    async fn second(&mut self, worker: &mut Worker, seen: &mut Seen) {
        if self.ended.is_some() {
            return;
        }
        let Ok(Ok((state, max_bandwidth))) = timeout(ANSWER, self.ask_figures()).await else {
            return;
        };
        self.look_at(&state, worker, seen).await;
        if state["status"] != "cancelling" {
            seen.cancelling = None;
        } else if seen.cancelling.get_or_insert_with(Instant::now).elapsed() > NOTICE {
            // It waits for a channel, and the worker for the peer, or for ever.
            let reason = "The migration was cancelled".to_owned();
            worker.order(&Order::Cancel { reason }).await;
        }
        // One that flushed its disks did not answer at once when it was stopped.
        self.look_at_guest(worker, &mut seen.pacing).await;
        seen.pacing.follow(worker, max_bandwidth).await;
        self.view.send_modify(|view| {
            let bytes = view.progress.ram_bytes.saturating_sub(seen.last.ram_bytes);
            let milliseconds = view.progress.elapsed_ms.saturating_sub(seen.last.elapsed_ms);
            view.mbps = rate(bytes, milliseconds);
            seen.last = view.progress.clone();
            view.note(state);
            view.max_bandwidth = max_bandwidth;
        });
        self.emit_throughput().await;
    }

    /// QEMU's state of the migration, and `max-bandwidth`.
    async fn ask_figures(&mut self) -> Result<(Value, u64), QmpError> {
        let mut qemu = self.qemu();
        let state = qemu.execute("query-migrate", Value::Null).await?;
        let parameters = qemu.execute("query-migrate-parameters", Value::Null).await?;
        Ok((state, parameters["max-bandwidth"].as_u64().unwrap_or(0)))
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

    /// The destination's QEMU completed.
    async fn confirm(&mut self) {
        info!("migration completed");
        if let Ok((state, max_bandwidth)) = self.ask_figures().await {
            self.view.send_modify(|view| {
                view.note(state);
                view.max_bandwidth = max_bandwidth;
            });
        }
        self.give_back().await;
        self.view.send_modify(|view| view.phase = Phase::Confirmed);
        self.emit_throughput().await;
        self.put(Output::Release).await;
    }
}

/// What is said when there is no worker to say it.
pub(super) const WORKER_DIED: &str =
    "The helper's worker process died; see its messages in the helper's log, and migrate again";

fn generic(error: impl std::fmt::Display) -> QmpError {
    QmpError::generic(error.to_string())
}

fn every_second() -> Interval {
    let mut seconds = interval(Duration::from_secs(1));
    seconds.set_missed_tick_behavior(MissedTickBehavior::Delay);
    seconds.reset();
    seconds
}

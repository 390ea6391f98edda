//! A failed migration: ends QEMU's own; the guest keeps running here unless it may run at the
//! destination.

use std::time::{Duration, Instant};

use tracing::warn;

use super::{Action, End, Event, Failing, Known, NOTICE, State, Step};
use crate::{
    patience::Patience,
    proto::{
        patience,
        relay::{Guest, MigrationStatus, RunState},
    },
};

/// How often QEMU is asked while a change is expected.
const POLL: Duration = Duration::from_millis(20);

/// How long QEMU may take to end a migration that failed.
const END: Duration = Duration::from_secs(15);

/// How long the worker may take to read the end of a stream that QEMU has written.
const READING: Duration = Duration::from_secs(3);

impl Failing {
    /// Begin with the worker's reason.
    pub fn reported(
        reason: String,
        guest_never_ran: bool,
        by_qemu: bool,
        known: &mut Known,
        now: Instant,
        actions: &mut Vec<Action>,
    ) -> State {
        let failing = Self::begin(reason, guest_never_ran, now);
        if by_qemu && known.ended.is_none() {
            return State::Failing(failing.ask(Step::HearQemu, NOTICE, now, actions));
        }
        failing.heard(known, now, actions)
    }

    /// Begin without a reason from the worker, which is gone.
    pub fn silent(
        reason: String,
        known: &mut Known,
        now: Instant,
        actions: &mut Vec<Action>,
    ) -> State {
        let failing = Self::begin(reason, !known.past_ram, now);
        if known.past_ram {
            actions.push(Action::SettleSockets);
        }
        failing.end_stream(known, now, actions)
    }

    fn begin(reason: String, guest_never_ran: bool, now: Instant) -> Self {
        warn!(%reason, "migration failed");
        let (step, limit) = (Step::HearQemu, patience(NOTICE, now));
        Self { reason, guest_never_ran, step, limit, poll: None }
    }

    pub fn poll_timeout(&self) -> Option<Instant> {
        let poll = self.poll.as_ref().map(Patience::next);
        Some(poll.unwrap_or_else(|| self.limit.next()))
    }

    /// Begin a step that asks QEMU for its migration or its guest.
    fn ask(self, step: Step, limit: Duration, now: Instant, actions: &mut Vec<Action>) -> Self {
        let asked = if step == Step::RunAgain { Action::AskGuest } else { Action::AskMigration };
        actions.push(asked);
        Self { step, limit: patience(limit, now), poll: None, ..self }
    }

    /// Break the sockets of a QEMU whose guest certainly keeps running.
    fn end_stream(self, known: &mut Known, now: Instant, actions: &mut Vec<Action>) -> State {
        if !self.guest_never_ran {
            return self.end_migration(known, now, actions);
        }
        if known.ended.is_none() && (known.has_channels || known.cancels) {
            return State::Failing(self.ask(Step::BreakOff, END, now, actions));
        }
        actions.push(Action::EndSockets);
        self.end_migration(known, now, actions)
    }

    /// Wait until QEMU's migration is over.
    fn end_migration(self, known: &mut Known, now: Instant, actions: &mut Vec<Action>) -> State {
        if let Some((status, _)) = &known.ended {
            return self.ended(*status, known, now, actions);
        }
        let step = Step::EndMigration { is_cancelled: false };
        State::Failing(self.ask(step, END, now, actions))
    }

    pub(super) fn handle(
        self,
        event: Event,
        known: &mut Known,
        now: Instant,
        actions: &mut Vec<Action>,
    ) -> State {
        match event {
            Event::WorkerGone(_) | Event::WorkerKilled => {
                known.has_worker = false;
                if self.step == Step::HearOfGuest {
                    return self.roll_back(known, now, actions);
                }
            }
            Event::Report(_) if self.step == Step::HearOfGuest && known.guest_before.is_some() => {
                return self.roll_back(known, now, actions);
            }
            Event::Migration(answer) => return self.migration(answer, known, now, actions),
            Event::Guest(answer) if self.step == Step::RunAgain => {
                return self.run_again(answer, known, now, actions);
            }
            Event::Continued(done) if self.step == Step::Continue => {
                return self.continued(done, known, actions);
            }
            Event::Timeout => return self.late(known, now, actions),
            _ => {}
        }
        State::Failing(self)
    }

    /// Handle QEMU's answer about its migration, or the lack of one.
    fn migration(
        self,
        answer: Option<(MigrationStatus, Option<String>)>,
        known: &mut Known,
        now: Instant,
        actions: &mut Vec<Action>,
    ) -> State {
        let Some((status, why)) = answer else { return self.unanswered(known, now, actions) };
        match self.step {
            Step::HearQemu if status.is_under_way() => self.again(now),
            Step::HearQemu => {
                if status == MigrationStatus::Failed {
                    known.ended.get_or_insert((status, why));
                }
                self.heard(known, now, actions)
            }
            Step::BreakOff => {
                Self::cancel_at_qemu(status, known, actions);
                actions.push(Action::EndSockets);
                self.end_migration(known, now, actions)
            }
            Step::EndMigration { .. } if !status.is_under_way() => {
                self.ended(status, known, now, actions)
            }
            Step::EndMigration { is_cancelled } => {
                let mut failing = self;
                // QEMU runs its guest after a cancel.
                if failing.guest_never_ran && !is_cancelled && failing.has_lasted(NOTICE) {
                    Self::cancel_at_qemu(status, known, actions);
                    failing.step = Step::EndMigration { is_cancelled: true };
                }
                failing.again(now)
            }
            Step::HearOfGuest | Step::RunAgain | Step::Continue => State::Failing(self),
        }
    }

    /// Cancel QEMU's migration, if it is under way. Clients see that it failed, unless they
    /// cancelled it.
    fn cancel_at_qemu(status: MigrationStatus, known: &mut Known, actions: &mut Vec<Action>) {
        if known.ended.is_some() || status != MigrationStatus::UnderWay {
            return;
        }
        if !known.cancels {
            known.is_failing = true;
            actions.push(Action::ShowFailing);
        }
        actions.push(Action::CancelAtQemu);
    }

    /// Ask again a little later.
    fn again(mut self, now: Instant) -> State {
        self.poll = Some(patience(POLL, now));
        State::Failing(self)
    }

    fn has_lasted(&self, time: Duration) -> bool {
        self.limit.left() + time <= END
    }

    /// Handle a missing answer: QEMU may hold its lock while it writes to a socket that nobody
    /// reads.
    fn unanswered(self, known: &mut Known, now: Instant, actions: &mut Vec<Action>) -> State {
        match self.step {
            Step::HearQemu => self.heard(known, now, actions),
            Step::BreakOff => {
                actions.push(Action::EndSockets);
                self.end_migration(known, now, actions)
            }
            Step::EndMigration { .. } => self.again(now),
            _ => State::Failing(self),
        }
    }

    /// Continue, with QEMU's reason if it is known.
    fn heard(mut self, known: &mut Known, now: Instant, actions: &mut Vec<Action>) -> State {
        if let Some((_, Some(why))) = &known.ended {
            self.reason = format!("{}: {why}", self.reason);
        }
        self.end_stream(known, now, actions)
    }

    /// Handle the end of QEMU's migration.
    fn ended(
        self,
        status: MigrationStatus,
        known: &mut Known,
        now: Instant,
        actions: &mut Vec<Action>,
    ) -> State {
        let end = match status {
            MigrationStatus::Cancelled if !known.is_failing => End::Cancelled,
            // QEMU took the worker's end for a failure.
            MigrationStatus::Failed if known.cancels && self.guest_never_ran => End::Cancelled,
            MigrationStatus::Completed if self.guest_never_ran => {
                if known.has_worker && known.guest_before.is_none() {
                    let (step, limit) = (Step::HearOfGuest, patience(READING, now));
                    return State::Failing(Self { step, limit, poll: None, ..self });
                }
                return self.roll_back(known, now, actions);
            }
            MigrationStatus::Completed => End::Failed(stays_stopped(&self.reason)),
            _ => End::Failed(self.reason),
        };
        State::restore(end, actions)
    }

    /// Resume the guest here: QEMU has completed, and the destination has not.
    fn roll_back(self, known: &Known, now: Instant, actions: &mut Vec<Action>) -> State {
        let reason = &self.reason;
        let end = match known.guest_at_switchover() {
            Guest::Runs => return State::Failing(self.ask(Step::RunAgain, END, now, actions)),
            Guest::Stopped => format!(
                "{reason}. The guest stays stopped, as it was; it must run before it can migrate again"
            ),
            // QEMU 8.2 and later abort then. Earlier versions wake the guest up to migrate.
            Guest::Suspended => format!(
                "{reason}. The guest was suspended, and QEMU can't let it go on from here ('cont' would \
                 end QEMU): 'system_reset' and 'cont' start it anew; with capability return-path a \
                 suspended guest is not lost"
            ),
        };
        State::restore(End::Failed(end), actions)
    }

    /// Resume the guest: `completed` may come while QEMU is still in `finish-migrate`, which
    /// refuses `cont`.
    fn run_again(
        mut self,
        answer: Option<(RunState, bool)>,
        known: &Known,
        now: Instant,
        actions: &mut Vec<Action>,
    ) -> State {
        match answer.map(|(run, _)| run) {
            None | Some(RunState::FinishMigrate) => self.again(now),
            // `Prelaunch` if it was reset meanwhile.
            Some(RunState::PostMigrate | RunState::Prelaunch) => {
                actions.push(Action::Continue);
                self.step = Step::Continue;
                self.poll = None;
                State::Failing(self)
            }
            Some(RunState::Running) => self.continued(Ok(()), known, actions),
            // Something else has changed it.
            Some(other) => self.continued(Err(format!("its state is {other:?}")), known, actions),
        }
    }

    fn continued(
        self,
        done: Result<(), String>,
        known: &Known,
        actions: &mut Vec<Action>,
    ) -> State {
        let end = match done {
            Ok(()) if known.cancels => End::Cancelled,
            Ok(()) => End::Failed(self.reason),
            Err(error) => End::Failed(format!(
                "{}. The guest could not be started again here ({error}): 'cont' it",
                self.reason
            )),
        };
        State::restore(end, actions)
    }

    fn late(mut self, known: &mut Known, now: Instant, actions: &mut Vec<Action>) -> State {
        if let Some(mut poll) = self.poll.take() {
            let lasts = self.limit.lasts_at(now);
            if poll.lasts_at(now) {
                self.poll = Some(poll);
                return State::Failing(self);
            }
            if lasts {
                let ask = match self.step {
                    Step::RunAgain => Action::AskGuest,
                    _ => Action::AskMigration,
                };
                actions.push(ask);
                return State::Failing(self);
            }
        } else if self.limit.lasts_at(now) {
            return State::Failing(self);
        }
        match self.step {
            Step::HearQemu => self.heard(known, now, actions),
            Step::BreakOff => {
                actions.push(Action::EndSockets);
                self.end_migration(known, now, actions)
            }
            Step::EndMigration { .. } => {
                // QEMU's migration continues, for an unknown time.
                let end = match self.guest_never_ran {
                    true => self.reason,
                    false => stays_stopped(&self.reason),
                };
                State::restore(End::Failed(end), actions)
            }
            Step::HearOfGuest => self.roll_back(known, now, actions),
            Step::RunAgain | Step::Continue => {
                self.continued(Err("it does not answer".to_owned()), known, actions)
            }
        }
    }
}

fn stays_stopped(reason: &str) -> String {
    format!(
        "{reason}. The guest stays stopped here, because it may be running at the destination: \
         look there, and 'cont' here only if it is not"
    )
}

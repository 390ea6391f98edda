//! Every state gets every event.

use super::*;
use crate::{proto::error::MigrationError::PeerFailed, threads::Lost};

const HELPER: Peer = Peer { is_stock: false, stall_timeout: Duration::from_secs(60) };
const STOCK: Peer = Peer { is_stock: true, ..HELPER };

/// Makes an event; events can't be cloned.
type Make = fn() -> Event;

fn cut() -> MigrationError {
    FabricError::Closed.into()
}

fn lost() -> MigrationError {
    Lost::NotStarted { thread: "one of them" }.into()
}

fn early() -> MigrationError {
    MigrationError::Qemu("ended its migration stream early".into())
}

fn denied(guest_never_ran: bool) -> MigrationError {
    PeerFailed { text: "its QEMU failed".into(), guest_never_ran }
}

fn cancel() -> Event {
    Event::Order(Order::Cancel { reason: "cancelled".into() })
}

fn abort() -> Event {
    Event::Order(Order::Abort { reason: "told".into() })
}

/// A source, and its actions so far.
struct Run {
    source: Source,
    now: Instant,
    actions: Vec<Action>,
}

/// How it ended.
#[derive(Debug, PartialEq, Eq)]
enum End {
    Done,
    Failed { reason: String, guest_never_ran: bool },
}

impl Run {
    fn new() -> Self {
        Self { source: Source::default(), now: Instant::now(), actions: Vec::new() }
    }

    /// Return a run that streams to `peer`.
    fn streaming(peer: Peer) -> Self {
        let mut run = Self::new();
        run.tell(Event::Connected(peer, Agreed::default()));
        run.tell(Event::Sockets(Some(Sockets { channels: false })));
        assert!(run.did(|action| matches!(action, Action::StartStream)));
        run
    }

    /// The same after RAM.
    fn past_ram(peer: Peer) -> Self {
        let mut run = Self::streaming(peer);
        run.tell(Event::RamEnded);
        assert!(run.did(|action| matches!(action, Action::PassRam)));
        run
    }

    fn tell(&mut self, event: Event) {
        let source = std::mem::take(&mut self.source);
        self.source = source.handle(event, self.now, &mut self.actions);
    }

    fn did(&self, is_it: impl Fn(&Action) -> bool) -> bool {
        self.actions.iter().any(is_it)
    }

    /// Advance the time until it has ended, or waits for an event.
    fn wait(&mut self) {
        while !self.source.has_ended()
            && let Some(deadline) = self.source.poll_timeout()
        {
            self.now = self.now.max(deadline);
            self.tell(Event::Timeout);
        }
    }

    fn end(&self) -> Option<End> {
        let ends: Vec<_> = self
            .actions
            .iter()
            .filter_map(|action| match action {
                Action::ReportDone => Some(End::Done),
                Action::ReportFailed { reason, guest_never_ran, .. } => {
                    Some(End::Failed { reason: reason.clone(), guest_never_ran: *guest_never_ran })
                }
                _ => None,
            })
            .collect();
        assert!(ends.len() <= 1, "{ends:?}");
        assert_eq!(!ends.is_empty(), self.source.has_ended());
        ends.into_iter().next()
    }

    fn is_done(&self) -> bool {
        self.end() == Some(End::Done)
    }

    /// Return, if it failed, whether the guest certainly runs nowhere else.
    fn guest_never_ran(&self) -> Option<bool> {
        match self.end()? {
            End::Failed { guest_never_ran, .. } => Some(guest_never_ran),
            End::Done => None,
        }
    }
}

fn all_events() -> Vec<(&'static str, Make)> {
    vec![
        ("Abort", abort),
        ("Cancel", cancel),
        ("SetGuestRunning", || Event::Order(Order::SetGuestRunning { runs: false })),
        ("SetRateLimit", || Event::Order(Order::SetRateLimit { rate: None })),
        ("Finish", || Event::Order(Order::Finish)),
        ("RelayGone", || Event::RelayGone("gone".into())),
        ("SetRestore", || Event::Order(Order::SetRestore { commands: Vec::new() })),
        ("GuestBefore", || Event::GuestBefore("running".into())),
        ("Sockets", || Event::Sockets(None)),
        ("StreamTaken: ok", || Event::StreamTaken(Ok(()))),
        ("StreamTaken: cut", || Event::StreamTaken(Err(cut()))),
        ("StreamTaken: lost", || Event::StreamTaken(Err(lost()))),
        ("StreamTaken: QEMU", || Event::StreamTaken(Err(early()))),
        ("PeerFailed: told", || Event::PeerFailed(denied(false))),
        ("PeerFailed: lost", || Event::PeerFailed(lost())),
        ("PeerFailed: cut", || Event::PeerFailed(cut())),
        ("StreamRead", || Event::StreamRead),
        ("Timeout", || Event::Timeout),
    ]
}

/// Return the states that have a connection; one already waits for the verdict.
fn states(past_ram: bool) -> Vec<(&'static str, Run)> {
    let begun = || if past_ram { Run::past_ram(HELPER) } else { Run::streaming(HELPER) };
    let after = |event: Event| {
        let mut run = begun();
        run.tell(event);
        run
    };
    vec![
        ("streaming", begun()),
        ("confirming", after(Event::StreamTaken(Ok(())))),
        ("ending, cut", after(Event::PeerFailed(cut()))),
        ("ending, told", after(Event::StreamTaken(Err(early())))),
    ]
}

/// Look at each state with each event, followed by `then`, if the guest may run at the destination.
fn pairs(then: Make, look: impl Fn(&str, &Run)) {
    for (event_name, event) in all_events() {
        for (state_name, mut run) in states(true) {
            run.tell(event());
            run.tell(then());
            run.wait();
            look(&format!("{state_name}, {event_name}"), &run);
        }
    }
}

/// No state waits for the destination without a reason, or reports that the guest never ran when it
/// may have.
#[test]
fn no_state_waits_and_none_lies() {
    for past_ram in [false, true] {
        for (event_name, event) in all_events() {
            for (state_name, mut run) in states(past_ram) {
                run.tell(event());
                run.wait();
                let pair = format!("{state_name}, {event_name}, past RAM: {past_ram}");
                if let Some(guest_never_ran) = run.guest_never_ran() {
                    assert_eq!(guest_never_ran, !past_ram, "{pair}");
                }
                if !past_ram && state_name.starts_with("ending") {
                    assert!(run.end().is_some(), "{pair}");
                }
            }
        }
    }
}

/// An acknowledgement counts, whatever happened just before it.
#[test]
fn an_acknowledgement_is_never_lost() {
    pairs(
        || Event::Acknowledged,
        |pair, run| {
            // The destination has reported otherwise, or its time was over.
            let is_other = pair.ends_with("PeerFailed: told");
            assert!(run.is_done() || is_other, "{pair}");
        },
    );
}

/// The destination's report that its guest never ran counts too; the reason is the first one.
#[test]
fn that_the_guest_never_ran_is_never_lost() {
    let told = || Event::PeerFailed(denied(true));
    pairs(told, |pair, run| {
        let Some(End::Failed { reason, guest_never_ran }) = run.end() else { panic!("{pair}") };
        // The destination has reported otherwise.
        let is_ended = pair.starts_with("ending") && pair.ends_with("PeerFailed: told");
        assert!(guest_never_ran || is_ended, "{pair}");
        if pair == "streaming, Cancel" {
            assert_eq!(reason, "cancelled");
        }
        if pair == "ending, cut, SetRateLimit" {
            assert_eq!(reason, "its QEMU failed");
        }
    });
}

/// Only the destination knows where the guest runs: the source waits while the connection stands.
#[test]
fn what_fails_here_after_ram_waits_for_the_verdict() {
    let failures: [(bool, Make); 5] = [
        (false, || Event::StreamTaken(Err(early()))),
        (false, || Event::StreamTaken(Err(lost()))),
        (false, || Event::Sockets(None)),
        (false, cancel),
        (true, cancel),
    ];
    for (is_sent, event) in failures {
        let mut run = Run::past_ram(HELPER);
        if is_sent {
            run.tell(Event::StreamTaken(Ok(())));
        }
        run.tell(event());
        assert!(run.did(|action| matches!(action, Action::TellPeer(_))));
        let is_cancel = matches!(event(), Event::Order(_));
        assert_eq!(run.source.poll_timeout().is_some(), is_cancel);
        // The client need not wait forever.
        run.tell(cancel());
        assert!(run.source.poll_timeout().is_some());
        run.wait();
        assert_eq!(run.guest_never_ran(), Some(false));
    }
}

/// After RAM a helper that is told to exit, or loses its relay, finishes the migration.
#[test]
fn who_is_told_to_end_after_ram_goes_on() {
    for event in [abort, || Event::RelayGone("gone".into())] {
        let mut run = Run::past_ram(HELPER);
        run.tell(event());
        run.tell(Event::StreamTaken(Ok(())));
        run.tell(event());
        assert!(run.end().is_none() && run.source.poll_timeout().is_none());
        run.tell(Event::Acknowledged);
        assert!(run.is_done());
        // Before the end of RAM it fails, and sends nothing more.
        let mut run = Run::streaming(HELPER);
        run.tell(event());
        run.tell(Event::RamEnded);
        assert!(run.did(|action| matches!(action, Action::HoldRam)));
        run.wait();
        run.tell(Event::RamEnded);
        assert!(!run.did(|action| matches!(action, Action::PassRam)));
        assert_eq!(run.guest_never_ran(), Some(true));
    }
}

/// A stock destination closes when it has the guest, which QEMU reports on the return path before;
/// maybe before our QEMU's stream has ended, or before this thread knows that.
#[test]
fn a_stock_destination_that_closes_has_the_guest() {
    let end = |events: &[Make]| {
        let mut run = Run::past_ram(STOCK);
        events.iter().for_each(|event| run.tell(event()));
        run.wait();
        run.is_done()
    };
    let (closed, taken): (Make, Make) =
        (|| Event::PeerFailed(cut()), || Event::StreamTaken(Ok(())));
    let acknowledged: Make = || Event::Acknowledged;
    assert!(end(&[acknowledged]));
    assert!(end(&[closed, acknowledged]));
    assert!(end(&[closed, taken]));
    assert!(end(&[taken, closed]));
    // A destination without the whole stream has no guest.
    assert!(!end(&[closed, || Event::StreamTaken(Err(early()))]));
    assert!(!end(&[closed]));
}

/// An acknowledgement before the end of RAM is an error.
#[test]
fn nobody_confirms_what_was_not_sent() {
    let mut run = Run::streaming(HELPER);
    run.tell(Event::Acknowledged);
    run.wait();
    assert_eq!(run.guest_never_ran(), Some(true));
}

fn restore(commands: usize) -> Event {
    let command =
        Command { execute: "migrate-set-capabilities".into(), arguments: serde_json::Value::Null };
    Event::Order(Order::SetRestore { commands: vec![command; commands] })
}

fn is_take_over(action: &Action) -> bool {
    matches!(action, Action::TakeOver { .. })
}

/// If the relay dies while it restores QEMU's settings, the worker does, even before QEMU has
/// migrated.
#[test]
fn what_was_borrowed_concerns_the_relay() {
    for commands in [0, 1] {
        let mut run = Run::new();
        run.tell(restore(2));
        run.tell(restore(commands));
        run.tell(Event::NotConnected(cut()));
        assert!(run.source.has_ended());
        assert_eq!(run.source.is_closed(), commands == 0);
        if commands > 0 {
            run.tell(Event::RelayGone("gone".into()));
            assert!(run.source.is_closed() && run.did(is_take_over));
        }
    }
}

/// A guest that a client stopped after the failure is not resumed.
#[test]
fn orders_count_after_the_verdict() {
    let failed = || {
        let mut run = Run::streaming(HELPER);
        run.tell(Event::StreamTaken(Err(early())));
        run.tell(Event::StreamRead);
        run.wait();
        assert!(run.source.has_ended() && !run.source.is_closed());
        run
    };
    let mut run = failed();
    run.tell(Event::Order(Order::SetGuestRunning { runs: false }));
    run.tell(Event::RelayGone("gone".into()));
    assert!(run.source.is_closed());
    let runs = |action: &Action| matches!(action, Action::TakeOver { guest_runs: true, .. });
    assert!(run.did(is_take_over) && !run.did(runs));
    let mut run = failed();
    run.tell(Event::Order(Order::Finish));
    assert!(run.source.is_closed() && !run.did(is_take_over));
}

/// Whether the guest ran is in QEMU's stream; if that does not arrive, the guest is left as it is.
#[test]
fn what_the_guest_did_is_waited_for_when_the_relay_is_gone() {
    let said: [(Option<Make>, bool); 4] = [
        (Some(|| Event::GuestBefore("running".into())), true),
        (Some(|| Event::GuestBefore("paused".into())), false),
        (Some(|| Event::StreamRead), true),
        (None, false),
    ];
    for (event, expected) in said {
        let mut run = Run::streaming(HELPER);
        run.tell(Event::RelayGone("gone".into()));
        run.wait();
        assert!(run.did(|action| matches!(action, Action::EndQemu)));
        assert!(!run.did(is_take_over) && run.source.has_ended());
        match event {
            Some(event) => run.tell(event()),
            None => {
                while let Some(deadline) = run.source.poll_timeout() {
                    run.now = deadline;
                    run.tell(Event::Timeout);
                }
            }
        }
        assert!(run.source.is_closed());
        let runs = run.actions.iter().find_map(|action| match action {
            Action::TakeOver { guest_runs, .. } => Some(*guest_runs),
            _ => None,
        });
        assert_eq!(runs, Some(expected));
    }
}

/// The same before QEMU's stream: the destination has nothing, so its guest never ran.
#[test]
fn no_state_waits_and_none_lies_before_the_stream() {
    for agreed in [false, true] {
        for (name, event) in all_events() {
            let mut run = Run::new();
            if agreed {
                run.tell(Event::Connected(HELPER, Agreed::default()));
            }
            run.tell(event());
            run.wait();
            if let Some(End::Failed { guest_never_ran, .. }) = run.end() {
                assert!(guest_never_ran, "{name}");
            }
            assert!(!run.is_done(), "{name}");
        }
    }
}

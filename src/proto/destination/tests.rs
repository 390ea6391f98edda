//! Every state gets every event.

use super::*;
use crate::{fabric::FabricError, threads::Lost};

const FIRST: Peer = Peer { number: 1, is_stock: false };
const SECOND: Peer = Peer { number: 2, is_stock: false };
const STOCK: Peer = Peer { number: 3, is_stock: true };

/// Makes an event; events can't be cloned.
type Make = fn() -> Event;

fn odd() -> MigrationError {
    MigrationError::Peer("it is odd".into())
}

fn qemu() -> MigrationError {
    MigrationError::Qemu("stopped to read".into())
}

fn completed() -> Event {
    Event::Order(Order::QemuCompleted)
}

fn failed(guest_never_ran: bool) -> Event {
    Event::Order(Order::QemuFailed { reason: "it failed".into(), guest_never_ran })
}

/// A destination, and its actions so far.
struct Run {
    destination: Destination,
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
        Self { destination: Destination::default(), now: Instant::now(), actions: Vec::new() }
    }

    /// Return a run that receives from `peer`, up to the end of RAM or beyond.
    fn receiving(peer: Peer, past_ram: bool) -> Self {
        let mut run = Self::new();
        run.tell(Event::Agreed(peer));
        run.tell(Event::Begun(peer));
        if past_ram {
            run.tell(Event::RamEnded);
            assert!(run.did(|action| matches!(action, Action::PassRam)));
        }
        run
    }

    fn tell(&mut self, event: Event) {
        let destination = std::mem::take(&mut self.destination);
        self.destination = destination.handle(event, self.now, &mut self.actions);
    }

    fn did(&self, is_it: impl Fn(&Action) -> bool) -> bool {
        self.actions.iter().any(is_it)
    }

    fn acknowledges(&self) -> bool {
        self.did(|action| matches!(action, Action::SendFinalAck(_)))
    }

    /// Advance the time until it has ended, or waits for an event.
    fn wait(&mut self) {
        while let Some(deadline) = self.destination.poll_timeout() {
            self.now = self.now.max(deadline);
            self.tell(Event::Timeout);
        }
    }

    fn end(&self) -> Option<End> {
        let end = self.actions.iter().find_map(|action| match action {
            Action::ReportDone => Some(End::Done),
            Action::ReportFailed { reason, guest_never_ran, .. } => {
                Some(End::Failed { reason: reason.clone(), guest_never_ran: *guest_never_ran })
            }
            _ => None,
        });
        assert_eq!(end.is_some(), self.destination.is_closed());
        end
    }

    fn is_done(&self) -> bool {
        self.end() == Some(End::Done)
    }
}

/// Return every state that has a source.
fn states(past_ram: bool) -> Vec<(&'static str, Run)> {
    let after = |events: Vec<Event>| {
        let mut run = Run::receiving(FIRST, past_ram);
        events.into_iter().for_each(|event| run.tell(event));
        run
    };
    let mut states = vec![
        ("receiving", after(Vec::new())),
        ("loading", after(vec![Event::StreamEnded])),
        ("judging", after(vec![Event::QemuLeft(qemu())])),
        ("judging for some time", after(vec![Event::Served(Err(qemu()))])),
    ];
    if past_ram {
        states.push(("the relay is lost", after(vec![Event::RelayGone(None)])));
    }
    states
}

/// Return the states after QEMU's `completed`.
fn completed_states() -> Vec<(&'static str, Run)> {
    let after = |event: Option<Event>| {
        let mut run = Run::receiving(FIRST, true);
        run.tell(completed());
        event.into_iter().for_each(|event| run.tell(event));
        run
    };
    vec![("completed", after(None)), ("telling", after(Some(Event::StreamEnded)))]
}

/// Return every event that may come after a source has begun.
fn all_events() -> Vec<(&'static str, Make)> {
    vec![
        ("QemuCompleted", completed),
        ("QemuFailed", || failed(false)),
        ("Abort", || Event::Order(Order::Abort { reason: "told".into() })),
        ("RelayGone", || Event::RelayGone(None)),
        ("orders lost", || {
            Event::RelayGone(Some(Lost::NotStarted { thread: "orders" }.to_string()))
        }),
        ("RamEnded", || Event::RamEnded),
        ("StreamEnded", || Event::StreamEnded),
        ("QemuLeft", || Event::QemuLeft(qemu())),
        ("Served: ok", || Event::Served(Ok(()))),
        ("Served: peer", || Event::Served(Err(odd()))),
        ("Served: QEMU", || Event::Served(Err(qemu()))),
        ("Closed", || Event::Closed),
        ("Failed", || Event::Failed(odd())),
        ("ReturnPathLost", || Event::ReturnPathLost(odd())),
        ("QemuClosed", || Event::QemuClosed),
        ("Told: ok", || Event::Told(Ok(()))),
        ("Told: peer", || Event::Told(Err(odd()))),
        ("Timeout", || Event::Timeout),
    ]
}

/// No state reports that the guest never ran when QEMU may have it.
#[test]
fn none_lies() {
    for past_ram in [false, true] {
        for (event_name, event) in all_events() {
            for (state_name, mut run) in states(past_ram) {
                run.tell(event());
                run.wait();
                let pair = format!("{state_name}, {event_name}, past RAM: {past_ram}");
                if let Some(End::Failed { guest_never_ran, .. }) = run.end() {
                    assert!(!(guest_never_ran && past_ram), "{pair}");
                    // The bytes after RAM do not get to QEMU any more.
                    run.actions.clear();
                    run.tell(Event::RamEnded);
                    assert!(run.did(|action| matches!(action, Action::HoldRam)), "{pair}");
                }
            }
        }
    }
}

/// Whenever QEMU completes, and whatever happens then, the guest is here.
#[test]
fn what_qemu_has_completed_stays_so() {
    for (name, mut run) in states(true).into_iter().filter(|(name, _)| *name != "the relay is lost")
    {
        run.tell(completed());
        run.tell(Event::StreamEnded);
        assert!(run.acknowledges(), "{name}");
    }
    for (event_name, event) in all_events() {
        for (state_name, mut run) in completed_states() {
            run.tell(event());
            run.wait();
            let failed = matches!(run.end(), Some(End::Failed { .. }));
            assert!(!failed, "{state_name}, {event_name}");
        }
    }
}

/// The source waits for QEMU's verdict, even if it has failed itself.
#[test]
fn the_source_hears_qemus_verdict_whatever_has_failed() {
    let gone = || MigrationError::PeerFailed { text: "no".into(), guest_never_ran: false };
    for error in [gone, odd, qemu, || FabricError::Closed.into()] {
        let mut run = Run::receiving(FIRST, true);
        run.tell(Event::StreamEnded);
        run.tell(Event::Served(Err(error())));
        assert!(run.end().is_none() && run.destination.poll_timeout().is_none());
        run.tell(failed(true));
        let Some(End::Failed { guest_never_ran: true, .. }) = run.end() else { panic!() };
        let told = run.actions.iter().find_map(|action| match action {
            Action::EndConnections { peers, error, guest_never_ran } => {
                Some((peers.clone(), error.to_string(), *guest_never_ran))
            }
            _ => None,
        });
        let (peers, _, guest_never_ran) = told.unwrap();
        assert!(peers == [FIRST] && guest_never_ran);
    }
}

/// A source that was told closes; a stopped one does so when it continues.
#[test]
fn a_source_that_is_told_is_waited_for() {
    let told = |peer| {
        let mut run = Run::receiving(peer, true);
        run.tell(Event::StreamEnded);
        run.tell(completed());
        assert!(run.end().is_none());
        run
    };
    let mut run = told(FIRST);
    assert!(run.acknowledges() && run.destination.poll_timeout().is_none());
    run.tell(Event::Closed);
    assert!(run.is_done());
    let mut run = told(STOCK);
    assert!(!run.acknowledges() && run.destination.poll_timeout().is_some());
    run.wait();
    assert!(run.is_done());
    let mut run = Run::receiving(STOCK, true);
    run.tell(completed());
    assert!(run.end().is_none() && run.destination.poll_timeout().is_none());
}

/// QEMU needs no more of the stream and completes; the source is told when it has sent all.
#[test]
fn the_source_is_told_when_it_listens() {
    let mut run = Run::receiving(FIRST, true);
    run.tell(Event::QemuLeft(qemu()));
    run.tell(completed());
    assert!(!run.acknowledges());
    run.tell(Event::StreamEnded);
    assert!(run.acknowledges());
    run.tell(Event::Told(Ok(())));
    assert!(run.end().is_none());
    run.tell(Event::Served(Ok(())));
    assert!(run.is_done());
}

/// Without its return path the source's QEMU never ends its stream.
#[test]
fn the_source_is_told_at_once_when_the_return_path_is_lost() {
    let mut run = Run::receiving(FIRST, true);
    run.tell(Event::ReturnPathLost(odd()));
    run.tell(completed());
    assert!(run.acknowledges());
}

/// Before a source has begun, whichever agrees or leaves, no guest runs here.
#[test]
fn none_lies_before_a_source() {
    let mut ends = 0;
    let sources: [(&str, Make); 2] =
        [("Agreed", || Event::Agreed(FIRST)), ("Withdrawn", || Event::Withdrawn(SECOND, None))];
    for agreed in [&[][..], &[FIRST], &[FIRST, SECOND]] {
        for (name, event) in all_events().into_iter().chain(sources) {
            let mut run = Run::new();
            agreed.iter().for_each(|peer| run.tell(Event::Agreed(*peer)));
            run.tell(event());
            run.wait();
            assert!(!run.is_done(), "{name}");
            if let Some(End::Failed { guest_never_ran, .. }) = run.end() {
                ends += 1;
                // The relay knows better than the worker.
                assert!(guest_never_ran || name == "QemuFailed", "{name}");
            }
        }
    }
    assert!(ends > 0);
}

/// As with QEMU itself, another source may never connect. But not while one is connected.
#[test]
fn it_ends_with_the_last_source_that_takes_leave() {
    let went = |peer| Event::Withdrawn(peer, Some("it was cancelled".into()));
    let mut run = Run::new();
    [FIRST, SECOND].into_iter().for_each(|peer| run.tell(Event::Agreed(peer)));
    run.tell(went(FIRST));
    assert!(run.end().is_none());
    run.tell(went(SECOND));
    let reason = "it was cancelled".to_owned();
    assert_eq!(run.end(), Some(End::Failed { reason, guest_never_ran: true }));
    let mut run = Run::new();
    run.tell(Event::Agreed(FIRST));
    run.tell(Event::Withdrawn(FIRST, None));
    assert!(run.end().is_none());
}

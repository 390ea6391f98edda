//! Every state meets every event.

use std::{sync::mpsc, time::Instant};

use super::*;
use crate::{fabric::FabricError, worker::idle_link};

fn context(past_ram: bool) -> (Context, Receiver<Event>) {
    let ((qemu, _), (socket, _)) = (UnixStream::pair().unwrap(), UnixStream::pair().unwrap());
    let (events, received) = mpsc::channel();
    let context = Context {
        qemu: Arc::new(qemu),
        reports: Arc::new(Reports::new(socket)),
        switchover: Arc::default(),
        listening: Handle::new(|| {}),
        sent: Cell::new(false),
        closed: Cell::new(false),
        mute: Cell::new(false),
        events,
    };
    assert!(!past_ram || context.switchover.try_commit());
    (context, received)
}

fn peer() -> MigrationError {
    MigrationError::Peer("it is odd".into())
}

fn qemu() -> MigrationError {
    MigrationError::Qemu("stopped to read".into())
}

/// Every state that has a source.
fn states(link: &Arc<Link>) -> Vec<(&'static str, Incoming)> {
    let judging = |patience| Incoming::Judging { link: link.clone(), error: peer(), patience };
    vec![
        ("receiving", Incoming::Receiving(link.clone())),
        ("loading", Incoming::Loading(link.clone())),
        ("judging", judging(None)),
        ("judging for some time", judging(patience_of(Duration::ZERO))),
        ("orphaned", Incoming::Orphaned(link.clone(), peer())),
    ]
}

/// Those behind QEMU's `completed`.
fn completed(link: &Arc<Link>) -> Vec<(&'static str, Incoming)> {
    vec![
        ("completed", Incoming::Completed(link.clone())),
        ("telling", Incoming::Telling(link.clone(), None)),
    ]
}

/// Every event that may come when a source has begun.
fn all_events() -> Vec<(&'static str, Event)> {
    let failed = Order::QemuFailed { reason: "it failed".into(), guest_never_ran: false };
    let lost = Lost::NotStarted { thread: "orders" };
    vec![
        ("QemuCompleted", Event::Order(Order::QemuCompleted)),
        ("QemuFailed", Event::Order(failed)),
        ("Abort", Event::Order(Order::Abort { reason: "told".into() })),
        ("RelayGone", Event::RelayGone(None)),
        ("orders lost", Event::RelayGone(Some(lost))),
        ("StreamEnded", Event::StreamEnded),
        ("QemuLeft", Event::QemuLeft(qemu())),
        ("Served: ok", Event::Served(Ok(()))),
        ("Served: peer", Event::Served(Err(peer()))),
        ("Served: QEMU", Event::Served(Err(qemu()))),
        ("Closed", Event::Closed),
        ("Failed", Event::Failed(peer())),
        ("ReturnPathLost", Event::ReturnPathLost(peer())),
        ("Told: ok", Event::Told(Ok(()))),
        ("Told: peer", Event::Told(Err(peer()))),
        ("Late", Event::Late),
    ]
}

/// All pairs, to a source that takes nothing: none waits for it, and none says that the guest never
/// ran when QEMU may have it.
#[test]
fn no_state_waits_and_none_lies() {
    for past_ram in [false, true] {
        let (link, _receiver) = idle_link::link();
        let count = states(&link).len();
        for state in 0..count {
            for event in 0..all_events().len() {
                let (context, _events) = context(past_ram);
                let (state_name, state) = states(&link).swap_remove(state);
                let (event_name, event) = all_events().swap_remove(event);
                let begun = Instant::now();
                let next = state.handle(event, &context);
                let pair = format!("{state_name}, {event_name}, past RAM: {past_ram}");
                assert!(begun.elapsed() < Duration::from_secs(1), "{pair}");
                if let Incoming::Ended(Outcome::Failed { guest_never_ran, .. }) = next {
                    assert!(!(guest_never_ran && past_ram), "{pair}");
                }
            }
        }
        link.close();
    }
}

/// Wherever it comes, and whatever comes then, the guest is here.
#[test]
fn what_qemu_has_completed_stays_so() {
    let (link, _receiver) = idle_link::link();
    for (name, state) in states(&link).into_iter().filter(|(name, _)| *name != "orphaned") {
        let (context, _events) = context(true);
        let next = state.handle(Event::Order(Order::QemuCompleted), &context);
        assert!(matches!(next, Incoming::Completed(_)), "{name}");
    }
    for state in 0..2 {
        for event in 0..all_events().len() {
            let (context, _events) = context(true);
            let (state_name, state) = completed(&link).swap_remove(state);
            let (event_name, event) = all_events().swap_remove(event);
            let next = state.handle(event, &context);
            let failed = matches!(next, Incoming::Ended(Outcome::Failed { .. }));
            assert!(!failed, "{state_name}, {event_name}");
        }
    }
}

/// Which waits for it, also where it has failed itself.
#[test]
fn the_source_hears_qemus_verdict_whatever_has_failed() {
    let (link, _receiver) = idle_link::link();
    let gone = || MigrationError::PeerFailed { text: "no".into(), guest_never_ran: false };
    for error in [gone, peer, qemu, || FabricError::Closed.into()] {
        let (context, _events) = context(true);
        let state = Incoming::Loading(link.clone());
        let state = state.handle(Event::Served(Err(error())), &context);
        assert!(matches!(&state, Incoming::Judging { patience: None, .. }));
        let reason = "it failed".to_owned();
        let failed = Order::QemuFailed { reason, guest_never_ran: true };
        let state = state.handle(Event::Order(failed), &context);
        let Incoming::Ended(Outcome::Failed { error, guest_never_ran: true, links }) = state else {
            panic!()
        };
        assert!(matches!(error, MigrationError::Aborted(_)) && links.len() == 1);
    }
    link.close();
}

/// A source that knows closes, and one that is stopped does so when it goes on.
#[test]
fn a_source_that_is_told_is_waited_for() {
    let (link, _receiver) = idle_link::link();
    let (context, _events) = context(true);
    context.sent.set(true);
    let mut state = Incoming::confirm(link.clone(), &context);
    assert!(matches!(state, Incoming::Telling(..)) && state.patience().is_none());
    let state = state.handle(Event::Closed, &context);
    assert!(matches!(state, Incoming::Ended(Outcome::Done)));
    let (link, _receiver) = idle_link::stock();
    let mut state = Incoming::confirm(link, &self::context(true).0);
    assert!(matches!(state, Incoming::Completed(_)) && state.patience().is_none());
    context.closed.set(false);
    let (link, _receiver) = idle_link::stock();
    let mut state = Incoming::confirm(link, &context);
    assert!(matches!(state, Incoming::Telling(..)) && state.patience().is_some());
    let state = state.handle(Event::Late, &context);
    assert!(matches!(state, Incoming::Ended(Outcome::Done)));
}

/// QEMU needs no more of the stream and completes; the source hears that when it has sent all.
#[test]
fn the_source_is_told_when_it_listens() {
    let (link, _receiver) = idle_link::link();
    let (context, _events) = context(true);
    let state = Incoming::Receiving(link.clone());
    let state = state.handle(Event::QemuLeft(qemu()), &context);
    let state = state.handle(Event::Order(Order::QemuCompleted), &context);
    assert!(matches!(state, Incoming::Completed(_)));
    let state = state.handle(Event::StreamEnded, &context);
    assert!(matches!(state, Incoming::Telling(..)));
    let state = state.handle(Event::Told(Ok(())), &context);
    assert!(matches!(state, Incoming::Telling(..)));
    let state = state.handle(Event::Served(Ok(())), &context);
    assert!(matches!(state, Incoming::Ended(Outcome::Done)));
}

/// Without its return path the source's QEMU never ends its stream.
#[test]
fn the_source_is_told_at_once_when_the_return_path_is_lost() {
    let (link, _receiver) = idle_link::link();
    let (context, _events) = context(true);
    let state = Incoming::Receiving(link.clone());
    let state = state.handle(Event::ReturnPathLost(peer()), &context);
    let state = state.handle(Event::Order(Order::QemuCompleted), &context);
    assert!(matches!(state, Incoming::Telling(..)));
    link.close();
}

/// Before a source has begun, whoever agrees or goes: nobody is waited for, and no guest runs here.
#[test]
fn no_state_waits_and_none_lies_before_a_source() {
    let (first, _receiver) = idle_link::link();
    let (second, _receiver) = idle_link::link();
    let mut count = 0;
    for agreed in [vec![], vec![first.clone()], vec![first.clone(), second.clone()]] {
        let sources = || {
            let (link, gone) = (first.clone(), second.clone());
            [("Agreed", Event::Agreed(link)), ("Withdrawn", Event::Withdrawn(gone, None))]
        };
        for event in 0..all_events().len() + 2 {
            let (context, _events) = context(false);
            let (name, event) = all_events().into_iter().chain(sources()).nth(event).unwrap();
            let begun = Instant::now();
            let next = Incoming::Listening(agreed.clone()).handle(event, &context);
            assert!(begun.elapsed() < Duration::from_secs(1), "{name}");
            match next {
                Incoming::Listening(_) => {}
                Incoming::Ended(Outcome::Failed { guest_never_ran, .. }) => {
                    count += 1;
                    // The relay knows better than the worker.
                    assert!(guest_never_ran || name == "QemuFailed", "{name}");
                }
                _ => panic!("{name} leads elsewhere"),
            }
        }
        let (context, _events) = context(false);
        let next = Incoming::Listening(agreed).handle(Event::Begun(first.clone()), &context);
        assert!(matches!(next, Incoming::Receiving(link) if Arc::ptr_eq(&link, &first)));
    }
    assert!(count > 0);
    first.close();
    second.close();
}

/// As at QEMU's own: nobody knows whether another one will come. But not as long as one is there.
#[test]
fn it_ends_with_the_last_source_that_takes_leave() {
    let (first, _receiver) = idle_link::link();
    let (second, _receiver) = idle_link::link();
    let (context, _events) = context(false);
    let state = Incoming::Listening(vec![first.clone(), second.clone()]);
    let went = |link: &Arc<Link>| Event::Withdrawn(link.clone(), Some("it was cancelled".into()));
    let state = state.handle(went(&first), &context);
    assert!(matches!(&state, Incoming::Listening(agreed) if agreed.len() == 1));
    let state = state.handle(went(&second), &context);
    let Incoming::Ended(Outcome::Failed { error, guest_never_ran: true, .. }) = state else {
        panic!("it goes on")
    };
    assert_eq!(error.to_string(), "it was cancelled");
    let state = Incoming::Listening(vec![first.clone()]);
    let made_room = state.handle(Event::Withdrawn(first.clone(), None), &context);
    assert!(matches!(made_room, Incoming::Listening(agreed) if agreed.is_empty()));
    first.close();
    second.close();
}
